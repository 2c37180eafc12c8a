from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from rtdetrv2_jax.arrays import DenoisingTargets, Output, Prediction, Targets
from rtdetrv2_jax.objective import losses
from rtdetrv2_jax.objective.losses import LossSettings, varifocal_loss
from rtdetrv2_jax.objective.matcher import MatcherSettings

CRITERION_CASES = {
    "all_empty": LossSettings(),
    "extremes": LossSettings(),
    "focal": LossSettings(classification="focal", alpha=0.25),
    "giou_weighted": LossSettings(boxes_weight_format="giou"),
    "iou_weighted": LossSettings(boxes_weight_format="iou"),
    "more_targets_than_queries": LossSettings(),
    "shared_match": LossSettings(matching="final"),
    "shipped": LossSettings(),
    "softmax_matcher": LossSettings(matcher=MatcherSettings(class_cost="softmax")),
    "zero_area_targets": LossSettings(),
}
TRAINING_CASES = ("points_mixed", "r18_empty", "r18_many", "r18_mixed", "r50_mixed")

PUBLISHED = LossSettings()
criterion = jax.jit(losses.criterion, static_argnames="settings")


@partial(jax.jit, static_argnames="settings")
def criterion_and_gradient(output, targets, *, denoising=None, settings=PUBLISHED):
    def total(output):
        result = losses.criterion(output, targets, denoising=denoising, settings=settings)
        return result.total, result

    slopes, result = jax.grad(total, has_aux=True)(output)
    return result, slopes


def gradient(*case, **named):
    return criterion_and_gradient(*case, **named)[1]


def make_output(layers: list[Prediction], encoder: Prediction, denoising: list[Prediction]) -> Output:
    tokens = jnp.zeros(
        layers[-1].logits.shape[:2]
    )  # no part of any loss; floats, so that the whole can be differentiated
    return Output(layers[-1].logits, layers[-1].boxes, tuple(layers), tuple(denoising), encoder, tokens)


def random_case(counts: list[int], *, layers: int = 2, queries: int = 12, slots: int = 8, seed: int = 0):
    """Random outputs, targets and denoising targets; the last two slots are not real."""
    rng = np.random.default_rng(seed)
    images, most = len(counts), 8

    def prediction(number: int) -> Prediction:
        return Prediction(
            jnp.array(rng.normal(-1, 2, (images, number, 5)), jnp.float32),
            jnp.array(rng.uniform(0.05, 0.6, (images, number, 4)), jnp.float32),
        )

    output = make_output(
        [prediction(queries) for _ in range(layers)], prediction(queries), [prediction(slots) for _ in range(layers)]
    )
    targets = Targets(
        jnp.array(rng.integers(0, 5, (images, most)), jnp.int32),
        jnp.array(rng.uniform(0.05, 0.6, (images, most, 4)), jnp.float32),
        jnp.array(np.arange(most) < np.array(counts)[:, None]),
    )
    sought = np.where(np.arange(slots) < np.minimum(counts, slots - 4)[:, None], np.arange(slots), -1)
    return output, targets, DenoisingTargets(jnp.array(sought), jnp.arange(slots)[None] < slots - 2, jnp.array([3]))


def check_equal(ours: losses.Losses, theirs: losses.Losses, rtol: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), ours, theirs)


@pytest.mark.parametrize(
    ("logit", "matched", "quality", "expected"),
    [
        (0.0, False, 0.0, 0.129965),
        (0.0, True, 0.8, 0.554518),
        (2.0, True, 0.8, 0.421542),
        (2.0, True, 0.0, 0.0),
        (-4.59512, True, 0.5, 1.153805),
    ],
)
def test_elements_of_the_varifocal_loss_worked_by_hand(logit, matched, quality, expected):
    loss = varifocal_loss(jnp.array([logit]), jnp.array([matched]), jnp.array(quality), alpha=0.75, gamma=2.0)
    np.testing.assert_allclose(loss[0], expected, atol=1e-6)


def test_losses_worked_by_hand():
    logits = jnp.array([[[0.0, -2.0], [2.0, 0.0], [-1.0, 1.0]]])
    boxes = jnp.array([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2]]])
    targets = Targets(
        jnp.array([[0, 1]]), jnp.array([[[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2]]]), jnp.array([[True, True]])
    )
    prediction = Prediction(logits, boxes)
    named = criterion(make_output([prediction], prediction, []), targets).named(LossSettings())
    for suffix in ("", "_enc_0"):
        np.testing.assert_allclose(named[f"loss_vfl{suffix}"], 0.286203, atol=1e-6)
        np.testing.assert_allclose(named[f"loss_bbox{suffix}"], 0.5, atol=1e-6)
        np.testing.assert_allclose(named[f"loss_giou{suffix}"], 1.079365, atol=1e-6)


