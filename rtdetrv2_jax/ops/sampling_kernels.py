"""The kernels of deformable sampling on TPUs, forward and backward.

A cell of the grid is an image, a group of heads and a tile of 128 reads, which lie along lanes. All tokens of the image
stay in VMEM while the tiles of its reads pass. For each level the hats of the points' columns and rows are written
out once a tile; then, a chunk of rows at a time, the share of every token in every read is made of them, for the
matrix units to multiply with the values.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Float, Int

from rtdetrv2_jax.ops.sampling_tiles import LANES, PACKED, SUBLANES, Chunk, Plan, Tiles

Ref = Any
"""A block of an array, or scratch, in VMEM."""

Carry = TypeVar("Carry")

SPARE = 12 * 2**20
"""Bytes of VMEM beside scratch and the blocks of values: for small blocks, and what the compiler spills."""


class Points(NamedTuple):
    """Sampling points of the reads of each group of heads (g): columns, rows and weights, float32."""

    x: Float[Array, "b g p r"]
    y: Float[Array, "b g p r"]
    weight: Float[Array, "b g p r"]


class Run(NamedTuple):
    """Tokens of a chunk that lie in the same row, some eights of them; or eight that lie in several rows."""

    rows: range
    start: int
    size: int


class Hats(NamedTuple):
    """Of the points of one level, [points, columns or rows, lanes]: hats, their slopes, and row hats times weights."""

    column: Ref
    row_share: Ref
    column_slope: Ref
    row: Ref
    row_slope: Ref


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
            column[point, : level.period] = _hat(x[0, 0, at], _columns(level))
            share[point, : level.height] = _hat(y[0, 0, at], _index(level.height)) * weight[0, 0, at][None]

        def add(chunk: Chunk, total: Float[Array, "d r"], level: Tiles = level) -> Float[Array, "d r"]:
            matrix = _lengthened(_shares(column, share, chunk, level=level).astype(values.dtype))
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
            hats.column[point, : level.period] = _hat(x[0, 0, at], _columns(level))
            hats.column_slope[point, : level.period] = _slope(x[0, 0, at], _columns(level))
            hats.row[point, : level.height] = _hat(y[0, 0, at], _index(level.height))
            hats.row_slope[point, : level.height] = _slope(y[0, 0, at], _index(level.height))
            hats.row_share[point, : level.height] = hats.row[point, : level.height] * weight[0, 0, at][None]

        def add(chunk: Chunk, sums: tuple[Points, ...], level: Tiles = level) -> tuple[Points, ...]:
            tokens = pl.ds(chunk.token, chunk.rows * level.width)
            matrix = _shares(hats.column, hats.row_share, chunk, level=level).astype(values.dtype)
            total[tokens] += _product(matrix, spread, over=(1, 1))
            return _sums(_product(values[0, tokens], spread, over=(1, 0)), hats, chunk, sums, level=level)

        zero = jnp.zeros((SUBLANES, LANES), jnp.float32)
        sums = _each_chunk(level, add, (Points(zero, zero, zero),) * level.count)
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


def _sums(
    product: Float[Array, "t r"], hats: Hats, chunk: Chunk, sums: tuple[Points, ...], *, level: Tiles
) -> tuple[Points, ...]:
    """Sums of a chunk added to those before it: of value times gradient, under each point's hats and their slopes.

    Each is kept as eight sums, of every eighth token.
    """
    found = list(sums)
    for run in _runs(chunk, level):
        part = _part(product, run)
        at = pl.ds(run.start % level.period, run.size)
        for point in range(level.count):
            read = _folded(part * hats.column[point, at])
            sloped = _folded(part * hats.column_slope[point, at])
            height = _row(hats.row, point, chunk, run, level=level)
            slope = _row(hats.row_slope, point, chunk, run, level=level)
            x, y, weight = found[point]
            found[point] = Points(x + sloped * height, y + read * slope, weight + read * height)
    return tuple(found)


def _shares(column: Ref, share: Ref, chunk: Chunk, *, level: Tiles) -> Float[Array, "t r"]:
    """The share of each token of a chunk in each read: of each point, the column's hat times the row's."""
    parts = []
    for run in _runs(chunk, level):
        at = pl.ds(run.start % level.period, run.size)
        products = [
            column[point, at] * _row(share, point, chunk, run, level=level) for point in range(level.count)
        ]
        parts.append(functools.reduce(jnp.add, products))
    return jnp.concatenate(parts)[: chunk.rows * level.width]


def _runs(chunk: Chunk, level: Tiles) -> Iterator[Run]:
    """The tokens of a chunk by eights; the last eight may end below the chunk."""
    starts = range(0, chunk.rows * level.width, SUBLANES)
    rows = [range(start // level.width, (start + SUBLANES - 1) // level.width + 1) for start in starts]
    for own, run in itertools.groupby(zip(rows, starts, strict=True), key=operator.itemgetter(0)):
        eights = [start for _, start in run]
        if len(own) == 1:
            yield Run(own, eights[0], len(eights) * SUBLANES)
        else:
            yield from (Run(own, start, SUBLANES) for start in eights)


def _row(hats: Ref, point: int, chunk: Chunk, run: Run, *, level: Tiles) -> Float[Array, "..."]:
    """The hats of the rows of a run: of its one row, or of each of its eight tokens. Below the chunk they are zero."""

    def of(row: int) -> Any:
        return hats[point, pl.ds(chunk.row + row, 1)] if row < chunk.rows else 0.0

    found = of(run.rows[0])
    token = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    for row in run.rows[1:]:
        found = jnp.where(token >= row * level.width - run.start, of(row), found)
    return found


def _part(array: Float[Array, "t r"], run: Run) -> Float[Array, "u r"]:
    """A run's tokens; zeros beyond the end of the array."""
    part = array[run.start : run.start + run.size]
    missing = run.size - len(part)
    return jnp.concatenate([part, jnp.zeros((missing, LANES), part.dtype)]) if missing else part


