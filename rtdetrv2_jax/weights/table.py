"""THE TABLE: every number of a model, by our name, by Hugging Face's, and by the authors'.

One row a tensor, generated from the configuration and read both ways: from a file to a model, and back. The Hugging
Face names are those on disk (transformers 5 shows some of them under other names in memory; `canonical` undoes that).
"""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from rtdetrv2_jax.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig

Layout = Literal["same", "conv", "linear", "count"]
"""How a tensor lies in a PyTorch file: as ours; a kernel OIHW, ours HWIO; a matrix (out, in), ours (in, out); a counter
that is int64 there and int32 here."""


class Row(NamedTuple):
    """One tensor. `third` is the part (0, 1, 2) of it where the authors stack queries, keys and values in one.

    `optional` tensors may be missing in a file: the model's own initial value is right for them.
    """

    ours: str
    hugging_face: str
    authors: str
    layout: Layout = "same"
    third: int | None = None
    optional: bool = False


def rows(config: ModelConfig) -> list[Row]:
    """Every tensor of a model of this configuration, in the order the data meets them."""
    return [
        *_backbone(config.backbone),
        *_encoder(config.encoder),
        *_selection(config.decoder),
        *_decoder(config.decoder),
    ]


DROPPED = (
    (r"decoder\.(anchors|valid_mask)", "anchors are computed from the size of the input"),
    (r"encoder\.pos_embed\d+", "the positional code is computed from the size of the input"),
    (r".*\.num_batches_tracked", "frozen statistics count no batches"),
    (r"(model|decoder)\.denoising_class_embed\.weight", "the configuration has no denoising queries"),
)
"""Keys that a file may hold and a model does without, each with the reason."""


def canonical(key: str) -> str:
    """The name on disk, in published files, of a Hugging Face key in any of its namings."""
    for pattern, name in _RENAMED:
        key = pattern.sub(name, key)
    return key


_RENAMED = (
    (re.compile(r"^(class_embed|bbox_embed)\."), r"model.decoder.\1."),
    (re.compile(r"^model\.encoder\.aifi\."), "model.encoder.encoder."),
    (re.compile(r"\.self_attn\.o_proj\."), ".self_attn.out_proj."),
    (re.compile(r"\.mlp\.(fc[12])\."), r".\1."),
)


def _backbone(config: BackboneConfig) -> Iterator[Row]:
    frozen = config.batch_norm == "frozen"

    def conv_norm(ours: str, hugging_face: str, authors: str) -> Iterator[Row]:
        yield Row(f"{ours}.conv.kernel", f"{hugging_face}.convolution.weight", f"{authors}.conv.weight", "conv")
        yield from _batch_norm(f"{ours}.norm", f"{hugging_face}.normalization", f"{authors}.norm", frozen=frozen)

    root = "model.backbone.model"
    for index in range(3):
        yield from conv_norm(
            f"backbone.stem.{index}", f"{root}.embedder.embedder.{index}", f"backbone.conv1.conv1_{index + 1}"
        )
    layers = ("branch2a", "branch2b", "branch2c")[: 2 if config.block == "basic" else 3]
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            ours = f"backbone.stages.{stage}.{block}"
            hugging_face = f"{root}.encoder.stages.{stage}.layers.{block}"
            authors = f"backbone.res_layers.{stage}.blocks.{block}"
            for index, branch in enumerate(layers):
                yield from conv_norm(f"{ours}.layers.{index}", f"{hugging_face}.layer.{index}", f"{authors}.{branch}")
            if block == 0:
                # Behind an average pool the convolution is the second of two in both references.
                behind_pool = ("", "") if stage == 0 else (".1", ".conv")
                yield from conv_norm(
                    f"{ours}.shortcut.projection",
                    f"{hugging_face}.shortcut{behind_pool[0]}",
                    f"{authors}.short{behind_pool[1]}",
                )


