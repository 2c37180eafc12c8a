"""What a model is: frozen configurations, and every released size as a named row."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Literal

BLOCKS_PER_DEPTH = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


Sampling = Literal["bilinear", "discrete"]


class ConfigError(ValueError):
    """A configuration that no model can have, or that a format cannot say."""


@dataclass(frozen=True)
class BackboneConfig:
    """ResNet-vd. `widths` are the channels that come out of the four stages; the last three feed the encoder.

    `batch_norm` is "frozen" where statistics and affine part are constants in training, "live" where they learn.
    """

    block: Literal["basic", "bottleneck"] = "bottleneck"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    stem_width: int = 64
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    batch_norm: Literal["frozen", "live"] = "frozen"

    def __post_init__(self) -> None:
        """Checks what the network takes for granted."""
        faults = []
        if len(self.depths) != 4 or len(self.widths) != 4:
            faults.append(
                f"a backbone has four stages: depths {self.depths} and widths {self.widths} need four numbers"
            )
        if self.stem_width % 2:
            faults.append(f"stem_width must be even (its first convolutions are half as wide), not {self.stem_width}")
        if self.block == "bottleneck" and any(width % 4 for width in self.widths):
            faults.append(f"a bottleneck narrows to a quarter: widths {self.widths} must be multiples of 4")
        _raise(faults)


@dataclass(frozen=True)
class EncoderConfig:
    """Hybrid encoder: self-attention inside single levels, convolutions between them.

    `attention_levels` are the pyramid levels (0 finest) that get `layers` transformer layers each; `expansion` is
    the hidden width of the fusion blocks as a share of `width`.
    """

    width: int = 256
    ffn_width: int = 1024
    heads: int = 8
    layers: int = 1
    attention_levels: tuple[int, ...] = (2,)
    expansion: float = 1.0
    temperature: float = 10000.0

    def __post_init__(self) -> None:
        """Checks what the network takes for granted."""
        faults = _width_faults("encoder", self.width, self.heads)
        if any(level not in (0, 1, 2) for level in self.attention_levels):
            faults.append(f"attention_levels must be among 0, 1 and 2, not {self.attention_levels}")
        _raise(faults)


@dataclass(frozen=True)
class DecoderConfig:
    """Query selection and decoder.

    `points` are the sampling points of a head on each level. `inference_layers` is how many of `layers` run at
    inference (the medium ResNet-50 model trains six and answers after the third). `denoising`, `label_noise` and
    `box_noise` shape the denoising queries of training; without denoising (0) the model has no label embedding.
    """

    width: int = 256
    ffn_width: int = 1024
    heads: int = 8
    layers: int = 6
    inference_layers: int = 0
    queries: int = 300
    points: tuple[int, ...] = (4, 4, 4)
    sampling: Sampling = "bilinear"
    offset_scale: float = 0.5
    denoising: int = 100
    label_noise: float = 0.5
    box_noise: float = 1.0

    def __post_init__(self) -> None:
        """Fills in `inference_layers` (0 means all) and checks what the network takes for granted."""
        object.__setattr__(self, "inference_layers", self.inference_layers or self.layers)
        faults = _width_faults("decoder", self.width, self.heads)
        if not 1 <= self.inference_layers <= self.layers:
            faults.append(f"inference_layers must lie between 1 and layers {self.layers}, not {self.inference_layers}")
        if len(self.points) != 3 or min(self.points) < 1:
            faults.append(f"points must be three numbers, one a level, of at least 1, not {self.points}")
        if self.queries < 1:
            faults.append(f"queries must be at least 1, not {self.queries}")
        _raise(faults)


@dataclass(frozen=True)
class ModelConfig:
    """A whole RT-DETRv2: `class_names[label]` is the name of a label, and their count the width of the class heads."""

    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    class_names: tuple[str, ...] = ()
    layer_norm_epsilon: float = 1e-5
    batch_norm_epsilon: float = 1e-5
    """Of the encoder's and the decoder's convolutions; the backbone and the encoder's input always have 1e-5."""

    def __post_init__(self) -> None:
        """Takes the 80 COCO names where none were given."""
        object.__setattr__(self, "class_names", tuple(self.class_names) or COCO_CLASS_NAMES)

    @property
    def classes(self) -> int:
        """How many classes the model tells apart."""
        return len(self.class_names)

    def with_classes(self, class_names: tuple[str, ...]) -> "ModelConfig":
        """The same network for other classes."""
        return dataclasses.replace(self, class_names=tuple(class_names))

    def without_later_layers(self) -> "ModelConfig":
        """The same network without the decoder layers behind its answer."""
        return dataclasses.replace(
            self, decoder=dataclasses.replace(self.decoder, layers=self.decoder.inference_layers)
        )

    def inference_form(self) -> "ModelConfig":
        """The same network without what only training uses: later decoder layers and the label embedding."""
        decoder = dataclasses.replace(self.decoder, layers=self.decoder.inference_layers, denoising=0)
        return dataclasses.replace(self, decoder=decoder)


