"""Which query answers for which target: the cost of each pair, and the matching of least total cost."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rtdetrv2_jax.arrays import Prediction, Targets
from rtdetrv2_jax.ops.assignment import assign
from rtdetrv2_jax.ops.boxes import cxcywh_to_xyxy, pairwise_giou
from rtdetrv2_jax.sharding import each_share

LOG_FLOOR = 1e-8


@dataclass(frozen=True)
class MatcherSettings:
    """How much each part of a pair's cost counts, as published.

    `class_cost` is the focal loss that the pair would save, with `alpha` and `gamma`, or minus the softmax
    probability, as DETR has it.
    """

    class_cost: Literal["focal", "softmax"] = "focal"
    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0


def match(
    prediction: Prediction, targets: Targets, *, settings: MatcherSettings = MatcherSettings()
) -> Int[Array, "*b t"]:
    """The query of every target, -1 for padding and for what is left where targets outnumber queries.

    The prediction may have axes before the batch, the output sets: all are matched in one call, each on its own.

    Source: lyuwenyu/RT-DETR, matcher.py, `HungarianMatcher`. There SciPy solves one image after another on the host.
    Costs that are not finite make it raise; here such a pair is the last to be chosen, and the loss will tell.
    """
    cost = jax.lax.stop_gradient(matching_cost(prediction, targets, settings=settings))
    mask = jnp.broadcast_to(targets.mask, (*cost.shape[:-2], cost.shape[-1]))
    if cost.ndim == 2:
        return assign(cost, mask)
    return each_share(assign, cost, mask, axis=cost.ndim - 3)


def queries_to_targets(queries: Int[Array, "*b t"], number: int) -> Int[Array, "*b {number}"]:
    """The inverse of a matching: the target of each of `number` queries, -1 for background.

    By comparison rather than by scattering, which an accelerator does one by one.
    """
    pairs = queries[..., None, :] == jnp.arange(number)[:, None]
    return jnp.max(jnp.where(pairs, jnp.arange(queries.shape[-1]), -1), axis=-1, initial=-1)


def matching_cost(
    prediction: Prediction, targets: Targets, *, settings: MatcherSettings = MatcherSettings()
) -> Float[Array, "*b q t"]:
    """The cost of each query for each target, in float32: weighted sum of class cost, L1 distance and minus GIoU.

    Source: Zhao et al. 2024 (arXiv 2304.08069) after Carion et al. 2020 (arXiv 2005.12872), section 3.1;
    lyuwenyu/RT-DETR, matcher.py, `HungarianMatcher.forward`. It computes in the type of the logits, under mixed
    precision a half, where the logarithms of the class cost overflow; here it is float32 always.
    """
    logits, boxes = prediction.logits.astype(jnp.float32), prediction.boxes.astype(jnp.float32)
    lead = logits.shape[:-2]
    labels = jnp.broadcast_to(targets.labels, (*lead, targets.labels.shape[-1]))
    target_boxes = jnp.broadcast_to(targets.boxes.astype(jnp.float32), (*lead, *targets.boxes.shape[-2:]))
    giou = pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    return (
        settings.l1_weight * _l1_distance(boxes, target_boxes)
        + settings.class_weight * _class_cost(logits, labels, settings)
        - settings.giou_weight * giou
    )


def _class_cost(
    logits: Float[Array, "*b q k"], labels: Int[Array, "*b t"], settings: MatcherSettings
) -> Float[Array, "*b q t"]:
    if settings.class_cost == "softmax":
        return -_columns(jax.nn.softmax(logits, axis=-1), labels)
    scores = jax.nn.sigmoid(_columns(logits, labels))
    # It is never below 0, but without saying so a compiler adds the floor to the 1, where it is lost: log of 0.
    rest = jnp.maximum(1.0 - scores, 0.0)
    found = settings.alpha * rest**settings.gamma * -jnp.log(scores + LOG_FLOOR)
    missed = (1.0 - settings.alpha) * scores**settings.gamma * -jnp.log(rest + LOG_FLOOR)
    return found - missed


def _columns(table: Float[Array, "*b q k"], labels: Int[Array, "*b t"]) -> Float[Array, "*b q t"]:
    """The column of each label. Transposed, so that a gather moves whole rows and not single numbers."""
    return jnp.take_along_axis(table.swapaxes(-1, -2), labels[..., None], axis=-2).swapaxes(-1, -2)


def _l1_distance(boxes: Float[Array, "*b q 4"], others: Float[Array, "*b t 4"]) -> Float[Array, "*b q t"]:
    """One coordinate after another, so that no table of pairs has a last axis of 4, which wastes a TPU's lanes."""
    return sum(
        (jnp.abs(boxes[..., :, None, side] - others[..., None, :, side]) for side in range(1, 4)),
        start=jnp.abs(boxes[..., :, None, 0] - others[..., None, :, 0]),
    )
