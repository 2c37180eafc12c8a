"""`config.json` in Hugging Face's form, both ways.

The form cannot say two things that a model may have: sampling points that differ between levels, and an answer before
the last decoder layer. Our own folders hold them under the key `rtdetrv2_jax`; a folder meant for transformers cannot.
"""

from collections.abc import Mapping
from typing import Any

from rtdetrv2_jax.config import BackboneConfig, ConfigError, DecoderConfig, EncoderConfig, ModelConfig, Sampling

EXTENSION = "rtdetrv2_jax"

# What transformers' classes take where a file is silent. Source: RTDetrV2Config, RTDetrResNetConfig (5.23).
_DEFAULTS = {
    "freeze_backbone_batch_norms": True,
    "layer_norm_eps": 1e-5,
    "batch_norm_eps": 1e-5,
    "encoder_hidden_dim": 256,
    "encoder_layers": 1,
    "encoder_ffn_dim": 1024,
    "encoder_attention_heads": 8,
    "encode_proj_layers": [2],
    "positional_encoding_temperature": 10000,
    "hidden_expansion": 1.0,
    "d_model": 256,
    "num_queries": 300,
    "decoder_ffn_dim": 1024,
    "decoder_n_points": 4,
    "decoder_layers": 6,
    "decoder_attention_heads": 8,
    "decoder_offset_scale": 0.5,
    "decoder_method": "default",
    "num_denoising": 100,
    "label_noise_ratio": 0.5,
    "box_noise_scale": 1.0,
}
_BACKBONE_DEFAULTS = {
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
}

_SAMPLING: dict[str, Sampling] = {"default": "bilinear", "discrete": "discrete"}

# What the network has built in. A file that says otherwise describes another network.
_FIXED = {
    "model_type": "rt_detr_v2",
    "encoder_activation_function": "gelu",
    "activation_function": "silu",
    "decoder_activation_function": "relu",
    "normalize_before": False,
    "num_feature_levels": 3,
    "decoder_n_levels": 3,
    "learn_initial_query": False,
    "eval_size": None,
    "use_timm_backbone": False,
}
_BACKBONE_FIXED = {
    "model_type": "rt_detr_resnet",
    "num_channels": 3,
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
    "out_indices": [2, 3, 4],
}

# What transformers wants in a file and the network does not depend on: sizes that follow from others, and the loss.
_LOSS = {
    "auxiliary_loss": True,
    "matcher_alpha": 0.25,
    "matcher_gamma": 2.0,
    "matcher_class_cost": 2.0,
    "matcher_bbox_cost": 5.0,
    "matcher_giou_cost": 2.0,
    "use_focal_loss": True,
    "focal_loss_alpha": 0.75,
    "focal_loss_gamma": 2.0,
    "weight_loss_vfl": 1.0,
    "weight_loss_bbox": 5.0,
    "weight_loss_giou": 2.0,
    "eos_coefficient": 1e-4,
}


