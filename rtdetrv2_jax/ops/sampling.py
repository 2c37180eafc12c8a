"""Deformable sampling: weighted reads of a feature pyramid at points that the queries chose."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rtdetrv2_jax.arrays import Sizes

Sampling = Literal["bilinear", "discrete"]


def deformable_sampling(
    values: Float[Array, "b s n e"],
    locations: Float[Array, "b q n p 2"],
    *,
    weights: Float[Array, "b q n p"],
    sizes: Sizes,
    points: tuple[int, ...],
    method: Sampling,
) -> Float[Array, "b q n e"]:
    """The weighted sum, for each query and head, of the values at its sampling points.

    `locations` are (x, y) in units of the image, float32, those of the finest level first: `points` tells how many
    belong to each level, and `sizes` its (height, width). "bilinear" reads between pixel centres, with zeros outside
    the map; "discrete" reads one pixel and has no gradient to the locations.

    Source: RT-DETRv2, section 3.1; lyuwenyu/RT-DETR, `deformable_attention_core_func_v2`.
    """
    sample = {"bilinear": _bilinear, "discrete": _discrete}[method]
    output = jnp.zeros((*locations.shape[:3], values.shape[-1]), values.dtype)
    token = point = 0
    for (height, width), count in zip(sizes, points, strict=True):
        level = values[:, token : token + height * width]
        here = slice(point, point + count)
        output += sample(level, locations[:, :, :, here], weights[:, :, :, here], size=(height, width))
        token, point = token + height * width, point + count
    return output


def _bilinear(
    level: Float[Array, "b s n e"],
    locations: Float[Array, "b q n p 2"],
    weights: Float[Array, "b q n p"],
    *,
    size: tuple[int, int],
) -> Float[Array, "b q n e"]:
    """Four reads a point; a corner outside the map counts as zero (grid_sample with align_corners=False, zero padding)."""
    height, width = size
    x = locations[..., 0] * width - 0.5
    y = locations[..., 1] * height - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    right_share, bottom_share = x - left, y - top
    output = jnp.zeros((*locations.shape[:3], level.shape[-1]), level.dtype)
    for column, column_share in ((left, 1 - right_share), (left + 1, right_share)):
        for row, row_share in ((top, 1 - bottom_share), (top + 1, bottom_share)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            share = jnp.where(inside, weights * (column_share * row_share), 0).astype(level.dtype)
            cell_x = jnp.clip(column, 0, width - 1).astype(jnp.int32)
            cell_y = jnp.clip(row, 0, height - 1).astype(jnp.int32)
            output += jnp.einsum("bqnp,bqnpe->bqne", share, _read(level, cell_y * width + cell_x))
    return output


def _discrete(
    level: Float[Array, "b s n e"],
    locations: Float[Array, "b q n p 2"],
    weights: Float[Array, "b q n p"],
    *,
    size: tuple[int, int],
) -> Float[Array, "b q n e"]:
    """One read a point, at the cell half a pixel to the lower right, clamped to the map.

    Source: lyuwenyu/RT-DETR clamps both coordinates to the height, which is wrong on maps that are not square; as
    transformers, we clamp each to its own side. On square maps the two are the same.
    """
    height, width = size
    cell_x = jnp.clip((locations[..., 0] * width + 0.5).astype(jnp.int32), 0, width - 1)
    cell_y = jnp.clip((locations[..., 1] * height + 0.5).astype(jnp.int32), 0, height - 1)
    return jnp.einsum("bqnp,bqnpe->bqne", weights.astype(level.dtype), _read(level, cell_y * width + cell_x))


def _read(level: Float[Array, "b s n e"], cells: Int[Array, "b q n p"]) -> Float[Array, "b q n p e"]:
    """The values of each head at its cells."""
    batch = jnp.arange(level.shape[0])[:, None, None, None]
    head = jnp.arange(level.shape[2])[None, None, :, None]
    return level[batch, cells, head]
