"""The check of a conversion: the source in PyTorch and the result in JAX on one image, compared stage by stage."""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.image import read_image
from rtdetrv2_jax.model.rtdetrv2 import check_image_size
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.weights.load import inference_layers_only, load_pretrained, save_model

from .source import Source
from .stages import STRIDES, Answer, Stages, aligned, run

# What is allowed in any case: about three times the float32 noise of the reference on models of ordinary weights.
BACKBONE, ENCODER, LOGITS, BOXES = 1e-4, 6e-4, 3e-4, 2e-5

# A model of large activations or many layers makes more of every rounding: how much more, a run of the reference in
# float64 shows. Two programs that round differently may be twice that apart; the other factor of two is for chance.
ROUNDING = 4

# Discrete sampling reads one cell, and jumps where a point is on the border of two: of the tens of thousands of points
# of a decoder, rounding puts a few on the other side. A wrong weight shifts all queries; those few are let off.
DISCRETE_SHARE = 0.9


class VerificationError(ValueError):
    """A check that can't be made, or one that found a difference."""


class Reference(NamedTuple):
    """What PyTorch makes of the source: the network's input, and the stages in float32 and in float64."""

    images: Float[np.ndarray, "1 h w 3"]
    stages: Stages
    exact: Stages


class Measure(NamedTuple):
    """How far apart the two are at one stage; `note` says more where a number is not enough."""

    stage: str
    difference: float
    tolerance: float
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether the difference is within its tolerance; NaN is not."""
        return self.difference <= self.tolerance


def check_installed() -> None:
    """Raises `VerificationError` where the packages that verification takes are missing."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise VerificationError(f"--verify takes {' and '.join(missing)}: pip install -e '.[parity]'")


def run_reference(source: Source, *, image: str | None = None) -> Reference:
    """Runs the source in PyTorch.

    A Hugging Face folder is loaded as it is. Any other source is written in that form first, without decoder layers
    behind the answer; the check then says that transformers and the library agree on these weights, and rests on the
    table of names for where they came from.

    Args:
        source: What was read.
        image: What to read as an image; one of gradients and noise where None.

    Raises:
        VerificationError: Hugging Face's form can't say what the model is.
        ImageError, ImageSizeError: The image can't be read, or does not fit the model.
    """
    from . import reference

    images = prepare(source.preprocessing, image)
    check_image_size(images.shape[1:3], queries=source.model.config.decoder.queries)
    with _hugging_face_folder(source) as folder:
        return Reference(images, *reference.run(folder, images, dropped=source.dropped))


def verify(reference: Reference, folder: Path) -> list[Measure]:
    """Compares a written checkpoint with the reference."""
    model = load_pretrained(folder).model
    ours = run(model, reference.images, tokens=reference.stages.tokens)
    share = 1.0 if model.config.decoder.sampling == "bilinear" else DISCRETE_SHARE
    return compare(ours, reference.stages, exact=reference.exact, share=share)


def compare(ours: Stages, theirs: Stages, *, exact: Stages, share: float) -> list[Measure]:
    """The largest difference of every stage; in the decoder, of the `share` of queries where it is smallest.

    `exact` are their stages without rounding, from which they are apart by what may be forgiven.
    """
    measures = []
    for stage in ("backbone", "encoder"):
        base = BACKBONE if stage == "backbone" else ENCODER
        for stride, *maps in zip(STRIDES, *(getattr(side, stage) for side in (ours, theirs, exact)), strict=True):
            measures.append(_measure(f"{stage}, stride {stride}", *maps, base=base))
    measures += [
        _measure("memory", ours.memory, theirs.memory, exact.memory, base=ENCODER),
        _measure("scores of all tokens", ours.scores, theirs.scores, exact.scores, base=LOGITS),
    ]
    measures.append(_selection(ours, theirs, tolerance=2 * measures[-1].tolerance))
    exact = _in_order(exact, theirs)
    measures.append(
        _measure(
            "boxes of selected tokens", ours.selected_boxes, theirs.selected_boxes, exact.selected_boxes, base=BOXES
        )
    )
    for number, answers in enumerate(zip(ours.layers, theirs.layers, exact.layers, strict=True), start=1):
        measures += _answers(f"decoder layer {number}", *answers, share=share)
    order = aligned(ours.tokens, theirs.tokens)
    if order is not None:
        output = Answer(ours.output.logits[order], ours.output.boxes[order])
        measures += _answers("output", output, theirs.output, exact.output, share=share)
    return measures