def _encoder(config: EncoderConfig) -> Iterator[Row]:
    for level in range(3):
        name = f"encoder.input_proj.{level}"
        yield from _projection(f"encoder.projections.{level}", f"model.encoder_input_proj.{level}", name)
    for index in range(len(config.attention_levels)):
        for layer in range(config.layers):
            ours, theirs = f"encoder.attention.{index}.layers.{layer}", f"encoder.encoder.{index}.layers.{layer}"
            yield from _self_attention(f"{ours}.attention", f"model.{theirs}.self_attn", f"{theirs}.self_attn")
            for name, hugging_face, authors in (
                ("attention_norm", "self_attn_layer_norm", "norm1"),
                ("output_norm", "final_layer_norm", "norm2"),
            ):
                yield from _layer_norm(f"{ours}.{name}", f"model.{theirs}.{hugging_face}", f"{theirs}.{authors}")
            yield from _perceptron(ours, f"model.{theirs}", theirs)

    def conv_norm(ours: str, theirs: str) -> Iterator[Row]:
        yield Row(f"{ours}.conv.kernel", f"model.{theirs}.conv.weight", f"{theirs}.conv.weight", "conv")
        yield from _batch_norm(f"{ours}.norm", f"model.{theirs}.norm", f"{theirs}.norm", frozen=False)

    narrowed = int(config.width * config.expansion) != config.width
    for index in range(2):
        yield from conv_norm(f"encoder.laterals.{index}", f"encoder.lateral_convs.{index}")
        yield from conv_norm(f"encoder.downsamples.{index}", f"encoder.downsample_convs.{index}")
        for path, blocks in (("top_down", "fpn_blocks"), ("bottom_up", "pan_blocks")):
            ours, theirs = f"encoder.{path}.{index}", f"encoder.{blocks}.{index}"
            yield from conv_norm(f"{ours}.deep", f"{theirs}.conv1")
            yield from conv_norm(f"{ours}.shallow", f"{theirs}.conv2")
            if narrowed:
                yield from conv_norm(f"{ours}.output", f"{theirs}.conv3")
            for block in range(3):
                yield from conv_norm(f"{ours}.blocks.{block}.wide", f"{theirs}.bottlenecks.{block}.conv1")
                yield from conv_norm(f"{ours}.blocks.{block}.narrow", f"{theirs}.bottlenecks.{block}.conv2")


def _selection(config: DecoderConfig) -> Iterator[Row]:
    for level in range(len(config.points)):
        name = f"decoder.input_proj.{level}"
        yield from _projection(f"memory.projections.{level}", f"model.decoder_input_proj.{level}", name)
    yield from _linear("selection.output", "model.enc_output.0", "decoder.enc_output.proj")
    yield from _layer_norm("selection.output_norm", "model.enc_output.1", "decoder.enc_output.norm")
    yield from _linear("selection.class_head", "model.enc_score_head", "decoder.enc_score_head")
    yield from _mlp("selection.box_head", "model.enc_bbox_head", "decoder.enc_bbox_head", layers=3)
    if config.denoising:
        embedding = "denoising_class_embed.weight"
        yield Row("denoising.table", f"model.{embedding}", f"decoder.{embedding}")


