"""Files that are not what they should be, and folders that are no checkpoints."""

import numpy as np
import pytest
import safetensors.numpy

from rtdetrv2_jax.weights.files import read_json, read_tensors, replaced_checkpoint
from rtdetrv2_jax.weights.transfer import WeightsError


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    refused = pytest.raises(FileExistsError, match=r"not a checkpoint folder \(it holds diary\.txt\)")
    with refused, replaced_checkpoint(tmp_path):
        pass
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
