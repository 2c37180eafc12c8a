"""Configurations: their checks, their names, and `config.json` both ways."""

import dataclasses
import json

import pytest

from rtdetrv2_jax.config import RELEASED, BackboneConfig, ConfigError, DecoderConfig, EncoderConfig, ModelConfig, named
from rtdetrv2_jax.weights.config_json import from_hugging_face, to_hugging_face, to_ours


def through_json(fields):
    return json.loads(json.dumps(fields))


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_size_survives_our_config_json(name):
    assert from_hugging_face(through_json(to_ours(named(name)))) == named(name)


@pytest.mark.parametrize("name", [name for name in RELEASED if "_m" not in name])
def test_sizes_that_hugging_face_can_say_are_said_without_an_extension(name):
    fields = to_hugging_face(named(name))
    assert fields == to_ours(named(name))
    assert "rtdetrv2_jax" not in fields


def test_an_answer_before_the_last_layer_is_an_error_that_says_how_to_go_on():
    with pytest.raises(ConfigError, match=r"after decoder layer 3 of 6.*--drop-unused-layers"):
        to_hugging_face(named("r50vd_m"))
    assert to_hugging_face(named("r50vd_m").without_later_layers())["decoder_layers"] == 3


def test_points_that_differ_between_levels_are_an_error_for_hugging_face_and_kept_by_us(tiny_config):
    with pytest.raises(ConfigError, match=r"one number of sampling points for all levels, not \(2, 3, 1\)"):
        to_hugging_face(tiny_config)
    assert from_hugging_face(through_json(to_ours(tiny_config))) == tiny_config


def test_missing_fields_have_hugging_faces_defaults():
    config = from_hugging_face({"model_type": "rt_detr_v2", "backbone_config": {"layer_type": "basic"}})
    assert config.class_names == ("LABEL_0", "LABEL_1")
    assert config.backbone == BackboneConfig(block="basic", depths=(3, 4, 6, 3), widths=(256, 512, 1024, 2048))
    assert (config.encoder, config.decoder) == (EncoderConfig(), DecoderConfig())


def test_keys_of_older_files_are_tolerated():
    old = {"backbone": None, "backbone_kwargs": None, "use_timm_backbone": False, "use_pretrained_backbone": False}
    old |= {"disable_custom_kernels": True, "torch_dtype": "float32", "transformers_version": "4.49.0"}
    assert from_hugging_face(to_hugging_face(named("r18vd")) | old) == named("r18vd")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "d_fine"}, "model_type is 'd_fine' where only 'rt_detr_v2' is known"),
        ({"normalize_before": True}, "normalize_before is True"),
        (
            {"num_feature_levels": 4, "learn_initial_query": True},
            "num_feature_levels is 4.*learn_initial_query is True",
        ),
        ({"backbone_config": {"model_type": "hgnet_v2"}}, "backbone_config.model_type is 'hgnet_v2'"),
        ({"decoder_method": "nearest"}, "decoder_method 'nearest' must be 'default' or 'discrete'"),
        ({"id2label": {"1": "a", "2": "b"}}, r"labels of id2label must be 0 to 1, not \[1, 2\]"),
    ],
)
def test_other_models_are_refused_by_every_field_that_tells(fields, said):
    with pytest.raises(ConfigError, match=said):
        from_hugging_face(to_hugging_face(named("r18vd")) | fields)


def test_an_unknown_name_suggests_a_known_one():
    with pytest.raises(ConfigError, match="did you mean 'r18vd'"):
        named("r18")


@pytest.mark.parametrize(
    ("part", "field", "value", "said"),
    [
        (BackboneConfig, "depths", (1, 2), "four stages"),
        (BackboneConfig, "stem_width", 33, "stem_width must be even"),
        (EncoderConfig, "width", 100, "multiple of its 8 heads"),
        (EncoderConfig, "attention_levels", (3,), "among 0, 1 and 2"),
        (DecoderConfig, "inference_layers", 7, "between 1 and layers 6"),
        (DecoderConfig, "points", (4, 4), "three numbers"),
        (DecoderConfig, "queries", 0, "at least 1"),
    ],
)
def test_what_no_network_can_be_is_refused(part, field, value, said):
    with pytest.raises(ConfigError, match=said):
        part(**{field: value})


def test_configurations_can_be_keys():
    assert len({named("r18vd"), dataclasses.replace(named("r18vd")), ModelConfig()}) == 2
