"""From logits and boxes to detections."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rtdetrv2_jax.arrays import Detections
from rtdetrv2_jax.ops.boxes import cxcywh_to_xyxy


def best_detections(
    logits: Float[Array, "b q k"], boxes: Float[Array, "b q 4"], *, sizes: Float[Array, "b 2"]
) -> Detections:
    """The best pairs of query and class, as many as there are queries, best first.

    A query may come several times, as different classes; nothing is suppressed and no box is clipped. Among equal
    scores the earlier query and the lower label come first.

    Args:
        logits: Class logits.
        boxes: Boxes in units of the network's input.
        sizes: (height, width) in original pixels that the network's input spans, for each image.

    Source: lyuwenyu/RT-DETR, `RTDETRPostProcessor` with its focal-loss branch.
    """
    queries, classes = logits.shape[1:]
    best, index = jax.lax.top_k(logits.reshape(logits.shape[0], -1), queries)
    corners = cxcywh_to_xyxy(jnp.take_along_axis(boxes, (index // classes)[..., None], axis=1))
    return Detections(
        scores=jax.nn.sigmoid(best),
        labels=index % classes,
        boxes_xyxy_pixels=corners * jnp.concatenate([sizes[:, ::-1]] * 2, axis=-1)[:, None],
    )
