from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rtdetrv2_jax.arrays import Targets
from rtdetrv2_jax.objective import denoising
from rtdetrv2_jax.objective.denoising import (
    DenoisingNoise,
    DenoisingSettings,
    draw_noise,
    slot_count,
)

denoising_queries = jax.jit(denoising.denoising_queries, static_argnames=("classes", "queries", "settings"))

CLASSES = 80
PUBLISHED = DenoisingSettings()
NO_NOISE = DenoisingSettings(label_noise=0.0, box_noise=0.0)


def make_targets(counts: list[int], most: int, seed: int = 0) -> Targets:
    rng = np.random.default_rng(seed)
    shape = (len(counts), most)
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (*shape, 2)), rng.uniform(0.05, 0.5, (*shape, 2))], axis=-1)
    return Targets(
        jnp.array(rng.integers(0, CLASSES, shape), jnp.int32),
        jnp.array(boxes, jnp.float32),
        jnp.array(np.arange(most) < np.array(counts)[:, None]),
    )


def constant_noise(targets: Targets, sign: tuple[float, ...], step: float, settings: DenoisingSettings):
    shape = (len(targets.mask), slot_count(targets.mask.shape[1], settings=settings))
    return DenoisingNoise(
        jnp.ones(shape),
        jnp.zeros(shape, jnp.int32),
        jnp.broadcast_to(jnp.array(sign), (*shape, 4)),
        jnp.full((*shape, 4), step),
    )


def make(targets: Targets, settings: DenoisingSettings = PUBLISHED, queries: int = 7):
    noise = draw_noise(jax.random.key(0), targets, classes=CLASSES, settings=settings)
    return denoising_queries(targets, noise, classes=CLASSES, queries=queries, settings=settings)


@pytest.mark.parametrize(
    ("counts", "groups", "real", "positives", "first"),
    [
        ([1], 100, 200, [100], [[0, 2, 4]]),
        ([7], 14, 196, [98], [[0, 1, 2]]),
        ([3, 1], 33, 198, [99, 33], [[0, 1, 2, 6, 7, 8], [0, 6, 12]]),
        ([60], 1, 120, [60], [[0, 1, 2]]),
        ([150], 1, 300, [150], [[0, 1, 2]]),
        ([0, 2], 50, 200, [0, 100], [[], [0, 1, 4, 5]]),
        ([0, 0], 1, 2, [0, 0], [[], []]),
    ],
)
def test_groups_and_slots_follow_the_largest_count_of_the_batch(counts, groups, real, positives, first):
    targets = make_targets(counts, most=max(*counts, 1))
    queries, sought = make(targets)
    assert sought.groups.tolist() == [groups]
    assert sought.real.sum() == real
    assert queries.labels.shape[1] >= real
    for image, (number, start) in enumerate(zip(positives, first, strict=True)):
        slots = np.flatnonzero(sought.targets[image] >= 0)
        assert len(slots) == number
        assert slots[: len(start)].tolist() == start
        np.testing.assert_array_equal(sought.targets[image][slots], np.tile(np.arange(counts[image]), groups))


