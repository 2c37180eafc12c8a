"""Contrastive denoising: noised ground truth for the decoder to put right, in a fixed number of slots."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rtdetrv2_jax.arrays import Denoising, DenoisingTargets, Targets
from rtdetrv2_jax.ops.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh

DUMMY_BOX = (0.5, 0.5, 0.1, 0.1)


@dataclass(frozen=True)
class DenoisingSettings:
    """How many denoising queries, and how much noise, as published.

    Args:
        queries: about how many positive queries an image has: as many groups of its targets as fit in.
        label_noise: half of this share of the labels is drawn anew.
        box_noise: how far a corner may move, in halves of the box; negatives move once to twice as far.
        images_together: how many neighbouring images share one layout, that of the one with most targets. None: the
            whole batch. The published models were trained with 4, the images of one GPU: in a larger batch the
            largest count is larger, and so every image has fewer groups.
    """

    queries: int = 100
    label_noise: float = 0.5
    box_noise: float = 1.0
    images_together: int | None = None


class DenoisingNoise(NamedTuple):
    """The random draws of one step, apart from the arithmetic that uses them.

    A label becomes `labels` where `label_draws` (0 to 1) is small enough; a corner moves by `steps` (0 to 1) in the
    direction of `signs` (±1).
    """

    label_draws: Float[Array, "b q_denoising"]
    labels: Int[Array, "b q_denoising"]
    signs: Float[Array, "b q_denoising 4"]
    steps: Float[Array, "b q_denoising 4"]


class _Layout(NamedTuple):
    """What the slots stand for: groups of positives, each followed by as many negatives. The letter r: see `_layout`.

    `rank` counts the targets of an image from 0; a slot whose rank an image does not reach is empty, but real.
    """

    group: Int[Array, "r q_denoising"]
    rank: Int[Array, "r q_denoising"]
    negative: Bool[Array, "r q_denoising"]
    real: Bool[Array, "r q_denoising"]
    groups: Int[Array, " r"]


def slot_count(max_targets: int, *, settings: DenoisingSettings = DenoisingSettings()) -> int:
    """The number of slots that holds any batch of up to `max_targets` targets an image.

    With M the largest count of a batch and N the denoising queries, a batch fills 2 M max(1, N // M) slots: at most
    2 N while M is at most N, and 2 M beyond. A batch without targets fills 2.
    """
    return 2 * max(settings.queries, max_targets)


def draw_noise(
    key: PRNGKeyArray, targets: Targets, *, classes: int, settings: DenoisingSettings = DenoisingSettings()
) -> DenoisingNoise:
    """Draws for every slot, those that stay empty included, so that the number of targets has no say in them."""
    images, max_targets = targets.mask.shape
    shape = (images, slot_count(max_targets, settings=settings))
    label_key, new_key, sign_key, step_key = jax.random.split(key, 4)
    return DenoisingNoise(
        label_draws=jax.random.uniform(label_key, shape, jnp.float32),
        labels=jax.random.randint(new_key, shape, 0, classes),
        signs=jax.random.rademacher(sign_key, (*shape, 4), jnp.float32),
        steps=jax.random.uniform(step_key, (*shape, 4), jnp.float32),
    )


def denoising_queries(
    targets: Targets,
    noise: DenoisingNoise,
    *,
    classes: int,
    queries: int,
    settings: DenoisingSettings = DenoisingSettings(),
) -> tuple[Denoising, DenoisingTargets]:
    """The denoising queries of a batch and what they are to find; `queries` is the number of selected queries.

    Slot by slot equal to the reference for any batch; the slots after those it would make are seen by no query and
    belong to no loss. Real targets may lie anywhere among the padding.

    Source: Zhang et al. 2022 (DINO, arXiv 2203.03605), section 3.3; lyuwenyu/RT-DETR, denoising.py,
    `get_contrastive_denoising_training_group`. As there, slots that an image leaves empty (it has fewer targets than
    the largest of the batch) are seen within their group and count as background, a batch without any target makes
    one dummy group, and a negative whose corners cross gets the smallest size. Deliberate differences: the shapes are
    fixed, so that one program serves all batches; no noise on boxes is allowed, where the reference fails.
    """
    images, max_targets = targets.mask.shape
    slots = slot_count(max_targets, settings=settings)
    if noise.labels.shape != (images, slots):
        raise ValueError(
            f"noise for {images} images and {slots} slots was expected, but its shape is {noise.labels.shape}: "
            "draw it with the same targets and settings"
        )
    counts = jnp.sum(targets.mask, axis=-1)
    layout = _layout(_largest(counts, settings.images_together), slots, settings.queries)

    real_first = jnp.argsort(~targets.mask, axis=-1, stable=True)
    index = jnp.take_along_axis(real_first, layout.rank, axis=-1)
    filled = layout.real & (layout.rank < counts[:, None])
    labels = jnp.where(filled, jnp.take_along_axis(targets.labels, index, axis=-1), classes)
    labels = jnp.where(filled & (noise.label_draws < 0.5 * settings.label_noise), noise.labels, labels)
    boxes = jnp.take_along_axis(targets.boxes.astype(jnp.float32), index[..., None], axis=-2)
    boxes = jnp.where(filled[..., None], boxes, 0.0)
    dummy = layout.real & (_largest(counts, settings.images_together) == 0)[:, None]
    boxes = jnp.where(dummy[..., None], jnp.array(DUMMY_BOX), boxes)
    boxes = _move_corners(boxes, layout.negative, noise, settings.box_noise)
    return (
        Denoising(labels=labels, boxes_logits=inverse_sigmoid(boxes), mask=_attention_mask(layout, queries)),
        DenoisingTargets(jnp.where(filled & ~layout.negative, index, -1), layout.real, layout.groups),
    )


def _largest(counts: Int[Array, " b"], images_together: int | None) -> Int[Array, " r"]:
    """The largest number of targets among the images that share a layout, for all at once or for each image."""
    if images_together is None:
        return jnp.max(counts, keepdims=True)
    if counts.size % images_together:
        raise ValueError(f"images_together ({images_together}) must divide the batch, which has {counts.size} images")
    return jnp.repeat(jnp.max(counts.reshape(-1, images_together), axis=-1), images_together)


def _layout(largest: Int[Array, " r"], slots: int, positives: int) -> _Layout:
    """Groups of `largest` positives and as many negatives, as many groups as fit, one at least.

    The letter r stands for layouts: 1 for the whole batch, or one for each image.
    """
    width = jnp.maximum(largest, 1)
    groups = jnp.where(largest == 0, 1, jnp.maximum(positives // width, 1))
    slot, width = jnp.arange(slots), width[:, None]
    group, place = slot // (2 * width), slot % (2 * width)
    return _Layout(
        group=group,
        rank=place % width,
        negative=place >= width,
        real=group < groups[:, None],
        groups=groups,
    )


def _move_corners(
    boxes: Float[Array, "b q_denoising 4"],
    negative: Bool[Array, "#b q_denoising"],
    noise: DenoisingNoise,
    scale: float,
) -> Float[Array, "b q_denoising 4"]:
    """Each corner coordinate moves by up to half the box, those of negatives by half to all of it, within the image."""
    half = jnp.tile(boxes[..., 2:] * 0.5, 2) * scale
    steps = noise.steps + negative[..., None].astype(noise.steps.dtype)
    corners = cxcywh_to_xyxy(boxes) + noise.signs * steps * half
    return xyxy_to_cxcywh(jnp.clip(corners, 0.0, 1.0))


def _attention_mask(layout: _Layout, queries: int) -> Bool[Array, "r q_all q_all"]:
    """All see the selected queries, and a real slot its own group as well, empty slots included; no more."""
    group = jnp.where(layout.real, layout.group, -1)
    group = jnp.pad(group, ((0, 0), (0, queries)), constant_values=-1)
    selected = jnp.arange(group.shape[-1]) >= layout.group.shape[-1]
    return ((group[:, :, None] == group[:, None, :]) & (group >= 0)[:, :, None]) | selected
