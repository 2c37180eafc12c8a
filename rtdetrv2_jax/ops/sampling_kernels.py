"""The kernels of deformable sampling on TPUs, forward and backward.

A cell of the grid is an image, a group of heads and a tile of 128 reads, which lie along lanes. All tokens of the image
stay in VMEM while the tiles of its reads pass. For each level the hats of the points' columns and rows are written
out once a tile; then, a chunk of rows at a time, the share of every token in every read is made of them, for the
matrix units to multiply with the values.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Float, Int

from rtdetrv2_jax.ops.sampling_hats import Hats, Points, Ref, columns_of, hat, index_of, shares_of, slope, sums_of
from rtdetrv2_jax.ops.sampling_tiles import LANES, PACKED, SUBLANES, Chunk, Plan, Tiles

Carry = TypeVar("Carry")

SPARE = 12 * 2**20
"""Bytes of VMEM beside scratch and the blocks of values: for small blocks, and what the compiler spills."""


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def read_forward(
    values: Float[Array, "b t d"], points: Points, *, plan: Plan, interpret: bool
) -> Float[Array, "b g e r"]:
    """What each read is. Jitted, so that the layers of a decoder trace it once."""
    grid = *points.x.shape[:2], plan.reads // LANES
    column, row = _hats_scratch(plan)
    scratch = [pltpu.VMEM((plan.width, plan.levels[-1].end_lane), values.dtype), column, row]
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


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
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
            column[point, : level.period] = hat(x[0, 0, at], columns_of(level))
            share[point, : level.height] = hat(y[0, 0, at], index_of(level.height)) * weight[0, 0, at][None]

        def add(chunk: Chunk, total: Float[Array, "d r"], level: Tiles = level) -> Float[Array, "d r"]:
            matrix = _lengthened(shares_of(column, share, chunk, level=level).astype(values.dtype))
            return total + _product(turned[:, pl.ds(chunk.lane, len(matrix))], matrix, over=(1, 0))

        total = _each_chunk(level, add, total)
    heads = total.reshape(plan.group, plan.channels, LANES)
    own = sum(jnp.where(mask, head, 0) for mask, head in zip(_heads(plan), heads, strict=True))
    read[0, 0] = jnp.asarray(own, read.dtype)


def _turn(values: Ref, turned: Ref, *, plan: Plan) -> None:
    """Writes the values as the forward product wants them: tokens along lanes."""
    for level in plan.levels:

        def turn(chunk: Chunk, _: None, level: Tiles = level) -> None:
            part = _lengthened(values[0, pl.ds(chunk.token, chunk.rows * level.width)])
            turned[:, pl.ds(chunk.lane, len(part))] = part.T

        _each_chunk(level, turn, None)


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
            hats.column[point, : level.period] = hat(x[0, 0, at], columns_of(level))
            hats.column_slope[point, : level.period] = slope(x[0, 0, at], columns_of(level))
            hats.row[point, : level.height] = hat(y[0, 0, at], index_of(level.height))
            hats.row_slope[point, : level.height] = slope(y[0, 0, at], index_of(level.height))
            hats.row_share[point, : level.height] = hats.row[point, : level.height] * weight[0, 0, at][None]

        def add(chunk: Chunk, sums: tuple[Points, ...], level: Tiles = level) -> tuple[Points, ...]:
            tokens = pl.ds(chunk.token, chunk.rows * level.width)
            matrix = shares_of(hats.column, hats.row_share, chunk, level=level).astype(values.dtype)
            total[tokens] += _product(matrix, spread, over=(1, 1))
            return sums_of(_product(values[0, tokens], spread, over=(1, 0)), hats, chunk, sums, level=level)

        zero = jnp.zeros((SUBLANES, LANES), jnp.float32)
        sums = _each_chunk(level, add, (Points(zero, zero, zero),) * level.point_count)
        for at, parts in zip(range(*level.points), sums, strict=True):
            weight_change[0, 0, at] = parts.weight.sum(0)
            x_change[0, 0, at] = parts.x.sum(0) * weight[0, 0, at]
            y_change[0, 0, at] = parts.y.sum(0) * weight[0, 0, at]

    last = tile == pl.num_programs(2) - 1
    pl.when(last)(lambda: values_change.__setitem__(0, total[...].astype(values_change.dtype)))


def _each_chunk(level: Tiles, handle: Callable[[Chunk, Carry], Carry], carry: Carry) -> Carry:
    """What is carried from each chunk of a level to the next: the full ones in a loop, then what is left."""

    def turn(index: Int[Array, ""], carry: Carry) -> Carry:
        token = pl.multiple_of(level.token + index * (level.rows * level.width), PACKED)
        lane = pl.multiple_of(level.lane + index * level.lanes, LANES)
        return handle(Chunk(index * level.rows, token, lane, level.rows), carry)

    if level.chunks == 1:
        carry = handle(Chunk(0, level.token, level.lane, level.rows), carry)
    elif level.chunks:
        carry = jax.lax.fori_loop(0, level.chunks, turn, carry)
    return carry if level.last is None else handle(level.last, carry)


def _heads(plan: Plan) -> list[Array]:
    """For each head of the group, which of the tile's reads are its own."""
    read = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1) + pl.program_id(2) * LANES
    starts = [head * plan.queries for head in range(plan.group)]
    return [(read >= start) & (read < start + plan.queries) for start in starts]