@pytest.mark.parametrize("most", [1, 2, 3, 33, 60, 99, 100, 101, 150])
def test_no_batch_fills_more_than_the_slots_there_are(most):
    settings = DenoisingSettings()
    slots = slot_count(most, settings=settings)
    for count in range(1, most + 1):
        assert 2 * count * max(1, settings.queries // count) <= slots
    _, sought = make(make_targets([most], most), settings)
    assert sought.real.sum() == 2 * most * max(1, settings.queries // most)


def test_one_compilation_serves_any_number_of_targets():
    @jax.jit
    def jitted(targets, noise):
        return denoising.denoising_queries(targets, noise, classes=CLASSES, queries=7)

    for counts in ([0, 0], [1, 0], [7, 3], [60, 2], [150, 150]):
        targets = make_targets(counts, 150)
        _, sought = jitted(targets, draw_noise(jax.random.key(0), targets, classes=CLASSES))
        most = max(*counts, 1)
        groups = max(1, 100 // most) if any(counts) else 1
        assert (sought.targets >= 0).sum(axis=1).tolist() == [count * groups for count in counts]
        assert sought.real.sum() == 2 * most * groups
    assert jitted._cache_size() == 1


def test_the_attention_mask_of_a_small_batch_is_the_one_worked_by_hand():
    queries, sought = make(make_targets([2, 1], 3), DenoisingSettings(queries=4), queries=3)
    seen = np.asarray(queries.mask[0])
    assert seen.shape == (11, 11)
    expected = np.ones((11, 11), bool)
    expected[:4, 4:8] = expected[4:8, :4] = expected[8:, :8] = False
    np.testing.assert_array_equal(seen, expected)
    assert np.flatnonzero(sought.targets[0] >= 0).tolist() == [0, 1, 4, 5]
    assert np.flatnonzero(sought.targets[1] >= 0).tolist() == [0, 4]


def test_slots_that_are_not_real_are_seen_by_none_but_always_see_something():
    queries, sought = make(make_targets([3, 1], 130))
    seen, real = np.asarray(queries.mask[0]), np.asarray(sought.real[0])
    beyond = np.flatnonzero(~real)
    assert len(beyond) == 260 - 198
    assert not seen[:, beyond].any()
    assert seen[:, 260:].all()
    assert np.all(np.asarray(queries.labels)[:, beyond] == CLASSES)


@pytest.mark.parametrize(
    ("sign", "step", "positive", "negative"),
    [
        ((1.0, 1.0, 1.0, 1.0), 0.5, (0.55, 0.6, 0.2, 0.4), (0.65, 0.8, 0.2, 0.4)),
        ((1.0, 1.0, -1.0, 1.0), 0.9, (0.5, 0.68, 0.02, 0.4), (0.5, 0.84, 1e-5, 0.32)),
    ],
)
def test_corners_move_as_worked_by_hand(sign, step, positive, negative):
    targets = Targets(jnp.array([[3]]), jnp.array([[[0.5, 0.5, 0.2, 0.4]]]), jnp.array([[True]]))
    settings = DenoisingSettings(queries=1)
    queries, _ = denoising_queries(
        targets, constant_noise(targets, sign, step, settings), classes=CLASSES, queries=2, settings=settings
    )
    np.testing.assert_allclose(jax.nn.sigmoid(queries.boxes_logits[0]), [positive, negative], atol=1e-6)


def test_without_noise_positives_are_the_targets_themselves():
    targets = make_targets([4, 2], 5)
    noise = draw_noise(jax.random.key(0), targets, classes=CLASSES, settings=NO_NOISE)
    queries, sought = denoising_queries(targets, noise, classes=CLASSES, queries=3, settings=NO_NOISE)
    for image in range(2):
        slots = np.flatnonzero(sought.targets[image] >= 0)
        index = sought.targets[image][slots]
        np.testing.assert_array_equal(queries.labels[image][slots], targets.labels[image][index])
        np.testing.assert_allclose(
            jax.nn.sigmoid(queries.boxes_logits[image][slots]), targets.boxes[image][index], atol=1e-5
        )


def test_more_padding_changes_nothing_and_neither_does_its_place():
    targets = make_targets([3, 0, 2], 4)
    noise = draw_noise(jax.random.key(0), targets, classes=CLASSES)
    expected, sought = denoising_queries(targets, noise, classes=CLASSES, queries=7)
    places = np.array([1, 4, 5, 8])
    spread = Targets(
        jnp.full((3, 9), 77, jnp.int32).at[:, places].set(targets.labels),
        jnp.full((3, 9, 4), 0.9).at[:, places].set(targets.boxes),
        jnp.zeros((3, 9), bool).at[:, places].set(targets.mask),
    )
    found, spread_sought = denoising_queries(spread, noise, classes=CLASSES, queries=7)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    moved = jnp.where(sought.targets >= 0, places[jnp.maximum(sought.targets, 0)], -1)
    np.testing.assert_array_equal(spread_sought.targets, moved)


def test_the_order_of_images_changes_nothing():
    targets = make_targets([3, 0, 5, 1], 6)
    noise = draw_noise(jax.random.key(0), targets, classes=CLASSES)
    order = np.array([2, 3, 0, 1])
    expected, sought = denoising_queries(targets, noise, classes=CLASSES, queries=7)
    found, found_sought = denoising_queries(
        *jax.tree.map(lambda x: x[order], (targets, noise)), classes=CLASSES, queries=7
    )
    np.testing.assert_array_equal(found.labels, expected.labels[order])
    np.testing.assert_array_equal(found.boxes_logits, expected.boxes_logits[order])
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found_sought.targets, sought.targets[order])


def test_images_together_equal_batches_of_their_own():
    settings = DenoisingSettings(images_together=2)
    targets = make_targets([3, 0, 0, 0, 5, 1], 6)
    noise = draw_noise(jax.random.key(0), targets, classes=CLASSES, settings=settings)
    together, sought = denoising_queries(targets, noise, classes=CLASSES, queries=7, settings=settings)
    assert sought.groups.tolist() == [33, 33, 1, 1, 20, 20]
    for first in (0, 2, 4):
        part = slice(first, first + 2)
        alone, alone_sought = denoising_queries(
            *jax.tree.map(lambda x, part=part: x[part], (targets, noise)), classes=CLASSES, queries=7
        )
        np.testing.assert_array_equal(together.labels[part], alone.labels)
        np.testing.assert_array_equal(together.boxes_logits[part], alone.boxes_logits)
        np.testing.assert_array_equal(sought.targets[part], alone_sought.targets)
        for image in range(first, first + 2):
            np.testing.assert_array_equal(together.mask[image], alone.mask[0])
            np.testing.assert_array_equal(sought.real[image], alone_sought.real[0])


def test_a_batch_that_does_not_divide_and_noise_of_another_size_are_told():
    targets = make_targets([1, 1, 1], 2)
    with pytest.raises(ValueError, match="must divide the batch"):
        make(targets, DenoisingSettings(images_together=2))
    noise = draw_noise(jax.random.key(0), targets, classes=CLASSES, settings=DenoisingSettings(queries=10))
    with pytest.raises(ValueError, match="same targets and settings"):
        denoising_queries(targets, noise, classes=CLASSES, queries=7)


def test_draws_have_the_ranges_and_shares_they_should():
    noise = draw_noise(jax.random.key(0), make_targets([1] * 50, 1), classes=5)
    assert set(np.unique(noise.signs)) == {-1.0, 1.0}
    assert set(np.unique(noise.labels)) == set(range(5))
    for draws in (noise.label_draws, noise.steps):
        assert draws.min() >= 0
        assert draws.max() < 1
        np.testing.assert_allclose(draws.mean(), 0.5, atol=0.01)
    np.testing.assert_allclose(noise.signs.mean(), 0.0, atol=0.02)


def test_a_quarter_of_the_real_labels_is_drawn_anew():
    targets = make_targets([4] * 50, 4)._replace(labels=jnp.full((50, 4), 79, jnp.int32))
    queries, sought = make(targets)
    changed = np.asarray(queries.labels)[:, np.asarray(sought.real[0])] != 79
    np.testing.assert_allclose(changed.mean(), 0.25 * 79 / 80, atol=0.02)


@pytest.mark.parametrize(
    ("case", "classes"),
    [("points_mixed", 11), ("r18_empty", 40), ("r18_many", 40), ("r18_mixed", 40), ("r50_mixed", 17)],
)
def test_every_slot_is_that_of_the_reference(shared: Path, case, classes):
    golden = load_file(shared / f"golden/train_{case}.safetensors")
    images, real = golden["dn.class_index"].shape
    selected = golden["out.main.logits"].shape[1]
    counts = [len(golden[f"targets.{i}.labels"]) for i in range(images)]
    targets = make_targets(counts, max(counts) + 20, seed=1)
    for i, count in enumerate(counts):
        targets = targets._replace(
            labels=targets.labels.at[i, :count].set(golden[f"targets.{i}.labels"].astype(np.int32)),
            boxes=targets.boxes.at[i, :count].set(golden[f"targets.{i}.boxes"]),
        )
    slots = slot_count(max(counts) + 20)

    def draw(name: str, kind: type) -> jax.Array:
        values = golden[f"dn.draw.{name}"].astype(kind)
        return jnp.array(np.pad(values, [(0, 0), (0, slots - real)] + [(0, 0)] * (values.ndim - 2)))

    noise = DenoisingNoise(
        label_draws=draw("label_uniform", np.float32),
        labels=draw("new_label", np.int32),
        signs=2 * draw("box_sign01", np.float32) - 1,
        steps=draw("box_uniform", np.float32),
    )
    queries, sought = denoising_queries(targets, noise, classes=classes, queries=selected)

    assert sought.real[0].tolist() == [True] * real + [False] * (slots - real)
    np.testing.assert_array_equal(queries.labels[:, :real], golden["dn.class_index"])
    np.testing.assert_allclose(queries.boxes_logits[:, :real], golden["dn.boxes_unact"], rtol=1e-5, atol=1e-5)
    kept = np.r_[:real, slots : slots + selected]
    np.testing.assert_array_equal(~np.asarray(queries.mask[0])[np.ix_(kept, kept)], golden["dn.attn_mask"].astype(bool))
    for i in range(images):
        positive = np.flatnonzero(sought.targets[i] >= 0)
        np.testing.assert_array_equal(positive, golden[f"dn.positive_index.{i}"])
        np.testing.assert_array_equal(positive, golden[f"match.dn.{i}.query"])
        np.testing.assert_array_equal(sought.targets[i][positive], golden[f"match.dn.{i}.gt"])
