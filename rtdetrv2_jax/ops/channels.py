"""Channel by channel: sums over all else, and normalisation by them, in loops that XLA for CPUs makes fast ones of.

A sum over many rows becomes there a loop that no vector unit helps; adding parts of the rows to each other, as a whole,
takes a quarter of its time, or a tenth, and is more exact.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

PARTS = 16
"""Are added at once: with fewer, more is written and read again."""
FEW_ROWS = 128
"""These are left to the compiler."""


def channel_sums(x: Float[Array, "b h w c"]) -> Float[Array, "c"]:
    """The sum of each channel, in float32. For what needs no gradient: as part of one, such as that of `affine`."""
    rows = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
    return lax.platform_dependent(rows, cpu=_added_in_parts, default=_added)


@jax.custom_vjp
def affine(x: Float[Array, "b h w c"], scale: Float[Array, "c"], shift: Float[Array, "c"]) -> Float[Array, "b h w c"]:
    """`x` times a scale plus a shift for each channel, in the type of `x`; their gradients are summed in float32."""
    return x * scale.astype(x.dtype) + shift.astype(x.dtype)


def _affine_forward(
    x: Float[Array, "b h w c"], scale: Float[Array, "c"], shift: Float[Array, "c"]
) -> tuple[Float[Array, "b h w c"], tuple[Float[Array, "b h w c"], Float[Array, "c"]]]:
    return affine(x, scale, shift), (x, scale)


def _affine_backward(
    kept: tuple[Float[Array, "b h w c"], Float[Array, "c"]], gradient: Float[Array, "b h w c"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "c"], Float[Array, "c"]]:
    x, scale = kept
    products = x.astype(jnp.float32) * gradient.astype(jnp.float32)
    return gradient * scale.astype(x.dtype), channel_sums(products), channel_sums(gradient)


affine.defvjp(_affine_forward, _affine_backward)


@jax.custom_vjp
def moments(x: Float[Array, "b h w c"]) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
    """Mean and variance of each channel, in float32, the variance in a second pass."""
    mean = channel_sums(x) / _count(x)
    return mean, channel_sums(jnp.square(x.astype(jnp.float32) - mean)) / _count(x)


def _moments_forward(
    x: Float[Array, "b h w c"],
) -> tuple[tuple[Float[Array, "c"], Float[Array, "c"]], tuple[Float[Array, "b h w c"], Float[Array, "c"]]]:
    mean, variance = moments(x)
    return (mean, variance), (x, mean)


def _moments_backward(
    kept: tuple[Float[Array, "b h w c"], Float[Array, "c"]], gradients: tuple[Float[Array, "c"], Float[Array, "c"]]
) -> tuple[Float[Array, "b h w c"]]:
    (x, mean), (of_mean, of_variance) = kept, gradients
    centred = x.astype(jnp.float32) - mean
    return (((of_mean + 2 * of_variance * centred) / _count(x)).astype(x.dtype),)


moments.defvjp(_moments_forward, _moments_backward)


def _count(x: Float[Array, "b h w c"]) -> int:
    return x.size // x.shape[-1]


def _added(rows: Float[Array, "b s c"]) -> Float[Array, "c"]:
    return rows.sum((0, 1))


def _added_in_parts(rows: Float[Array, "b s c"]) -> Float[Array, "c"]:
    """Each image's rows are cut into parts that are added as they lie; images stay apart, as they may on devices."""
    while rows.shape[1] > FEW_ROWS:
        parts = next((count for count in range(PARTS, 1, -1) if rows.shape[1] % count == 0), None)
        if parts is None:
            break
        length = rows.shape[1] // parts
        total = lax.slice_in_dim(rows, 0, length, axis=1)
        for start in range(length, rows.shape[1], length):
            total = lax.add(total, lax.slice_in_dim(rows, start, start + length, axis=1))
        rows = total
    return rows.sum((0, 1))
