"""What a run starts from: which data, which classes, and whose weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.data import DataError, SyntheticDataset
from rtdetrv2_jax.weights.load import save_model
from rtdetrv2_jax.weights.transfer import flat_state
from rtdetrv2_jax.weights.untrained import untrained_model
from train.recipe import RecipeError
from train.recipes import build
from train.starting import FirstImages, open_data, starting_point

SCENES = SyntheticDataset(5, sizes=((40, 60), (60, 40)))
TINY = {
    "dtype": "float32",
    "batches.side": "64",
    "model.backbone.stem_width": "8",
    "model.backbone.widths": "8,8,16,16",
    "model.encoder.width": "16",
    "model.encoder.ffn_width": "16",
    "model.encoder.heads": "2",
    "model.decoder.width": "16",
    "model.decoder.ffn_width": "16",
    "model.decoder.heads": "2",
    "model.decoder.layers": "1",
    "model.decoder.inference_layers": "1",
    "model.decoder.queries": "12",
    "model.decoder.denoising": "6",
}


class Animals:
    """A data set of which nothing matters but its classes."""

    class_names = ("dog", "fox", "ant")
    category_ids = (0, 1, 2)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index, /):
        raise AssertionError("no image is needed to begin")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model) -> Path:
    """A model of five animals: ant, bee, cat, dog, eel."""
    folder = tmp_path_factory.mktemp("start") / "model"
    save_model(tiny_model, folder)
    return folder


def write_split(folder: Path, split: str, categories: dict[str, int], *, objects: dict[str, int]) -> None:
    """One image, with so many objects of some categories, in COCO's form."""
    (folder / split).mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(folder / split / "a.png")
    names = [name for name, count in objects.items() for _ in range(count)]
    boxes = [
        {"id": 1 + i, "image_id": 7, "category_id": categories[name], "bbox": [i, 1, 5, 5], "area": 25, "iscrowd": 0}
        for i, name in enumerate(names)
    ]
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 40}],
        "annotations": boxes,
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
    }
    (folder / split / "_annotations.coco.json").write_text(json.dumps(content))


def test_the_first_images_are_those_of_the_whole_and_no_more():
    some = FirstImages(SCENES, 3)
    assert len(some) == 3
    assert (some.class_names, some.category_ids) == (SCENES.class_names, SCENES.category_ids)
    assert [sample.image_id for sample in some] == [0, 1, 2]
    np.testing.assert_array_equal(some[1].read(), SCENES[1].read())
    assert some[-1].image_id == 2
    with pytest.raises(IndexError):
        some[3]


@pytest.mark.parametrize(("images", "training", "validation"), [(None, 6, 4), (5, 5, 4), (3, 3, 3), (100, 6, 4)])
def test_the_number_of_images_holds_for_either_split(images: int | None, training: int, validation: int):
    data = open_data("synthetic:6", validation_path="synthetic:4", images=images)
    assert (len(data.training), len(data.validation)) == (training, validation)


def test_scenes_to_be_measured_on_are_others_than_those_learned():
    data = open_data("synthetic:3", validation_path="synthetic:3")
    assert data.training.class_names == data.validation.class_names
    for learned, measured in zip(data.training, data.validation, strict=True):
        assert not np.array_equal(learned.read(), measured.read())


def test_scenes_without_a_number_are_as_many_as_the_demo_learns():
    data = open_data("synthetic")
    assert (len(data.training), len(data.validation)) == (25_000, 500)


@pytest.mark.parametrize("path", ["synthetic:", "synthetic:0", "synthetic:-1", "synthetic:many"])
def test_a_number_of_scenes_that_is_none_is_refused(path: str):
    with pytest.raises(DataError, match="COUNT is a number from 1"):
        open_data(path)


@pytest.mark.parametrize("images", [0, -3])
def test_no_images_at_all_are_refused(images: int):
    with pytest.raises(DataError, match="--images must be at least 1"):
        open_data("synthetic:4", images=images)


def test_validation_has_the_classes_of_training_whatever_its_file_says(tmp_path: Path):
    write_split(tmp_path, "train", {"cat": 1, "dog": 3}, objects={"cat": 1, "dog": 2})
    write_split(tmp_path, "valid", {"dog": 5, "cat": 9}, objects={"dog": 1, "cat": 3})
    data = open_data(str(tmp_path))
    assert data.training.class_names == data.validation.class_names == ("cat", "dog")
    assert data.training[0].labels.tolist() == [0, 1, 1]
    assert sorted(data.validation[0].labels.tolist()) == [0, 0, 0, 1]


