"""`python -m train`: the command line."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from rtdetrv2_jax.compilation import enable_persistent_cache, keep_freed_memory
from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.data import DataError
from rtdetrv2_jax.evaluation import EvaluationError
from rtdetrv2_jax.image import ImageError
from rtdetrv2_jax.model.rtdetrv2 import ImageSizeError
from rtdetrv2_jax.sharding import ShardingError, connect_processes, data_mesh
from rtdetrv2_jax.weights.hub import SourceError
from rtdetrv2_jax.weights.transfer import WeightsError

from . import benchmark, compile_check
from .batches import TrainingBatches
from .checkpoints import CheckpointError
from .journal import JournalError
from .loop import train, training_source
from .meter import TrainingError
from .place import Place
from .recipe import Recipe, RecipeError, fields_of
from .recipes import NAMES, summary
from .show_batch import show_batch
from .starting import SYNTHETIC, Data, open_data, starting_point
from .step import step_keys
from .topology import TopologyError

VERBS = {"benchmark": benchmark, "compile-check": compile_check}
INTERRUPTED = 130
# What can be wrong with what a user gave. Anything else is a fault of the program, and shows where.
_EXPECTED = (
    *(CheckpointError, ConfigError, DataError, EvaluationError, ImageError, ImageSizeError, JournalError),
    *(OSError, RecipeError, ShardingError, SourceError, TopologyError, TrainingError, WeightsError),
)

_DESCRIPTION = f"""\
Trains RT-DETRv2. RECIPE is one of {", ".join(NAMES)}; `finetune` derives its lengths from the data. Every field of a
recipe can be given by its dotted path, such as --batches.epochs 20 or --optimisation.learning_rate 5e-5; --dry-run
shows all of them.
"""
_EPILOG = """\
Besides: `python -m train compile-check` compiles the training step for a TPU or GPU that is not there, and
`python -m train benchmark` measures it here; both have a --help of their own.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code: 0, 1 for what the user can mend, 130 for an interruption."""
    keep_freed_memory()
    words = list(sys.argv[1:] if argv is None else argv)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=errors, show_path=False, show_time=False)])
    try:
        if words and words[0] in VERBS:
            return _verb(words[0], words[1:])
        return _train(*_arguments(words), errors)
    except KeyboardInterrupt:
        errors.print("interrupted")
        return INTERRUPTED
    except _EXPECTED as error:
        errors.print(f"[red]error:[/] {escape(str(error))}")
        return 1


def _arguments(words: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser(
        prog="python -m train", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("recipe", metavar="RECIPE", help="what to follow")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="PATH", help=f"a data set (COCO, YOLO, Pascal VOC) or {SYNTHETIC}[:COUNT]")
    data.add_argument("--split", default="train", help="of it, to learn from (default: %(default)s)")
    data.add_argument("--val-data", metavar="PATH", help="another data set to be measured on (default: the same)")
    data.add_argument("--val-split", default="val", help="of it; none: no validation (default: %(default)s)")
    data.add_argument("--images", type=int, metavar="N", help="the first N images of either only")
    data.add_argument(
        "--on-bad-data",
        choices=("skip", "refuse"),
        default="skip",
        help="leave out what is faulty and say so, or end with an error (default: %(default)s)",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, metavar="FOLDER", help="of the run (default: runs/RECIPE)")
    run.add_argument("--resume", action="store_true", help="go on with the run in that folder, if there is one")
    run.add_argument("--workers", type=int, default=0, help="processes that read images (default: threads of this one)")
    run.add_argument("--tensorboard", action="store_true", help="write TensorBoard's files too")
    run.add_argument("--dry-run", action="store_true", help="show the data and every field of the recipe, and end")
    run.add_argument("--show-batch", type=Path, metavar="FILE", help="draw what the network sees at first, and end")
    hosts = parser.add_argument_group("several processes, where JAX does not find them by itself (GPU machines)")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
    hosts.add_argument("--processes", type=int, metavar="N", help="how many there are")
    hosts.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    arguments, rest = parser.parse_known_args(words)
    return arguments, _fields(rest, parser)


def _fields(words: list[str], parser: argparse.ArgumentParser) -> dict[str, str]:
    """The recipe's fields among the arguments: `--path value` or `--path=value`."""
    fields, position = {}, 0
    while position < len(words):
        name, equals, value = words[position].partition("=")
        if not name.startswith("--"):
            parser.error(f"{words[position]!r} belongs to nothing: fields of a recipe are given as --path value")
        if not equals:
            position += 1
            if position == len(words):
                parser.error(f"{name} has no value")
            value = words[position]
        fields[name.removeprefix("--")] = value
        position += 1
    return fields


def _train(arguments: argparse.Namespace, overrides: dict[str, str], console: Console) -> int:
    connect_processes(arguments.coordinator, processes=arguments.processes, index=arguments.process)
    enable_persistent_cache()
    data = _data(arguments)
    recipe, model = starting_point(arguments.recipe, overrides, training=data.training)
    place = Place(
        folder=arguments.output or Path("runs") / recipe.name,
        resume=arguments.resume,
        workers=arguments.workers,
        tensorboard=arguments.tensorboard,
        on_bad_data=arguments.on_bad_data,
    )
    if jax.process_index() == 0:
        console.print(escape(summary(recipe, images=len(data.training))))
        _advise(recipe, data, console)
    if arguments.dry_run:
        print("\n".join(fields_of(recipe)))
        return 0
    if arguments.show_batch:
        _show(recipe, data, place, arguments.show_batch)
        console.print(f"what the network sees at first is in {arguments.show_batch}")
        return 0
    return {"finished": 0, "interrupted": INTERRUPTED}[train(recipe, model, data, place)]


def _data(arguments: argparse.Namespace) -> Data:
    path = arguments.data or (SYNTHETIC if arguments.recipe in ("demo", "debug") else None)
    if path is None:
        raise DataError("--data is missing: the path of a data set in the form of COCO, YOLO or Pascal VOC")
    return open_data(
        path,
        split=arguments.split,
        validation_path=arguments.val_data,
        validation_split=arguments.val_split,
        images=arguments.images,
        on_bad_data=arguments.on_bad_data,
    )


def _advise(recipe: Recipe, data: Data, console: Console) -> None:
    """Says what one might regret later."""
    if data.validation is None:
        console.print("no validation: the last weights will count as the best")
    if jax.default_backend() == "cpu" and recipe.dtype == "bfloat16":
        console.print("processors are slow at bfloat16: --dtype float32 is faster here")


def _show(recipe: Recipe, data: Data, place: Place, file: Path) -> None:
    own = data_mesh(jax.local_devices()[:1])  # one device can show any batch
    with TrainingBatches(training_source(recipe, data, place), mesh=own) as batches:
        loaded = next(batches)
    side = recipe.side_at(loaded.step, epoch=loaded.epoch)
    key, _ = step_keys(jax.random.key(recipe.seed), loaded.step)
    size = (side, side)
    show_batch(file, loaded.batch, key=key, size=size, augmentation=recipe.augmentation, dataset=data.training)


def _verb(name: str, words: list[str]) -> int:
    """Does what is not training: a command with arguments of its own."""
    command = VERBS[name]
    parser = argparse.ArgumentParser(prog=f"python -m train {name}", description=command.__doc__, allow_abbrev=False)
    command.add_arguments(parser)
    if command is compile_check:  # it takes a recipe's fields
        arguments, rest = parser.parse_known_args(words)
        arguments.overrides = _fields(rest, parser)
    else:
        arguments = parser.parse_args(words)
    return command.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