def test_an_image_without_objects_at_the_prior_costs_what_it_should():
    prior = -float(np.log(0.99 / 0.01))
    prediction = Prediction(jnp.full((1, 300, 80), prior), jnp.full((1, 300, 4), 0.5))
    targets = Targets(jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4, 4)), jnp.zeros((1, 4), bool))
    output = make_output([prediction], prediction, [])
    result, slopes = criterion_and_gradient(output, targets)
    terms = result.layers
    np.testing.assert_allclose(terms.classification, [0.0180906], rtol=1e-5)
    assert terms.l1[0] == terms.giou[0] == 0.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_terms_have_the_names_of_the_reference_and_add_up_to_the_total():
    output, targets, sought = random_case([3, 1], layers=3)
    result = criterion(output, targets, denoising=sought)
    named = result.named(LossSettings())
    suffixes = ("", "_aux_0", "_aux_1", "_dn_0", "_dn_1", "_dn_2", "_enc_0")
    assert list(named) == [f"loss_{term}{suffix}" for suffix in suffixes for term in ("vfl", "bbox", "giou")]
    np.testing.assert_allclose(sum(float(term) for term in named.values()), result.total, rtol=1e-6)
    assert "loss_focal_aux_1" in result.named(LossSettings(classification="focal"))


def test_padding_changes_nothing_whatever_it_holds():
    output, targets, sought = random_case([3, 0, 5])
    padded = Targets(
        jnp.pad(targets.labels, ((0, 0), (0, 4)), constant_values=99),
        jnp.pad(targets.boxes, ((0, 0), (0, 4), (0, 0)), constant_values=-7.0),
        jnp.pad(targets.mask, ((0, 0), (0, 4))),
    )
    found, found_slopes = criterion_and_gradient(output, padded, denoising=sought)
    expected, expected_slopes = criterion_and_gradient(output, targets, denoising=sought)
    check_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, found_slopes, expected_slopes)


def test_the_order_of_images_changes_nothing():
    output, targets, sought = random_case([3, 0, 5, 1])
    order = np.array([2, 3, 1, 0])
    shuffled, shuffled_targets, indices = jax.tree.map(lambda x: x[order], (output, targets, sought.targets))
    found = criterion(shuffled, shuffled_targets, denoising=sought._replace(targets=indices))
    check_equal(found, criterion(output, targets, denoising=sought), rtol=1e-5)


def test_a_batch_taken_twice_has_the_same_loss():
    output, targets, sought = random_case([3, 0, 5])
    twice, twice_targets, indices = jax.tree.map(lambda x: jnp.concatenate([x, x]), (output, targets, sought.targets))
    found = criterion(twice, twice_targets, denoising=sought._replace(targets=indices))
    check_equal(found, criterion(output, targets, denoising=sought), rtol=1e-5)


def test_slots_that_are_not_real_change_nothing_but_empty_ones_are_background():
    output, targets, sought = random_case([3, 1])
    expected = criterion(output, targets, denoising=sought)
    for slot, counts in ((7, False), (5, True)):
        changed = tuple(layer._replace(logits=layer.logits.at[:, slot].add(1.0)) for layer in output.denoising)
        found = criterion(output._replace(denoising=changed), targets, denoising=sought)
        assert np.all(found.denoising.classification > expected.denoising.classification) == counts
        assert np.array_equal(found.denoising.classification, expected.denoising.classification) != counts
    slopes = gradient(output, targets, denoising=sought).denoising
    assert all(not np.any(layer.logits[:, 6:]) and np.any(layer.logits[:, 5]) for layer in slopes)


def test_the_divisor_is_the_number_of_boxes_and_for_denoising_that_of_groups_too():
    output, targets, sought = random_case([3, 1])
    once = criterion(output, targets, denoising=sought).denoising
    double = criterion(output, targets, denoising=sought._replace(groups=jnp.array([6]))).denoising
    each = criterion(output, targets, denoising=sought._replace(groups=jnp.array([6, 3]))).denoising
    for a, b, c in zip(once, double, each, strict=True):
        np.testing.assert_allclose(a, 2 * b, rtol=1e-6)
        assert np.all((b < c) & (c < a))


