"""What goes wrong is said in one message, and leaves what was there as it was."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from rtdetrv2_jax import replacing
from rtdetrv2_jax.weights import load
from rtdetrv2_jax.weights.load import load_pretrained, save_model
from rtdetrv2_jax.weights.transfer import flat_state

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def copy(hf_folder, tmp_path) -> Path:
    """A Hugging Face folder to spoil."""
    return shutil.copytree(hf_folder, tmp_path / "copy")


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(convert, tmp_path, source, *arguments) -> str:
    """The message of a run that must fail without a trace."""
    before = sorted(tmp_path.iterdir())
    done = convert(source, tmp_path / "new", *arguments)
    assert done.code == 1, done.out
    assert "error: " in done.err
    assert "Traceback" not in done.err
    assert sorted(tmp_path.iterdir()) == before
    return done.err


def test_nothing_of_that_name(convert, tmp_path):
    assert "no file or folder" in refused(convert, tmp_path, "no such thing")
    assert "there is no file" in refused(convert, tmp_path, "weights/best.pth")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", b"version https://git-lfs.github.com/spec/v1\n", b"{" * 100])
def test_a_file_that_is_no_checkpoint(convert, tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    message = refused(convert, tmp_path, tmp_path / "file")
    assert f"{len(content)} bytes" in message


def test_a_truncated_file(convert, copy, tmp_path):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "download complete" in refused(convert, tmp_path, copy)


def test_a_folder_without_weights_names_what_it_holds(convert, copy, tmp_path):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(convert, tmp_path, copy)


def test_another_kind_of_model(convert, copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "d_fine", "activation_function": "relu"}))
    message = refused(convert, tmp_path, copy)
    assert "d_fine" in message
    assert "activation_function" in message


def test_a_missing_key_a_key_too_many_and_a_wrong_shape_are_named_together(convert, copy, tmp_path):
    def change(tensors):
        del tensors["model.enc_output.0.bias"]
        tensors["model.decoder.layers.9.fc1.bias"] = np.zeros(3, np.float32)
        tensors["model.enc_score_head.bias"] = np.zeros(7, np.float32)

    edit(copy, change)
    message = refused(convert, tmp_path, copy)
    assert "missing: model.enc_output.0.bias (32,)" in message
    assert "left over: model.decoder.layers.9.fc1.bias (3,)" in message
    assert "shape: model.enc_score_head.bias is (7,)" in message


def test_weights_of_another_network(convert, tmp_path):
    save_file({"conv.weight": np.zeros(3, np.float32)}, tmp_path / "file.safetensors")
    assert "conv.weight" in refused(convert, tmp_path, tmp_path / "file.safetensors")


def test_hugging_face_weights_without_their_config(convert, copy, tmp_path):
    assert "--config" in refused(convert, tmp_path, copy / "model.safetensors")


def test_a_config_where_there_is_one(convert, copy, tmp_path):
    assert "config.json of its own" in refused(convert, tmp_path, copy, "--config", "r18vd")


def test_a_released_name_that_is_nearly_right(convert, copy, tmp_path):
    message = refused(convert, tmp_path, copy / "model.safetensors", "--config", "r50_m")
    assert "did you mean 'r50vd_m'" in message


def test_class_names_that_do_not_fit(convert, copy, tmp_path):
    names = tmp_path / "names.txt"
    for content, words in (("a\nb\n", "5 classes"), ("a\na\n", "twice"), ("\n", "no class name")):
        names.write_text(content)
        assert words in refused(convert, tmp_path, copy, "--classes", names)
    assert "none.txt: No such file" in refused(convert, tmp_path, copy, "--classes", tmp_path / "none.txt")


def test_a_destination_that_is_something_else(convert, hf_folder, tmp_path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").touch()
    (tmp_path / "file").write_text("text")
    for name, words in (("holiday", "photo.jpg"), ("file", "not even a folder")):
        done = convert(hf_folder, tmp_path / name)
        assert done.code == 1
        assert words in done.err
    assert (tmp_path / "holiday" / "photo.jpg").exists()
    assert (tmp_path / "file").read_text() == "text"


def test_a_file_is_not_replaced_by_what_is_made_of_it(convert, copy, tmp_path):
    done = convert(copy / "model.safetensors", copy, "--config", copy / "config.json")
    assert done.code == 1
    assert "name another folder" in done.err
    assert (copy / "model.safetensors").exists()


def test_wrong_usage_is_another_exit_code(capsys):
    wrong = (["--to", "onnx"], ["--image", "i.png"], ["--revision", "main"])
    for arguments in ([], ["a"], *([".", "b", *more] for more in wrong)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def fails_at_the_end(monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(replacing, "_flush", full)


def fails_within_orbax(monkeypatch):
    def full(folder, model):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 99 bytes to file 4: No space left on device")

    monkeypatch.setattr(load, "write_orbax", full)


def fails_before(monkeypatch):
    monkeypatch.setattr(replacing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1, 1))


@pytest.mark.parametrize("fault", [fails_at_the_end, fails_within_orbax, fails_before])
def test_a_full_disk_leaves_the_old_checkpoint(convert, hf_folder, copy, tmp_path, monkeypatch, fault):
    old = (copy / "model.safetensors").read_bytes()
    fault(monkeypatch)
    done = convert(hf_folder, copy)
    assert done.code == 1
    assert done.err.endswith(f"the disk is full: nothing at {copy} was changed; free some space and run again\n")
    assert (copy / "model.safetensors").read_bytes() == old
    assert list(tmp_path.iterdir()) == [copy]


def test_an_interruption_leaves_nothing_behind(convert, hf_folder, tmp_path, monkeypatch):
    def interrupt(folder, model):
        folder.joinpath("weights").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "write_orbax", interrupt)
    done = convert(hf_folder, tmp_path / "new")
    assert done.code == 130
    assert "as it was" in done.err
    assert not list(tmp_path.iterdir())


def test_a_kill_in_the_middle_of_writing_leaves_the_old_checkpoint(convert, hf_folder, small, tmp_path):
    """Killed where everything is written and nothing is yet in its place."""
    other = small.config.with_classes(("v", "w", "x", "y", "z"))
    save_model(load_pretrained(hf_folder).model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["id2label"]["0"] != other.class_names[0]
    script = (
        "import os, sys, time\n"
        "from convert.__main__ import main\n"
        "def wait(handle):\n"
        "    print('now', flush=True)\n"
        "    time.sleep(100)\n"
        "os.fsync = wait\n"
        "main(sys.argv[1:])\n"
    )
    (tmp_path / "names.txt").write_text("v\nw\nx\ny\nz\n")
    command = [sys.executable, "-c", script, hf_folder, tmp_path / "model", "--classes", tmp_path / "names.txt"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "now\n" for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.glob(".model.partial-*"))) == 1
    old = load_pretrained(tmp_path / "model").model
    assert old.config == small.config
    kept = flat_state(old)
    for path, value in flat_state(small).items():
        np.testing.assert_array_equal(value, kept[path])

    assert convert(hf_folder, tmp_path / "model", "--classes", tmp_path / "names.txt").code == 0
    assert load_pretrained(tmp_path / "model").model.config == other
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "names.txt"]
