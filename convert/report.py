"""What is printed about a checkpoint: a few lines that tell which model it is."""

import dataclasses
import shlex
from collections import defaultdict
from pathlib import Path

import jax
from flax import nnx

from rtdetrv2_jax.config import RELEASED, ModelConfig
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.weights.load import Format

from .source import Source

Line = tuple[str, str]
"""What a line is about, and what it says."""


def describe(source: Source) -> list[Line]:
    """The lines about what was read, what was left out and what was assumed."""
    config = source.model.config
    backbone, encoder, decoder = config.backbone, config.encoder, config.decoder
    attended = f"attention on level {_listed(encoder.attention_levels)}" if encoder.attention_levels else "no attention"
    answer = "" if decoder.inference_layers == decoder.layers else f", answers after layer {decoder.inference_layers}"
    lines = [
        ("source", f"{source.path} ({source.kind})"),
        ("architecture", architecture(config)),
        (
            "backbone",
            f"ResNet-vd, {backbone.block} blocks {_listed(backbone.depths)}, widths {_listed(backbone.widths)}, "
            f"stem {backbone.stem_width}, {backbone.batch_norm} batch norm",
        ),
        (
            "encoder",
            f"width {encoder.width}, {attended} ({encoder.heads} heads, hidden {encoder.ffn_width}), "
            f"expansion {encoder.expansion:g}",
        ),
        (
            "decoder",
            f"{decoder.layers} layers{answer}, width {decoder.width} ({decoder.heads} heads, hidden "
            f"{decoder.ffn_width}), {decoder.queries} queries, points {_listed(decoder.points)}, "
            f"{decoder.sampling} sampling",
        ),
        ("images", _images(source.preprocessing)),
        ("classes", f"{config.classes}: {_listed(config.class_names, most=6)}"),
        ("parameters", _parameters(source.model)),
    ]
    reasons = defaultdict(list)
    for key, reason in source.dropped.items():
        reasons[reason].append(key)
    lines += [("left out", f"{_listed(keys, most=2)} ({reason})") for reason, keys in reasons.items()]
    return lines + [("assumed", what) for what in source.assumed]


def written(destination: Path, to: Format) -> list[Line]:
    """The lines about what was written, and what it is good for now."""
    size = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    form = "the form of this library" if to == "orbax" else "Hugging Face's form, for transformers and for this library"
    return [
        ("written", f"{destination} ({size / 1e6:.1f} MB, {form})"),
        ("next", f"rtdetrv2 detect --model {shlex.quote(str(destination))} IMAGE"),
    ]


def architecture(config: ModelConfig) -> str:
    """The released model that a configuration is, or is nearest to and in what it differs; "custom" where it is far."""
    differences = {name: _differences(config, released) for name, released in RELEASED.items()}
    name = min(differences, key=lambda name: len(differences[name]))
    if not differences[name]:
        return name
    slim = [name for name, row in RELEASED.items() if not _differences(config, row.without_later_layers())]
    if slim:
        return f"{slim[0]}, without the decoder layers behind its answer"
    return f"like {name}, but {', '.join(differences[name])}" if len(differences[name]) <= 3 else "custom"


def _differences(config: ModelConfig, released: ModelConfig) -> list[str]:
    """Where two networks differ. Classes, and what only training looks at, are no difference of architecture."""
    found = []
    for part in ("backbone", "encoder", "decoder"):
        ours, theirs = (dataclasses.asdict(getattr(side, part)) for side in (config, released))
        for field in ours.keys() - {"batch_norm", "denoising", "label_noise", "box_noise"}:
            if ours[field] != theirs[field]:
                found.append(f"{part} {field} {_value(ours[field])} for {_value(theirs[field])}")
    for field in ("layer_norm_epsilon", "batch_norm_epsilon"):
        if getattr(config, field) != getattr(released, field):
            found.append(f"{field} {getattr(config, field)} for {getattr(released, field)}")
    return sorted(found)


def _parameters(model: RTDETRv2) -> str:
    trained = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    return f"{trained:,} ({size / 1e6:.1f} MB with the statistics of batch norms)"


def _images(preprocessing: Preprocessing) -> str:
    size = preprocessing.input_size
    fixed = "of a size that follows theirs" if size is None else f"{size[0]} x {size[1]} (height x width)"
    return f"{fixed}, resize {preprocessing.resize}, {'not ' if preprocessing.mean is None else ''}normalised"


def _listed(values: tuple | list, *, most: int = 8) -> str:
    more = f", ... ({len(values) - most} more)" if len(values) > most else ""
    return ", ".join(str(value) for value in values[:most]) + more


def _value(value: object) -> str:
    return _listed(value) if isinstance(value, tuple) else str(value)
