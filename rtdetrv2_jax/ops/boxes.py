"""Boxes: conversions, overlaps, and the logit that keeps its distance from infinity."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

INVERSE_SIGMOID_FLOOR = 1e-5


def cxcywh_to_xyxy(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
    """Corners (left, top, right, bottom) of boxes given by centre and size."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def xyxy_to_cxcywh(boxes_xyxy: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
    """Centre and size of boxes given by their corners."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def inverse_sigmoid(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The logit of `x`, with numerator and denominator floored at 1e-5, so that it stays within ±11.513.

    Source: lyuwenyu/RT-DETR, `inverse_sigmoid`. The two floors act apart, as there: the result is not the logit of
    a clipped `x`.
    """
    x = jnp.clip(x, 0.0, 1.0)
    return jnp.log(jnp.maximum(x, INVERSE_SIGMOID_FLOOR) / jnp.maximum(1.0 - x, INVERSE_SIGMOID_FLOOR))


def iou(boxes_xyxy: Float[Array, "*n 4"], others_xyxy: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Intersection over union of each box with its partner, 0 to 1; 0 where both have no area."""
    return _overlaps(boxes_xyxy, others_xyxy)[0]


def giou(boxes_xyxy: Float[Array, "*n 4"], others_xyxy: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Generalised IoU of each box with its partner: the IoU less the empty share of the box around both, -1 to 1.

    Where both boxes have no area it is -1 if the box around them has one, else 0.

    Source: Rezatofighi et al. 2019 (arXiv 1902.09630), algorithm 1; lyuwenyu/RT-DETR, box_ops.py,
    `generalized_box_iou`. Values and gradients are theirs wherever theirs are finite. A pair without any area gives
    them NaN, which one such pair spreads over the loss of a whole batch; here it gives the constants above and no
    gradient. Their assertion that corners are in order is left out, since a compiled program can't raise: sizes that
    come from a sigmoid are never negative.
    """
    return _overlaps(boxes_xyxy, others_xyxy)[1]


def pairwise_iou(boxes_xyxy: Float[Array, "*b q 4"], others_xyxy: Float[Array, "*b t 4"]) -> Float[Array, "*b q t"]:
    """`iou` of every box with every other."""
    return _overlaps(boxes_xyxy[..., :, None, :], others_xyxy[..., None, :, :])[0]


def pairwise_giou(boxes_xyxy: Float[Array, "*b q 4"], others_xyxy: Float[Array, "*b t 4"]) -> Float[Array, "*b q t"]:
    """`giou` of every box with every other."""
    return _overlaps(boxes_xyxy[..., :, None, :], others_xyxy[..., None, :, :])[1]


def _overlaps(
    boxes_xyxy: Float[Array, "*#n 4"], others_xyxy: Float[Array, "*#n 4"]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """IoU and generalised IoU, broadcasting.

    Works on one coordinate at a time, so that a table of pairs never has a last axis of 4, which wastes a TPU's lanes.
    """
    left, top, right, bottom = (boxes_xyxy[..., side] for side in range(4))
    other_left, other_top, other_right, other_bottom = (others_xyxy[..., side] for side in range(4))
    area = (right - left) * (bottom - top)
    other_area = (other_right - other_left) * (other_bottom - other_top)
    intersection = _length(jnp.maximum(left, other_left), jnp.minimum(right, other_right)) * _length(
        jnp.maximum(top, other_top), jnp.minimum(bottom, other_bottom)
    )
    union = area + other_area - intersection
    hull = _length(jnp.minimum(left, other_left), jnp.maximum(right, other_right)) * _length(
        jnp.minimum(top, other_top), jnp.maximum(bottom, other_bottom)
    )
    overlap = _ratio(intersection, union)
    return overlap, overlap - _ratio(hull - union, hull)


def _length(low: Float[Array, "*n"], high: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`high - low`, at least 0.

    Not `jnp.maximum`: for boxes that just touch, the reference's clamp passes the whole gradient and maximum half.
    """
    return jnp.where(high >= low, high - low, 0.0)


@jax.custom_jvp
def _ratio(part: Float[Array, "*n"], whole: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`part / whole`, and 0 without gradient where `whole` is no positive normal number.

    The rule for its derivative exists because JAX's own squares the denominator, which overflows for areas below
    1e-19, while the reference's stays finite there.
    """
    return _divide(part, whole)


@_ratio.defjvp
def _ratio_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    part, whole = primals
    part_tangent, whole_tangent = tangents
    ratio = _ratio(part, whole)
    return ratio, _divide(part_tangent - ratio * whole_tangent, whole)


def _divide(part: Float[Array, "*n"], whole: Float[Array, "*n"]) -> Float[Array, "*n"]:
    positive = whole >= jnp.finfo(whole.dtype).tiny
    return jnp.where(positive, part / jnp.where(positive, whole, 1.0), 0.0)