def _lengthened(array: Float[Array, "t r"]) -> Float[Array, "l r"]:
    """With rows of zeros, to a multiple of 128."""
    missing = -len(array) % LANES
    return jnp.concatenate([array, jnp.zeros((missing, array.shape[1]), array.dtype)]) if missing else array


def _product(one: Float[Array, "a c"], other: Float[Array, "d f"], *, over: tuple[int, int]) -> Float[Array, "g h"]:
    """The product of two matrices over one axis of each, summed in float32; of float32 matrices, in full precision."""
    precision = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else None
    axes = (over[:1], over[1:]), ((), ())
    return jax.lax.dot_general(one, other, axes, precision=precision, preferred_element_type=jnp.float32)


def _values_block(plan: Plan) -> pl.BlockSpec:
    return pl.BlockSpec((1, plan.tokens, plan.width), lambda image, group, tile: (image, 0, group))


def _reads_block(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, size, LANES), lambda image, group, tile: (image, group, 0, tile))


def _points_blocks(plan: Plan) -> list[pl.BlockSpec]:
    return [_reads_block(plan.points)] * 3


def _hats_scratch(plan: Plan) -> tuple[Ref, Ref]:
    count, columns, rows = map(
        max, zip(*((each.point_count, each.period, each.height) for each in plan.levels), strict=True)
    )
    return pltpu.VMEM((count, columns, LANES), jnp.float32), pltpu.VMEM((count, rows, LANES), jnp.float32)


def _parameters(scratch: Sequence[Ref], dtype: DTypeLike, *, plan: Plan, blocks: int) -> pltpu.CompilerParams:
    """Images and groups of heads in any order; the tiles of each one after the other. With the VMEM that this takes."""
    held = sum(math.prod(each.shape) * jnp.dtype(each.dtype).itemsize for each in scratch)
    held += blocks * plan.tokens * max(plan.width, LANES) * jnp.dtype(dtype).itemsize
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=held + SPARE
    )


def _cost(*arrays: Array, plan: Plan, products: int, operations: int) -> pl.CostEstimate:
    """What the kernels do for each token and read: so many products with each channel, and operations for each point.

    A product is two operations. All arrays, the first of which are the values, cross once.
    """
    batch, groups = arrays[0].shape[0], arrays[0].shape[2] // plan.width
    shares = batch * groups * plan.reads * sum(level.height * level.width * level.point_count for level in plan.levels)
    pairs = batch * groups * plan.reads * plan.tokens
    return pl.CostEstimate(
        flops=2 * products * plan.width * pairs + operations * shares,
        transcendentals=0,
        bytes_accessed=sum(each.size * each.dtype.itemsize for each in arrays),
    )
