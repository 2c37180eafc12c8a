"""The training loss: classification, L1 and GIoU of every output set, final, auxiliary, encoder and denoising."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from rtdetrv2_jax.arrays import DenoisingTargets, Output, Prediction, Targets
from rtdetrv2_jax.objective.matcher import MatcherSettings, match, queries_to_targets
from rtdetrv2_jax.ops.boxes import cxcywh_to_xyxy, giou, iou

WHOLE_IMAGE = (0.5, 0.5, 1.0, 1.0)


@dataclass(frozen=True)
class LossSettings:
    """Which losses, and how much each counts, as published.

    Args:
        classification: "varifocal" learns the IoU of the matched box as its class score; "focal" is the sigmoid focal
            loss (published with `alpha` 0.25).
        alpha: weight of the background ("varifocal") or of the matched class ("focal").
        gamma: how much less an easy example counts.
        boxes_weight_format: what scales the GIoU loss of a pair and, as quality, its class score; "none" scales
            nothing and takes the IoU as quality.
        matching: "each" layer has its own, or all take that of the "final" one; the encoder always has its own.
    """

    classification: Literal["varifocal", "focal"] = "varifocal"
    classification_weight: float = 1.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    alpha: float = 0.75
    gamma: float = 2.0
    boxes_weight_format: Literal["none", "iou", "giou"] = "none"
    matching: Literal["each", "final"] = "each"
    matcher: MatcherSettings = field(default_factory=MatcherSettings)


class Terms(NamedTuple):
    """The three losses of output sets, weights multiplied in."""

    classification: Float[Array, "*sets"]
    l1: Float[Array, "*sets"]
    giou: Float[Array, "*sets"]


class Losses(NamedTuple):
    """The total, and what it is the sum of: decoder layers (the last is the final one), encoder, denoising layers."""

    total: Float[Array, ""]
    layers: Terms
    encoder: Terms
    denoising: Terms

    def named(self, settings: LossSettings) -> Mapping[str, ScalarLike]:
        """Every term under the reference's name, in its order: `loss_vfl`, `loss_bbox_aux_0`, `loss_giou_dn_2`..."""
        names = ({"varifocal": "loss_vfl", "focal": "loss_focal"}[settings.classification], "loss_bbox", "loss_giou")
        layers, denoising = self.layers.l1.size, self.denoising.l1.size
        sets = [("", self.layers, layers - 1)]
        sets += [(f"_aux_{i}", self.layers, i) for i in range(layers - 1)]
        sets += [(f"_dn_{i}", self.denoising, i) for i in range(denoising)]
        named = {name + suffix: term[i] for suffix, terms, i in sets for name, term in zip(names, terms, strict=True)}
        return named | {f"{name}_enc_0": term for name, term in zip(names, self.encoder, strict=True)}


def criterion(
    output: Output,
    targets: Targets,
    *,
    denoising: DenoisingTargets | None = None,
    settings: LossSettings = LossSettings(),
) -> Losses:
    """The loss of a batch, in float32. `denoising` goes with `output.denoising`, and is needed if that has layers.

    Every term is divided by the number of boxes in the global batch (at least 1), those of denoising also by the
    number of groups. A NaN in the output stays visible as NaN.

    Source: lyuwenyu/RT-DETR, rtdetrv2_criterion.py, `RTDETRCriterionv2`. It averages the count of boxes over
    processes and counts each as 1 at least; here the batch is one, whatever the number of devices. It computes in the
    type of the logits, which underflows in half precision.
    """
    if bool(output.denoising) != (denoising is not None):
        raise ValueError(
            f"the output has {len(output.denoising)} denoising layers, but denoising targets were "
            f"{'not ' if denoising is None else ''}given: give both or neither"
        )
    boxes = jnp.maximum(jnp.sum(targets.mask), 1).astype(jnp.float32)
    sets = _stack((*output.layers, output.encoder))
    matched = queries_to_targets(_match_all(output, targets, settings), sets.logits.shape[-2])
    terms = _terms(sets, targets, matched, counted=jnp.ones((1, 1), bool), divisor=boxes[None], settings=settings)
    if denoising is None:
        restored = Terms(*(jnp.zeros(0),) * 3)
    else:
        divisor = boxes * denoising.groups.astype(jnp.float32)
        matched = jnp.broadcast_to(denoising.targets, (len(output.denoising), *denoising.targets.shape))
        restored = _terms(
            _stack(output.denoising), targets, matched, counted=denoising.real, divisor=divisor, settings=settings
        )
    return Losses(
        total=sum((jnp.sum(term) for term in (*terms, *restored)), start=jnp.zeros(())),
        layers=Terms(*(term[:-1] for term in terms)),
        encoder=Terms(*(term[-1] for term in terms)),
        denoising=restored,
    )