def from_hugging_face(data: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a parsed `config.json` describes; fields that it lacks have Hugging Face's defaults.

    Raises:
        ConfigError: It describes another kind of model; every field that says so is listed.
    """
    backbone = data.get("backbone_config") or {}
    faults = _faults(data, _FIXED, "") + _faults(backbone, _BACKBONE_FIXED, "backbone_config.")
    if faults:
        raise ConfigError("config.json does not describe an RT-DETRv2 that this library has: " + "; ".join(faults))
    get = {key: default if data.get(key) is None else data[key] for key, default in _DEFAULTS.items()}
    inner = {
        key: default if backbone.get(key) is None else backbone[key] for key, default in _BACKBONE_DEFAULTS.items()
    }
    points, extension = get["decoder_n_points"], data.get(EXTENSION, {})
    sampling = _SAMPLING.get(get["decoder_method"])
    if sampling is None or inner["layer_type"] not in ("basic", "bottleneck"):
        raise ConfigError(
            f"config.json: decoder_method {get['decoder_method']!r} must be 'default' or 'discrete', and "
            f"backbone_config.layer_type {inner['layer_type']!r} 'basic' or 'bottleneck'"
        )
    return ModelConfig(
        backbone=BackboneConfig(
            block=inner["layer_type"],
            depths=tuple(inner["depths"]),
            stem_width=inner["embedding_size"],
            widths=tuple(inner["hidden_sizes"]),
            batch_norm="frozen" if get["freeze_backbone_batch_norms"] else "live",
        ),
        encoder=EncoderConfig(
            width=get["encoder_hidden_dim"],
            ffn_width=get["encoder_ffn_dim"],
            heads=get["encoder_attention_heads"],
            layers=get["encoder_layers"],
            attention_levels=tuple(get["encode_proj_layers"]) if get["encoder_layers"] else (),
            expansion=float(get["hidden_expansion"]),
            temperature=float(get["positional_encoding_temperature"]),
        ),
        decoder=DecoderConfig(
            width=get["d_model"],
            ffn_width=get["decoder_ffn_dim"],
            heads=get["decoder_attention_heads"],
            layers=get["decoder_layers"],
            inference_layers=extension.get("inference_layers", 0),
            queries=get["num_queries"],
            points=tuple(extension.get("points") or (points if isinstance(points, list) else [points] * 3)),
            sampling=sampling,
            offset_scale=float(get["decoder_offset_scale"]),
            denoising=get["num_denoising"],
            label_noise=float(get["label_noise_ratio"]),
            box_noise=float(get["box_noise_scale"]),
        ),
        class_names=_class_names(data),
        layer_norm_epsilon=float(get["layer_norm_eps"]),
        batch_norm_epsilon=float(get["batch_norm_eps"]),
    )


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """The content of a `config.json` that transformers loads.

    Raises:
        ConfigError: The form cannot say what the model is.
    """
    decoder, faults = config.decoder, []
    if len(set(decoder.points)) > 1:
        faults.append(f"it has one number of sampling points for all levels, not {decoder.points}")
    if not float(config.encoder.temperature).is_integer():
        faults.append(f"its positional_encoding_temperature is a whole number, not {config.encoder.temperature}")
    if decoder.inference_layers != decoder.layers:
        faults.append(
            f"it has no answer after decoder layer {decoder.inference_layers} of {decoder.layers}: "
            "drop the later layers first (`inference_layers_only`, or `--drop-unused-layers`)"
        )
    if faults:
        raise ConfigError("Hugging Face's config.json cannot say what this model is: " + "; ".join(faults))
    return _fields(config)


def to_ours(config: ModelConfig) -> dict[str, Any]:
    """The content of the `config.json` of a folder of ours: Hugging Face's form, and what that form lacks."""
    decoder, extension = config.decoder, {}
    if len(set(decoder.points)) > 1:
        extension["points"] = list(decoder.points)
    if decoder.inference_layers != decoder.layers:
        extension["inference_layers"] = decoder.inference_layers
    return _fields(config) | ({EXTENSION: extension} if extension else {})


def _fields(config: ModelConfig) -> dict[str, Any]:
    backbone, encoder, decoder = config.backbone, config.encoder, config.decoder
    temperature = float(encoder.temperature)
    return {
        **_FIXED,
        **_LOSS,
        "architectures": ["RTDetrV2ForObjectDetection"],
        "dtype": "float32",
        "backbone_config": {
            **_BACKBONE_FIXED,
            "embedding_size": backbone.stem_width,
            "hidden_sizes": list(backbone.widths),
            "depths": list(backbone.depths),
            "layer_type": backbone.block,
            "out_features": ["stage2", "stage3", "stage4"],
        },
        "freeze_backbone_batch_norms": backbone.batch_norm == "frozen",
        "layer_norm_eps": config.layer_norm_epsilon,
        "batch_norm_eps": config.batch_norm_epsilon,
        "encoder_hidden_dim": encoder.width,
        "encoder_in_channels": list(backbone.widths[1:]),
        "feat_strides": [8, 16, 32],
        "encoder_layers": encoder.layers,
        "encoder_ffn_dim": encoder.ffn_width,
        "encoder_attention_heads": encoder.heads,
        "encode_proj_layers": list(encoder.attention_levels),
        # transformers checks the types of a file: this one must be a whole number.
        "positional_encoding_temperature": int(temperature) if temperature.is_integer() else temperature,
        "hidden_expansion": encoder.expansion,
        "d_model": decoder.width,
        "num_queries": decoder.queries,
        "decoder_in_channels": [encoder.width] * 3,
        "decoder_ffn_dim": decoder.ffn_width,
        "decoder_n_points": decoder.points[0],
        "decoder_layers": decoder.layers,
        "decoder_attention_heads": decoder.heads,
        "decoder_offset_scale": decoder.offset_scale,
        "decoder_method": "default" if decoder.sampling == "bilinear" else "discrete",
        "num_denoising": decoder.denoising,
        "label_noise_ratio": decoder.label_noise,
        "box_noise_scale": decoder.box_noise,
        "id2label": {str(label): name for label, name in enumerate(config.class_names)},
        "label2id": {name: label for label, name in enumerate(config.class_names)},
    }


def _faults(data: Mapping[str, Any], fixed: Mapping[str, Any], prefix: str) -> list[str]:
    """The fields that say something else than the one thing they may; a missing one says nothing."""
    return [
        f"{prefix}{key} is {data[key]!r} where only {wanted!r} is known"
        for key, wanted in fixed.items()
        if key in data and data[key] != wanted and not (data[key] is None and key == "use_timm_backbone")
    ]


def _class_names(data: Mapping[str, Any]) -> tuple[str, ...]:
    names = data.get("id2label")
    if not names:
        return tuple(f"LABEL_{label}" for label in range(data.get("num_labels") or 2))
    by_label = {int(label): str(name) for label, name in names.items()}
    if sorted(by_label) != list(range(len(by_label))):
        raise ConfigError(
            f"config.json: the labels of id2label must be 0 to {len(by_label) - 1}, not {sorted(by_label)}"
        )
    return tuple(by_label[label] for label in range(len(by_label)))
