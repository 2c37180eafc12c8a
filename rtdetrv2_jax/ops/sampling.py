"""Deformable sampling: weighted reads of a feature pyramid at points that the queries chose.

Each way of sampling comes down to cells of the pyramid and the share of each; what reads them has several forms with
one meaning, of which each backend has its fastest. On a TPU no cell is looked up at all: see `sampling_matmul`.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rtdetrv2_jax.arrays import Sizes
from rtdetrv2_jax.config import Sampling
from rtdetrv2_jax.ops.sampling_matmul import read_multiplied
from rtdetrv2_jax.ops.sampling_tiles import MOST_TOKENS, plan

Reading = Literal["gather", "unrolled", "matmul"]


class Cells(NamedTuple):
    """Tokens that a query and head read, and with what share, float32; a cell outside the map has none."""

    tokens: Int[Array, "b q n r"]
    shares: Float[Array, "b q n r"]


class Levels(NamedTuple):
    """Width, height and first token of the level of each sampling point; sizes as float32, like what meets them."""

    width: Float[np.ndarray, "p"]
    height: Float[np.ndarray, "p"]
    start: Int[np.ndarray, "p"]


def deformable_sampling(
    values: Float[Array, "b s n e"],
    locations: Float[Array, "b q n p 2"],
    *,
    weights: Float[Array, "b q n p"],
    sizes: Sizes,
    points: tuple[int, ...],
    method: Sampling,
    reading: Reading | None = None,
) -> Float[Array, "b q n e"]:
    """The weighted sum, for each query and head, of the values at its sampling points, summed in float32.

    Args:
        values: What is read: the memory, split into heads.
        locations: (x, y) in units of the image, float32, those of the finest level first.
        weights: The weight of each point, float32.
        sizes: (height, width) of each level.
        points: How many of the points belong to each level.
        method: "bilinear" reads between pixel centres, with zeros outside the map; "discrete" reads one pixel, and has
            no gradient to the locations.
        reading: The form that reads; the backend's fastest that applies where none is named. "matmul" runs its kernels
            step by step where there is no TPU, which is slow, and for tests.

    Raises:
        ValueError: The form that was named does not apply.

    Source: RT-DETRv2, section 3.1; lyuwenyu/RT-DETR, `deformable_attention_core_func_v2`.
    """
    cells = partial(bilinear_cells if method == "bilinear" else discrete_cells, levels=_levels(sizes, points))

    def gather(values: Array, locations: Array, weights: Array) -> Array:
        return read_gathered(values, cells(locations, weights))

    def unrolled(values: Array, locations: Array, weights: Array) -> Array:
        return read_unrolled(values, cells(locations, weights))

    # The one place that decides where the kernels apply: elsewhere a TPU gathers.
    heads, channels = values.shape[2:]
    tiles = plan(sizes, points, queries=locations.shape[1], heads=heads, channels=channels)
    matmul = None if method == "discrete" or tiles is None else partial(read_multiplied, plan=tiles)
    match reading:
        case "gather":
            return gather(values, locations, weights)
        case "unrolled":
            return unrolled(values, locations, weights)
        case "matmul" if matmul is None:
            raise ValueError(
                f'reading "matmul" is for bilinear sampling of up to {MOST_TOKENS:,} tokens, by heads of 16, 32, 64 or '
                f"128 channels that fill lanes, not for {method} sampling of {values.shape[1]:,} tokens by {heads} "
                f"heads of {channels}: name no reading, or another"
            )
    if reading == "matmul" and matmul is not None:
        elsewhere = partial(matmul, interpret=True)
        return jax.lax.platform_dependent(values, locations, weights, tpu=matmul, default=elsewhere)
    tpu = gather if matmul is None or _has_little_vmem() else matmul
    return jax.lax.platform_dependent(values, locations, weights, cpu=unrolled, tpu=tpu, default=gather)


def bilinear_cells(locations: Float[Array, "b q n p 2"], weights: Float[Array, "b q n p"], *, levels: Levels) -> Cells:
    """Four cells a point. Source: PyTorch's grid_sample with align_corners=False and zero padding."""
    x = locations[..., 0] * levels.width - 0.5
    y = locations[..., 1] * levels.height - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    right_share, bottom_share = x - left, y - top
    tokens, shares = [], []
    for column, column_share in ((left, 1 - right_share), (left + 1, right_share)):
        for row, row_share in ((top, 1 - bottom_share), (top + 1, bottom_share)):
            inside = (column >= 0) & (column < levels.width) & (row >= 0) & (row < levels.height)
            tokens.append(_token(column, row, levels))
            shares.append(jnp.where(inside, weights * (column_share * row_share), 0))
    flat = (*locations.shape[:3], -1)
    return Cells(jnp.stack(tokens, axis=-1).reshape(flat), jnp.stack(shares, axis=-1).reshape(flat))