def varifocal_loss(
    logits: Float[Array, "*b k"],
    one_hot: Bool[Array, "*b k"],
    quality: Float[Array, "*b"],
    *,
    alpha: float,
    gamma: float,
) -> Float[Array, "*b k"]:
    """Cross entropy of the matched class with `quality`, weighted by it, and of all else with 0, weighted focally.

    A matched class of quality 0 has weight 0: it is not pushed down either.

    Source: Zhang et al. 2021 (VarifocalNet, arXiv 2008.13367), section 3.2; lyuwenyu/RT-DETR, rtdetrv2_criterion.py,
    `loss_labels_vfl`. The weights are detached.
    """
    target = jnp.where(one_hot, quality[..., None], 0.0)
    background = alpha * jax.nn.sigmoid(logits) ** gamma
    weight = stop_gradient(jnp.where(one_hot, target, background))
    return weight * _cross_entropy(logits, stop_gradient(target))


def focal_loss(
    logits: Float[Array, "*b k"], one_hot: Bool[Array, "*b k"], *, alpha: float, gamma: float
) -> Float[Array, "*b k"]:
    """Cross entropy, less for what is already right.

    Source: Lin et al. 2017 (arXiv 1708.02002), section 3; lyuwenyu/RT-DETR, rtdetrv2_criterion.py,
    `loss_labels_focal`. Here the gradient goes through the weight too.
    """
    scores = jax.nn.sigmoid(logits)
    wrong = jnp.where(one_hot, 1.0 - scores, scores)
    balance = jnp.where(one_hot, alpha, 1.0 - alpha)
    return balance * wrong**gamma * _cross_entropy(logits, one_hot.astype(logits.dtype))


def _cross_entropy(logits: Float[Array, "*n"], target: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return jax.nn.softplus(logits) - logits * target


def _stack(predictions: tuple[Prediction, ...]) -> Prediction:
    """Output sets on a new first axis, in float32."""
    logits = jnp.stack([prediction.logits for prediction in predictions])
    boxes = jnp.stack([prediction.boxes for prediction in predictions])
    return Prediction(logits.astype(jnp.float32), boxes.astype(jnp.float32))


def _match_all(output: Output, targets: Targets, settings: LossSettings) -> Int[Array, "sets b t"]:
    """The query of every target in every decoder layer and, last, in the encoder: one call of the matcher."""
    if settings.matching == "each":
        return match(_stack((*output.layers, output.encoder)), targets, settings=settings.matcher)
    final, encoder = match(_stack((output.layers[-1], output.encoder)), targets, settings=settings.matcher)
    return jnp.stack([final] * len(output.layers) + [encoder])


def _terms(
    prediction: Prediction,
    targets: Targets,
    matched: Int[Array, "sets b q"],
    *,
    counted: Bool[Array, "#b #q"],
    divisor: Float[Array, "#b"],
    settings: LossSettings,
) -> Terms:
    """The losses of each output set, given the target of each query (-1: background) and the queries that count.

    Everything is computed for every query, against its target, so that nothing is gathered from the prediction and
    its gradient needs no scatter. A query without target is compared as the whole image with the whole image, which
    gives no loss and no gradient, whatever its own box.
    """
    positive = matched >= 0
    index = jnp.maximum(matched, 0)
    labels = jnp.take_along_axis(targets.labels[None], index, axis=-1)
    target_boxes = jnp.take_along_axis(targets.boxes.astype(jnp.float32)[None], index[..., None], axis=-2)
    whole = jnp.array(WHOLE_IMAGE)
    target_boxes = jnp.where(positive[..., None], target_boxes, whole)
    boxes = jnp.where(positive[..., None], prediction.boxes, whole)
    corners, target_corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes)
    overlap = giou(corners, target_corners)
    measure = overlap if settings.boxes_weight_format == "giou" else iou(corners, target_corners)
    quality = stop_gradient(measure)
    box_weight = jnp.ones_like(quality) if settings.boxes_weight_format == "none" else quality

    distance = boxes - target_boxes
    distance = distance * stop_gradient(jnp.sign(distance))  # no gradient at 0, where that of jnp.abs is 1

    logits = prediction.logits
    one_hot = positive[..., None] & (labels[..., None] == jnp.arange(logits.shape[-1]))
    if settings.classification == "varifocal":
        class_loss = varifocal_loss(logits, one_hot, quality, alpha=settings.alpha, gamma=settings.gamma)
    else:
        class_loss = focal_loss(logits, one_hot, alpha=settings.alpha, gamma=settings.gamma)

    def reduce(losses: Float[Array, "sets b q"], weight: float) -> Float[Array, " sets"]:
        images = jnp.sum(jnp.where(counted, losses, 0.0), axis=-1)
        return weight * jnp.sum(images / divisor, axis=-1)

    return Terms(
        classification=reduce(jnp.sum(class_loss, axis=-1), settings.classification_weight),
        l1=reduce(jnp.sum(distance, axis=-1), settings.l1_weight),
        giou=reduce(box_weight * (1.0 - overlap), settings.giou_weight),
    )
