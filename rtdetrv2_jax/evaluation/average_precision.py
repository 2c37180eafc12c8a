"""COCO's figures: how well detections agree with what a data set says is there."""

import logging
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from rtdetrv2_jax.arrays import Detections
from rtdetrv2_jax.data import Dataset, FileDataset

logger = logging.getLogger(__name__)

_CELLS = 4  # classes that stand side by side in a table

# What COCO's arrays hold along their axes.
_IOUS, _RECALLS, _SIZES, _LIMITS = 10, 101, 4, 3
_AT_50, _AT_75 = 0, 5
_ALL, _SMALL, _MEDIUM, _LARGE = range(_SIZES)
_ONE, _TEN, _HUNDRED = range(_LIMITS)


class EvaluationError(ValueError):
    """Detections that cannot be evaluated. The message says what to do."""


class Scores(NamedTuple):
    """COCO's figures: shares from 0 to 1, NaN where there is nothing to be found (COCO's -1).

    `ap` is average precision, the mean over classes and over IoU thresholds 0.5, 0.55 to 0.95; `ap50` and `ap75` are
    at one threshold. `ar1`, `ar10` and `ar100` are average recall with so many detections of a class in an image; all
    else goes by a hundred. Small objects have under 32² pixels, large ones over 96². `per_class` is the average
    precision of each class by its name, in the order of labels.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    per_class: dict[str, float]

    def table(self) -> str:
        """A short text in percent: the figures, and the classes from best to worst."""
        rows = [
            ("AP", self.ap, self.ap_small, self.ap_medium, self.ap_large),
            ("AP at IoU 0.50", self.ap50),
            ("AP at IoU 0.75", self.ap75),
            ("AR, 1 a class", self.ar1),
            ("AR, 10 a class", self.ar10),
            ("AR, 100 a class", self.ar100, self.ar_small, self.ar_medium, self.ar_large),
        ]
        lines = [f"{'percent':<15}" + "".join(f"{size:>8}" for size in ("all", "small", "medium", "large"))]
        lines += [f"{name:<15}" + "".join(f"{_percent(value):>8}" for value in values) for name, *values in rows]
        found = {name: value for name, value in self.per_class.items() if not np.isnan(value)}
        width = max(map(len, found), default=0)
        cells = [f"{name:<{width}} {_percent(found[name]):>5}" for name in sorted(found, key=lambda name: -found[name])]
        lines += ["", "AP by class"] if cells else []
        lines += ["   ".join(cells[start : start + _CELLS]) for start in range(0, len(cells), _CELLS)]
        absent = [name for name in self.per_class if name not in found]
        lines += [f"without an object: {', '.join(absent)}"] if absent else []
        return "\n".join(lines)


class Evaluator:
    """Takes the detections of a data set's images, in any order, and gives COCO's figures.

    What counts is all images, or those at `positions`; nothing is found in an image whose detections were not added.
    As COCO has it, a class is judged by its hundred best detections in an image, crowds forgive what is found in
    them, and classes without an object have no part in the means.

    Args:
        dataset: What is there. Only annotations are kept; of files no image is read.
        positions: The images that count.

    Attributes:
        left_out: How many detections had a score or a box that is no finite number, and count as not
            made.

    Raises:
        EvaluationError: The package that matches detections to objects is not installed, or a position is not in
            the data set.
    """

    def __init__(self, dataset: Dataset, *, positions: Int[np.ndarray, " images"] | None = None) -> None:
        _matcher()
        self.class_names = dataset.class_names
        self.positions = np.arange(len(dataset)) if positions is None else np.unique(positions)
        if len(self.positions) and not 0 <= self.positions[0] <= self.positions[-1] < len(dataset):
            raise EvaluationError(
                f"positions go from {self.positions[0]} to {self.positions[-1]}, and the data set has {len(dataset)} "
                "images. Give positions in the data set, from 0."
            )
        self.left_out = 0
        self._truth = _truth(dataset, self.positions)
        self._found: dict[int, _Boxes] = {}

    def add(self, positions: Int[np.ndarray, " b"], found: Detections) -> None:
        """Adds the detections of some images.

        Args:
            positions: Where in the data set each image is.
            found: For each of them, as arrays of NumPy; labels index the data set's `class_names`.

        Raises:
            EvaluationError: An image has its detections already, or does not count; a label is of no class; or there
                are detections of more or fewer images than positions. Nothing is added then.
        """
        scores, labels, boxes = map(np.asarray, found)
        finite = np.isfinite(scores) & np.isfinite(boxes).all(axis=-1)
        self._check(positions, scores=scores, labels=labels)
        self.left_out += np.count_nonzero(~finite)
        for row, position in enumerate(positions.tolist()):
            kept = finite[row]
            self._found[position] = _boxes(position, labels[row][kept], boxes[row][kept], scores=scores[row][kept])

    def scores(self) -> Scores:
        """COCO's figures for what has been added so far."""
        if self.left_out:
            logger.warning("%d detections are left out: their scores or boxes are no finite numbers", self.left_out)
        classes, found = len(self.class_names), _joined([self._found[position] for position in sorted(self._found)])
        precision = np.full((classes, _IOUS, _RECALLS, _SIZES, _LIMITS), np.nan)
        recall = np.full((classes, _IOUS, _SIZES, _LIMITS), np.nan)
        # Class by class: the same figures as in one go, in a small part of its memory.
        for label in np.unique(self._truth.labels).tolist():
            precision[label], recall[label] = _match(self._truth.of_class(label), found.of_class(label))
        best = precision[..., _HUNDRED]
        return Scores(
            ap=_mean(best[..., _ALL]),
            ap50=_mean(best[:, _AT_50, :, _ALL]),
            ap75=_mean(best[:, _AT_75, :, _ALL]),
            ap_small=_mean(best[..., _SMALL]),
            ap_medium=_mean(best[..., _MEDIUM]),
            ap_large=_mean(best[..., _LARGE]),
            ar1=_mean(recall[..., _ALL, _ONE]),
            ar10=_mean(recall[..., _ALL, _TEN]),
            ar100=_mean(recall[..., _ALL, _HUNDRED]),
            ar_small=_mean(recall[..., _SMALL, _HUNDRED]),
            ar_medium=_mean(recall[..., _MEDIUM, _HUNDRED]),
            ar_large=_mean(recall[..., _LARGE, _HUNDRED]),
            per_class={name: _mean(best[label, ..., _ALL]) for label, name in enumerate(self.class_names)},
        )

    def _check(self, positions: np.ndarray, *, scores: np.ndarray, labels: np.ndarray) -> None:
        faults = []
        if len(positions) != len(scores):
            faults.append(f"there are {len(positions)} positions, and detections of {len(scores)} images")
        distinct, counts = np.unique(positions, return_counts=True)
        if again := distinct[(counts > 1) | np.isin(distinct, list(self._found))].tolist():
            faults.append(f"each image is added once, and these come again: {again}")
        if strange := np.setdiff1d(positions, self.positions).tolist():
            faults.append(f"these positions are not among the {len(self.positions)} images that count: {strange}")
        if labels.size and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            faults.append(
                f"labels go from {labels.min()} to {labels.max()}, and the data set has {len(self.class_names)} "
                "classes: give labels that index its class_names"
            )
        if faults:
            raise EvaluationError("; ".join(faults))


