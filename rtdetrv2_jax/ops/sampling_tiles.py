"""How the kernels of deformable sampling cut their work: levels into chunks of rows, reads into tiles."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rtdetrv2_jax.arrays import Sizes

LANES = 128
SUBLANES = 8
PACKED = 16
"""Rows of a bfloat16 tile: where a chunk begins is a multiple of it, whatever the type."""
CHUNK = 1280
"""About the most tokens of a chunk: the kernels' loops handle one a turn, written out."""


MOST_TOKENS = 20_000
"""Of what an image may have: in float32, the backward kernel holds five arrays of 128 of each in VMEM, 49 MiB."""


class Chunk(NamedTuple):
    """Whole rows of a level. `row` is its first one; `token` and `lane` where it begins among all levels' tokens."""

    row: int | Array
    token: int | Array
    lane: int | Array
    rows: int


class Tiles(NamedTuple):
    """One level: `chunks` chunks of `rows` rows, then what is left of the `height`.

    `token` and `lane` are where it begins, with tokens one above the other and side by side; there each chunk begins
    at a multiple of 128. Its sampling points are those from `points[0]` to `points[1]`.
    """

    height: int
    width: int
    rows: int
    token: int
    lane: int
    points: tuple[int, int]

    @property
    def point_count(self) -> int:
        """Sampling points of the level."""
        return self.points[1] - self.points[0]

    @property
    def period(self) -> int:
        """After how many tokens, in steps of eight, columns repeat."""
        return min(math.lcm(self.width, SUBLANES), round_up(self.rows * self.width, SUBLANES))

    @property
    def chunks(self) -> int:
        """Chunks of the full number of rows."""
        return self.height // self.rows

    @property
    def lanes(self) -> int:
        """Lanes of a full chunk."""
        return round_up(self.rows * self.width, LANES)

    @property
    def last(self) -> Chunk | None:
        """The chunk of the rows that are left, where some are."""
        row = self.chunks * self.rows
        start = self.token + row * self.width, self.lane + self.chunks * self.lanes
        return Chunk(row, *start, self.height - row) if row < self.height else None

    @property
    def end_lane(self) -> int:
        """Where the next level begins."""
        last = 0 if self.last is None else round_up(self.last.rows * self.width, LANES)
        return self.lane + self.chunks * self.lanes + last


class Plan(NamedTuple):
    """All levels; `group` heads of `channels` channels lie side by side in the lanes that a cell of the grid reads.

    A cell computes a tile of 128 reads: the queries of its heads, one head after the other; the last tile is padded.
    """

    levels: tuple[Tiles, ...]
    queries: int
    group: int
    channels: int

    @property
    def tokens(self) -> int:
        """All tokens, with those between levels."""
        return self.levels[-1].token + self.levels[-1].height * self.levels[-1].width

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
        return round_up(self.group * self.queries, LANES)


def plan(sizes: Sizes, points: tuple[int, ...], *, queries: int, heads: int, channels: int) -> Plan | None:
    """How to cut this work; None where heads do not fit lanes, or images VMEM, and the kernels do not apply."""
    group = min(heads, max(1, LANES // channels))
    if channels % PACKED or heads % group or (group < heads and group * channels % LANES) or not queries:
        return None
    levels: list[Tiles] = []
    token = lane = point = 0
    for (height, width), count in zip(sizes, points, strict=True):
        levels.append(Tiles(height, width, _rows(height, width), token, lane, (point, point + count)))
        token, lane, point = round_up(token + height * width, PACKED), levels[-1].end_lane, point + count
    found = Plan(tuple(levels), queries, group, channels)
    return found if found.tokens * max(found.width, LANES) <= MOST_TOKENS * LANES else None


def padded(values: Float[Array, "b s d"], plan: Plan) -> Float[Array, "b t d"]:
    """The tokens with zeros between levels where one would not begin at a multiple of 16; none in images of 640."""
    if values.shape[1] == plan.tokens:
        return values
    parts, start, stop = [], 0, 0
    for level in plan.levels:
        gap = level.token - sum(part.shape[1] for part in parts)
        stop = start + level.height * level.width
        parts.append(jnp.pad(values[:, start:stop], ((0, 0), (gap, 0), (0, 0))))
        start = stop
    return jnp.concatenate(parts, axis=1)


def round_up(size: int, multiple: int) -> int:
    """The next multiple that is not less."""
    return -(-size // multiple) * multiple


def _rows(height: int, width: int) -> int:
    """Rows of a chunk: those that waste the fewest lanes and turns. Two chunks are at least 16 tokens apart."""
    step = PACKED // math.gcd(width, PACKED)

    def cost(rows: int) -> int:
        chunks, rest = divmod(height, rows)
        sizes = [rows * width] * chunks + [rest * width] * (rest > 0)
        return sum(round_up(size, LANES) + LANES for size in sizes)

    several = [rows for rows in range(step, height, step) if rows * width <= CHUNK]
    whole = [height] if height * width <= CHUNK or height <= step else []
    return min(several + whole or [step], key=cost)