def prepare(preprocessing: Preprocessing, image: str | None) -> Float[np.ndarray, "1 h w 3"]:
    """The network's input for an image, prepared as the checkpoint says."""
    pixels = _pattern(preprocessing.input_size or (480, 640)) if image is None else read_image(image)
    prepared = preprocessing.prepare(pixels)
    content = np.array([prepared.content_size], np.int32)
    return np.asarray(preprocessing.normalise(prepared.pixels[None], content_sizes=content))


def _pattern(size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Gradients with noise upon them: the same on every machine, and different everywhere in the image."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    slopes = [columns / size[1], rows / size[0], (rows + columns) / sum(size)]
    noise = np.random.default_rng(0).integers(-48, 49, (*size, 3))
    return np.clip(np.stack(slopes, axis=-1) * 255 + noise, 0, 255).astype(np.uint8)


@contextlib.contextmanager
def _hugging_face_folder(source: Source) -> Iterator[Path]:
    """A folder that transformers loads: the source's own, or one made of it for the time of the block."""
    if source.hugging_face is not None:
        yield source.hugging_face
        return
    with tempfile.TemporaryDirectory(prefix="rtdetrv2-verify-") as folder:
        try:
            save_model(inference_layers_only(source.model), folder, preprocessing=source.preprocessing, to="hf")
        except ConfigError as error:
            raise VerificationError(f"this model can't be verified: {error}") from None
        yield Path(folder)


def _in_order(exact: Stages, theirs: Stages) -> Stages:
    """`exact` with its queries in their order; where its tokens are others, their own, so that nothing is forgiven."""
    order = aligned(exact.tokens, theirs.tokens)
    if order is None:
        return theirs
    return exact._replace(
        selected_boxes=exact.selected_boxes[order],
        layers=tuple(Answer(layer.logits[order], layer.boxes[order]) for layer in exact.layers),
        output=Answer(exact.output.logits[order], exact.output.boxes[order]),
    )


def _selection(ours: Stages, theirs: Stages, *, tolerance: float) -> Measure:
    """The selected tokens as sets: how far from the last one's score those are that only one side selected."""
    strangers = np.setxor1d(ours.tokens, theirs.tokens)
    last = theirs.scores[theirs.tokens[-1]]
    apart = float(np.abs(theirs.scores[strangers] - last).max()) if strangers.size else 0.0
    count = len(theirs.tokens)
    note = f"the same {count}"
    if strangers.size:
        # Queries see each other: with another one among them, no query's answer is to be compared.
        note = f"{len(strangers) // 2} of {count} differ, by near ties: the model's own output is not compared"
    return Measure("selected tokens", apart, tolerance, note)


def _answers(stage: str, ours: Answer, theirs: Answer, exact: Answer, *, share: float) -> list[Measure]:
    return [
        _measure(f"{stage}, logits", ours.logits, theirs.logits, exact.logits, base=LOGITS, share=share),
        _measure(f"{stage}, boxes", ours.boxes, theirs.boxes, exact.boxes, base=BOXES, share=share),
    ]


def _measure(
    stage: str, ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray, *, base: float, share: float = 1.0
) -> Measure:
    """How far ours are from theirs, with what rounding may do as tolerance."""
    rounding = _difference(theirs, exact, share)
    note = f"PyTorch's rounding {rounding:.1e}"
    if share < 1:
        note += f"; {share:.0%} of queries, of all {_difference(ours, theirs, 1.0):.1e}"
    return Measure(stage, _difference(ours, theirs, share), max(base, ROUNDING * rounding), note)


def _difference(these: np.ndarray, those: np.ndarray, share: float) -> float:
    """The largest difference, leaving out the rows where it is largest, but for the `share` of them."""
    of_rows = np.abs(these - those).max(axis=-1)
    return float(np.quantile(of_rows, share, method="higher"))