class _Boxes(NamedTuple):
    """What is there or what was found, in any number of images: a row for each box."""

    positions: np.ndarray
    labels: np.ndarray
    boxes_xyxy_pixels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    scores: np.ndarray

    def of_class(self, label: int) -> "_Boxes":
        chosen = self.labels == label
        return _Boxes(*(column[chosen] for column in self))

    def annotations(self) -> list[dict[str, Any]]:
        """In COCO's form, as of one class. Numbers start from 1: 0 would mean that nothing was matched."""
        corners, far_corners = np.split(self.boxes_xyxy_pixels, 2, axis=1)
        boxes = np.concatenate([corners, far_corners - corners], axis=1)
        columns = (self.positions, boxes, self.areas, self.crowd.astype(np.int64), self.scores)
        keys = ("id", "category_id", "image_id", "bbox", "area", "iscrowd", "score")
        rows = enumerate(zip(*(column.tolist() for column in columns), strict=True), start=1)
        return [dict(zip(keys, (number, 1, *row), strict=True)) for number, row in rows]


def _boxes(
    position: int,
    labels: np.ndarray,
    boxes_xyxy_pixels: np.ndarray,
    *,
    areas: np.ndarray | None = None,
    crowd: bool = False,
    scores: np.ndarray | None = None,
) -> _Boxes:
    """The boxes of one image; their own areas where no others are given, and scores of 1."""
    boxes, ones = boxes_xyxy_pixels.astype(np.float64), np.ones(len(labels))
    own_areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    of_boxes = labels, boxes, own_areas if areas is None else areas
    return _Boxes(np.full(len(labels), position), *of_boxes, ones * crowd > 0, ones if scores is None else scores)


def _joined(parts: list[_Boxes]) -> _Boxes:
    none = _boxes(0, np.zeros(0, np.int32), np.zeros((0, 4)))
    return _Boxes(*map(np.concatenate, zip(none, *parts, strict=True)))


def _truth(dataset: Dataset, positions: np.ndarray) -> _Boxes:
    if isinstance(dataset, FileDataset):
        owners = np.repeat(np.arange(len(dataset)), np.diff(dataset.starts))
        boxes, scores = dataset.boxes_xyxy_pixels.astype(np.float64), np.ones(len(owners))
        columns = _Boxes(owners, dataset.labels, boxes, dataset.areas, dataset.crowd, scores)
        counts = np.isin(owners, positions)
        return _Boxes(*(column[counts] for column in columns))
    parts = []
    for position in positions.tolist():
        sample = dataset[position]
        parts.append(_boxes(position, sample.labels, sample.boxes_xyxy_pixels, areas=sample.areas))
        parts.append(_boxes(position, sample.crowd_labels, sample.crowd_boxes_xyxy_pixels, crowd=True))
    return _joined(parts)


def _match(truth: _Boxes, found: _Boxes) -> tuple[np.ndarray, np.ndarray]:
    """The precision and the recall of one class, along COCO's axes; NaN where there is nothing to be found."""
    annotations, evaluation = _matcher()
    images = [{"id": position} for position in np.union1d(truth.positions, found.positions).tolist()]
    described = [
        annotations({"images": images, "categories": [{"id": 1}], "annotations": boxes.annotations()})
        for boxes in (truth, found)
    ]
    matching = evaluation(*described, "bbox")
    matching.evaluate()
    matching.accumulate()
    precision, recall = matching.eval["precision"][:, :, 0], matching.eval["recall"][:, 0]
    return np.where(precision < 0, np.nan, precision), np.where(recall < 0, np.nan, recall)


def _matcher() -> tuple[Any, Any]:
    """The two classes of faster-coco-eval: one holds annotations, the other matches two of these."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise EvaluationError(
            "detections are matched to objects by faster-coco-eval, which is not installed: "
            "pip install 'rtdetrv2-jax[evaluate]'"
        ) from error
    return COCO, COCOeval_faster


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.1f}"
