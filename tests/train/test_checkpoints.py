"""What a run keeps: every bit comes back, and a save that fails costs nothing but itself."""

import dataclasses
import errno
import gc
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from rtdetrv2_jax import load_model
from rtdetrv2_jax.config import ModelConfig
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.sharding import data_mesh, replicate
from rtdetrv2_jax.weights.transfer import flat_state
from rtdetrv2_jax.weights.untrained import untrained_model
from train.checkpoints import KEPT, STATES, CheckpointError, Checkpoints
from train.recipes import debug
from train.step import TrainState, init_state, program

NOTES = {"best": {"step": 3, "ap": 0.125, "ap50": 1 / 3}, "batches": {"step": 4, "images": 12, "seed": 0}}
PREPROCESSING = Preprocessing(size=(64, 64))
ODD = np.array([0x00000001, 0x80000000, 0x7FC01234, 0xFF800000, 0x3F800001], np.uint32).view(np.float32)
"""The smallest number there is, a negative zero, something that is no number, an infinity, one and a little."""

unraisable = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
"""Where Orbax gives up on a state, it leaves reads behind that nobody waits for, and writes that find no folder."""


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return data_mesh(jax.devices()[:1])


@pytest.fixture
def plain_config(tiny_config) -> ModelConfig:
    """The tiny network with as many points on each level, which Hugging Face's form can say."""
    return dataclasses.replace(tiny_config, decoder=dataclasses.replace(tiny_config.decoder, points=(2, 2, 2)))


@pytest.fixture(scope="module")
def fresh() -> TrainState:
    """The state of a run whose network has two arrays, before its first step."""
    trained = {"head.kernel": jnp.ones((3, 4)), "head.bias": jnp.zeros(5)}
    statistics = {"norm.mean": jnp.zeros(5), "norm.batches": jnp.zeros((), jnp.int32)}
    zeros = jax.tree.map(jnp.zeros_like, trained)
    adam = (optax.EmptyState(), optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, dict(zeros)))
    counts = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(*counts, trained, {}, statistics, adam, trained | statistics, jax.random.key(0))


def after(fresh: TrainState, step: int) -> TrainState:
    """A state of other numbers, the odd ones among them, and another key."""
    dice = np.random.default_rng(step)

    def other(array: jax.Array) -> jax.Array:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return array + step
        numbers = dice.standard_normal(array.shape).astype(array.dtype)
        if numbers.size >= len(ODD):
            numbers.reshape(-1)[: len(ODD)] = ODD
        return jnp.asarray(numbers)

    changed = jax.tree.map(other, fresh._replace(key=()))
    return changed._replace(step=jnp.int32(step), key=jax.random.fold_in(jax.random.key(7), step))


def assert_same(ours: Any, wanted: Any) -> None:
    """Equal to the bit, in structure, in types and in what is no number."""
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert (one.shape, np.asarray(one).tobytes()) == (other.shape, np.asarray(other).tobytes())


def saved_steps(folder: Path) -> set[str]:
    return {path.name for path in (folder / STATES).iterdir()}


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_state_comes_back_to_the_bit_with_its_types_its_key_and_the_notes(tmp_path, mesh, fresh):
    state = after(fresh, 4)
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save_state(4, state, notes=NOTES)
        checkpoints.wait()
        assert checkpoints.failures() == []
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        assert checkpoints.latest == 4
        found, notes = checkpoints.restore(fresh)
    assert_same(found, state)
    assert notes == NOTES
    assert jax.random.key_impl(found.key) == jax.random.key_impl(state.key)
    np.testing.assert_array_equal(jax.random.normal(found.key, (4,)), jax.random.normal(state.key, (4,)))


@pytest.mark.slow
def test_a_whole_network_comes_back_to_the_bit(tmp_path, mesh, tiny_config, tiny_model):
    recipe = dataclasses.replace(debug(), model=tiny_config)
    whole = init_state(program(recipe, steps_per_epoch=4), tiny_model)
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        checkpoints.save_state(4, after(whole, 4), notes=NOTES)
        checkpoints.wait()
        assert_same(checkpoints.restore(whole).state, after(whole, 4))


