"""COCO's figures keep to what they mean: laws first, then numbers worked out by hand, then pycocotools."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rtdetrv2_jax.arrays import Detections
from rtdetrv2_jax.data import Classes, FileDataset, Sample
from rtdetrv2_jax.evaluation import EvaluationError, Evaluator, Scores

NAMES = ("ant", "bee", "cat", "dog")
FIGURES = Scores._fields[:-1]


@dataclass
class Listed:
    """Samples as they were given."""

    samples: list[Sample]
    class_names: tuple[str, ...] = NAMES
    category_ids: tuple[int, ...] = (1, 3, 5, 7)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def image(*objects, crowds=(), areas=None) -> Sample:
    """A sample of objects and crowds, each a label and the four sides of its box."""
    boxes = np.array([box for _, *box in objects], np.float32).reshape(-1, 4)
    return Sample(
        image=Path("there is no such file"),
        image_id="any",
        size=(480, 640),
        boxes_xyxy_pixels=boxes,
        labels=np.array([label for label, *_ in objects], np.int32),
        areas=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) if areas is None else np.array(areas, np.float32),
        crowd_boxes_xyxy_pixels=np.array([box for _, *box in crowds], np.float32).reshape(-1, 4),
        crowd_labels=np.array([label for label, *_ in crowds], np.int32),
    )


def found(*detections) -> Detections:
    """A batch of one image: detections as score, label and four sides."""
    scores, labels = [score for score, *_ in detections], [label for _, label, *_ in detections]
    boxes = np.array([box for _, _, *box in detections], np.float32).reshape(1, -1, 4)
    return Detections(np.array([scores], np.float32), np.array([labels], np.int32), boxes)


def truth_of(sample: Sample, *, label_shift: int = 0) -> Detections:
    """Detections of all that is there."""
    labels = (sample.labels + label_shift) % len(NAMES)
    return Detections(np.full(labels.shape, 0.9, np.float32)[None], labels[None], sample.boxes_xyxy_pixels[None])


def scores_of(dataset, detections, **options) -> Scores:
    evaluator = Evaluator(dataset, **options)
    for position, each in detections.items():
        evaluator.add(np.array([position]), each)
    return evaluator.scores()


def same(left: Scores, right: Scores, *, within: float = 0.0) -> bool:
    one, other = (np.array([*scores[:-1], *scores.per_class.values()]) for scores in (left, right))
    return bool(np.allclose(one, other, rtol=0, atol=within, equal_nan=True)) and list(left.per_class) == list(
        right.per_class
    )


def scenes(count: int, *, seed: int = 0) -> Listed:
    """Images with objects of all sizes and classes but the last, and some crowds."""
    random = np.random.default_rng(seed)

    def some(most: int) -> list[tuple]:
        corners = random.uniform(0, 300, (random.integers(most + 1), 2))
        far_corners = corners + np.exp(random.uniform(2, 5.5, corners.shape))
        return [(random.integers(len(NAMES) - 1), *box) for box in np.concatenate([corners, far_corners], axis=1)]

    return Listed([image(*some(6), crowds=some(1)) for _ in range(count)])


def guesses(dataset: Listed, *, seed: int = 0, queries: int = 30) -> dict[int, Detections]:
    """Detections as a middling model makes them: near objects or anywhere, many of the same score."""
    random = np.random.default_rng(seed)
    detections = {}
    for position, sample in enumerate(dataset.samples):
        boxes = np.concatenate([sample.boxes_xyxy_pixels, sample.crowd_boxes_xyxy_pixels, [[10, 10, 90, 70]]])
        labels = np.concatenate([sample.labels, sample.crowd_labels, [3]])
        chosen = random.integers(len(boxes), size=queries)
        sides = boxes[chosen] + random.normal(0, 6, (queries, 4))
        detections[position] = Detections(
            np.round(random.random((1, queries)), 1).astype(np.float32),
            np.where(random.random(queries) < 0.8, labels[chosen], 1).astype(np.int32)[None],
            np.concatenate([sides[:, :2], np.maximum(sides[:, 2:], sides[:, :2] + 1)], axis=1).astype(np.float32)[None],
        )
    return detections


def files(dataset: Listed) -> FileDataset:
    """The same annotations, as files give them."""
    rows = [
        (position, label, box, area, crowd)
        for position, sample in enumerate(dataset.samples)
        for boxes, labels, areas, crowd in (
            (sample.boxes_xyxy_pixels, sample.labels, sample.areas, False),
            (sample.crowd_boxes_xyxy_pixels, sample.crowd_labels, np.ones(len(sample.crowd_labels)), True),
        )
        for box, label, area in zip(boxes, labels, areas, strict=True)
    ]
    owners, labels, boxes, areas, crowd = zip(*rows, strict=True)
    return FileDataset(
        classes=Classes(dataset.class_names, dataset.category_ids),
        folder=Path("there is no such folder"),
        files=np.array(["a.jpg"] * len(dataset)),
        image_ids=np.arange(len(dataset)),
        sizes=np.full((len(dataset), 2), 640, np.int32),
        starts=np.searchsorted(owners, np.arange(len(dataset) + 1)).astype(np.int64),
        boxes_xyxy_pixels=np.array(boxes, np.float32),
        labels=np.array(labels, np.int32),
        areas=np.array(areas, np.float32),
        crowd=np.array(crowd, np.bool_),
    )


def test_all_that_is_there_and_nothing_else_is_perfect():
    dataset = scenes(20)
    scores = scores_of(dataset, {position: truth_of(sample) for position, sample in enumerate(dataset.samples)})
    for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100", "ar_small", "ar_large"):
        assert getattr(scores, name) == pytest.approx(1), name
    assert list(scores.per_class) == list(NAMES)
    assert np.isnan(scores.per_class["dog"])  # there is none


def test_nothing_found_is_nothing_whether_it_was_added_or_not():
    dataset = scenes(5)
    silent, empty = scores_of(dataset, {}), scores_of(dataset, dict.fromkeys(range(5), found()))
    assert same(silent, empty)
    assert all(getattr(silent, name) == 0 for name in FIGURES)


def test_the_right_boxes_with_wrong_classes_are_worth_nothing():
    dataset = scenes(10)
    shifted = {index: truth_of(sample, label_shift=3) for index, sample in enumerate(dataset.samples)}
    assert scores_of(Listed([image((2, 0, 0, 50, 50))]), {0: found((1, 0, 0, 0, 50, 50))}).ap == 0
    assert scores_of(dataset, shifted).ap < 0.05


def test_where_there_is_nothing_to_be_found_there_is_no_figure():
    scores = scores_of(Listed([image(), image()]), {0: found((0.9, 1, 0, 0, 9, 9))})
    assert all(np.isnan(getattr(scores, name)) for name in FIGURES)
    assert "-" in scores.table()


def test_crowds_forgive_what_is_found_in_them():
    there, detections = (0, 300, 300, 400, 400), [(0.9, 0, 0, 0, 40, 40), (0.8, 0, 50, 50, 80, 90)]
    detections.append((0.5, *there))
    crowded = scores_of(Listed([image(there, crowds=[(0, 0, 0, 100, 100)])]), {0: found(*detections)})
    open_field = scores_of(Listed([image(there)]), {0: found(*detections)})
    another = scores_of(Listed([image(there, crowds=[(1, 0, 0, 100, 100)])]), {0: found(*detections)})
    assert crowded.ap == pytest.approx(1)
    assert open_field.ap == another.ap == pytest.approx(1 / 3)


def test_order_and_batches_of_adding_change_nothing():
    dataset = scenes(12)
    detections = guesses(dataset)
    one_by_one = scores_of(dataset, detections)
    assert 0.02 < one_by_one.ap < 0.9
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(12)
        evaluator = Evaluator(dataset)
        for part in np.split(order, [1, 4, 4, 9]):
            batch = [np.concatenate(column) for column in zip(*(detections[index] for index in part), strict=True)]
            evaluator.add(part, Detections(*batch) if batch else Detections(*(field[:0] for field in detections[0])))
        assert same(evaluator.scores(), one_by_one)


def test_figures_may_be_asked_for_again_and_between():
    dataset = scenes(6)
    detections = guesses(dataset)
    evaluator = Evaluator(dataset)
    for position, each in detections.items():
        evaluator.add(np.array([position]), each)
        evaluator.scores()
    assert same(evaluator.scores(), scores_of(dataset, detections))


def test_the_mean_over_classes_is_the_figure():
    dataset = scenes(12)
    scores = scores_of(dataset, guesses(dataset))
    assert scores.ap == pytest.approx(np.nanmean(list(scores.per_class.values())))


def test_images_that_do_not_count_change_nothing():
    dataset = scenes(12)
    detections = guesses(dataset)
    chosen = [1, 4, 5, 10]
    within = scores_of(dataset, {index: detections[index] for index in chosen}, positions=np.array(chosen[::-1]))
    alone = Listed([dataset.samples[index] for index in chosen])
    assert same(within, scores_of(alone, dict(enumerate(detections[index] for index in chosen))))


def test_annotations_of_files_are_those_of_their_samples():
    dataset = scenes(12)
    detections = guesses(dataset)
    from_files = files(dataset)
    from_samples = Listed([from_files[index] for index in range(12)])
    assert same(scores_of(from_files, detections), scores_of(from_samples, detections))
    assert same(scores_of(from_files, detections), scores_of(dataset, detections))
    some = {index: detections[index] for index in (0, 7)}
    positions = np.array([7, 0])
    assert same(scores_of(from_files, some, positions=positions), scores_of(dataset, some, positions=positions))


def test_a_second_detection_of_one_object_is_a_false_one():
    # In order of score: right, wrong, right. Precision is 1 up to a recall of 0.50, 2/3 from 0.51 to 1.
    dataset = Listed([image((1, 0, 0, 50, 50), (1, 100, 0, 150, 50))])
    scores = scores_of(dataset, {0: found((0.9, 1, 0, 0, 50, 50), (0.8, 1, 0, 0, 50, 50), (0.7, 1, 100, 0, 150, 50))})
    expected = (51 + 50 * 2 / 3) / 101
    assert (scores.ap, scores.ap50, scores.ap_medium, scores.per_class["bee"]) == pytest.approx((expected,) * 4)
    assert (scores.ar1, scores.ar10, scores.ar100) == (0.5, 1, 1)
    assert np.isnan(scores.ap_small)


def test_a_loose_box_counts_up_to_its_overlap():
    # An overlap of 0.62 passes at 0.50, 0.55 and 0.60 of ten thresholds.
    scores = scores_of(Listed([image((0, 0, 0, 100, 100))]), {0: found((0.9, 0, 0, 0, 100, 62))})
    assert (scores.ap, scores.ap50, scores.ap75) == pytest.approx((0.3, 1, 0))
    assert scores.ar100 == pytest.approx(0.3)


def test_size_goes_by_the_annotated_area():
    dataset = Listed([image((0, 0, 0, 100, 100), areas=[500])])
    scores = scores_of(dataset, {0: found((0.9, 0, 0, 0, 100, 100))})
    assert (scores.ap_small, scores.ar_small) == pytest.approx((1, 1))
    assert np.isnan([scores.ap_medium, scores.ap_large, scores.ar_medium, scores.ar_large]).all()


@pytest.mark.parametrize(("others", "ap"), [(99, 1 / 100), (100, 0)])
def test_the_hundred_best_of_a_class_count(others, ap):
    dataset = Listed([image((0, 0, 0, 50, 50))])
    right, wrong = (0.1, 0, 0, 0, 50, 50), (0.5, 0, 200, 200, 250, 250)
    assert scores_of(dataset, {0: found(right, *[wrong] * others)}).ap == pytest.approx(ap)
    elsewhere = (0.5, 1, 200, 200, 250, 250)
    assert scores_of(dataset, {0: found(right, *[elsewhere] * others)}).ap == pytest.approx(1)


def test_what_is_no_number_is_left_out_counted_and_told(caplog):
    dataset = Listed([image((0, 0, 0, 50, 50))])
    evaluator = Evaluator(dataset)
    right = (0.5, 0, 0, 0, 50, 50)
    evaluator.add(np.array([0]), found((np.nan, 0, 9, 9, 50, 50), (0.9, 0, 0, 0, np.inf, 50), right))
    assert evaluator.scores().ap == pytest.approx(1)
    assert evaluator.left_out == 2
    assert "2 detections are left out" in caplog.text


def test_what_can_not_be_added_is_said_and_nothing_is_added():
    dataset = scenes(6)
    evaluator = Evaluator(dataset, positions=np.array([0, 1, 2, 3]))
    one = found((0.9, 0, 0, 0, 9, 9))
    two = Detections(*(np.concatenate([column, column]) for column in one))
    evaluator.add(np.array([3]), one)
    for positions, detections, complaint in (
        ([3], one, r"come again: \[3\]"),
        ([1, 1], two, r"come again: \[1\]"),
        ([1, 5], two, r"not among the 4 images that count: \[5\]"),
        ([-1], one, r"not among .* \[-1\]"),
        ([1, 2], one, "2 positions, and detections of 1 images"),
        ([1], found((0.9, 4, 0, 0, 9, 9)), "labels go from 4 to 4"),
        ([1], found((0.9, -1, 0, 0, 9, 9)), "labels go from -1"),
    ):
        with pytest.raises(EvaluationError, match=complaint):
            evaluator.add(np.array(positions), detections)
    evaluator.add(np.array([1, 2]), two)


@pytest.mark.parametrize("positions", [[0, 6], [-1]])
def test_positions_out_of_the_data_set_are_refused(positions):
    with pytest.raises(EvaluationError, match="the data set has 6 images"):
        Evaluator(scenes(6), positions=np.array(positions))


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(EvaluationError, match=r"pip install 'rtdetrv2-jax\[evaluate\]'"):
        Evaluator(scenes(1))


def test_the_table_has_the_figures_and_the_best_class_first():
    dataset = Listed([image((0, 0, 0, 50, 50), (1, 100, 0, 150, 50), (2, 200, 0, 300, 100))])
    lines = scores_of(dataset, {0: found((0.9, 1, 100, 0, 150, 50), (0.9, 2, 200, 0, 300, 62))}).table().splitlines()
    assert lines[0].split() == ["percent", "all", "small", "medium", "large"]
    assert lines[1].split() == ["AP", "43.3", "-", "50.0", "30.0"]
    assert lines[-2].split() == ["bee", "100.0", "cat", "30.0", "ant", "0.0"]
    assert lines[-1] == "without an object: dog"


def described(position, labels, boxes, *, iscrowd=0, **numbers) -> list[dict]:
    """Boxes of one image in COCO's form; `numbers` are other columns."""
    columns = {name: np.broadcast_to(values, len(labels)).astype(np.float64) for name, values in numbers.items()}
    return [
        {"image_id": position, "category_id": int(label), "bbox": [*box[:2], *(box[2:] - box[:2])], "iscrowd": iscrowd}
        | {name: float(values[row]) for name, values in columns.items()}
        for row, (label, box) in enumerate(zip(labels, boxes.astype(np.float64), strict=True))
    ]


