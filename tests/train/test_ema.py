"""The running average, against the authors' code and by law."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from train.ema import average, averaged_paths, fresh_share
from train.recipe import Averaging


def test_many_updates_are_those_of_the_formula_in_float64():
    draws = np.random.default_rng(0).standard_normal((50, 100)).astype(np.float32)
    ours, exact = {"a": jnp.asarray(draws[0])}, draws[0].astype(np.float64)
    for update in range(1, len(draws)):
        ours = average(Averaging(), ours, {"a": jnp.asarray(draws[update])}, updates=jnp.asarray(update))
        decay = 0.9999 * (1 - np.exp(-update / 2000))
        exact = decay * exact + (1 - decay) * draws[update]
        np.testing.assert_allclose(ours["a"], exact, atol=1e-6)


def test_floats_are_averaged_and_counters_are_not():
    values = {"scale": jnp.ones(3), "mean": jnp.zeros(3), "batches": jnp.zeros((), jnp.int32)}
    assert averaged_paths(values) == ["scale", "mean"]


def test_the_decay_ramps_up_as_the_authors_does(shared):
    said = json.loads((shared / "golden" / "optim_ema.json").read_text())
    for update, wanted in said["decay_at_update"].items():
        assert 1 - float(fresh_share(Averaging(), jnp.asarray(int(update)))) == pytest.approx(wanted, abs=1e-6)


def test_the_average_of_a_model_that_stands_still_is_that_model():
    still = {"a": jnp.asarray(np.random.default_rng(0).standard_normal(100), jnp.float32)}
    for update in (1, 100, 100_000):
        np.testing.assert_array_equal(average(Averaging(), still, still, updates=jnp.asarray(update))["a"], still["a"])


def test_late_on_a_new_model_counts_one_part_in_ten_thousand():
    assert float(fresh_share(Averaging(), jnp.asarray(10_000_000))) == pytest.approx(1e-4, rel=1e-6)
