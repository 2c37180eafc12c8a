"""The configuration of a checkpoint of the authors, read off its tensors: their files carry none."""

import dataclasses
import re
from typing import NamedTuple

import numpy as np

from rtdetrv2_jax.config import COCO_CLASS_NAMES, RELEASED, BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig
from rtdetrv2_jax.weights.transfer import Tensors, WeightsError


class Inferred(NamedTuple):
    """A configuration, and what of it the tensors do not tell and was assumed."""

    config: ModelConfig
    assumed: tuple[str, ...]


def infer_config(tensors: Tensors) -> Inferred:
    """The configuration that the shapes of the authors' tensors tell, with the published values where they are silent.

    The number of queries and the way of sampling leave no trace in a file, nor does an answer before the last decoder
    layer: that is assumed where the network is otherwise the medium ResNet-50 one.

    Raises:
        WeightsError: A tensor that every such checkpoint has is missing.
    """
    try:
        config = ModelConfig(
            backbone=_backbone(tensors),
            encoder=_encoder(tensors),
            decoder=_decoder(tensors),
            class_names=_class_names(tensors["decoder.enc_score_head.bias"].shape[0]),
        )
    except KeyError as missing:
        raise WeightsError(
            f"this checkpoint lacks {missing}: is it one of lyuwenyu/RT-DETR, rtdetrv2_pytorch, with a ResNet?"
        ) from None
    medium = RELEASED["r50vd_m"]
    if (config.backbone, config.encoder, config.decoder.layers) == (medium.backbone, medium.encoder, 6):
        early = dataclasses.replace(config.decoder, inference_layers=medium.decoder.inference_layers)
        config = dataclasses.replace(config, decoder=early)
    decoder = config.decoder
    assumed = (
        f"{decoder.queries} queries",
        f"{decoder.sampling} sampling",
        f"the answer after decoder layer {decoder.inference_layers} of {decoder.layers}",
        f"{config.encoder.heads} attention heads in the encoder",
    )
    return Inferred(config, assumed)


def _backbone(tensors: Tensors) -> BackboneConfig:
    root = "backbone.res_layers"
    bottleneck = f"{root}.0.blocks.0.branch2c.conv.weight" in tensors
    last = "branch2c" if bottleneck else "branch2b"
    return BackboneConfig(
        block="bottleneck" if bottleneck else "basic",
        depths=tuple(_count(tensors, rf"{re.escape(root)}\.{stage}\.blocks\.(\d+)\.") for stage in range(4)),
        stem_width=tensors["backbone.conv1.conv1_3.conv.weight"].shape[0],
        widths=tuple(tensors[f"{root}.{stage}.blocks.0.{last}.conv.weight"].shape[0] for stage in range(4)),
        batch_norm="live" if "backbone.conv1.conv1_1.norm.num_batches_tracked" in tensors else "frozen",
    )


def _encoder(tensors: Tensors) -> EncoderConfig:
    width = tensors["encoder.input_proj.0.conv.weight"].shape[0]
    attended = _count(tensors, r"encoder\.encoder\.(\d+)\.")
    return EncoderConfig(
        width=width,
        ffn_width=tensors["encoder.encoder.0.layers.0.linear1.bias"].shape[0],
        layers=_count(tensors, r"encoder\.encoder\.0\.layers\.(\d+)\."),
        attention_levels=tuple(range(3 - attended, 3)),
        expansion=tensors["encoder.fpn_blocks.0.conv1.conv.weight"].shape[0] / width,
    )


def _decoder(tensors: Tensors) -> DecoderConfig:
    cross = "decoder.decoder.layers.0.cross_attn"
    points = _points(tensors[f"{cross}.num_points_scale"])
    return DecoderConfig(
        width=tensors["decoder.input_proj.0.conv.weight"].shape[0],
        ffn_width=tensors["decoder.decoder.layers.0.linear1.bias"].shape[0],
        heads=tensors[f"{cross}.attention_weights.bias"].shape[0] // sum(points),
        layers=_count(tensors, r"decoder\.decoder\.layers\.(\d+)\."),
        points=points,
        denoising=100 if "decoder.denoising_class_embed.weight" in tensors else 0,
    )


def _points(scale: np.ndarray) -> tuple[int, ...]:
    """The points of each level, from the scale of each point, which is one over the number of its level."""
    points, index = [], 0
    while index < len(scale):
        points.append(round(1 / float(scale[index])))
        index += points[-1]
    return tuple(points)


def _class_names(count: int) -> tuple[str, ...]:
    return COCO_CLASS_NAMES if count == len(COCO_CLASS_NAMES) else tuple(f"class_{label}" for label in range(count))


def _count(tensors: Tensors, pattern: str) -> int:
    """How many different numbers the group of `pattern` takes over the keys."""
    return len({match.group(1) for key in tensors if (match := re.match(pattern, key))})