def test_layers_may_share_the_matching_of_the_final_one():
    output, targets, _ = random_case([3, 5], layers=3)
    output = output._replace(denoising=())
    each, shared_one = (criterion(output, targets, settings=LossSettings(matching=way)) for way in ("each", "final"))
    check_equal(each.encoder, shared_one.encoder)
    np.testing.assert_allclose(each.layers.l1[-1], shared_one.layers.l1[-1], rtol=1e-6)
    assert np.all(each.layers.l1[:-1] < shared_one.layers.l1[:-1])


def test_half_precision_outputs_give_float32_losses():
    output, targets, sought = random_case([3, 1])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), output)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    found = criterion(half, targets, denoising=sought)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    check_equal(found, criterion(exact, targets, denoising=sought))


def test_boxes_without_area_give_a_finite_loss_and_gradient():
    output, targets, sought = random_case([3, 1])
    point = jnp.array([0.5, 0.5, 0.0, 0.0])
    targets = targets._replace(boxes=targets.boxes.at[0, 0].set(point))
    layers = tuple(layer._replace(boxes=layer.boxes.at[:, :2].set(point)) for layer in output.layers)
    output = output._replace(layers=layers)
    leaves = jax.tree.leaves(criterion_and_gradient(output, targets, denoising=sought))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_an_exact_hit_has_no_gradient_in_its_distance():
    output, targets, _ = random_case([1])
    hit = tuple(layer._replace(boxes=layer.boxes.at[:, 4].set(targets.boxes[:, 0])) for layer in output.layers)
    settings = LossSettings(classification_weight=0.0, giou_weight=0.0, matcher=MatcherSettings(class_weight=0.0))
    output = output._replace(layers=hit, denoising=())
    assert np.any(gradient(output, targets, settings=settings).encoder.boxes)
    assert not any(np.any(layer.boxes) for layer in gradient(output, targets, settings=settings).layers)


def test_a_nan_in_the_output_stays_visible():
    output, targets, sought = random_case([3, 1])
    broken = output._replace(encoder=output.encoder._replace(logits=output.encoder.logits.at[1, 2, 3].set(np.nan)))
    found = criterion(broken, targets, denoising=sought)
    assert np.isnan(found.total)
    assert np.isnan(found.encoder.classification)
    assert np.isfinite(found.layers.classification).all()


def test_denoising_outputs_without_targets_are_an_error_and_the_reverse_too():
    output, targets, sought = random_case([1])
    with pytest.raises(ValueError, match="targets were not given"):
        losses.criterion(output, targets)
    with pytest.raises(ValueError, match="has 0 denoising layers"):
        losses.criterion(output._replace(denoising=()), targets, denoising=sought)


@pytest.mark.slow
def test_a_batch_spread_over_devices_has_the_same_loss_and_gradient():
    output, targets, sought = random_case([3, 0, 5, 1, 1, 2, 0, 4])
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    spread = jax.device_put((output, targets, sought.targets), split)
    spread_sought = DenoisingTargets(spread[2], *jax.device_put((sought.real, sought.groups), whole))
    found, found_slopes = criterion_and_gradient(spread[0], spread[1], denoising=spread_sought)
    expected, expected_slopes = criterion_and_gradient(output, targets, denoising=sought)
    check_equal(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found_slopes, expected_slopes)
    program = criterion_and_gradient.lower(spread[0], spread[1], denoising=spread_sought).compile().as_text()
    assert not any(name in program for name in ("all-gather", "all-to-all", "collective-permute"))