def discrete_cells(locations: Float[Array, "b q n p 2"], weights: Float[Array, "b q n p"], *, levels: Levels) -> Cells:
    """One cell a point: the one half a pixel to the lower right, clamped to the map.

    Source: lyuwenyu/RT-DETR clamps both coordinates to the height, which is wrong on maps that are not square; as
    transformers, we clamp each to its own side. On square maps the two are the same.
    """
    column = jnp.trunc(locations[..., 0] * levels.width + 0.5)
    row = jnp.trunc(locations[..., 1] * levels.height + 0.5)
    return Cells(_token(column, row, levels), weights)


def read_gathered(values: Float[Array, "b s n e"], cells: Cells) -> Float[Array, "b q n e"]:
    """One gather of all cells, then a sum: the plain definition.

    What is read becomes float32 before it is read, so that gradients are summed in float32 where reads meet. The sum is
    written as one, and not as a product of matrices, whose gradient would first be a table of what each cell gets.
    """
    batch = jnp.arange(values.shape[0])[:, None, None, None]
    head = jnp.arange(values.shape[2])[:, None]
    read = values.astype(jnp.float32)[batch, cells.tokens, head]
    return jnp.sum(cells.shares[..., None] * read, axis=-2).astype(values.dtype)


@jax.custom_vjp
def read_unrolled(values: Float[Array, "b s n e"], cells: Cells) -> Float[Array, "b q n e"]:
    """A gather a cell, each added as it is read: XLA for CPUs makes one loop of them, five times as fast.

    Its gradient is that of the plain definition: differentiated as it stands, every use of a gradient would read all
    cells once more.
    """
    batch, tokens, heads, channels = values.shape
    rows = values.reshape(batch * tokens * heads, channels)
    first = (jnp.arange(batch) * (tokens * heads))[:, None, None, None] + jnp.arange(heads)[:, None]
    index = first + cells.tokens * heads
    total = jnp.zeros((*index.shape[:3], channels), jnp.float32)
    for cell in range(index.shape[-1]):
        read = rows.at[index[..., cell]].get(mode="promise_in_bounds")
        total += cells.shares[..., cell, None] * read.astype(jnp.float32)
    return total.astype(values.dtype)


def _unrolled_forward(
    values: Float[Array, "b s n e"], cells: Cells
) -> tuple[Float[Array, "b q n e"], tuple[Float[Array, "b s n e"], Cells]]:
    return read_unrolled(values, cells), (values, cells)


def _unrolled_backward(
    saved: tuple[Float[Array, "b s n e"], Cells], change: Float[Array, "b q n e"]
) -> tuple[Float[Array, "b s n e"], Cells]:
    return jax.vjp(read_gathered, *saved)[1](change)


read_unrolled.defvjp(_unrolled_forward, _unrolled_backward)


def _has_little_vmem() -> bool:
    """Whether this process computes on TPUs that the kernels do not fit: those before v5 have 16 MiB of VMEM."""
    return jax.devices()[0].device_kind in ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")


def _levels(sizes: Sizes, points: tuple[int, ...]) -> Levels:
    heights, widths = np.array(sizes, np.float32).T
    starts = np.cumsum([0] + [height * width for height, width in sizes[:-1]])
    return Levels(np.repeat(widths, points), np.repeat(heights, points), np.repeat(starts, points).astype(np.int32))


def _token(column: Float[Array, "b q n p"], row: Float[Array, "b q n p"], levels: Levels) -> Int[Array, "b q n p"]:
    """The token of the cell at a column and row, or of the nearest there is. Clipped before it becomes an integer."""
    column = jnp.clip(column, 0, levels.width - 1).astype(jnp.int32)
    row = jnp.clip(row, 0, levels.height - 1).astype(jnp.int32)
    return row * levels.width.astype(np.int32) + column + levels.start
