"""The kernels of deformable sampling on TPUs, forward and backward.

A cell of the grid is an image, a group of heads and a tile of 128 reads, which lie along lanes. All tokens of the image
stay in VMEM while the tiles of its reads pass. For each level the hats of the points' columns and rows are written
out once a tile; then, a chunk of rows at a time, the share of every token in every read is made of them, for the
matrix units to multiply with the values.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Float, Int

from rtdetrv2_jax.ops.sampling_tiles import LANES, PACKED, SUBLANES, Plan, Tiles

Ref = Any
"""A block of an array, or scratch, in VMEM."""

SPARE = 12 * 2**20
"""Bytes of VMEM beside scratch and the blocks of values: for small blocks, and what the compiler spills."""


class Points(NamedTuple):
    """Sampling points of the reads of each group of heads (g): columns, rows and weights, float32."""

    x: Float[Array, "b g p r"]
    y: Float[Array, "b g p r"]
    weight: Float[Array, "b g p r"]


class Hats(NamedTuple):
    """Of the points of one level, [points, columns or rows, lanes]: hats, their slopes, and row hats times weights."""

    column: Ref
    row_share: Ref
    column_slope: Ref
    row: Ref
    row_slope: Ref


def read_forward(values: Float[Array, "b t d"], points: Points, *, plan: Plan, interpret: bool) -> Float[Array, "..."]:
    """What each read is: [b, g, e, r]. Eleven operations make a share that two of the matrix units use."""
    grid = *points.x.shape[:2], plan.reads // LANES
    column, row = _hats_scratch(plan)
    scratch = [pltpu.VMEM((plan.width, plan.token_lanes), values.dtype), column, row]
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan=plan),
        grid=grid,
        in_specs=[_values_block(plan), *_points_blocks(plan)],
        out_specs=_reads_block(plan.channels),
        out_shape=jax.ShapeDtypeStruct((*grid[:2], plan.channels, plan.reads), values.dtype),
        scratch_shapes=scratch,
        compiler_params=_parameters(scratch, values.dtype, plan=plan, blocks=2),
        cost_estimate=_cost(values, *points, plan=plan, products=1, operations=2),
        interpret=interpret,
        name="deformable_forward",
    )(values, *points)


def read_backward(
    values: Float[Array, "b t d"], points: Points, change: Float[Array, "b g e r"], *, plan: Plan, interpret: bool
) -> tuple[Float[Array, "b t d"], Points]:
    """The gradients of values and points, given that of the reads."""
    grid = *points.x.shape[:2], plan.reads // LANES
    column, row = _hats_scratch(plan)
    scratch = [pltpu.VMEM((plan.tokens, plan.width), jnp.float32), *Hats(column, row, column, row, row)]
    values_change, *points_change = pl.pallas_call(
        functools.partial(_backward_kernel, plan=plan),
        grid=grid,
        in_specs=[_values_block(plan), *_points_blocks(plan), _reads_block(plan.channels)],
        out_specs=[_values_block(plan), *_points_blocks(plan)],
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (values, *points)],
        scratch_shapes=scratch,
        compiler_params=_parameters(scratch, values.dtype, plan=plan, blocks=4),
        cost_estimate=_cost(values, values, *points, *points, change, plan=plan, products=2, operations=6),
        interpret=interpret,
        name="deformable_backward",
    )(values, *points, change)
    return values_change, Points(*points_change)


def _forward_kernel(
    values: Ref, x: Ref, y: Ref, weight: Ref, read: Ref, turned: Ref, column: Ref, share: Ref, *, plan: Plan
) -> None:
    pl.when(pl.program_id(2) == 0)(lambda: _turn(values, turned, plan=plan))
    total = jnp.zeros((plan.width, LANES), jnp.float32)
    for level in plan.levels:
        for point, at in enumerate(range(*level.points)):
            column[point, : level.columns] = _hat(x[0, 0, at], level.columns)
            share[point, : level.all_rows] = _hat(y[0, 0, at], level.all_rows) * weight[0, 0, at][None]

        def add(chunk: Int[Array, ""], total: Float[Array, "d r"], level: Tiles = level) -> Float[Array, "d r"]:
            matrix = _lengthened(_shares(column, share, chunk, level=level).astype(values.dtype), level.lanes)
            return total + _product(turned[:, _lanes(chunk, level)], matrix, over=(1, 0))

        total = jax.lax.fori_loop(0, level.chunks, add, total)
    heads = total.reshape(plan.group, plan.channels, LANES)
    own = sum(jnp.where(mask, head, 0) for mask, head in zip(_heads(plan), heads, strict=True))
    read[0, 0] = jnp.asarray(own, read.dtype)


def _turn(values: Ref, turned: Ref, *, plan: Plan) -> None:
    """Writes the values as the forward product wants them: tokens along lanes."""
    for level in plan.levels:

        def turn(chunk: Int[Array, ""], _: None, level: Tiles = level) -> None:
            turned[:, _lanes(chunk, level)] = _lengthened(values[0, _tokens(chunk, level)], level.lanes).T

        jax.lax.fori_loop(0, level.chunks, turn, None)


def _backward_kernel(
    values: Ref,
    x: Ref,
    y: Ref,
    weight: Ref,
    change: Ref,
    values_change: Ref,
    x_change: Ref,
    y_change: Ref,
    weight_change: Ref,
    total: Ref,
    *scratch: Ref,
    plan: Plan,
) -> None:
    hats, tile = Hats(*scratch), pl.program_id(2)
    pl.when(tile == 0)(lambda: total.__setitem__(..., jnp.zeros_like(total)))
    wanted = change[0, 0].astype(jnp.float32)
    spread = jnp.concatenate([jnp.where(mask, wanted, 0) for mask in _heads(plan)]).astype(values.dtype)
    for level in plan.levels:
        for point, at in enumerate(range(*level.points)):
            hats.column[point, : level.columns] = _hat(x[0, 0, at], level.columns)
            hats.column_slope[point, : level.columns] = _slope(x[0, 0, at], level.columns)
            hats.row[point, : level.all_rows] = _hat(y[0, 0, at], level.all_rows)
            hats.row_slope[point, : level.all_rows] = _slope(y[0, 0, at], level.all_rows)
            hats.row_share[point, : level.all_rows] = hats.row[point, : level.all_rows] * weight[0, 0, at][None]

        def add(chunk: Int[Array, ""], sums: tuple[Points, ...], level: Tiles = level) -> tuple[Points, ...]:
            tokens = _tokens(chunk, level)
            matrix = _shares(hats.column, hats.row_share, chunk, level=level).astype(values.dtype)
            total[tokens] += _product(matrix, spread, over=(1, 1))
            return _sums(_product(values[0, tokens], spread, over=(1, 0)), hats, chunk, sums, level=level)

        zero = jnp.zeros((SUBLANES, LANES), jnp.float32)
        sums = jax.lax.fori_loop(0, level.chunks, add, (Points(zero, zero, zero),) * level.count)
        for at, parts in zip(range(*level.points), sums, strict=True):
            weight_change[0, 0, at] = parts.weight.sum(0)
            x_change[0, 0, at] = parts.x.sum(0) * weight[0, 0, at]
            y_change[0, 0, at] = parts.y.sum(0) * weight[0, 0, at]

    last = tile == pl.num_programs(2) - 1
    pl.when(last)(lambda: values_change.__setitem__(0, total[...].astype(values_change.dtype)))


def _sums(
    product: Float[Array, "t r"], hats: Hats, chunk: Int[Array, ""], sums: tuple[Points, ...], *, level: Tiles
) -> tuple[Points, ...]:
    """Sums of a chunk added to those before it: of value times gradient, under each point's hats and their slopes.

    Each is kept as eight sums, of every eighth column.
    """
    found = list(sums)
    for row in range(level.rows):
        part = product[row * level.columns : (row + 1) * level.columns]
        at = pl.ds(chunk * level.rows + row, 1)
        for point in range(level.count):
            read = _folded(part * hats.column[point, : level.columns])
            sloped = _folded(part * hats.column_slope[point, : level.columns])
            height, slope = hats.row[point, at], hats.row_slope[point, at]
            x, y, weight = found[point]
            found[point] = Points(x + sloped * height, y + read * slope, weight + read * height)
    return tuple(found)


def _shares(column: Ref, share: Ref, chunk: Int[Array, ""], *, level: Tiles) -> Float[Array, "t r"]:
    """The share of each token of a chunk in each read: of each point, the column's hat times the row's."""
    rows = []
    for row in range(level.rows):
        at = pl.ds(chunk * level.rows + row, 1)
        rows.append(sum(column[point, : level.columns] * share[point, at] for point in range(level.count)))
    return jnp.concatenate(rows)


def _hat(position: Float[Array, " r"], size: int) -> Float[Array, "t r"]:
    return jnp.maximum(1 - jnp.abs(position[None] - _index(size)), 0)


def _slope(position: Float[Array, " r"], size: int) -> Float[Array, "t r"]:
    """The hat's derivative; at a hat's corners that of its right side, as with a floor."""
    index, left = _index(size), jnp.floor(position)[None]
    return jnp.where(index == left, -1.0, jnp.where(index == left + 1, 1.0, 0.0))


def _index(size: int) -> Float[Array, "t r"]:
    return jax.lax.broadcasted_iota(jnp.int32, (size, LANES), 0).astype(jnp.float32)


def _heads(plan: Plan) -> list[Array]:
    """For each head of the group, which of the tile's reads are its own."""
    read = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1) + pl.program_id(2) * LANES
    starts = [head * plan.queries for head in range(plan.group)]
    return [(read >= start) & (read < start + plan.queries) for start in starts]


