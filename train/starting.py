"""What a run starts from: its data, its recipe for them, and the first weights."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
from flax import nnx

from rtdetrv2_jax.data import DataError, Dataset, Sample, SyntheticDataset, open_dataset
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2, abstract_model
from rtdetrv2_jax.weights.load import load_pretrained, with_classes
from rtdetrv2_jax.weights.transfer import flat_state, with_values

from .loading import OnBadData
from .recipe import Recipe, RecipeError
from .recipes import build, summary

SYNTHETIC = "synthetic"
SCENES, UNSEEN_SCENES = 25_000, 500
TRAINING_SEED, UNSEEN_SEED = 0, 1000
"""Scenes under another seed are others. `rtdetrv2 evaluate synthetic` has a third one."""
logger = logging.getLogger(__name__)


class Data(NamedTuple):
    """What to learn from, and what to be measured on, with the same classes; None: on nothing."""

    training: Dataset
    validation: Dataset | None


@dataclass(frozen=True)
class FirstImages:
    """The first `length` images of another data set."""

    dataset: Dataset
    length: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the whole."""
        return self.dataset.class_names

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Those of the whole."""
        return self.dataset.category_ids

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: SupportsIndex, /) -> Sample:
        return self.dataset[range(self.length)[index]]


def open_data(
    path: str,
    *,
    split: str = "train",
    validation_path: str | None = None,
    validation_split: str = "val",
    images: int | None = None,
    on_bad_data: OnBadData = "skip",
) -> Data:
    """The data of a run.

    Args:
        path: of a data set, or `synthetic`, or `synthetic:COUNT`.
        split: of it, to learn from.
        validation_path: of another data set; None: the same.
        validation_split: "none" for no validation.
        images: use the first so many of either split only.
        on_bad_data: what to do with faulty annotations.

    Raises:
        DataError: Something of it is not there, or faulty and refused.
    """
    if images is not None and images < 1:
        raise DataError(f"--images must be at least 1, not {images}")
    training = _scenes(path, seed=TRAINING_SEED, count=SCENES)
    training = training or open_dataset(path, split=split, on_bad_data=on_bad_data)
    validation: Dataset | None = None
    if validation_split != "none":
        elsewhere = validation_path or (SYNTHETIC if isinstance(training, SyntheticDataset) else path)
        if validation_path is None and Path(path).suffix.lower() == ".json":
            raise DataError(
                f"{path} is one split by itself, so that there is none to be measured on: name one with --val-data, or "
                "give the folder of the data set. To train without validation: --val-split none."
            )
        validation = _scenes(elsewhere, seed=UNSEEN_SEED, count=UNSEEN_SCENES)
        if validation is None:
            try:
                validation = open_dataset(
                    elsewhere, split=validation_split, classes=training.class_names, on_bad_data=on_bad_data
                )
            except DataError as error:
                raise DataError(f"{error} To train without validation: --val-split none.") from error
    return Data(_first(training, images), None if validation is None else _first(validation, images))


def starting_point(name: str, overrides: Mapping[str, str], *, training: Dataset) -> tuple[Recipe, RTDETRv2]:
    """The recipe for this data, with the data's classes, and the model that the run starts from.

    The recipe `finetune` takes the network from the checkpoint that it starts from, unless "model" is overridden;
    with any other recipe the two have to agree.

    Raises:
        RecipeError: The recipe cannot be followed, or the checkpoint is of another network.
    """
    recipe = build(name, overrides, images=len(training), devices=jax.device_count())
    summary(recipe, images=len(training))  # refuses data that do not make a batch, before weights are fetched or made
    classes = training.class_names
    recipe = dataclasses.replace(recipe, model=recipe.model.with_classes(classes))
    dtype = jnp.dtype(recipe.dtype)
    if recipe.start is None:
        return recipe, RTDETRv2(recipe.model, dtype=dtype, rngs=nnx.Rngs(recipe.seed))
    model = load_pretrained(recipe.start, dtype=dtype).model
    if model.config.class_names != classes:
        model = with_classes(model, classes, seed=recipe.seed)
    own = not any(path.partition(".")[0] == "model" for path in overrides)
    if name == "finetune" and own:
        return dataclasses.replace(recipe, model=model.config), model
    wanted, found = (_shapes(each) for each in (abstract_model(recipe.model, dtype=dtype), model))
    if wanted != found:
        different = sorted(path for path, _ in wanted.items() ^ found.items())
        raise RecipeError(
            f"{recipe.start} is of another network than recipe {name}: {len(set(different))} of its arrays differ "
            f"({', '.join(dict.fromkeys(different[:6]))}...). Give the recipe's own network to start from, or use the "
            "recipe finetune without --model: it takes the checkpoint's"
        )
    return recipe, with_values(abstract_model(recipe.model, dtype=dtype), flat_state(model))


def _scenes(path: str, *, seed: int, count: int) -> SyntheticDataset | None:
    """The scenes that `path` asks for, if it asks for scenes."""
    kind, colon, number = path.partition(":")
    if kind != SYNTHETIC:
        return None
    if colon and not (number.isdecimal() and int(number)):
        raise DataError(f"{path}: expected {SYNTHETIC} or {SYNTHETIC}:COUNT, where COUNT is a number from 1")
    return SyntheticDataset(int(number or count), seed=seed)


def _first(dataset: Dataset, images: int | None) -> Dataset:
    return dataset if images is None or images >= len(dataset) else FirstImages(dataset, images)


def _shapes(model: RTDETRv2) -> dict[str, tuple[int, ...]]:
    return {path: value.shape for path, value in flat_state(model).items()}