def test_a_state_of_one_device_comes_back_on_eight(tmp_path, mesh, fresh):
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        checkpoints.save_state(4, replicate(mesh, after(fresh, 4)), notes=NOTES)
    with Checkpoints(tmp_path, mesh=data_mesh()) as checkpoints:
        found, _ = checkpoints.restore(fresh)
    assert_same(found, after(fresh, 4))
    assert all(len(array.sharding.device_set) == 8 for array in jax.tree.leaves(found))


def test_a_state_may_be_given_up_as_soon_as_saving_returns(tmp_path, mesh, fresh):
    state, wanted = after(fresh, 4), after(fresh, 4)
    consume = jax.jit(lambda x: jax.tree.map(lambda y: y * 0, x), donate_argnums=0)
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        checkpoints.save_state(4, state, notes=NOTES)
        consume(state._replace(key=()))
        checkpoints.wait()
        assert_same(checkpoints.restore(fresh).state, wanted)


def test_only_the_last_states_stay(tmp_path, mesh, fresh):
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        for step in (2, 4, 6, 8):
            checkpoints.save_state(step, after(fresh, step), notes=NOTES)
    assert KEPT == 2
    assert saved_steps(tmp_path) == {"6", "8"}


def test_the_same_step_is_not_saved_twice(tmp_path, mesh, fresh, monkeypatch):
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        checkpoints.save_state(4, after(fresh, 4), notes=NOTES)
        checkpoints.save_state(4, after(fresh, 5), notes={"best": None})
        checkpoints.wait()
        assert checkpoints.failures() == []
        found, notes = checkpoints.restore(fresh)
    assert_same(found, after(fresh, 4))
    assert notes == NOTES


@unraisable
@pytest.mark.parametrize("place", ["before it begins", "while it is written", "when it takes its place"])
def test_a_save_that_fails_is_told_loses_nothing_and_the_next_one_works(tmp_path, mesh, fresh, monkeypatch, place):
    owner, name = {
        "before it begins": (ocp.CheckpointManager, "save"),
        "while it is written": (ocp.JsonCheckpointHandler, "_save_fn"),
        "when it takes its place": (os, "rename"),
    }[place]
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        checkpoints.save_state(2, after(fresh, 2), notes=NOTES)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            checkpoints.save_state(4, after(fresh, 4), notes=NOTES)
            checkpoints.wait()
        (failure,) = checkpoints.failures()
        assert "could not be saved" in failure
        assert os.strerror(errno.ENOSPC) in failure
        assert "Free some space: the run goes on" in failure
        assert checkpoints.failures() == []
        assert checkpoints.latest == 2
        assert "4" not in saved_steps(tmp_path)
        assert_same(checkpoints.restore(fresh).state, after(fresh, 2))
        checkpoints.save_state(6, after(fresh, 6), notes=NOTES)
        checkpoints.wait()
        assert checkpoints.failures() == []
        assert_same(checkpoints.restore(fresh).state, after(fresh, 6))
    assert "4.orbax-checkpoint-tmp" not in saved_steps(tmp_path)  # it took up space


@unraisable
def test_a_save_that_fails_unseen_does_not_take_the_next_one_with_it(tmp_path, mesh, fresh, monkeypatch):
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", full)
            checkpoints.save_state(4, after(fresh, 4), notes=NOTES)
            while checkpoints._states.is_saving_in_progress():
                time.sleep(0.01)  # now it has failed, and nobody has asked
        checkpoints.save_state(6, after(fresh, 6), notes=NOTES)
        checkpoints.wait()
        assert len(checkpoints.failures()) == 1
        assert checkpoints.latest == 6
        assert_same(checkpoints.restore(fresh).state, after(fresh, 6))
    assert saved_steps(tmp_path) == {"6"}


def test_what_a_kill_left_half_written_is_no_state_and_is_cleared_away(tmp_path, mesh, fresh):
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        checkpoints.save_state(4, after(fresh, 4), notes=NOTES)
    half = tmp_path / STATES / "6.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / STATES / "4", half)
    shutil.rmtree(half / "notes")
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        assert checkpoints.latest == 4
        assert_same(checkpoints.restore(fresh).state, after(fresh, 4))
        checkpoints.save_state(6, after(fresh, 6), notes=NOTES)
    assert saved_steps(tmp_path) == {"4", "6"}


