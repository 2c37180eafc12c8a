"""Which query for which target: the exact linear assignment of many small problems at once, inside the graph."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

LARGEST_COST = 1e30
TURNS_ON_GPUS = 8
"""In one turn of the loop: after each the host looks whether it was the last, which takes as long as several."""


class _Search(NamedTuple):
    """Where one problem stands. The letter c stands for columns: the queries, then the places of targets without one.

    `held` is the column of every row (-1: none yet), `prices` the dual variables of the columns. The rest is one
    Dijkstra search for the cheapest way to give one more row a column: `distances` of the columns from that row,
    the row each was reached from (`parents`), those that are final (`closed`), the `row` to go on from and its
    distance (`reach`). Once a free column is found, `turn` is the column to hand to its parent, else -1.
    """

    held: Int[Array, " t"]
    prices: Float[Array, " c"]
    distances: Float[Array, " c"]
    parents: Int[Array, " c"]
    closed: Bool[Array, " c"]
    row: Int[Array, ""]
    reach: Float[Array, ""]
    turn: Int[Array, ""]


def assign(cost: Float[Array, "*b q t"], mask: Bool[Array, "*b t"]) -> Int[Array, "*b t"]:
    """The query of every target in the one-to-one matching of least total cost.

    -1 for targets that `mask` leaves out, and for those left over where there are more targets than queries. Works in
    float32. A cost that is NaN, infinite or beyond 1e30 counts as worse than any matching without it, so the result is
    always a matching. Equal costs go to the lowest index, so the result is the same on every run and device.

    All problems share one loop, in which each advances its own search by one row: no problem waits for another before
    the end, a target that the mask leaves out costs no turn, and one program serves any number of targets. Most
    targets never enter the loop: those whose cheapest query no earlier target wants have it from the start.

    Source: shortest augmenting paths, Jonker and Volgenant 1987, in the rectangular form of Crouse 2016
    (doi 10.1109/TAES.2016.140952), which is also what SciPy's `linear_sum_assignment`, the reference's matcher, does.
    Row potentials are never stored: a held pair has reduced cost zero, which gives them, and exactly so in float32.
    """
    if mask.shape[-1] == 0:
        return jnp.zeros(mask.shape, int)
    table, taken = _tables(lax.stop_gradient(cost).astype(jnp.float32), mask)
    start, step, waiting = _start, _step, _waiting
    for _ in range(mask.ndim - 1):
        start, step, waiting = jax.vmap(start), jax.vmap(step), jax.vmap(waiting)

    def turn(search: _Search, *, steps: int) -> _Search:
        for _ in range(steps):
            search = step(search, table, taken, mask)
        return search

    one, several = (partial(turn, steps=steps) for steps in (1, TURNS_ON_GPUS))
    search = lax.while_loop(
        lambda search: jnp.any(waiting(search, mask)),
        lambda search: lax.platform_dependent(search, cuda=several, rocm=several, default=one),
        start(table, taken, mask),
    )
    return jnp.where(search.held < cost.shape[-2], search.held, -1)


def _tables(
    cost: Float[Array, "*b q t"], mask: Bool[Array, "*b t"]
) -> tuple[Float[Array, "*b t c"], Bool[Array, "*b c"]]:
    """The costs as rows of targets, each row less its minimum, and the columns that no row may have.

    Every row must have a column, so that surplus targets get as many further columns, at a price equal for all.
    Subtracting a row's minimum changes no matching and leaves the small differences their float32 digits.
    """
    queries, targets = cost.shape[-2:]
    table = cost.swapaxes(-1, -2)
    usable = (jnp.abs(table) <= LARGEST_COST) & mask[..., None]  # False for NaN too
    lowest = jnp.min(table, axis=(-1, -2), keepdims=True, where=usable, initial=LARGEST_COST)
    highest = jnp.max(table, axis=(-1, -2), keepdims=True, where=usable, initial=-LARGEST_COST)
    any_usable = jnp.any(usable, axis=(-1, -2), keepdims=True)
    lowest, highest = jnp.where(any_usable, lowest, 0.0), jnp.where(any_usable, highest, 0.0)
    worst = highest + (1.0 + highest - lowest) * min(queries, targets)
    table = jnp.where(usable, table, worst)

    surplus = max(targets - queries, 0)
    spare = jnp.broadcast_to(highest, (*table.shape[:-1], surplus))
    table = jnp.concatenate([table, spare], axis=-1)
    columns = jnp.maximum(queries, jnp.sum(mask, axis=-1, keepdims=True))
    taken = jnp.arange(queries + surplus) >= columns
    table = jnp.where(taken[..., None, :], jnp.inf, table)
    return table - jnp.min(table, axis=-1, keepdims=True), taken


def _waiting(search: _Search, mask: Bool[Array, " t"]) -> Bool[Array, " t"]:
    return mask & (search.held < 0)


def _start(table: Float[Array, "t c"], taken: Bool[Array, " c"], mask: Bool[Array, " t"]) -> _Search:
    """Gives each row its cheapest column where no earlier row has the same one, which is optimal as far as it goes."""
    rows, columns = table.shape
    cheapest = _first(table == 0.0)
    earlier = jnp.tril(jnp.ones((rows, rows), bool), -1)
    wanted_before = jnp.any(earlier & mask & (cheapest[:, None] == cheapest), axis=-1)
    search = _Search(
        held=jnp.where(mask & ~wanted_before, cheapest, -1),
        prices=jnp.zeros(columns, table.dtype),
        distances=jnp.zeros(columns, table.dtype),
        parents=jnp.zeros(columns, int),
        closed=taken,
        row=jnp.array(0),
        reach=jnp.zeros((), table.dtype),
        turn=jnp.array(-1),
    )
    return _next_row(search, taken, mask)


def _next_row(search: _Search, taken: Bool[Array, " c"], mask: Bool[Array, " t"]) -> _Search:
    """Begins the search for the first row that still waits."""
    return search._replace(
        distances=jnp.full_like(search.distances, jnp.inf),
        closed=taken,
        row=_first(_waiting(search, mask)),
        reach=jnp.zeros_like(search.reach),
        turn=jnp.full_like(search.turn, -1),
    )


def _step(search: _Search, table: Float[Array, "t c"], taken: Bool[Array, " c"], mask: Bool[Array, " t"]) -> _Search:
    """One turn of one problem: looks around from one row, or hands over one column; nothing once all are served.

    Finding the free column and handing it over are one turn, so are the last handing over and the next row's choice.
    """
    search = _choose(search.turn < 0, _look(search, table), search)
    handed = _hand_over(search)
    served = (search.turn >= 0) & (handed.turn < 0)
    handed = _choose(served, _next_row(handed, taken, mask), handed)
    moved = _choose(search.turn >= 0, handed, search)
    return moved._replace(held=jnp.where(jnp.any(_waiting(search, mask)), moved.held, search.held))


def _look(search: _Search, table: Float[Array, "t c"]) -> _Search:
    """Closes the nearest column, reached perhaps from `row`; if no row holds it, settles the prices."""
    own = search.held[search.row]
    reduced = table[search.row] - search.prices
    ways = reduced + jnp.where(own < 0, 0.0, search.reach - reduced[own])
    shorter = ~search.closed & (ways < search.distances)
    distances = jnp.where(shorter, ways, search.distances)
    parents = jnp.where(shorter, search.row, search.parents)

    open_distances = jnp.where(search.closed, jnp.inf, distances)
    reach = jnp.min(open_distances)
    nearest = _first(open_distances == reach)
    holders = search.held == nearest
    free = ~jnp.any(holders)
    passed = search.closed & jnp.isfinite(distances)
    return search._replace(
        prices=jnp.where(free & passed, search.prices + distances - reach, search.prices),
        distances=distances,
        parents=parents,
        closed=search.closed | (jnp.arange(search.closed.size) == nearest),
        row=_first(holders),
        reach=reach,
        turn=jnp.where(free, nearest, -1),
    )


def _hand_over(search: _Search) -> _Search:
    """Gives the column `turn` to its parent row, whose own column is next; the row that had none is the last."""
    row = search.parents[search.turn]
    rows = jnp.arange(search.held.shape[0])
    return search._replace(held=jnp.where(rows == row, search.turn, search.held), turn=search.held[row])


def _first(condition: Bool[Array, "*b n"]) -> Int[Array, "*b"]:
    """The lowest index where `condition` holds. As a plain minimum, which a CPU does far faster than an argmax."""
    size = condition.shape[-1]
    return jnp.min(jnp.where(condition, jnp.arange(size), size - 1), axis=-1)


def _choose(first: Bool[Array, ""], this: _Search, other: _Search) -> _Search:
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), this, other)
