"""`rtdetrv2 evaluate` as a person types it."""

import dataclasses
import itertools
import json
import logging

import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax import Preprocessing, save_model
from rtdetrv2_jax.cli import main
from rtdetrv2_jax.commands.evaluate import SEED, SPELLINGS
from rtdetrv2_jax.config import COCO_CLASS_NAMES
from rtdetrv2_jax.data import SyntheticDataset, open_dataset
from rtdetrv2_jax.detector import Detector, Found, Result
from rtdetrv2_jax.image import read_image
from rtdetrv2_jax.weights.untrained import untrained_model

SHAPES = SyntheticDataset(0).class_names


class Told(Detector):
    """A detector that says what it was told, image by image: names and boxes."""

    def __init__(self, config, answers):
        self.config, self.answers = config, answers

    def stream(self, sources, *, threshold=0.5):
        assert threshold == 0
        for source, (names, boxes) in zip(sources, self.answers, strict=False):
            labels = np.array([self.config.class_names.index(name) for name in names], np.int32)
            scores, size = np.full(len(names), 0.9, np.float32), read_image(source).shape[:2]
            yield Found(source, None, Result(scores, labels, tuple(names), boxes, size))


@pytest.fixture
def told(tiny_config, monkeypatch):
    """Puts a detector in place that knows some classes and gives some answers; nothing, where none are given."""

    def put(names, answers=None):
        nothing = itertools.repeat(((), np.zeros((0, 4), np.float32)))
        detector = Told(dataclasses.replace(tiny_config, class_names=tuple(names)), answers or nothing)
        monkeypatch.setattr(Detector, "from_pretrained", lambda *_, **__: detector)

    return put


