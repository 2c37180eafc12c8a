from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from rtdetrv2_jax.arrays import Prediction, Targets
from rtdetrv2_jax.objective import matcher
from rtdetrv2_jax.objective.matcher import MatcherSettings, queries_to_targets
from rtdetrv2_jax.sharding import DATA, along_data, data_mesh, traced_for

match = jax.jit(matcher.match, static_argnames="settings")
matching_cost = jax.jit(matcher.matching_cost, static_argnames="settings")

CRITERION_CASES = (
    "all_empty",
    "extremes",
    "focal",
    "giou_weighted",
    "iou_weighted",
    "more_targets_than_queries",
    "shared_match",
    "shipped",
    "softmax_matcher",
    "zero_area_targets",
)
TRAINING_CASES = ("points_mixed", "r18_empty", "r18_many", "r18_mixed", "r50_mixed")


def golden_targets(golden: dict[str, np.ndarray], padding: int = 3) -> Targets:
    images = sum(name.startswith("targets.") and name.endswith(".labels") for name in golden)
    counts = [len(golden[f"targets.{i}.labels"]) for i in range(images)]
    shape = (images, max(counts) + padding)
    labels, boxes, mask = np.zeros(shape, np.int32), np.zeros((*shape, 4), np.float32), np.zeros(shape, bool)
    for i, count in enumerate(counts):
        labels[i, :count], boxes[i, :count] = golden[f"targets.{i}.labels"], golden[f"targets.{i}.boxes"]
        mask[i, :count] = True
    return Targets(jnp.array(labels), jnp.array(boxes), jnp.array(mask))


def golden_outputs(golden: dict[str, np.ndarray]) -> dict[str, Prediction]:
    names = sorted({name.split(".")[1] for name in golden if name.startswith("out.")})
    return {
        name: Prediction(jnp.array(golden[f"out.{name}.logits"]), jnp.array(golden[f"out.{name}.boxes"]))
        for name in names
        if not name.startswith("dn_")
    }


def random_case(seed: int, images: int = 4, queries: int = 20, targets: int = 6) -> tuple[Prediction, Targets]:
    rng = np.random.default_rng(seed)
    prediction = Prediction(
        jnp.array(rng.normal(-1, 2, (images, queries, 5)), jnp.float32),
        jnp.array(rng.uniform(0.05, 0.6, (images, queries, 4)), jnp.float32),
    )
    mask = np.arange(targets) < rng.integers(0, targets + 1, images)[:, None]
    return prediction, Targets(
        jnp.array(rng.integers(0, 5, (images, targets)), jnp.int32),
        jnp.array(rng.uniform(0.05, 0.6, (images, targets, 4)), jnp.float32),
        jnp.array(mask),
    )


def test_costs_and_pairs_worked_by_hand():
    prediction = Prediction(
        jnp.array([[0.0, -2.0], [2.0, 0.0], [-1.0, 1.0]]),
        jnp.array([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2]]),
    )
    targets = Targets(
        jnp.array([0, 1]), jnp.array([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2]]), jnp.array([True, True])
    )
    expected = [[1.326713, 3.822334], [-4.474215, 4.201450], [6.205836, 0.117257]]
    np.testing.assert_allclose(matching_cost(prediction, targets), expected, atol=2e-6)
    np.testing.assert_array_equal(match(prediction, targets), [1, 2])


@pytest.mark.parametrize(
    ("score", "expected"), [(0.01, 1.128381), (0.1, 0.465483), (0.5, -0.086643), (0.9, -1.398557), (0.99, -3.385144)]
)
def test_the_class_cost_is_what_the_focal_loss_would_save(score, expected):
    logits = jnp.full((1, 1), np.log(score / (1 - score)), jnp.float32)
    box = jnp.array([[0.5, 0.5, 0.2, 0.2]])
    settings = MatcherSettings(class_weight=1.0, l1_weight=0.0, giou_weight=0.0)
    cost = matching_cost(Prediction(logits, box), Targets(jnp.array([0]), box, jnp.array([True])), settings=settings)
    np.testing.assert_allclose(cost, [[expected]], rtol=5e-6)


@pytest.mark.parametrize("logit", [-100.0, -40.0, 17.0, 40.0, 100.0])
def test_the_cost_of_a_certain_class_is_finite_compiled_or_not(logit):
    box = jnp.array([[0.5, 0.5, 0.2, 0.2]])
    case = Prediction(jnp.full((1, 1), logit), box), Targets(jnp.array([0]), box, jnp.array([True]))
    assert np.isfinite(matching_cost(*case)).all()
    np.testing.assert_allclose(matching_cost(*case), matcher.matching_cost(*case), rtol=1e-5)