def golden_case(golden: dict[str, np.ndarray], groups: int) -> tuple[Output, Targets, DenoisingTargets | None]:
    """The stored outputs; an encoder output, where none is stored, is made up of the final one."""
    outputs = {
        name: Prediction(jnp.array(golden[f"out.{name}.logits"]), jnp.array(golden[f"out.{name}.boxes"]))
        for name in sorted({name.split(".")[1] for name in golden if name.startswith("out.")})
    }
    layers = [value for name, value in outputs.items() if name.startswith("aux_")] + [outputs["main"]]
    denoising = [value for name, value in outputs.items() if name.startswith("dn_")]
    output = make_output(layers, outputs.get("enc_0", outputs["main"]), denoising)

    counts = [len(golden[f"targets.{i}.labels"]) for i in range(len(outputs["main"].logits))]
    shape = (len(counts), max(counts) + 3)
    labels, boxes, mask = np.zeros(shape, np.int32), np.zeros((*shape, 4), np.float32), np.zeros(shape, bool)
    for i, count in enumerate(counts):
        labels[i, :count], boxes[i, :count] = golden[f"targets.{i}.labels"], golden[f"targets.{i}.boxes"]
        mask[i, :count] = True
    targets = Targets(jnp.array(labels), jnp.array(boxes), jnp.array(mask))
    if not denoising:
        return output, targets, None
    slots = denoising[0].logits.shape[1]
    sought = np.full((len(counts), slots), -1, np.int32)
    for i, count in enumerate(counts):
        sought[i, golden[f"dn.positive_index.{i}"]] = np.tile(np.arange(count), groups)
    return output, targets, DenoisingTargets(jnp.array(sought), jnp.ones((1, slots), bool), jnp.array([groups]))


def golden_groups(golden: dict[str, np.ndarray]) -> int:
    counts = {name.split(".")[2]: len(value) for name, value in golden.items() if name.startswith("dn.positive_index.")}
    image = max(counts, key=lambda name: counts[name], default="0")
    return max(1, counts.get(image, 0) // max(1, len(golden[f"targets.{image}.labels"])))


def check_terms(golden: dict[str, np.ndarray], named: dict[str, jax.Array], rtol: float) -> None:
    stored = {name.removeprefix("loss."): value for name, value in golden.items() if name.startswith("loss.")}
    total = stored.pop("total")
    assert set(stored) == {name for name in named if "enc_0" not in name or "loss.loss_bbox_enc_0" in golden}
    for name, value in stored.items():
        np.testing.assert_allclose(named[name], value, rtol=rtol, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(sum(float(named[name]) for name in stored), total, rtol=rtol)


@pytest.mark.slow
@pytest.mark.parametrize("case", CRITERION_CASES)
def test_every_term_and_gradient_is_that_of_the_reference(shared: Path, case):
    golden, settings = load_file(shared / f"golden/criterion_{case}.safetensors"), CRITERION_CASES[case]
    output, targets, sought = golden_case(golden, golden_groups(golden))
    result, slopes = criterion_and_gradient(output, targets, denoising=sought, settings=settings)
    check_terms(golden, result.named(settings), rtol=1e-5)

    ours = {f"aux_{i}": layer for i, layer in enumerate(slopes.layers[:-1])} | {"main": slopes.layers[-1]}
    ours |= {f"dn_{i}": layer for i, layer in enumerate(slopes.denoising)} | {"enc_0": slopes.encoder}
    stored = [name for name in golden if name.startswith("grad.")]
    assert len(stored) >= 2
    for name in stored:
        _, outputs, kind = name.split(".")
        found = getattr(ours[outputs], kind)
        np.testing.assert_allclose(found, golden[name], rtol=1e-5, atol=1e-5 * np.abs(golden[name]).max(), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINING_CASES)
def test_every_term_of_a_training_step_is_that_of_the_reference(shared: Path, case):
    golden = load_file(shared / f"golden/train_{case}.safetensors")
    output, targets, sought = golden_case(golden, golden_groups(golden))
    assert sought is not None
    check_terms(golden, criterion(output, targets, denoising=sought).named(LossSettings()), rtol=2e-5)


def test_elements_of_the_varifocal_loss_are_those_of_the_reference(shared: Path):
    golden = load_file(shared / "golden/criterion_vfl_elements.safetensors")

    def element(logit, matched, quality):
        return varifocal_loss(logit[None], matched[None], quality, alpha=0.75, gamma=2.0)[0]

    values = jax.vmap(jax.value_and_grad(element), (0, None, None))
    logits = jnp.array(golden["logits"])
    for ours, name in zip(values(logits, jnp.array(False), jnp.array(0.0)), ("loss", "grad"), strict=True):
        np.testing.assert_allclose(ours, golden[f"unmatched_{name}"], rtol=1e-5, atol=1e-7)
    table = jax.vmap(values, (None, None, 0), 1)(logits, jnp.array(True), jnp.array(golden["qualities"]))
    for ours, name in zip(table, ("loss", "grad"), strict=True):
        np.testing.assert_allclose(ours, golden[f"matched_{name}"], rtol=1e-5, atol=1e-6)