def named(name: str) -> ModelConfig:
    """The released model of this name, such as "r18vd"; an unknown name is an error that suggests one."""
    if name in RELEASED:
        return RELEASED[name]
    near = difflib.get_close_matches(name, RELEASED, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"no released model is called {name!r}: {hint}there are {', '.join(RELEASED)}")


def _width_faults(part: str, width: int, heads: int) -> list[str]:
    faults = []
    if width % heads:
        faults.append(f"{part} width {width} must be a multiple of its {heads} heads")
    if width % 4:
        faults.append(f"{part} width {width} must be a multiple of 4 (the positional code has four parts)")
    return faults


def _raise(faults: list[str]) -> None:
    if faults:
        raise ConfigError("; ".join(faults))


# The spelling of the published checkpoints.
# fmt: off
COCO_CLASS_NAMES = (
    "person", "bicycle", "car", "motorbike", "aeroplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "sofa", "pottedplant", "bed", "diningtable", "toilet",
    "tvmonitor", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on


def _row(depth: int, *, layers: int, expansion: float, **decoder: object) -> ModelConfig:
    basic = depth < 50
    wide = depth == 101
    return ModelConfig(
        backbone=BackboneConfig(
            block="basic" if basic else "bottleneck",
            depths=BLOCKS_PER_DEPTH[depth],
            widths=(64, 128, 256, 512) if basic else (256, 512, 1024, 2048),
            batch_norm="live" if basic else "frozen",
        ),
        encoder=EncoderConfig(width=384 if wide else 256, ffn_width=2048 if wide else 1024, expansion=expansion),
        decoder=DecoderConfig(layers=layers, **decoder),  # pyright: ignore[reportArgumentType]
    )


RELEASED: dict[str, ModelConfig] = {
    "r18vd": _row(18, layers=3, expansion=0.5),
    "r34vd": _row(34, layers=4, expansion=0.5),
    "r50vd_m": _row(50, layers=6, expansion=0.5, inference_layers=3),
    "r50vd": _row(50, layers=6, expansion=1.0),
    "r101vd": _row(101, layers=6, expansion=1.0),
    "r18vd_dsp": _row(18, layers=3, expansion=0.5, sampling="discrete"),
    "r34vd_dsp": _row(34, layers=4, expansion=0.5, sampling="discrete"),
    "r50vd_m_dsp": _row(50, layers=6, expansion=0.5, inference_layers=3, sampling="discrete"),
    "r50vd_dsp": _row(50, layers=6, expansion=1.0, sampling="discrete"),
    "r18vd_sp1": _row(18, layers=3, expansion=0.5, points=(1, 1, 1)),
    "r18vd_sp2": _row(18, layers=3, expansion=0.5, points=(2, 2, 2)),
    "r18vd_sp3": _row(18, layers=3, expansion=0.5, points=(3, 3, 3)),
}
"""The models of the paper and of its repository, by the names of their configuration files.

`_dsp`: discrete sampling; `_spN`: N points a level. Source: lyuwenyu/RT-DETR, rtdetrv2_pytorch/configs/rtdetrv2.
"""
