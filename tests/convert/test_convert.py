"""What goes in comes out: every tensor to the bit, whatever form the source has."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.report import architecture
from rtdetrv2_jax.config import RELEASED
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.weights.config_json import to_hugging_face, to_ours
from rtdetrv2_jax.weights.load import load_pretrained, save_model
from rtdetrv2_jax.weights.table import rows
from rtdetrv2_jax.weights.transfer import flat_state, to_tensors

REPOSITORY = Path(__file__).parents[2]


def assert_same(ours, theirs):
    """Two models with the same numbers, to the bit."""
    ours, theirs = flat_state(ours), flat_state(theirs)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


def authors_tensors(model) -> dict[str, np.ndarray]:
    """The model's tensors as the authors name and stack them."""
    tensors, stacked = to_tensors(model), {}
    for row in rows(model.config):
        stacked.setdefault(row.authors, []).append(tensors[row.hugging_face])
    return {key: np.concatenate(parts) if len(parts) > 1 else parts[0] for key, parts in stacked.items()}


@pytest.fixture(scope="session")
def authors_file(small, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("authors") / "small.safetensors"
    extra = {"decoder.anchors": np.zeros((1, 5, 4), np.float32), "decoder.valid_mask": np.ones((1, 5, 1), bool)}
    save_file(authors_tensors(small) | extra, path)
    return path


def test_a_hugging_face_folder_comes_back_to_the_bit(hf_folder, small, tmp_path, convert):
    there = convert(hf_folder, tmp_path / "ours")
    back = convert(tmp_path / "ours", tmp_path / "back", "--to", "hf")
    assert there.code == back.code == 0, there.err + back.err
    before, after = (load_file(folder / "model.safetensors") for folder in (hf_folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        np.testing.assert_array_equal(tensor, after[key], strict=True, err_msg=key)
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads((hf_folder / name).read_text()) == json.loads((tmp_path / "back" / name).read_text())
    ours = load_pretrained(tmp_path / "ours")
    assert ours.model.config == small.config
    assert ours.preprocessing.size == (128, 96)


def test_it_says_what_it_read_and_how_to_go_on(hf_folder, tmp_path, convert):
    done = convert(hf_folder, tmp_path / "my model")
    assert "cat, dog, bird, fish, horse" in done.out
    assert re.search(r"parameters +[\d,]+ \(0\.\d MB", done.out)
    assert f"rtdetrv2 detect --model '{tmp_path / 'my model'}' IMAGE" in done.out
    assert "reading" in done.err
    assert "writing" in done.err


def test_the_authors_file_is_read_by_its_shapes_and_says_what_was_assumed(authors_file, small, tmp_path, convert):
    done = convert(authors_file, tmp_path / "ours")
    assert done.code == 0, done.err
    written = load_pretrained(tmp_path / "ours")
    assert_same(written.model, small)
    assert written.model.config.backbone == small.config.backbone
    assert written.preprocessing == Preprocessing()
    for words in ("assumed      300 queries", "bilinear", "anchors", "placeholders for the 5 class names"):
        assert words in done.out


def test_a_config_and_class_names_take_the_place_of_assumptions(authors_file, small, tmp_path, convert):
    (tmp_path / "config.json").write_text(json.dumps(to_ours(small.config)))
    (tmp_path / "names.txt").write_text("a\nb\nc\n\nd d\né\n", encoding="utf-8")
    arguments = ("--config", tmp_path / "config.json", "--classes", tmp_path / "names.txt")
    done = convert(authors_file, tmp_path / "ours", *arguments)
    assert done.code == 0, done.err
    assert "queries" not in done.out.split("assumed")[-1]
    config = load_pretrained(tmp_path / "ours").model.config
    assert config == small.config.with_classes(("a", "b", "c", "d d", "é"))


def test_shards_are_one_model(hf_folder, small, tmp_path, convert):
    tensors = load_file(hf_folder / "model.safetensors")
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    home = {key: names[index % 2] for index, key in enumerate(tensors)}
    source = tmp_path / "sharded"
    shutil.copytree(hf_folder, source)
    (source / "model.safetensors").unlink()
    for name in names:
        save_file({key: tensors[key] for key in tensors if home[key] == name}, source / name)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    assert convert(source, tmp_path / "ours").code == 0
    assert_same(load_pretrained(tmp_path / "ours").model, small)

    (source / names[1]).unlink()
    missing = convert(source, tmp_path / "ours")
    assert missing.code == 1
    assert names[1] in missing.err


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(hf_folder, tmp_path, convert, dtype):
    tensors = load_file(hf_folder / "model.safetensors")
    half = {key: tensor.astype(dtype) if tensor.dtype == np.float32 else tensor for key, tensor in tensors.items()}
    source = tmp_path / "half"
    shutil.copytree(hf_folder, source)
    save_file(half, source / "model.safetensors")
    assert convert(source, tmp_path / "whole", "--to", "hf").code == 0
    for key, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert tensor.dtype in (np.float32, np.int64)
        np.testing.assert_array_equal(tensor, half[key].astype(tensor.dtype), err_msg=key)


@pytest.mark.slow
def test_an_early_exit_needs_its_unused_layers_dropped_for_hugging_face(make_model, small, tmp_path, convert):
    decoder = dataclasses.replace(small.config.decoder, layers=3, inference_layers=2)
    model = make_model(dataclasses.replace(small.config, decoder=decoder))
    save_model(model, tmp_path / "early")
    refused = convert(tmp_path / "early", tmp_path / "hf", "--to", "hf")
    assert refused.code == 1
    assert "--drop-unused-layers" in refused.err
    assert not (tmp_path / "hf").exists()

    done = convert(tmp_path / "early", tmp_path / "hf", "--to", "hf", "--drop-unused-layers")
    assert done.code == 0, done.err
    assert "answers after layer 2" in done.out
    slim = load_pretrained(tmp_path / "hf").model
    assert slim.config == model.config.without_later_layers()
    kept = flat_state(model)
    for path, value in flat_state(slim).items():
        np.testing.assert_array_equal(value, kept[path])


@pytest.mark.slow
def test_points_that_differ_by_level_stay_in_folders_of_ours(make_model, small, tmp_path, convert):
    decoder = dataclasses.replace(small.config.decoder, points=(1, 3, 2))
    model = make_model(dataclasses.replace(small.config, decoder=decoder))
    save_model(model, tmp_path / "points")
    assert convert(tmp_path / "points", tmp_path / "again").code == 0
    assert load_pretrained(tmp_path / "again").model.config == model.config
    refused = convert(tmp_path / "points", tmp_path / "hf", "--to", "hf")
    assert refused.code == 1
    assert "--to orbax" in refused.err


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_folder_may_be_converted_in_its_place(hf_folder, small, tmp_path, convert, to):
    shutil.copytree(hf_folder, tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "model", "--to", to)
    assert done.code == 0, done.err
    assert (tmp_path / "model" / "model.safetensors").exists() == (to == "hf")
    assert_same(load_pretrained(tmp_path / "model").model, small)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_folder_stays_a_link(hf_folder, small, tmp_path, convert):
    shutil.copytree(hf_folder, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert convert(tmp_path / "link", tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "weights").is_dir()
    assert_same(load_pretrained(tmp_path / "link").model, small)


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_are_called_by_their_names(name):
    config = RELEASED[name].with_classes(("one", "two"))
    assert architecture(config) == name
    assert architecture(dataclasses.replace(config, batch_norm_epsilon=1e-3)).startswith(f"like {name}, but ")
    slim = architecture(config.without_later_layers())
    assert slim == (
        name if config == config.without_later_layers() else f"{name}, without the decoder layers behind its answer"
    )


def test_the_program_runs_from_a_checkout(hf_folder, small, tmp_path):
    command = [sys.executable, "-m", "convert", str(hf_folder), str(tmp_path / "ours")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert_same(load_pretrained(tmp_path / "ours").model, small)


def test_every_configuration_of_hugging_faces_form_has_the_types_that_transformers_checks():
    fields = to_hugging_face(RELEASED["r18vd"])
    assert type(fields["positional_encoding_temperature"]) is int