def test_padding_changes_no_pair_whatever_it_holds():
    prediction, targets = random_case(0)
    expected = match(prediction, targets)
    padded = Targets(
        jnp.pad(targets.labels, ((0, 0), (0, 3)), constant_values=-1),
        jnp.pad(targets.boxes, ((0, 0), (0, 3), (0, 0)), constant_values=np.nan),
        jnp.pad(targets.mask, ((0, 0), (0, 3))),
    )
    found = match(prediction, padded)
    np.testing.assert_array_equal(found[:, :-3], expected)
    assert np.all(found[:, -3:] == -1)


def test_the_order_of_images_and_the_output_sets_beside_change_no_pair():
    prediction, targets = random_case(1)
    other, _ = random_case(2)
    expected = match(prediction, targets)
    order = np.array([2, 0, 3, 1])
    shuffled = jax.tree.map(lambda x: x[order], (prediction, targets))
    np.testing.assert_array_equal(match(*shuffled), expected[order])
    stacked = jax.tree.map(lambda *sets: jnp.stack(sets), other, prediction)
    np.testing.assert_array_equal(match(stacked, targets)[1], expected)


def test_eight_devices_match_their_images_without_a_word_to_each_other():
    keys = jax.random.split(jax.random.key(3), 4)
    prediction = Prediction(jax.random.normal(keys[0], (3, 16, 30, 5)), jax.random.uniform(keys[1], (3, 16, 30, 4)))
    labels, boxes = jax.random.randint(keys[2], (16, 7), 0, 5), jax.random.uniform(keys[3], (16, 7, 4))
    targets = Targets(labels, boxes, jnp.arange(7) < jnp.arange(16)[:, None] % 8)
    mesh = data_mesh()
    layers = NamedSharding(mesh, PartitionSpec(None, DATA))
    shared_out = jax.jit(traced_for(mesh, matcher.match), in_shardings=(layers, along_data(mesh)), out_shardings=layers)
    np.testing.assert_array_equal(shared_out(prediction, targets), match(prediction, targets))
    program = shared_out.lower(prediction, targets).compile().as_text()
    assert "while" in program
    assert not any(word in program for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


def test_a_matching_turned_round_names_the_target_of_each_query():
    queries = jnp.array([[3, 0, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(queries_to_targets(queries, 5), [[1, -1, -1, 0, -1], [-1] * 5])


def test_half_precision_outputs_are_matched_in_float32():
    prediction, targets = random_case(3)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), prediction)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    np.testing.assert_array_equal(matching_cost(half, targets), matching_cost(exact, targets))


def test_outputs_that_are_not_finite_still_give_a_matching_and_leave_other_images_alone():
    prediction, targets = random_case(4)
    targets = targets._replace(mask=jnp.ones_like(targets.mask))
    expected = match(prediction, targets)
    broken = Prediction(prediction.logits.at[1, :7].set(np.nan), prediction.boxes.at[2].set(np.nan))
    found = np.asarray(match(broken, targets))
    np.testing.assert_array_equal(found[[0, 3]], expected[jnp.array([0, 3])])
    assert all(len(set(row.tolist())) == 6 for row in found)
    assert np.all(found[1] >= 7)


def check_pairs(golden: dict[str, np.ndarray], name: str, found: np.ndarray) -> None:
    for image, chosen in enumerate(found):
        targets = np.flatnonzero(chosen >= 0)
        pairs = sorted(zip(chosen[targets].tolist(), targets.tolist(), strict=True))
        theirs = zip(
            golden[f"match.{name}.{image}.query"].tolist(), golden[f"match.{name}.{image}.gt"].tolist(), strict=True
        )
        assert pairs == sorted(theirs)


@pytest.mark.parametrize("case", CRITERION_CASES)
def test_costs_and_pairs_are_those_of_the_reference(shared: Path, case):
    golden = load_file(shared / f"golden/criterion_{case}.safetensors")
    settings = MatcherSettings(class_cost="softmax" if case == "softmax_matcher" else "focal")
    targets = golden_targets(golden)
    for name, prediction in golden_outputs(golden).items():
        found = np.asarray(match(prediction, targets, settings=settings))
        if case == "shared_match" and name.startswith("aux_"):
            continue  # the reference stores the pairs of the final layer here
        cost = np.asarray(matching_cost(prediction, targets, settings=settings))
        for image in range(len(cost)):
            theirs = golden[f"cost.{name}.{image}"]
            np.testing.assert_allclose(cost[image, :, : theirs.shape[1]], theirs, rtol=1e-5, atol=1e-5)
        check_pairs(golden, name, found)


@pytest.mark.parametrize("case", TRAINING_CASES)
def test_pairs_of_a_training_step_are_those_of_the_reference(shared: Path, case):
    golden = load_file(shared / f"golden/train_{case}.safetensors")
    outputs = golden_outputs(golden)
    stacked = jax.tree.map(lambda *sets: jnp.stack(sets), *outputs.values())
    for name, found in zip(outputs, np.asarray(match(stacked, golden_targets(golden))), strict=True):
        check_pairs(golden, name, found)
