"""Between files and models: every tensor once, to the bit, in every naming."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from rtdetrv2_jax.config import RELEASED, named
from rtdetrv2_jax.model.rtdetrv2 import abstract_model
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.weights.files import read_tensors
from rtdetrv2_jax.weights.infer import infer_config
from rtdetrv2_jax.weights.load import inference_layers_only, load_model, load_pretrained, save_model, with_classes
from rtdetrv2_jax.weights.table import rows
from rtdetrv2_jax.weights.transfer import WeightsError, flat_state, from_tensors, to_tensors
from rtdetrv2_jax.weights.untrained import untrained_model


@pytest.fixture(scope="module")
def config(tiny_config):
    """Like the small network, but one that Hugging Face's form can say."""
    decoder = dataclasses.replace(tiny_config.decoder, points=(2, 2, 2))
    return dataclasses.replace(tiny_config, decoder=decoder)


@pytest.fixture(scope="module")
def model(config):
    return untrained_model(config)


@pytest.fixture(scope="module")
def tensors(model):
    """The model's tensors; counters that are not zero show whether they survive."""
    tensors = to_tensors(model)
    for number, key in enumerate(key for key in tensors if key.endswith("num_batches_tracked")):
        tensors[key] = np.array(number, np.int64)
    return tensors


def authors(tensors, config):
    """The same tensors as the authors' repository names and stacks them."""
    stacked, named_by_authors = {}, {}
    for row in rows(config):
        if row.third is None:
            named_by_authors[row.authors] = tensors[row.hugging_face]
        else:
            stacked.setdefault(row.authors, [None] * 3)[row.third] = tensors[row.hugging_face]
    return named_by_authors | {key: np.concatenate(parts) for key, parts in stacked.items()}


def equal(one, other):
    one, other = flat_state(one), flat_state(other)
    assert one.keys() == other.keys()
    return all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", RELEASED)
def test_the_table_covers_every_number_of_every_released_model_once(name):
    table = rows(named(name))
    assert sorted(row.ours for row in table) == sorted(flat_state(abstract_model(named(name))))
    for column in ("ours", "hugging_face"):
        assert len({getattr(row, column) for row in table}) == len(table)


@pytest.mark.parametrize(("name", "count"), [("r18vd", 529), ("r34vd", 644), ("r50vd", 770), ("r101vd", 1025)])
def test_files_have_as_many_tensors_as_the_published_ones(name, count):
    backbone = dataclasses.replace(named(name).backbone, batch_norm="frozen")
    assert len(rows(dataclasses.replace(named(name), backbone=backbone))) == count


def test_a_round_trip_gives_every_tensor_back_to_the_bit(tensors, config):
    back = to_tensors(from_tensors(tensors, config).model)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype, key
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)


def test_every_naming_gives_the_same_model(tensors, config, model):
    new = {
        key.replace("self_attn.out_proj", "self_attn.o_proj")
        .replace(".fc1.", ".mlp.fc1.")
        .replace(".fc2.", ".mlp.fc2.")
        .replace("model.encoder.encoder.", "model.encoder.aifi."): tensor
        for key, tensor in tensors.items()
    }
    top = {
        key.removeprefix("model.decoder.") if "class_embed" in key or "bbox_embed" in key else key: tensor
        for key, tensor in tensors.items()
        if "denoising" not in key
    }
    top["model.denoising_class_embed.weight"] = tensors["model.denoising_class_embed.weight"]
    reference = from_tensors(tensors, config).model
    for renamed in (new, top, tensors | top, authors(tensors, config)):
        assert equal(from_tensors(renamed, config).model, reference)


def test_heads_stored_twice_with_different_numbers_are_an_error(tensors, config):
    key = "class_embed.0.bias"
    with pytest.raises(WeightsError, match=r"holds model.decoder.class_embed.0.bias twice"):
        from_tensors(tensors | {key: tensors[f"model.decoder.{key}"] + 1}, config)


def test_missing_extra_and_misshapen_tensors_are_all_listed(tensors, config):
    wrong = dict(tensors)
    del wrong["model.enc_score_head.bias"]
    wrong["model.surprise"] = np.zeros(3, np.float32)
    wrong["model.enc_output.1.bias"] = np.zeros(7, np.float32)
    with pytest.raises(WeightsError) as error:
        from_tensors(wrong, config)
    for said in ("3 of", "missing: model.enc_score_head.bias (5,)", "left over: model.surprise", "(7,) where"):
        assert said in str(error.value)


def test_tensors_of_something_else_are_named_as_such(config):
    with pytest.raises(WeightsError, match=r"not the weights of an RT-DETRv2.*first keys are: bert"):
        from_tensors({"bert.embeddings": np.zeros(3, np.float32)}, config)


