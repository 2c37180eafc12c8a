"""Sums and normalisation channel by channel: the fast loops of CPUs against what they mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdetrv2_jax.ops.channels import affine, channel_sums, moments
from rtdetrv2_jax.sharding import data_mesh, put_global_batch

SHAPES = [(2, 40, 32, 5), (1, 1, 1, 3), (3, 7, 59, 2), (2, 127, 131, 4)]


def values(shape, seed=0, *, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(1.0, 2.0, shape), dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_exact_to_the_last_digits(shape):
    x = values(shape)
    exact = np.asarray(x, np.float64).sum((0, 1, 2))
    largest = np.abs(np.asarray(x, np.float64)).sum((0, 1, 2))
    assert np.all(np.abs(np.asarray(channel_sums(x)) - exact) <= 4e-7 * largest)


def test_sums_of_halved_numbers_are_float32():
    x = jnp.ones((1, 64, 64, 2), jnp.bfloat16)  # 257 of them are no bfloat16 any more
    np.testing.assert_array_equal(channel_sums(x), np.float32([4096, 4096]))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_moments_are_mean_and_variance_and_so_are_their_gradients(shape):
    x, (of_mean, of_variance) = values(shape), values((2, shape[-1]), 1)

    def plain(x):
        mean = x.mean((0, 1, 2))
        return mean, jnp.square(x - mean).mean((0, 1, 2))

    (ours, ours_back), (theirs, theirs_back) = jax.vjp(moments, x), jax.vjp(plain, x)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5)
    np.testing.assert_allclose(
        ours_back((of_mean, of_variance))[0], theirs_back((of_mean, of_variance))[0], rtol=1e-4, atol=1e-6
    )


def test_the_variance_of_what_lies_far_from_zero_is_right():
    mean, variance = moments(values((2, 64, 64, 3)) + 1000)
    np.testing.assert_allclose(mean, 1001, rtol=1e-4)
    np.testing.assert_allclose(variance, 4, rtol=0.05)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scaling_and_shifting_has_the_gradients_of_the_plain_form(dtype):
    x, gradient = values((2, 24, 32, 3), dtype=dtype), values((2, 24, 32, 3), 1, dtype=dtype)
    scale, shift = values((3,), 2), values((3,), 3)

    def exact(x, scale, shift):
        return x.astype(jnp.float32) * scale + shift

    ours, ours_back = jax.vjp(affine, x, scale, shift)
    theirs, theirs_back = jax.vjp(exact, x, scale, shift)
    assert ours.dtype == dtype
    # In bfloat16 three numbers of up to 16 are rounded, each by up to a thirty-second.
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=0, atol=1e-5 if dtype == jnp.float32 else 3 / 32)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    found = ours_back(gradient)
    for one, other in zip(found, theirs_back(gradient.astype(jnp.float32)), strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=tolerance, atol=tolerance)
    assert [each.dtype for each in found] == [dtype, jnp.float32, jnp.float32]


def test_devices_that_share_a_batch_exchange_sums_and_nothing_else():
    mesh = data_mesh()
    x = put_global_batch(mesh, np.asarray(values((8, 32, 32, 3))))
    compiled = jax.jit(jax.grad(lambda x: (moments(x)[1] * jnp.arange(3.0)).sum())).lower(x).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    assert not any(word in text for word in ("all-gather", "collective-permute", "all-to-all"))
