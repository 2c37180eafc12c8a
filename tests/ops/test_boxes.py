import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from safetensors.numpy import load_file

from rtdetrv2_jax.ops.boxes import (
    cxcywh_to_xyxy,
    giou,
    inverse_sigmoid,
    iou,
    pairwise_giou,
    pairwise_iou,
    xyxy_to_cxcywh,
)

GIOU_AND_IOU = [
    ((0, 0, 2, 2), (1, 1, 3, 3), -0.0793651, 0.1428571),
    ((0, 0, 1, 1), (2, 2, 3, 3), -0.7777778, 0.0),
    ((0, 0, 4, 4), (0, 0, 4, 4), 1.0, 1.0),
    ((0, 0, 4, 4), (1, 1, 3, 3), 0.25, 0.25),
]


def random_corners(key: jax.Array, *shape: int) -> jax.Array:
    centre_key, size_key = jax.random.split(key)
    centre = jax.random.uniform(centre_key, (*shape, 2))
    size = jax.random.uniform(size_key, (*shape, 2), minval=0.01, maxval=0.7)
    return cxcywh_to_xyxy(jnp.concatenate([centre, size], axis=-1))


def test_conversion_there_and_back_changes_nothing():
    corners = random_corners(jax.random.key(0), 50)
    np.testing.assert_allclose(cxcywh_to_xyxy(xyxy_to_cxcywh(corners)), corners, atol=1e-6)


@pytest.mark.parametrize(("box", "other", "generalised", "plain"), GIOU_AND_IOU)
def test_overlaps_of_boxes_worked_by_hand(box, other, generalised, plain):
    box, other = jnp.array(box, jnp.float32), jnp.array(other, jnp.float32)
    np.testing.assert_allclose(giou(box, other), generalised, atol=1e-6)
    np.testing.assert_allclose(iou(box, other), plain, atol=1e-6)


@pytest.mark.parametrize(("pairwise", "elementwise"), [(pairwise_iou, iou), (pairwise_giou, giou)])
def test_the_table_of_pairs_holds_what_each_pair_gives(pairwise, elementwise):
    boxes, others = random_corners(jax.random.key(1), 2, 5), random_corners(jax.random.key(2), 2, 3)
    table = pairwise(boxes, others)
    assert table.shape == (2, 5, 3)
    for image, row, column in np.ndindex(table.shape):
        np.testing.assert_allclose(
            table[image, row, column], elementwise(boxes[image, row], others[image, column]), rtol=1e-6
        )


def test_overlaps_are_symmetric_and_do_not_change_when_the_image_is_moved_or_scaled():
    boxes, others = random_corners(jax.random.key(3), 100), random_corners(jax.random.key(4), 100)
    for overlap in (iou, giou):
        expected = overlap(boxes, others)
        np.testing.assert_allclose(overlap(others, boxes), expected, atol=1e-6)
        np.testing.assert_allclose(overlap(boxes * 3 + 2, others * 3 + 2), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("box", "other", "generalised"),
    [
        ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), 0.0),
        ((0.2, 0.2, 0.2, 0.2), (0.5, 0.5, 0.5, 0.5), -1.0),
        ((0.2, 0.2, 0.2, 0.6), (0.2, 0.4, 0.2, 0.9), 0.0),
    ],
)
def test_pairs_without_any_area_have_a_value_and_no_gradient(box, other, generalised):
    box, other = jnp.array(box, jnp.float32), jnp.array(other, jnp.float32)
    assert iou(box, other) == 0.0
    assert giou(box, other) == generalised
    for overlap in (iou, giou):
        gradients = jax.grad(overlap, argnums=(0, 1))(box, other)
        assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not np.any(jax.grad(iou)(box, other))


@pytest.mark.parametrize("size", [1e-3, 1e-8, 1e-12, 1e-18])
def test_gradients_stay_finite_and_right_for_boxes_however_small(size):
    box = jnp.array([0.0, 0.0, 2.0, 2.0]) * size
    other = jnp.array([1.0, 1.0, 3.0, 3.0]) * size
    large = jax.grad(giou)(box / size, other / size)
    np.testing.assert_allclose(jax.grad(giou)(box, other) * size, large, rtol=1e-4)


def test_the_gradient_is_that_of_finite_differences():
    boxes, others = random_corners(jax.random.key(5), 20), random_corners(jax.random.key(6), 20)
    for overlap in (iou, giou):
        check_grads(
            lambda a, b, f=overlap: f(jnp.asarray(a), jnp.asarray(b)), (boxes, others), order=1, eps=1e-3, rtol=2e-2
        )


def test_tables_are_those_of_the_reference_and_finite_where_it_is_not(shared):
    golden = load_file(shared / "golden/criterion_boxops.safetensors")
    boxes, others = jnp.array(golden["boxes1_xyxy"]), jnp.array(golden["boxes2_xyxy"])
    for name, pairwise in (("iou", pairwise_iou), ("giou", pairwise_giou)):
        ours, theirs = np.asarray(pairwise(boxes, others)), golden[name]
        finite = np.isfinite(theirs)
        assert not finite.all()
        np.testing.assert_allclose(ours[finite], theirs[finite], rtol=1e-5, atol=1e-6)
        assert np.isfinite(ours).all()


def test_the_giou_loss_has_the_value_and_gradient_of_the_reference(shared):
    golden = load_file(shared / "golden/criterion_boxops.safetensors")
    target = cxcywh_to_xyxy(jnp.array(golden["giou_loss_tgt_cxcywh"]))
    losses, pullback = jax.vjp(
        lambda boxes: 1.0 - giou(cxcywh_to_xyxy(boxes), target), jnp.array(golden["giou_loss_src_cxcywh"])
    )
    np.testing.assert_allclose(losses, golden["giou_loss"], rtol=1e-6)
    np.testing.assert_allclose(pullback(jnp.ones_like(losses))[0], golden["giou_loss_grad_src"], rtol=1e-4, atol=1e-5)


def test_conversions_and_the_inverse_sigmoid_are_those_of_the_reference(shared):
    golden = {
        name: jnp.array(value) for name, value in load_file(shared / "golden/criterion_boxops.safetensors").items()
    }
    np.testing.assert_allclose(cxcywh_to_xyxy(golden["boxes1_cxcywh"]), golden["boxes1_xyxy"], atol=1e-7)
    np.testing.assert_allclose(xyxy_to_cxcywh(golden["boxes1_xyxy"]), golden["boxes1_back_cxcywh"], atol=1e-7)
    np.testing.assert_allclose(inverse_sigmoid(golden["inverse_sigmoid_in"]), golden["inverse_sigmoid_out"], rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "logit"),
    [(-0.1, -11.512925), (0.0, -11.512925), (1e-5, -11.512916), (0.5, 0.0), (0.9, 2.197225), (2.0, 11.512925)],
)
def test_the_inverse_sigmoid_keeps_its_distance_from_infinity(x, logit):
    np.testing.assert_allclose(inverse_sigmoid(jnp.array(x)), logit, atol=2e-6)
