"""Deformable sampling as products of matrices, for TPUs: no gather and no scatter, forward or backward.

A bilinear read is a sum over all tokens of a level, most of them with no share: token (row, column) has hat(y - row)
hat(x - column), where hat(d) = max(0, 1 - |d|). So the reads of all queries are a product: of the values, and a matrix
of tokens by reads that already sums over the points of each. A TPU has no instruction that reads memory at a vector of
addresses, and matrix units that are idle meanwhile: hundreds of times the arithmetic takes a fraction of the time, as
long as that matrix never leaves VMEM, where the kernels make it piece by piece.

With bfloat16 values the shares are rounded to bfloat16 too, as the matrix units want them; sums, and the gradients of
locations and weights, are float32. So is everything where values are float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rtdetrv2_jax.ops.sampling_kernels import Points, read_backward, read_forward
from rtdetrv2_jax.ops.sampling_tiles import Plan, padded
from rtdetrv2_jax.sharding import each_share


def read_multiplied(
    values: Float[Array, "b s n e"],
    locations: Float[Array, "b q n p 2"],
    weights: Float[Array, "b q n p"],
    *,
    plan: Plan,
    interpret: bool = False,
) -> Float[Array, "b q n e"]:
    """What bilinear sampling reads. `interpret` runs the kernels where there is no TPU, slowly: for tests."""
    batch, queries, heads, channels = *weights.shape[:3], values.shape[3]
    sides = [(level.width, level.height) for level in plan.levels for _ in range(level.point_count)]
    places = locations * np.array(sides, np.float32) - 0.5
    points = Points(places[..., 0], places[..., 1], weights)
    tiled = [_tiled(each, plan) for each in points]
    read = _read(padded(values.reshape(batch, -1, heads * channels), plan), *tiled, plan, interpret)
    read = read[..., : plan.group * queries].reshape(batch, -1, channels, plan.group, queries)
    return read.transpose(0, 4, 1, 3, 2).reshape(batch, queries, heads, channels)


def _tiled(points: Float[Array, "b q n p"], plan: Plan) -> Float[Array, "b g p r"]:
    """Reads along lanes, those of the heads of a group one after the other."""
    batch, queries, heads, count = points.shape
    grouped = points.reshape(batch, queries, heads // plan.group, plan.group, count).transpose(0, 2, 4, 3, 1)
    flat = grouped.reshape(batch, heads // plan.group, count, plan.group * queries)
    return jnp.pad(flat, ((0, 0), (0, 0), (0, 0), (0, plan.reads - flat.shape[-1])))


def _forward(values: Array, x: Array, y: Array, weight: Array, plan: Plan, interpret: bool) -> Array:
    def read(values: Array, x: Array, y: Array, weight: Array) -> Array:
        return read_forward(values, Points(x, y, weight), plan=plan, interpret=interpret)

    return each_share(read, values, x, y, weight)


def _saving(
    values: Array, x: Array, y: Array, weight: Array, plan: Plan, interpret: bool
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    return _forward(values, x, y, weight, plan, interpret), (values, x, y, weight)


def _backward(
    plan: Plan, interpret: bool, saved: tuple[Array, Array, Array, Array], change: Array
) -> tuple[Array, Array, Array, Array]:
    def changes(values: Array, x: Array, y: Array, weight: Array, change: Array) -> tuple[Array, Array, Array, Array]:
        found = read_backward(values, Points(x, y, weight), change, plan=plan, interpret=interpret)
        return found[0], *found[1]

    return each_share(changes, *saved, change)


_read = jax.custom_vjp(_forward, nondiff_argnums=(4, 5))
_read.defvjp(_saving, _backward)