def _folded(array: Float[Array, "t r"]) -> Float[Array, "8 r"]:
    """The sum of every eighth row."""
    return functools.reduce(jnp.add, [array[row : row + SUBLANES] for row in range(0, len(array), SUBLANES)])


def _lengthened(array: Float[Array, "t r"], size: int) -> Float[Array, "l r"]:
    missing = size - len(array)
    return jnp.concatenate([array, jnp.zeros((missing, array.shape[1]), array.dtype)]) if missing else array


def _tokens(chunk: Int[Array, ""], level: Tiles) -> Any:
    return pl.ds(pl.multiple_of(level.first + chunk * level.tokens, PACKED), level.tokens)


def _lanes(chunk: Int[Array, ""], level: Tiles) -> Any:
    return pl.ds(pl.multiple_of(level.first_lane + chunk * level.lanes, LANES), level.lanes)


def _product(one: Float[Array, "a c"], other: Float[Array, "d f"], *, over: tuple[int, int]) -> Float[Array, "g h"]:
    """The product of two matrices over one axis of each, summed in float32; of float32 matrices, in full precision."""
    precision = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else None
    axes = (over[:1], over[1:]), ((), ())
    return jax.lax.dot_general(one, other, axes, precision=precision, preferred_element_type=jnp.float32)


