"""Laws of the training step: padding, devices, parts and faulty images change what they should, and nothing else."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PRNGKeyArray

from rtdetrv2_jax.arrays import Targets
from rtdetrv2_jax.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig
from rtdetrv2_jax.sharding import ShardingError, data_mesh, put_global_batch, replicate
from rtdetrv2_jax.weights.transfer import flat_state
from rtdetrv2_jax.weights.untrained import untrained_model
from train.augmentation import NO_AUGMENTATION, Augmentation
from train.batch import Batch
from train.recipe import Batches, Optimisation, Recipe
from train.recipes import parameter_groups
from train.step import (
    Program,
    TrainState,
    accumulated,
    gradients,
    init_state,
    jitted_step,
    model_of,
    noised,
    program,
    train_step,
)

pytestmark = pytest.mark.slow
MODEL = ModelConfig(
    backbone=BackboneConfig(block="basic", depths=(1, 1, 1, 1), stem_width=8, widths=(8, 8, 16, 16), batch_norm="live"),
    encoder=EncoderConfig(width=16, ffn_width=16, heads=2, expansion=0.5),
    decoder=DecoderConfig(width=16, ffn_width=16, heads=2, layers=2, queries=12, points=(2, 2, 2), denoising=6),
    class_names=("one", "two", "three"),
)
RECIPE = Recipe(
    name="tiny",
    model=MODEL,
    optimisation=Optimisation(1e-3, 1e-3, parameter_groups(), warmup_steps=4),
    augmentation=NO_AUGMENTATION,
    batches=Batches(size=8, epochs=2, side=64, denoising_together=None),
    dtype="float32",
)
SIZE = (64, 64)
QUICK = {"xla_backend_optimization_level": "0"}


def broken_if_negative(batch: Batch, key: PRNGKeyArray, size: tuple[int, int]) -> tuple[jax.Array, Targets]:
    """In place of an augmentation: an image with a negative number comes out as not a number."""
    del key, size
    images = batch.images.astype(jnp.float32) / 255
    return jnp.where(batch.image_ids[:, None, None, None] < 0, jnp.nan, images), batch.targets


def changed(**changes: Any) -> Recipe:
    return dataclasses.replace(RECIPE, **changes)


@functools.cache
def tiny_program(recipe: Recipe = RECIPE) -> Program:
    return program(recipe, steps_per_epoch=10, augment=broken_if_negative)


def fresh_state(made: Program) -> TrainState:
    return init_state(made, untrained_model(made.recipe.model, seed=1))


def tiny_batch(*, images: int = 8, room: int = 4, seed: int = 0) -> Batch:
    """Random images; the number of boxes goes round from 0 to 3."""
    dice = np.random.default_rng(seed)
    counts = np.arange(images) % 4
    boxes = np.concatenate([dice.uniform(0.3, 0.7, (images, 3, 2)), dice.uniform(0.1, 0.5, (images, 3, 2))], axis=-1)
    targets = Targets(
        labels=np.pad(dice.integers(0, 3, (images, 3)), ((0, 0), (0, room - 3))).astype(np.int32),
        boxes=np.pad(boxes, ((0, 0), (0, room - 3), (0, 0)), constant_values=0.7).astype(np.float32),
        mask=np.arange(room) < counts[:, None],
    )
    return Batch(
        images=dice.integers(0, 256, (images, *SIZE, 3), dtype=np.uint8),
        targets=targets,
        image_ids=np.arange(images, dtype=np.int32),
        content_xyxy_pixels=np.tile(np.array([0, 0, 64, 64], np.int32), (images, 1)),
        distort_colours=np.zeros(images, bool),
    )


@functools.cache
def step_on(devices: int) -> Any:
    made, mesh = tiny_program(), data_mesh(jax.devices()[:devices])
    step = jitted_step(made, mesh)
    state = replicate(mesh, fresh_state(made))
    return step.lower(state, put_global_batch(mesh, tiny_batch()), SIZE).compile(QUICK)


def run(devices: int, batches: list[Batch]) -> tuple[TrainState, list[Any]]:
    mesh = data_mesh(jax.devices()[:devices])
    state, told = replicate(mesh, fresh_state(tiny_program())), []
    for batch in batches:
        state, metrics = step_on(devices)(state, put_global_batch(mesh, batch))
        told.append(metrics)
    return jax.device_get(state), jax.device_get(told)


def assert_same(ours: Any, wanted: Any) -> None:
    """Equal to the bit."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)


def assert_near(ours: dict[str, Any], wanted: dict[str, Any], *, share: float) -> None:
    """Equal but for rounding: each array up to a share of its own norm, or of a thousandth of the largest one's."""
    largest = max(np.linalg.norm(value) for value in wanted.values())
    for path, value in wanted.items():
        error = np.linalg.norm(np.asarray(ours[path]) - value)
        assert error <= share * max(np.linalg.norm(value), 1e-3 * largest), path


def test_padding_the_targets_changes_neither_loss_nor_gradient():
    made = tiny_program()
    state = fresh_state(made)

    def found(batch: Batch) -> Any:
        values, images = state.frozen | state.trained, batch.images.astype(jnp.float32) / 255
        queries = noised(made, jax.random.key(3), batch.targets)
        return gradients(made, values, state.statistics, images, batch.targets, queries)

    compiled = jax.jit(found, compiler_options=QUICK)
    tight, roomy = (compiled(jax.tree.map(jnp.asarray, tiny_batch(room=room))) for room in (3, 6))
    assert float(tight.losses.total) == pytest.approx(float(roomy.losses.total), rel=1e-6)
    assert_near(roomy.gradients, jax.device_get(tight.gradients), share=1e-4)
    assert_near(roomy.statistics, jax.device_get(tight.statistics), share=1e-6)


