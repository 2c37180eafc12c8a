"""How the kernels of deformable sampling cut their work: pyramids into padded chunks of rows, queries into tiles."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rtdetrv2_jax.arrays import Sizes

LANES = 128
SUBLANES = 8
PACKED = 16
"""Rows of a bfloat16 tile: chunks begin and end at multiples of it, whatever the type."""
CHUNK = 1280
"""The most tokens a chunk has: what a turn of the kernels' loops handles, written out."""


class Tiles(NamedTuple):
    """One level as the kernels see it: `chunks` of `rows` rows, each padded to `columns` columns.

    `first` is its first token among the padded ones; `first_lane` the same where tokens lie along lanes, and each
    chunk takes `lanes` of them. Its sampling points are those from `points[0]` to `points[1]`.
    """

    height: int
    width: int
    rows: int
    columns: int
    chunks: int
    lanes: int
    first: int
    first_lane: int
    points: tuple[int, int]

    @property
    def count(self) -> int:
        """Its sampling points."""
        return self.points[1] - self.points[0]

    @property
    def all_rows(self) -> int:
        """Rows of all chunks."""
        return self.chunks * self.rows

    @property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        return self.rows * self.columns


class Plan(NamedTuple):
    """All levels; `group` heads of `channels` channels lie side by side in the lanes that a grid cell reads.

    A grid cell computes a tile of 128 reads: the queries of its heads one after the other, the last tile padded.
    """

    levels: tuple[Tiles, ...]
    queries: int
    group: int
    channels: int

    @property
    def tokens(self) -> int:
        """All padded tokens."""
        return self.levels[-1].first + self.levels[-1].chunks * self.levels[-1].tokens

    @property
    def token_lanes(self) -> int:
        """All padded tokens, where they lie along lanes."""
        return self.levels[-1].first_lane + self.levels[-1].chunks * self.levels[-1].lanes

    @property
    def width(self) -> int:
        """Channels of a group of heads together."""
        return self.group * self.channels

    @property
    def points(self) -> int:
        """Sampling points of all levels."""
        return self.levels[-1].points[1]

    @property
    def reads(self) -> int:
        """Reads of a group of heads, in whole tiles."""
        return _up(self.group * self.queries, LANES)


def plan(sizes: Sizes, points: tuple[int, ...], *, queries: int, heads: int, channels: int) -> Plan | None:
    """How to cut this work; None where heads do not fit lanes, and the kernels do not apply."""
    group = min(heads, max(1, LANES // channels))
    whole = group == heads or group * channels % LANES == 0
    if channels % PACKED or heads % group or not whole or not queries:
        return None
    levels: list[Tiles] = []
    first = first_lane = first_point = 0
    for (height, width), count in zip(sizes, points, strict=True):
        columns = _up(width, SUBLANES)
        rows = _rows(height, columns)
        chunks, lanes = -(-height // rows), _up(rows * columns, LANES)
        ends = first_point, first_point + count
        levels.append(Tiles(height, width, rows, columns, chunks, lanes, first, first_lane, ends))
        first, first_lane, first_point = first + chunks * rows * columns, first_lane + chunks * lanes, ends[1]
    return Plan(tuple(levels), queries, group, channels)


def padded(values: Float[Array, "b s d"], plan: Plan) -> Float[Array, "b t d"]:
    """The tokens with zeros after each row and after the last row of each level, so that chunks are aligned."""
    batch, _, width = values.shape
    if all(level.columns == level.width and level.chunks * level.rows == level.height for level in plan.levels):
        return values
    parts, start = [], 0
    for level in plan.levels:
        stop = start + level.height * level.width
        part = values[:, start:stop].reshape(batch, level.height, level.width, width)
        missing = (0, level.chunks * level.rows - level.height), (0, level.columns - level.width)
        parts.append(jnp.pad(part, ((0, 0), *missing, (0, 0))).reshape(batch, -1, width))
        start = stop
    return jnp.concatenate(parts, axis=1)


def _rows(height: int, columns: int) -> int:
    """Rows of a chunk: those that waste the fewest rows of the level and lanes of its chunks."""
    step = 1 if columns % PACKED == 0 else 2
    most = max(step, min(CHUNK // columns, height + height % step))

    def cost(rows: int) -> int:
        return -(-height // rows) * (rows * columns + _up(rows * columns, LANES) // 2 + LANES)

    return min(range(step, most + 1, step), key=cost)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