@pytest.mark.parity
def test_the_figures_are_those_of_pycocotools():
    coco = pytest.importorskip("pycocotools.coco", reason="needs the parity extra")
    cocoeval = pytest.importorskip("pycocotools.cocoeval", reason="needs the parity extra")
    dataset = scenes(60, seed=1)
    detections = guesses(dataset, queries=120, seed=1)

    truth, guessed = [], []
    for position, sample in enumerate(dataset.samples):
        truth += described(position, sample.labels, sample.boxes_xyxy_pixels, area=sample.areas)
        truth += described(position, sample.crowd_labels, sample.crowd_boxes_xyxy_pixels, iscrowd=1, area=0)
        scores, labels, boxes = (column[0] for column in detections[position])
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        guessed += described(position, labels, boxes, score=scores, area=areas)
    both = []
    for annotations in (truth, guessed):
        both.append(coco.COCO())
        both[-1].dataset = {
            "images": [{"id": position} for position in range(60)],
            "categories": [{"id": label} for label in range(len(NAMES))],
            "annotations": [{"id": number} | row for number, row in enumerate(annotations, start=1)],
        }
        both[-1].createIndex()
    reference = cocoeval.COCOeval(*both, "bbox")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    ours = scores_of(dataset, detections)
    np.testing.assert_allclose(ours[:-1], reference.stats, rtol=0, atol=1e-9)
    assert 0.05 < ours.ap < 0.9
