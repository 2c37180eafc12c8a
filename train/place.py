"""The folder of a run, and whose it is."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from rtdetrv2_jax.weights.files import read_json, write_json

from .checkpoints import CheckpointError
from .loading import OnBadData
from .recipe import Recipe

RECIPE = "recipe.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how a run takes place; none of it changes what is learned.

    Args:
        folder: of the run, on a disk that all of its processes share.
        resume: whether to go on with the run that is there, if there is one.
        workers: processes that read images ahead, for each process that trains.
        tensorboard: whether to write files for TensorBoard.
        on_bad_data: what to do with images that cannot be read.
    """

    folder: Path
    resume: bool = False
    workers: int = 0
    tensorboard: bool = False
    on_bad_data: OnBadData = "skip"


def agree(recipe: Recipe, place: Place, latest: int | None) -> None:
    """Sees to it that the folder is of the run of this recipe, and says in it what the run is.

    Args:
        recipe: The run's.
        place: Its folder.
        latest: The steps that the run in the folder has made, if there is one.

    Raises:
        CheckpointError: It is of another, or is not to be resumed.
    """
    file = place.folder / RECIPE
    ours = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if latest is not None and not place.resume:
        raise CheckpointError(
            f"{place.folder} has a run that has made {latest} steps: --resume goes on with it, or name another --output"
        )
    if latest is not None:
        theirs = read_json(file)
        different = [path for path in _differences(theirs, ours) if not path.startswith("keeping")]
        if different:
            raise CheckpointError(
                f"the run in {place.folder} was started with other settings: {'; '.join(different[:8])}. Give it the "
                "same ones, or start a new run from its weights: --start, with another --output"
            )
    elif jax.process_index() == 0:
        place.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, ours)


def _differences(theirs: Any, ours: Any, *, path: str = "") -> list[str]:
    """Where two trees of settings differ, by dotted path."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = list(dict.fromkeys([*theirs, *ours]))
        inner = [_differences(theirs.get(n), ours.get(n), path=f"{path}.{n}" if path else n) for n in names]
        return [each for found in inner for each in found]
    return [] if theirs == ours else [f"{path} was {theirs}, is {ours}"]