@pytest.fixture(scope="module")
def checkpoint(tiny_config, tmp_path_factory):
    """A small untrained model that knows the synthetic classes, and those of `animals`."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    model = untrained_model(dataclasses.replace(tiny_config, class_names=("ant", "couch", "bee", *reversed(SHAPES))))
    save_model(model, folder, preprocessing=Preprocessing(size=(128, 160)))
    return folder


@pytest.fixture
def animals(tmp_path):
    """Four pictures with one object each; one only looks like a picture, another has not the size that is annotated."""
    folder = tmp_path / "animals"
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "1.png").write_bytes(b"no picture")
    images = [{"id": number, "file_name": f"{number}.png", "height": 60, "width": 80} for number in range(4)]
    images[2]["width"] = 90
    boxes = [
        {"id": number + 1, "image_id": number, "category_id": 4, "bbox": [10, 10, 30, 30], "area": 900, "iscrowd": 0}
        for number in range(4)
    ]
    categories = [{"id": 4, "name": "couch"}, {"id": 9, "name": "ant"}]
    (folder / "val.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return folder


def evaluate(*words):
    return main(["evaluate", *map(str, words)])


def figures(table):
    """The rows of the upper table, by name."""
    lines = table.partition("\n\n")[0].splitlines()
    return {line[:15].rstrip(): line[15:].split() for line in lines}


def test_drawn_scenes_are_measured_by_one_command(checkpoint, tmp_path, capsys):
    words = ["synthetic:3", "--seed", 5, "--model", checkpoint, "--json", tmp_path / "figures.json"]
    assert evaluate(*words) == 0
    said = capsys.readouterr()
    assert figures(said.out)["percent"] == ["all", "small", "medium", "large"]
    assert "AP by class" in said.out
    assert "3 images, 0 of them not read" in said.err
    assert "no numbers" not in said.err
    record = json.loads((tmp_path / "figures.json").read_text())
    assert (record["dataset"], record["seed"], record["images"], record["not_read"]) == ("synthetic:3", 5, 3, 0)
    assert 0 <= record["scores"]["ap"] < 0.1
    assert set(record["per_class"]) == set(SHAPES)


def test_bad_images_are_reported_and_count_as_nothing_found(checkpoint, animals, tmp_path, capsys):
    assert evaluate(animals, "--model", checkpoint, "--json", tmp_path / "figures.json") == 1
    said = capsys.readouterr()
    assert "1.png" in said.err
    assert "2.png (image 2) is 80×60 pixels once upright, but its annotation says 90×60" in said.err
    assert "4 images, 2 of them not read" in said.err
    record = json.loads((tmp_path / "figures.json").read_text())
    assert (record["split"], record["images"], record["not_read"]) == ("val", 4, 2)
    assert record["scores"]["ar100"] <= 0.5
    assert record["per_class"]["bee"] is None


def test_a_model_that_finds_all_is_perfect_whatever_the_order_of_its_classes(told, capsys):
    scenes = SyntheticDataset(6, seed=SEED)
    told(["ant", *reversed(SHAPES)], [([SHAPES[i] for i in one.labels], one.boxes_xyxy_pixels) for one in scenes])
    assert evaluate("synthetic:6") == 0
    rows = figures(capsys.readouterr().out)
    assert rows["AP"][0] == rows["AP at IoU 0.75"][0] == rows["AR, 100 a class"][0] == "100.0"


def test_what_is_of_no_class_of_the_data_set_does_not_count(told, animals, capsys):
    box = np.array([[10, 10, 40, 40]], np.float32)
    told(["cow", "couch"], [(("couch", "cow"), np.repeat(box, 2, axis=0))])
    assert evaluate(animals, "--limit", 1) == 0
    said = capsys.readouterr()
    assert figures(said.out)["AP"][0] == "100.0"
    assert "1 images, 0 of them not read" in said.err


def test_a_limit_takes_the_first_images(told, capsys):
    told(SHAPES)
    assert evaluate("synthetic:5", "--limit", 2) == 0
    assert "2 images, 0 of them not read" in capsys.readouterr().err


def test_scores_that_are_no_numbers_are_told(told, capsys):
    told(SHAPES)
    assert evaluate("synthetic:2") == 0
    assert "in 2 images some scores are no numbers" in capsys.readouterr().err


def test_the_checkpoints_spelling_of_a_class_finds_that_of_the_annotations(told, animals, capsys, caplog):
    told(["cow", "sofa", "ant"], [(("sofa",), np.array([[10, 10, 40, 40]], np.float32))])
    with caplog.at_level(logging.WARNING):
        assert evaluate(animals, "--limit", 1) == 0
    assert not caplog.text
    assert "couch 100.0" in capsys.readouterr().out


def test_spellings_are_of_classes_that_checkpoints_have():
    assert set(SPELLINGS) <= set(COCO_CLASS_NAMES)
    assert not set(SPELLINGS.values()) & set(COCO_CLASS_NAMES)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["synthetic:none"], "expected synthetic or synthetic:COUNT"),
        (["synthetic:0"], "expected synthetic or synthetic:COUNT"),
        (["synthetic:2"], "the model does not know"),
        (["no/such/folder"], "does not exist"),
        (["{animals}", "--split", "train"], "has no split 'train'"),
        (["{animals}"], "no class of"),
    ],
)
def test_what_can_not_be_done_is_said_in_one_message(told, animals, words, said, capsys):
    told(["yak"])
    assert evaluate(*(word.format(animals=animals) for word in words)) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize("words", [["--limit", "0"], ["--batch", "0"], ["--seed", "-1"]])
def test_numbers_that_make_no_sense_are_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate("synthetic", *words)
    assert end.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        evaluate("--help")
    assert end.value.code == 0
    said = capsys.readouterr().out
    options = ("--model", "--split", "--limit", "--seed", "--json", "--dtype", "--batch", "--revision")
    assert all(option in said for option in options)


def test_real_annotations_are_perfect_in_the_classes_of_a_published_checkpoint(told, shared, capsys):
    truth = open_dataset(shared / "data" / "coco", split="val")
    told(
        COCO_CLASS_NAMES, [([COCO_CLASS_NAMES[i] for i in sample.labels], sample.boxes_xyxy_pixels) for sample in truth]
    )
    assert evaluate(shared / "data" / "coco") == 0
    said = capsys.readouterr()
    assert figures(said.out)["AP"] == ["100.0"] * 4
    assert "tvmonitor" not in said.out
    assert "103 images, 0 of them not read" in said.err
