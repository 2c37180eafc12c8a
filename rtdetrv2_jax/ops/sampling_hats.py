"""What the kernels of deformable sampling compute of a chunk of a level: shares of tokens, and sums over them.

A token's share in a read is a product of two hats, the column's and the row's; see `sampling_matmul`. Reads lie along
lanes, and tokens eight by eight one above the other. Hats of columns are the same in every row, those of rows in every
column: only products are as many as tokens.
"""

import functools
import itertools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from rtdetrv2_jax.ops.sampling_tiles import LANES, SUBLANES, Chunk, Tiles

Ref = Any
"""A block of an array, or scratch, in VMEM."""


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


def sums_of(
    product: Float[Array, "t r"], hats: Hats, chunk: Chunk, sums: tuple[Points, ...], *, level: Tiles
) -> tuple[Points, ...]:
    """Sums of a chunk added to those before it: of value times gradient, under each point's hats and their slopes.

    Each is kept as eight sums, of every eighth token.
    """
    found = list(sums)
    for run in _runs(chunk, level):
        part = _part(product, run)
        at = pl.ds(run.start % level.period, run.size)
        for point in range(level.point_count):
            read = _folded(part * hats.column[point, at])
            sloped = _folded(part * hats.column_slope[point, at])
            height = _row(hats.row, point, chunk, run, level=level)
            slope = _row(hats.row_slope, point, chunk, run, level=level)
            x, y, weight = found[point]
            found[point] = Points(x + sloped * height, y + read * slope, weight + read * height)
    return tuple(found)


def shares_of(column: Ref, share: Ref, chunk: Chunk, *, level: Tiles) -> Float[Array, "t r"]:
    """The share of each token of a chunk in each read: of each point, the column's hat times the row's."""
    parts = []
    for run in _runs(chunk, level):
        at = pl.ds(run.start % level.period, run.size)
        products = [
            column[point, at] * _row(share, point, chunk, run, level=level) for point in range(level.point_count)
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


def hat(position: Float[Array, " r"], index: Float[Array, "t r"]) -> Float[Array, "t r"]:
    """How much of a row or column a position reads: 1 on it, 0 one away and farther."""
    return jnp.maximum(1 - jnp.abs(position[None] - index), 0)


def slope(position: Float[Array, " r"], index: Float[Array, "t r"]) -> Float[Array, "t r"]:
    """The hat's derivative; at a hat's corners that of its right side, as with a floor."""
    left = jnp.floor(position)[None]
    return jnp.where(index == left, -1.0, jnp.where(index == left + 1, 1.0, 0.0))


def index_of(size: int) -> Float[Array, "t r"]:
    """0, 1, 2, ... downwards, the same in all lanes."""
    return jax.lax.broadcasted_iota(jnp.int32, (size, LANES), 0).astype(jnp.float32)


def columns_of(level: Tiles) -> Float[Array, "t r"]:
    """The column of each token of a period."""
    token = index_of(level.period)
    return token if level.period <= level.width else token - level.width * jnp.floor((token + 0.5) / level.width)
