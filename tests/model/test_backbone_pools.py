"""The stem's pool in its forms."""

import jax
import jax.numpy as jnp
import numpy as np

from rtdetrv2_jax.model.backbone import max_pool, pool_by_halves, pool_by_windows, pool_on_gpus


def values(shape=(2, 12, 16, 3)):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_all_forms_find_the_same():
    for x in (values(), -jnp.inf * jnp.ones((1, 2, 2, 1)), values().at[0, 5, 5].set(jnp.inf)):
        np.testing.assert_array_equal(pool_by_halves(x), pool_by_windows(x))
        np.testing.assert_array_equal(max_pool(x), pool_by_windows(x))
        np.testing.assert_array_equal(pool_on_gpus(x), pool_by_windows(x))


def test_what_is_not_a_number_is_not_lost():
    x = values((1, 8, 8, 1)).at[0, 3, 4, 0].set(jnp.nan)
    np.testing.assert_array_equal(pool_by_halves(x), pool_by_windows(x))
    assert jnp.isnan(pool_by_halves(x)).sum() == 2


def test_all_forms_have_the_same_gradient():
    x, weights = values(), values((2, 6, 8, 3))

    def gradient(pool):
        return jax.grad(lambda x: (pool(x) * weights).sum())(x)

    for pool in (pool_by_halves, pool_on_gpus):
        np.testing.assert_allclose(gradient(pool), gradient(pool_by_windows), rtol=1e-6, atol=1e-6)


def test_of_equal_pixels_the_first_has_the_gradient():
    gradient = jax.grad(lambda x: pool_by_halves(x).sum())(jnp.ones((1, 4, 4, 1)))
    np.testing.assert_array_equal(gradient[0, ..., 0], [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