def test_eight_devices_give_what_one_gives():
    batches = [tiny_batch(seed=seed) for seed in range(2)]
    (one, told_one), (eight, told_eight) = run(1, batches), run(8, batches)
    for ours, wanted in zip(told_eight, told_one, strict=True):
        assert ours.boxes == wanted.boxes
        assert ours.gradient_norm == pytest.approx(wanted.gradient_norm, rel=1e-4)
        np.testing.assert_allclose(ours.losses.layers, wanted.losses.layers, rtol=1e-4)
        np.testing.assert_allclose(ours.losses.denoising, wanted.losses.denoising, rtol=1e-4)
    first_one, first_eight = (run(devices, batches[:1])[0].statistics for devices in (1, 8))
    assert_near(first_eight, first_one, share=1e-5)
    assert_near(eight.statistics, one.statistics, share=1e-4)  # of parameters that the first update has moved apart
    adam_eight, adam_one = eight.optimizer[1], one.optimizer[1]
    # The order of a sum differs, in float32: gradients by a few millionths, and nearly cancelling ones by more.
    assert_near(adam_eight.mu, adam_one.mu, share=1e-2)
    assert_near(eight.trained, one.trained, share=1e-2)
    assert_near(eight.average, one.average, share=1e-4)


def test_taking_a_batch_in_parts_means_what_it_says():
    made = tiny_program(
        changed(
            optimisation=dataclasses.replace(RECIPE.optimisation, accumulation=2),
        )
    )
    state, key = fresh_state(made), jax.random.key(5)
    batch = jax.tree.map(jnp.asarray, tiny_batch())
    images = batch.images.astype(jnp.float32) / 255
    whole = jax.jit(lambda: accumulated(made, state, images, batch.targets, key), compiler_options=QUICK)()

    @functools.partial(jax.jit, compiler_options=QUICK)
    def part(statistics: Any, images: Any, targets: Targets, key: Any, share: Any) -> Any:
        values = state.frozen | state.trained
        return gradients(made, values, statistics, images, targets, noised(made, key, targets), share=share)

    statistics, total, gradient = state.statistics, 0.0, None
    for number, own_key in enumerate(jax.random.split(key, 2)):
        targets = Targets(*(x[number::2] for x in batch.targets))
        share = jnp.float32(targets.mask.sum() / batch.targets.mask.sum())
        found = part(statistics, images[number::2], targets, own_key, share)
        statistics, total = found.statistics, total + found.losses.total
        gradient = found.gradients if gradient is None else jax.tree.map(jnp.add, gradient, found.gradients)
    assert float(whole.losses.total) == pytest.approx(float(total), rel=1e-5)
    assert_near(whole.gradients, jax.device_get(gradient), share=1e-3)
    assert_near(whole.statistics, jax.device_get(statistics), share=1e-5)
    assert int(whole.statistics["encoder.projections.0.norm.batches"]) == 2


def test_a_step_that_is_not_finite_changes_nothing_but_two_counters():
    good = tiny_batch()
    bad = good._replace(image_ids=np.array([0, 1, 2, -1, 4, 5, 6, 7], np.int32))
    before, _ = run(1, [good])
    after, told = run(1, [good, bad])
    assert [bool(metrics.finite) for metrics in told] == [True, False]
    assert (int(after.step), int(after.skipped)) == (2, 1)
    assert int(told[-1].skipped) == 1
    assert_same(after._replace(step=before.step, skipped=before.skipped), before)


def test_a_run_goes_on_after_a_skipped_step_with_warmup_counted_on():
    good = tiny_batch()
    bad = good._replace(image_ids=np.full(8, -1, np.int32))
    after, told = run(1, [bad, good])
    assert [float(metrics.learning_rate) for metrics in told] == pytest.approx([0.25e-3, 0.5e-3])
    assert int(after.optimizer[1].count) == 1
    assert bool(told[-1].finite)
    assert np.isfinite(told[-1].losses.total)


def test_the_same_state_and_batch_give_the_same_bits():
    assert_same(run(1, [tiny_batch()]), run(1, [tiny_batch()]))


def test_a_start_is_the_model_that_it_was_made_from():
    made = tiny_program()
    model = untrained_model(MODEL, seed=1)
    state = init_state(made, model)
    for weights in ("average", "trained"):
        assert_same(flat_state(model_of(made, state, weights=weights)), flat_state(model))
    assert model_of(made, state).encoder.projections[0].norm.use_running_average is not False


@pytest.mark.parametrize(
    "recipe",
    [
        changed(dtype="bfloat16", augmentation=Augmentation()),
        changed(model=dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, denoising=0))),
    ],
    ids=["bfloat16 with augmentation", "without denoising"],
)
def test_a_step_keeps_the_types_of_its_state_and_never_calls_the_host(recipe):
    made = program(recipe, steps_per_epoch=10)
    state = jax.eval_shape(lambda: fresh_state(made))
    lowered = jax.jit(functools.partial(train_step, made), static_argnums=2).lower(state, tiny_batch(), SIZE)
    after, metrics = lowered.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics.losses.total.dtype == jnp.float32
    assert "callback" not in lowered.as_text()


def test_a_batch_that_the_devices_cannot_share_is_refused():
    made = tiny_program(changed(batches=Batches(size=6, side=64, denoising_together=None)))
    with pytest.raises(ShardingError, match="6 images cannot be shared out evenly over 8 devices"):
        jitted_step(made, data_mesh())