def _decoder(config: DecoderConfig) -> Iterator[Row]:
    yield from _mlp("decoder.positions", "model.decoder.query_pos_head", "decoder.query_pos_head", layers=2)
    for layer in range(config.layers):
        ours, hugging_face = f"decoder.layers.{layer}", f"model.decoder.layers.{layer}"
        authors = f"decoder.decoder.layers.{layer}"
        yield from _self_attention(f"{ours}.self_attention", f"{hugging_face}.self_attn", f"{authors}.self_attn")
        cross, hf_cross, authors_cross = (
            f"{ours}.cross_attention",
            f"{hugging_face}.encoder_attn",
            f"{authors}.cross_attn",
        )
        yield Row(
            f"{cross}.point_scale", f"{hf_cross}.n_points_scale", f"{authors_cross}.num_points_scale", optional=True
        )
        for name, theirs in (
            ("offsets", "sampling_offsets"),
            ("weights", "attention_weights"),
            ("value", "value_proj"),
            ("output", "output_proj"),
        ):
            yield from _linear(f"{cross}.{name}", f"{hf_cross}.{theirs}", f"{authors_cross}.{theirs}")
        for number, (name, theirs) in enumerate(
            (
                ("self_attention_norm", "self_attn_layer_norm"),
                ("cross_attention_norm", "encoder_attn_layer_norm"),
                ("output_norm", "final_layer_norm"),
            ),
            start=1,
        ):
            yield from _layer_norm(f"{ours}.{name}", f"{hugging_face}.{theirs}", f"{authors}.norm{number}")
        yield from _perceptron(ours, hugging_face, authors)
        yield from _linear(
            f"decoder.class_heads.{layer}", f"model.decoder.class_embed.{layer}", f"decoder.dec_score_head.{layer}"
        )
        yield from _mlp(
            f"decoder.box_heads.{layer}",
            f"model.decoder.bbox_embed.{layer}",
            f"decoder.dec_bbox_head.{layer}",
            layers=3,
        )


def _linear(ours: str, hugging_face: str, authors: str) -> Iterator[Row]:
    yield Row(f"{ours}.kernel", f"{hugging_face}.weight", f"{authors}.weight", "linear")
    yield Row(f"{ours}.bias", f"{hugging_face}.bias", f"{authors}.bias")


def _mlp(ours: str, hugging_face: str, authors: str, *, layers: int) -> Iterator[Row]:
    for index in range(layers):
        tail = f"layers.{index}"
        yield from _linear(f"{ours}.{tail}", f"{hugging_face}.{tail}", f"{authors}.{tail}")


def _perceptron(ours: str, hugging_face: str, authors: str) -> Iterator[Row]:
    yield from _linear(f"{ours}.expand", f"{hugging_face}.fc1", f"{authors}.linear1")
    yield from _linear(f"{ours}.contract", f"{hugging_face}.fc2", f"{authors}.linear2")


def _layer_norm(ours: str, hugging_face: str, authors: str) -> Iterator[Row]:
    for name, theirs in (("scale", "weight"), ("bias", "bias")):
        yield Row(f"{ours}.{name}", f"{hugging_face}.{theirs}", f"{authors}.{theirs}")


def _self_attention(ours: str, hugging_face: str, authors: str) -> Iterator[Row]:
    for third, (name, theirs) in enumerate((("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))):
        stacked = f"{authors}.in_proj_"
        yield Row(f"{ours}.{name}.kernel", f"{hugging_face}.{theirs}.weight", f"{stacked}weight", "linear", third)
        yield Row(f"{ours}.{name}.bias", f"{hugging_face}.{theirs}.bias", f"{stacked}bias", "same", third)
    yield from _linear(f"{ours}.output", f"{hugging_face}.out_proj", f"{authors}.out_proj")


def _projection(ours: str, hugging_face: str, authors: str) -> Iterator[Row]:
    yield Row(f"{ours}.conv.kernel", f"{hugging_face}.0.weight", f"{authors}.conv.weight", "conv")
    yield from _batch_norm(f"{ours}.norm", f"{hugging_face}.1", f"{authors}.norm", frozen=False)


def _batch_norm(ours: str, hugging_face: str, authors: str, *, frozen: bool) -> Iterator[Row]:
    for name, theirs in (
        ("scale", "weight"),
        ("bias", "bias"),
        ("mean", "running_mean"),
        ("variance", "running_var"),
    ):
        yield Row(f"{ours}.{name}", f"{hugging_face}.{theirs}", f"{authors}.{theirs}")
    if not frozen:
        counter = "num_batches_tracked"
        yield Row(f"{ours}.batches", f"{hugging_face}.{counter}", f"{authors}.{counter}", "count", optional=True)