def _values_block(plan: Plan) -> pl.BlockSpec:
    return pl.BlockSpec((1, plan.tokens, plan.width), lambda image, group, tile: (image, 0, group))


def _reads_block(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, size, LANES), lambda image, group, tile: (image, group, 0, tile))


def _points_blocks(plan: Plan) -> Points:
    return Points(*[_reads_block(plan.points)] * 3)


def _hats_scratch(plan: Plan) -> tuple[Ref, Ref]:
    count = max(level.count for level in plan.levels)
    columns, rows = (max(sides) for sides in zip(*((each.columns, each.all_rows) for each in plan.levels), strict=True))
    return pltpu.VMEM((count, columns, LANES), jnp.float32), pltpu.VMEM((count, rows, LANES), jnp.float32)


def _parameters(
    scratch: Sequence[Ref], dtype: DTypeLike, *, plan: Plan, blocks: int
) -> pltpu.CompilerParams:
    """Images and groups of heads in any order; the tiles of each one after the other. With the VMEM that this takes."""
    held = sum(math.prod(each.shape) * jnp.dtype(each.dtype).itemsize for each in scratch)
    held += blocks * plan.tokens * max(plan.width, LANES) * jnp.dtype(dtype).itemsize
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=held + SPARE
    )


def _cost(*arrays: Array, plan: Plan, products: int, operations: int) -> pl.CostEstimate:
    """Bytes of all arrays; a multiplication and an addition for each channel and product of a share,
    and so many operations for each point of it."""
    return pl.CostEstimate(
        flops=0, transcendentals=0, bytes_accessed=sum(each.size * each.dtype.itemsize for each in arrays)
    )
