"""The legend of dimension letters, and the values that cross files.

Every array annotation of the library reads with these letters:

====== ===========================================================
letter axis
====== ===========================================================
b      images of a batch
h w    rows and columns of an image or of a feature map
c      channels of a feature map
d      width of the encoder or of the decoder
q      queries
s      source tokens: all levels of the feature pyramid, flattened
l      levels of the feature pyramid
p      sampling points of a query and head, all levels together
n      attention heads
e      channels of one head
k      classes
t      targets (padded)
g      denoising groups
i      decoder layers
====== ===========================================================

Boxes are (centre x, centre y, width, height) in units of the image, 0 to 1, unless the name says otherwise
(`boxes_xyxy_pixels`). Sizes are (height, width). Masks are True where something takes part.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

Sizes = tuple[tuple[int, int], ...]
"""(height, width) of every level of a feature pyramid, finest first. Static: known when a program is traced."""

Pyramid = tuple[Float[Array, "b _h _w _c"], ...]
"""Feature maps of one batch, finest first, each of its own size and width."""


class Memory(NamedTuple):
    """The feature pyramid as one sequence: levels finest first, each row by row."""

    tokens: Float[Array, "b s d"]
    sizes: Sizes


class Queries(NamedTuple):
    """What enters the decoder: a content vector and a reference box for each query.

    `boxes_logits` are boxes before the sigmoid, float32.
    """

    content: Float[Array, "b q d"]
    boxes_logits: Float[Array, "b q 4"]


class Prediction(NamedTuple):
    """Class logits and boxes of one set of queries."""

    logits: Float[Array, "*b q k"]
    boxes: Float[Array, "*b q 4"]


class Selection(NamedTuple):
    """The result of query selection.

    `prediction` keeps its gradient (it is what the encoder's own loss sees), `queries` are detached from the encoder,
    and `tokens` are the indices of the selected source tokens, best first.
    """

    queries: Queries
    prediction: Prediction
    tokens: Int[Array, "b q"]


class Denoising(NamedTuple):
    """Noised ground truth that training puts in front of the selected queries.

    `labels` index the embedding table, whose last row (the number of classes) stands for an empty slot; `mask` is
    True where the row's query may attend to the column's, over denoising and selected queries together.
    """

    labels: Int[Array, "b q_denoising"]
    boxes_logits: Float[Array, "b q_denoising 4"]
    mask: Bool[Array, "#b q_all q_all"]


class Output(NamedTuple):
    """All that the network says of a batch.

    `logits` and `boxes` are the answer: those of the decoder layer that inference ends with. The rest is for losses:
    every decoder layer's prediction, the encoder's for the selected tokens, every layer's for the denoising queries
    (empty without them). A program that uses only the answer pays for nothing else: the compiler drops the rest.
    """

    logits: Float[Array, "b q k"]
    boxes: Float[Array, "b q 4"]
    layers: tuple[Prediction, ...]
    denoising: tuple[Prediction, ...]
    encoder: Prediction
    tokens: Int[Array, "b q"]


class Detections(NamedTuple):
    """The best detections of every image, best first: a fixed number, to be cut by a threshold on `scores`.

    `boxes_xyxy_pixels` are (left, top, right, bottom) in pixels of the original image, not clipped to it.
    """

    scores: Float[Array, "b q"]
    labels: Int[Array, "b q"]
    boxes_xyxy_pixels: Float[Array, "b q 4"]


class Targets(NamedTuple):
    """The ground truth of a batch, padded to one number of boxes; `mask` is True for the real ones."""

    labels: Int[Array, "b t"]
    boxes: Float[Array, "b t 4"]
    mask: Bool[Array, "b t"]


class DenoisingTargets(NamedTuple):
    """What the denoising queries are to find again.

    `targets` is the index of each slot's target, -1 for background; slots that are not `real` take no part in the
    loss; `groups` is how often every target occurs, which the loss divides by. The images of a batch may share the
    last two.
    """

    targets: Int[Array, "b q_denoising"]
    real: Bool[Array, "#b q_denoising"]
    groups: Int[Array, "#b"]
