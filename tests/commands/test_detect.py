"""`rtdetrv2 detect` as a person types it."""

import json

import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax import Preprocessing, save_model
from rtdetrv2_jax.cli import main
from rtdetrv2_jax.commands.detect import parse_threshold
from rtdetrv2_jax.config import ConfigError


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_model(tiny_model, folder, preprocessing=Preprocessing(size=(128, 160)))
    return folder


@pytest.fixture
def folder(tmp_path):
    """Two pictures and a file that only looks like one."""
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (60 + number, 80, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"picture_{number}.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff but no picture")
    return tmp_path


def detect(checkpoint, *words):
    return main(["detect", "--model", str(checkpoint), "--threshold", "0.2", *map(str, words)])


def test_a_bad_file_is_reported_the_others_are_done_and_the_status_tells(checkpoint, folder, capsys):
    status = detect(checkpoint, folder, "--json", folder / "found.json", "--save", folder / "drawn")
    said = capsys.readouterr()
    assert status == 1
    assert "broken.jpg" in said.err
    assert "2 images done, 1 not read" in said.err
    records = json.loads((folder / "found.json").read_text())
    assert [(record["width"], record["height"]) for record in records] == [(80, 60), (80, 61)]
    for record in records:
        assert set(record) == {"image", "width", "height", "detections"}
        assert record["image"] in said.out
        for detection in record["detections"]:
            assert set(detection) == {"label", "name", "score", "box"}
            assert detection["score"] > 0.2
            assert len(detection["box"]) == 4
            assert detection["name"] == ("ant", "bee", "cat", "dog", "eel")[detection["label"]]
    drawn = {path.name: np.asarray(Image.open(path)) for path in (folder / "drawn").iterdir()}
    assert sorted(drawn) == ["picture_0.png", "picture_1.png"]
    assert not np.array_equal(drawn["picture_0.png"], np.asarray(Image.open(folder / "picture_0.png")))


def test_json_on_standard_output_is_all_that_is_there(checkpoint, folder, capsys):
    assert detect(checkpoint, folder / "picture_0.png", "--json", "-") == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_pictures_of_one_name_do_not_overwrite_each_other(checkpoint, folder):
    (folder / "other").mkdir()
    (folder / "other" / "picture_0.png").write_bytes((folder / "picture_0.png").read_bytes())
    status = detect(checkpoint, folder / "picture_0.png", folder / "other", "--save", folder / "drawn")
    assert status == 0
    assert sorted(path.name for path in (folder / "drawn").iterdir()) == ["picture_0.png", "picture_0_2.png"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing_*.jpg"], "nothing_"),
        (
            ["http://localhost/a.png", "--model", "no/such/model/here"],
            "there is no file or folder 'no/such/model/here'",
        ),
        (["picture.png", "--threshold", "half"], "expected a number from 0 to 1"),
    ],
)
def test_what_can_not_be_done_is_said_in_one_message(checkpoint, words, said, capsys):
    assert main(["detect", *(["--model", str(checkpoint)] if "--model" not in words else []), *words]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_thresholds_as_typed():
    assert parse_threshold([]) == 0.5
    assert parse_threshold(["0.3"]) == 0.3
    assert parse_threshold(["cell phone=0.3", "a=b=1"]) == {"cell phone": 0.3, "a=b": 1.0}
    for wrong in (["1.5"], ["nan"], ["cat="], ["0.1", "0.2"], ["0.1", "cat=0.2"]):
        with pytest.raises(ConfigError, match="--threshold"):
            parse_threshold(wrong)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        main(["detect", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(option in said for option in ("--model", "--threshold", "--json", "--save", "--dtype", "--batch"))


def test_every_real_image_of_a_folder_gets_valid_json(checkpoint, shared, tmp_path, capsys):
    assert detect(checkpoint, shared / "data" / "coco" / "val2017", "--json", tmp_path / "found.json") == 0
    records = json.loads((tmp_path / "found.json").read_text())
    assert len(records) == 103
    for record in records:
        with Image.open(record["image"]) as image:
            assert (record["width"], record["height"]) == image.size
    assert "103 images done, 0 not read" in capsys.readouterr().err


def test_odd_images_give_pictures_or_clear_errors(checkpoint, shared, tmp_path, capsys):
    assert detect(checkpoint, shared / "data" / "odd_images", "--json", tmp_path / "found.json") == 1
    error = capsys.readouterr().err
    for name in ("broken.png", "decompression_bomb.gif", "truncated_jpeg.jpg", "truncated_image.png"):
        assert name in error
    assert "Traceback" not in error
    assert len(json.loads((tmp_path / "found.json").read_text())) == 19