def test_optional_tensors_may_be_missing_and_bookkeeping_is_dropped_with_a_reason(tensors, config):
    slim = {key: value for key, value in tensors.items() if "num_batches" not in key and "n_points_scale" not in key}
    frozen = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, batch_norm="frozen"))
    read = from_tensors(slim, config).model
    scale = read.decoder.layers[0].cross_attention.point_scale[...]
    np.testing.assert_array_equal(scale, np.full(6, 0.5, np.float32))
    dropped = from_tensors(tensors, frozen).dropped
    assert dropped
    assert set(dropped.values()) == {"frozen statistics count no batches"}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_read_as_their_float32_values(tensors, config, tmp_path, dtype):
    half = {key: value.astype(dtype) if value.dtype == np.float32 else value for key, value in tensors.items()}
    safetensors.numpy.save_file(half, tmp_path / "model.safetensors")
    wide = {key: value.astype(np.float32) if value.dtype == dtype else value for key, value in half.items()}
    assert equal(from_tensors(read_tensors(tmp_path), config).model, from_tensors(wide, config).model)


def test_sharded_files_are_read_as_one(tensors, tmp_path):
    keys, names = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {key: names[number % 2] for number, key in enumerate(keys)}
    for name in names:
        safetensors.numpy.save_file({key: tensors[key] for key in keys if where[key] == name}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    read = read_tensors(tmp_path)
    assert all(np.array_equal(read[key], tensors[key]) for key in keys)
    (tmp_path / names[1]).unlink()
    with pytest.raises(WeightsError, match=f"these are missing: {names[1]}"):
        read_tensors(tmp_path)


def test_the_authors_tensors_tell_the_configuration(tensors, config):
    inferred, assumed = infer_config(authors(tensors, config))
    decoder = dataclasses.replace(inferred.decoder, queries=config.decoder.queries)
    encoder = dataclasses.replace(inferred.encoder, heads=config.encoder.heads)
    names = {"class_names": config.class_names, "decoder": decoder, "encoder": encoder}
    assert inferred.class_names == tuple(f"class_{label}" for label in range(5))
    assert dataclasses.replace(inferred, **names) == config
    assert any("queries" in said for said in assumed)


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_saving_and_loading_gives_the_same_model(model, tmp_path, to):
    preprocessing = Preprocessing(size=(128, 160))
    save_model(model, tmp_path / "saved", preprocessing=preprocessing, to=to)
    read = load_pretrained(tmp_path / "saved")
    assert equal(read.model, model)
    assert (read.model.config, read.preprocessing) == (model.config, preprocessing)


def test_our_folder_keeps_what_hugging_faces_form_can_not_say(tiny_model, tmp_path):
    save_model(tiny_model, tmp_path / "saved")
    read, config = load_model(tmp_path / "saved")
    assert config == tiny_model.config
    assert equal(read, tiny_model)


def test_later_layers_can_be_dropped(config):
    early = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, inference_layers=1))
    slim = inference_layers_only(untrained_model(early))
    assert slim.config.decoder.layers == 1
    assert slim.denoising is not None
    assert to_tensors(slim).keys() < to_tensors(untrained_model(early)).keys()


def test_other_classes_keep_the_weights_of_the_names_they_share(model, caplog):
    with caplog.at_level(logging.WARNING):
        changed = with_classes(model, ("fox", "dog", "ant"))
    assert "2 of 3 classes keep the checkpoint's weights by name (dog, ant)" in caplog.text
    old, new = flat_state(model), flat_state(changed)
    for path in ("selection.class_head", "decoder.class_heads.0", "decoder.class_heads.1"):
        np.testing.assert_array_equal(new[f"{path}.kernel"][:, [1, 2]], old[f"{path}.kernel"][:, [3, 0]])
        np.testing.assert_array_equal(new[f"{path}.bias"][jnp.array([1, 2])], old[f"{path}.bias"][jnp.array([3, 0])])
        np.testing.assert_allclose(new[f"{path}.bias"][0], -4.5951199, rtol=1e-6)
    np.testing.assert_array_equal(new["denoising.table"][jnp.array([1, 2])], old["denoising.table"][jnp.array([3, 0])])
    untouched = [path for path in old if "class_head" not in path and path != "denoising.table"]
    assert all(np.array_equal(old[path], new[path]) for path in untouched)
    assert changed.config.class_names == ("fox", "dog", "ant")


def test_who_may_read_a_checkpoint_may_read_all_of_it(model, tmp_path):
    save_model(model, tmp_path / "saved", to="hf")
    assert len({file.stat().st_mode for file in (tmp_path / "saved").iterdir()}) == 1


def test_a_folded_model_can_not_be_saved(model, tmp_path):
    from rtdetrv2_jax.model.fuse import fuse

    with pytest.raises(WeightsError, match="inference form"):
        save_model(fuse(model), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_numbers_stay_on_the_default_device(model):
    assert {array.devices().pop() for array in jax.tree.leaves(model)} == {jax.devices()[0]}