@unraisable
def test_a_state_of_another_model_is_refused(tmp_path, mesh, fresh):
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        checkpoints.save_state(4, after(fresh, 4), notes=NOTES)
        checkpoints.wait()
        first = next(iter(fresh.trained))
        fewer = fresh._replace(trained={path: value for path, value in fresh.trained.items() if path != first})
        more = fresh._replace(trained=fresh.trained | {"decoder.another.kernel": jnp.zeros(3)})
        wider = fresh._replace(trained=fresh.trained | {first: jnp.zeros((3, 5, 7))})
        for other in (fewer, more, wider):
            with pytest.raises(CheckpointError, match=r"4 cannot be read as a state of this run"):
                checkpoints.restore(other)
    gc.collect()


@unraisable
def test_a_damaged_state_is_refused_and_the_one_before_named(tmp_path, mesh, fresh):
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        for step in (2, 4):
            checkpoints.save_state(step, after(fresh, step), notes=NOTES)
    for path in (tmp_path / STATES / "4" / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints, pytest.raises(CheckpointError, match="go on from step 2"):
        checkpoints.restore(fresh)
    shutil.rmtree(tmp_path / STATES / "4")
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        assert_same(checkpoints.restore(fresh).state, after(fresh, 2))
    gc.collect()


def test_a_folder_without_a_state_says_so(tmp_path, mesh, fresh):
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints, pytest.raises(CheckpointError, match="no saved state"):
        checkpoints.restore(fresh)


@pytest.mark.parametrize("form", ["orbax", "hf"])
def test_a_model_takes_the_place_of_an_earlier_one(tmp_path, mesh, plain_config, form):
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        for seed in (1, 2):
            model = untrained_model(plain_config, seed=seed)
            assert checkpoints.save_model("best", model, preprocessing=PREPROCESSING, to=form)
            found, config = load_model(tmp_path / "best")
            assert config == plain_config
            assert_same(flat_state(found), flat_state(model))
        assert checkpoints.failures() == []
    assert {path.name for path in tmp_path.iterdir()} == {"best", STATES}


@pytest.mark.parametrize("form", ["orbax", "hf"])
def test_a_model_that_cannot_be_written_leaves_the_earlier_one(tmp_path, mesh, plain_config, monkeypatch, form):
    first, second = (untrained_model(plain_config, seed=seed) for seed in (1, 2))
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        checkpoints.save_model("best", first, preprocessing=PREPROCESSING, to=form)
        with monkeypatch.context() as patch:
            patch.setattr("rtdetrv2_jax.replacing._take_place", full)
            assert not checkpoints.save_model("best", second, preprocessing=PREPROCESSING, to=form)
        (failure,) = checkpoints.failures()
        assert failure.startswith("best could not be saved")
        assert "Free some space" in failure
    found, _ = load_model(tmp_path / "best")
    assert_same(flat_state(found), flat_state(first))
    assert {path.name for path in tmp_path.iterdir()} == {"best", STATES}


def test_a_model_that_a_form_cannot_say_is_not_written_and_ends_nothing(tmp_path, mesh, tiny_model):
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        assert not checkpoints.save_model("best_hf", tiny_model, preprocessing=PREPROCESSING, to="hf")
        (failure,) = checkpoints.failures()
    assert failure.startswith("best_hf is not written")
    assert not (tmp_path / "best_hf").exists()


def test_a_failure_does_not_print_the_numbers_of_whole_arrays(tmp_path, mesh, fresh, monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("\n".join(["[0.1 0.2 0.3]"] * 1000))

    monkeypatch.setattr(ocp.CheckpointManager, "save", fails)
    with Checkpoints(tmp_path, mesh=mesh) as checkpoints:
        checkpoints.save_state(4, after(fresh, 4), notes=NOTES)
        (failure,) = checkpoints.failures()
    assert len(failure) < 1000
    assert "\n" not in failure
