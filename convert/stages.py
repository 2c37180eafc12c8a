"""What passes between the boxes of the figure, on its way from one image to the answer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rtdetrv2_jax.arrays import Output, Prediction, Pyramid, Queries, Selection
from rtdetrv2_jax.model.query_selection import QuerySelection
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2

STRIDES = (8, 16, 32)


class Answer(NamedTuple):
    """Class logits and boxes of the queries of one image, in NumPy."""

    logits: Float[np.ndarray, "q k"]
    boxes: Float[np.ndarray, "q 4"]


class Stages(NamedTuple):
    """The stages of one image, in NumPy: maps (h, w, c), finest first.

    `scores` are those of all source tokens; `tokens` the selected ones, best first. `selected_boxes` and `layers` (from
    the first decoder layer to the one that answers) belong to the reference's tokens, in their order; `output` is the
    model's own answer, in the order of `tokens`.
    """

    backbone: tuple[Float[np.ndarray, "_h _w _c"], ...]
    encoder: tuple[Float[np.ndarray, "_h _w _c"], ...]
    memory: Float[np.ndarray, "s d"]
    scores: Float[np.ndarray, " s"]
    tokens: Int[np.ndarray, " q"]
    selected_boxes: Float[np.ndarray, "q 4"]
    layers: tuple[Answer, ...]
    output: Answer


def run(model: RTDETRv2, images: Float[np.ndarray, "1 h w 3"], *, tokens: Int[np.ndarray, " q"]) -> Stages:
    """Our stages for one image.

    Args:
        model: In its training form.
        images: The network's input.
        tokens: The source tokens that the reference selected. Queries come back in their order, for a near tie between
            two scores may fall either way; where one did at the end of the list, and the tokens are not the same, the
            decoder runs once more from those given.
    """
    height, width = images.shape[1:3]
    ranking = nnx.clone(model.selection)
    ranking.queries = sum((height // stride) * (width // stride) for stride in STRIDES)
    with jax.default_matmul_precision("highest"):
        maps, encoded, memory, ranked, output = _first_image(_forward(model, ranking, jnp.asarray(images)))
        order = aligned(output.tokens, tokens)
        if order is None:
            layers = _first_image(_decode(model, ranking, jnp.asarray(images), jnp.asarray(tokens, jnp.int32)))
            order = slice(None)
        else:
            layers = output.layers
    place = np.argsort(ranked.tokens)
    return Stages(
        backbone=maps,
        encoder=encoded,
        memory=memory,
        scores=ranked.prediction.logits.max(-1)[place],
        tokens=output.tokens,
        selected_boxes=ranked.prediction.boxes[place[tokens]],
        layers=tuple(
            Answer(layer.logits[order], layer.boxes[order]) for layer in layers[: model.config.decoder.inference_layers]
        ),
        output=Answer(output.logits, output.boxes),
    )


def aligned(ours: Int[np.ndarray, " q"], theirs: Int[np.ndarray, " q"]) -> Int[np.ndarray, " q"] | None:
    """Where each of their tokens is among ours, or None if they are not the same tokens."""
    if np.setxor1d(ours, theirs).size:
        return None
    return np.argsort(ours)[np.argsort(np.argsort(theirs))]


@jax.jit
def _forward(
    model: RTDETRv2, ranking: QuerySelection, images: Array
) -> tuple[Pyramid, Pyramid, Array, Selection, Output]:
    """The stages before the decoder, and the output. `ranking` is the model's selection, made to select all tokens."""
    maps = model.backbone(images)
    encoded = model.encoder(maps)
    memory = model.memory(encoded)
    return maps, encoded, memory.tokens, ranking(memory), model(images)


@jax.jit
def _decode(model: RTDETRv2, ranking: QuerySelection, images: Array, tokens: Array) -> tuple[Prediction, ...]:
    """What every decoder layer says, started from `tokens` instead of those that the model selects."""
    memory = model.memory(model.encoder(model.backbone(images)))
    ranked = ranking(memory)
    chosen = jnp.argsort(ranked.tokens[0])[tokens]
    queries = Queries(ranked.queries.content[:, chosen], ranked.queries.boxes_logits[:, chosen])
    return model.decoder(queries, memory)


def _first_image(results: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[0], results)
