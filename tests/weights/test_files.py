"""Folders that change at once or not at all, and files that are not what they should be."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from rtdetrv2_jax.weights.files import read_json, read_tensors, replaced_folder
from rtdetrv2_jax.weights.transfer import WeightsError


def write(folder, text):
    with replaced_folder(folder) as partial:
        (partial / "config.json").write_text(text)


def test_a_folder_is_made_and_replaced_whole(tmp_path):
    target = tmp_path / "deep" / "model"
    write(target, "old")
    (target / "model.safetensors").write_text("of the old one")
    write(target, "new")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    def half():
        with replaced_folder(tmp_path / "model") as partial:
            (partial / "config.json").write_text("half")
            raise error

    write(tmp_path / "model", "old")
    with pytest.raises(type(error)):
        half()
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_said_to_be_full_and_changes_nothing(tmp_path):
    write(tmp_path / "model", "old")
    with (
        pytest.raises(OSError, match=r"the disk is full: nothing at .* was changed"),
        replaced_folder(tmp_path / "model"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_what_a_kill_left_behind_is_cleared_away_by_the_next_write(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    (tmp_path / f".model.partial-{process.pid}").mkdir()
    write(tmp_path / "model", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(os.name != "posix", reason="elsewhere one process can't see whether another is there")
def test_what_another_process_is_writing_is_left_alone(tmp_path):
    other = tmp_path / f".model.partial-{os.getppid()}"
    other.mkdir()
    write(tmp_path / "model", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "model"]


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(FileExistsError, match=r"not a checkpoint folder \(it holds diary\.txt\)"):
        write(tmp_path, "new")
    assert (tmp_path / "diary.txt").exists()


@pytest.mark.parametrize("size", [0, 5, 60])
def test_a_truncated_file_is_an_error_that_asks_for_the_whole(tmp_path, size):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(40, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match="is the download complete"):
        read_tensors(tmp_path)


def test_a_folder_without_weights_is_an_error_that_says_what_is_there(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"no model\.safetensors.*but: pytorch_model\.bin"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"), [(b"{", "not valid JSON"), (b"[]", "a list where an object"), (b"\xff", "not valid")]
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, content, said):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        read_json(tmp_path / "config.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        read_json(tmp_path / "config.json")
