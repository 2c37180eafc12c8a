"""Files and folders change at once or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtdetrv2_jax.replacing import replaced_file, replaced_folder


def write_folder(destination, text):
    with replaced_folder(destination) as partial:
        (partial / "text").write_text(text)


def write_file(destination, text):
    with replaced_file(destination) as partial:
        partial.write_text(text)


def text_of(place):
    return (place / "text" if place.is_dir() else place).read_text()


BOTH = pytest.mark.parametrize(
    ("replaced", "write"), [(replaced_file, write_file), (replaced_folder, write_folder)], ids=["file", "folder"]
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@BOTH
def test_it_is_made_and_replaced(tmp_path, replaced, write):
    for text in ("old", "new"):
        write(tmp_path / "run.v2", text)
        assert text_of(tmp_path / "run.v2") == text
        assert names(tmp_path) == ["run.v2"]


def test_a_folder_is_replaced_whole_and_made_at_any_depth(tmp_path):
    target = tmp_path / "deep" / "model"
    write_folder(target, "old")
    (target / "more").write_text("of the old one")
    write_folder(target, "new")
    assert names(target) == ["text"]


@BOTH
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_the_old_one_and_nothing_else(tmp_path, replaced, write, error):
    def half():
        with replaced(tmp_path / "model") as partial:
            (partial / "text" if partial.is_dir() else partial).write_text("half")
            raise error

    write(tmp_path / "model", "old")
    with pytest.raises(type(error)):
        half()
    assert text_of(tmp_path / "model") == "old"
    assert names(tmp_path) == ["model"]


@BOTH
def test_a_full_disk_is_said_to_be_full_and_changes_nothing(tmp_path, replaced, write):
    write(tmp_path / "model", "old")
    with (
        pytest.raises(OSError, match=r"the disk is full: nothing at .* was changed"),
        replaced(tmp_path / "model"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert text_of(tmp_path / "model") == "old"


@BOTH
@pytest.mark.parametrize("left", ["file", "folder"])
def test_what_a_kill_left_behind_is_cleared_away_by_the_next_write(tmp_path, replaced, write, left):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    stale = tmp_path / f".run.partial-{process.pid}.v2"
    if left == "file":
        stale.touch()
    else:
        stale.mkdir()
    write(tmp_path / "run.v2", "new")
    assert names(tmp_path) == ["run.v2"]


@BOTH
@pytest.mark.skipif(os.name != "posix", reason="elsewhere one process can't see whether another is there")
def test_what_another_process_is_writing_is_left_alone(tmp_path, replaced, write):
    other = tmp_path / f".model.partial-{os.getppid()}"
    other.mkdir()
    write(tmp_path / "model", "new")
    assert names(tmp_path) == [other.name, "model"]


@BOTH
def test_behind_a_link_what_it_points_to_is_replaced(tmp_path, replaced, write):
    write(tmp_path / "model", "old")
    (tmp_path / "link").symlink_to("model")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert text_of(tmp_path / "model") == "new"


def test_a_file_keeps_its_suffix_while_it_is_written(tmp_path):
    with replaced_file(tmp_path / "curves.png") as partial:
        assert partial.suffix == ".png"
        partial.touch()


@pytest.mark.skipif(os.name != "posix", reason="this system has no such devices")
def test_a_device_is_written_and_stays_one():
    write_file(Path(os.devnull), "gone")
    assert Path(os.devnull).is_char_device()