def _folded(array: Float[Array, "t r"]) -> Float[Array, "8 r"]:
    """The sum of every eighth row."""
    return array.reshape(-1, SUBLANES, LANES).sum(0)


def _hat(position: Float[Array, " r"], index: Float[Array, "t r"]) -> Float[Array, "t r"]:
    return jnp.maximum(1 - jnp.abs(position[None] - index), 0)


def _slope(position: Float[Array, " r"], index: Float[Array, "t r"]) -> Float[Array, "t r"]:
    """The hat's derivative; at a hat's corners that of its right side, as with a floor."""
    left = jnp.floor(position)[None]
    return jnp.where(index == left, -1.0, jnp.where(index == left + 1, 1.0, 0.0))


def _index(size: int) -> Float[Array, "t r"]:
    return jax.lax.broadcasted_iota(jnp.int32, (size, LANES), 0).astype(jnp.float32)


def _columns(level: Tiles) -> Float[Array, "t r"]:
    """The column of each token of a period."""
    token = _index(level.period)
    return token if level.period <= level.width else token - level.width * jnp.floor((token + 0.5) / level.width)


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


def _points_blocks(plan: Plan) -> Points:
    return Points(*[_reads_block(plan.points)] * 3)


def _hats_scratch(plan: Plan) -> tuple[Ref, Ref]:
    count, columns, rows = map(max, zip(*((each.count, each.period, each.height) for each in plan.levels), strict=True))
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
    """What the kernels do for each token and read: products with all channels of the group, in two operations each, and
    so many operations for each point. And the bytes of all arrays, which cross once."""
    batch, groups = arrays[0].shape[0], arrays[0].shape[2] // plan.width
    shares = batch * groups * plan.reads * sum(level.height * level.width * level.count for level in plan.levels)
    pairs = batch * groups * plan.reads * plan.tokens
    return pl.CostEstimate(
        flops=2 * products * plan.width * pairs + operations * shares,
        transcendentals=0,
        bytes_accessed=sum(each.size * each.dtype.itemsize for each in arrays),
    )