def test_a_data_set_without_a_second_split_says_how_to_do_without(tmp_path: Path):
    write_split(tmp_path, "train", {"cat": 1}, objects={"cat": 1})
    with pytest.raises(DataError, match="--val-split none"):
        open_data(str(tmp_path))
    assert open_data(str(tmp_path), validation_split="none").validation is None


def test_nobody_is_measured_unasked_on_what_was_learned(tmp_path: Path):
    write_split(tmp_path, "train", {"cat": 1}, objects={"cat": 1})
    file = str(tmp_path / "train" / "_annotations.coco.json")
    with pytest.raises(DataError, match=r"one split by itself.*--val-data.*--val-split none"):
        open_data(file)
    assert open_data(file, validation_split="none").validation is None
    assert len(open_data(file, validation_path=file).validation) == 1


def test_finetune_takes_the_network_of_the_checkpoint_and_the_classes_of_the_data(checkpoint, tiny_config):
    recipe, model = starting_point("finetune", {"start": str(checkpoint), "dtype": "float32"}, training=Animals())
    assert recipe.model == model.config == tiny_config.with_classes(Animals.class_names)
    assert recipe.name == "finetune"


def test_classes_that_the_checkpoint_knows_keep_their_rows_and_all_else_its_numbers(checkpoint, tiny_model):
    _, model = starting_point("finetune", {"start": str(checkpoint), "dtype": "float32"}, training=Animals())
    ours, theirs = flat_state(model), flat_state(tiny_model)
    assert ours.keys() == theirs.keys()
    rows = {0: 3, 2: 0}  # dog and ant, by their labels here and there
    new = 0
    for path, value in ours.items():
        value, before = np.asarray(value), np.asarray(theirs[path])
        if value.shape == before.shape:
            np.testing.assert_array_equal(value, before, err_msg=path)
            continue
        new += 1
        by_class = (lambda x: x) if "denoising" in path else (lambda x: np.moveaxis(x, -1, 0))
        for here, there in rows.items():
            np.testing.assert_array_equal(by_class(value)[here], by_class(before)[there], err_msg=path)
        if not path.endswith("bias"):  # all biases of new classes begin with the same rare chance
            assert not any(np.array_equal(by_class(value)[1], row) for row in by_class(before))
    assert new == 2 * (1 + tiny_model.config.decoder.layers) + 1


@pytest.mark.slow
def test_the_same_seed_gives_the_same_start_and_another_gives_another(checkpoint):
    def start(seed: str) -> dict[str, np.ndarray]:
        changes = {"start": str(checkpoint), "dtype": "float32", "seed": seed}
        _, model = starting_point("finetune", changes, training=Animals())
        return {path: np.asarray(value) for path, value in flat_state(model).items()}

    one, same, other = start("1"), start("1"), start("2")
    for path, value in one.items():
        np.testing.assert_array_equal(same[path], value, err_msg=path)
    changed = {path for path, value in one.items() if not np.array_equal(other[path], value)}
    assert "selection.class_head.kernel" in changed
    assert "backbone.stem.0.convolution.kernel" not in changed


def test_a_recipe_of_another_network_is_refused_and_finetune_recommended(checkpoint):
    with pytest.raises(RecipeError, match=r"another network than recipe debug: \d+ of its arrays differ.*finetune"):
        starting_point("debug", {"start": str(checkpoint)}, training=SCENES)


def test_finetune_with_a_network_of_its_own_is_held_to_it(checkpoint):
    changes = {"start": str(checkpoint), "model": "r18vd", "batches.size": "2"}
    with pytest.raises(RecipeError, match="another network than recipe finetune"):
        starting_point("finetune", changes, training=SCENES)


def test_a_recipe_goes_on_from_a_checkpoint_of_its_own_network(tmp_path: Path):
    first = untrained_model(build("debug", TINY, images=5).model.with_classes(SCENES.class_names))
    save_model(first, tmp_path / "model")
    recipe, second = starting_point("debug", TINY | {"start": str(tmp_path / "model"), "seed": "9"}, training=SCENES)
    assert recipe.start == str(tmp_path / "model")
    assert second.config == first.config == recipe.model
    wanted = flat_state(first)
    for path, value in flat_state(second).items():
        np.testing.assert_array_equal(value, wanted[path], err_msg=path)


def test_an_unknown_network_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'r18vd'"):
        starting_point("finetune", {"model": "r18"}, training=SCENES)
