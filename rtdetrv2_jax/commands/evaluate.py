"""`rtdetrv2 evaluate`: average precision of a model on a data set, as COCO defines it.

The data set is a folder or file in COCO's, YOLO's or Pascal VOC's form, or `synthetic`: scenes that this program draws.
"""

import argparse
import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rtdetrv2_jax.arrays import Detections
from rtdetrv2_jax.commands.detect import DEFAULT_MODEL
from rtdetrv2_jax.data import DataError, Dataset, SyntheticDataset, open_dataset
from rtdetrv2_jax.detector import Detector, Found, Result
from rtdetrv2_jax.evaluation import Evaluator, Scores
from rtdetrv2_jax.image import ImageError
from rtdetrv2_jax.weights.files import write_json

SYNTHETIC = "synthetic"
SCENES = 500
SEED = 2000
"""Far from the seeds that one trains and validates with, so that the scenes are new to the model."""

SPELLINGS = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""Classes of COCO as the published checkpoints spell them, and as COCO's own annotations do."""


class Evaluated(NamedTuple):
    """What came of a data set's images: the figures, how many images counted and were not read, and the time."""

    scores: Scores
    images: int
    unread: int
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rtdetrv2 evaluate`."""
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help=f"a folder, a COCO JSON file, a YOLO YAML file, or {SYNTHETIC}[:COUNT] for scenes drawn here "
        f"({SCENES}, if no count is given)",
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="hub id, Hugging Face folder or folder of ours (default: %(default)s)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--split", default="val", help="of the data set (default: %(default)s)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="the first N images only")
    parser.add_argument(
        "--seed", type=_not_negative, default=SEED, help=f"of {SYNTHETIC} scenes (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--batch", type=_positive, default=None, help="images at once (default: 16, on CPU 1)")


def run(arguments: argparse.Namespace) -> int:
    """Evaluates, prints the figures, and gives the exit status: 0, or 1 where an image could not be read."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status(f"loading {escape(arguments.model)}") as status:
        detector = Detector.from_pretrained(
            arguments.model, dtype=arguments.dtype, revision=arguments.revision, max_batch=arguments.batch
        )
        status.update(f"reading the annotations of {escape(arguments.dataset)}")
        names = detector.config.class_names
        dataset = _open(arguments.dataset, names, split=arguments.split, seed=arguments.seed)
        positions = np.arange(min(len(dataset), arguments.limit or len(dataset)))
        evaluator = Evaluator(dataset, positions=positions)
    evaluated = evaluate(detector, dataset, evaluator, console=console)
    print(evaluated.scores.table())
    console.print(
        f"[dim]{evaluated.images} images, {evaluated.unread} of them not read; {evaluated.seconds:.1f} s, "
        f"{evaluated.images / evaluated.seconds:.1f} images a second[/dim]"
    )
    if arguments.json:
        write_json(arguments.json, _record(evaluated, arguments))
    return int(evaluated.unread > 0)


def evaluate(detector: Detector, dataset: Dataset, evaluator: Evaluator, *, console: Console) -> Evaluated:
    """Detects in the images that count for the evaluator, with a progress bar, and gives the figures.

    An image that can't be read, or is of another size than its annotation says, is reported, and nothing is found in
    it.
    """
    names = _spelled(detector.config.class_names, dataset.class_names)
    labels = {name: label for label, name in enumerate(dataset.class_names)}
    to_dataset = np.array([labels.get(name, -1) for name in names], np.int32)
    unread, dubious, began = 0, 0, time.perf_counter()
    positions = evaluator.positions
    with _bar(console) as bar:
        task = bar.add_task("", total=len(positions), rate="compiling")
        stream = detector.stream((dataset[position].image for position in positions.tolist()), threshold=0.0)
        for count, (position, found) in enumerate(zip(positions.tolist(), stream, strict=True), start=1):
            bar.update(task, advance=1, rate=f"{count / (time.perf_counter() - began):.1f}/s")
            try:
                result = _trusted(found, dataset, position)
            except (ImageError, DataError) as error:
                console.print(f"[red]not read[/red] {escape(str(error))}")
                unread += 1
                continue
            dubious += len(result) < detector.config.decoder.queries
            evaluator.add(np.array([position]), _relabelled(result, to_dataset))
    if dubious:
        console.print(
            f"[red]in {dubious} images some scores are no numbers[/red], and are left out: the weights may be damaged, "
            "or --dtype float32 may help"
        )
    seconds = time.perf_counter() - began
    with console.status("matching detections to objects"):
        return Evaluated(evaluator.scores(), images=len(positions), unread=unread, seconds=seconds)


def _open(path: str, names: tuple[str, ...], *, split: str, seed: int) -> Dataset:
    """The data set with the model's classes, in the data set's own spelling."""
    kind, colon, count = path.partition(":")
    if kind == SYNTHETIC:
        if colon and not (count.isdecimal() and int(count)):
            raise DataError(f"{path}: expected {SYNTHETIC} or {SYNTHETIC}:COUNT, where COUNT is a number from 1")
        dataset = SyntheticDataset(int(count or SCENES), seed=seed)
        if missing := [name for name in dataset.class_names if name not in names]:
            raise DataError(
                f"the scenes of {SYNTHETIC} show {', '.join(dataset.class_names)}, and the model does not know "
                f"{', '.join(missing)}. Evaluate a model that was trained on them, or give the folder of a data set."
            )
        return dataset
    if not set(names) & set(SPELLINGS):
        return open_dataset(path, split=split, classes=names)
    with _quiet():  # it says what it has to say when it is opened to be used
        known = open_dataset(path, split=split).class_names
    return open_dataset(path, split=split, classes=_spelled(names, known))


def _spelled(names: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """The names, those of `SPELLINGS` as the data set has them."""
    return tuple(SPELLINGS[name] if name not in known and SPELLINGS.get(name) in known else name for name in names)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger(open_dataset.__module__.rpartition(".")[0])
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _trusted(found: Found, dataset: Dataset, position: int) -> Result:
    """What was found in an image that is the one that was annotated; else the error that says what is wrong."""
    if isinstance(found.result, ImageError):
        raise found.result
    if isinstance(found.source, Path) and found.result.size != (sample := dataset[position]).size:
        sample.read()
    return found.result


def _relabelled(result: Result, to_dataset: np.ndarray) -> Detections:
    """The detections of one image, as a batch, with the data set's labels; without classes that it does not have."""
    labels = to_dataset[result.labels]
    kept = labels >= 0
    columns: list[Any] = [column[kept][None] for column in (result.scores, labels, result.boxes)]
    return Detections(*columns)


def _record(evaluated: Evaluated, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures as the JSON says them; null where there was nothing to be found."""
    figures = evaluated.scores._asdict()
    per_class = figures.pop("per_class")
    return {
        "model": arguments.model,
        "dataset": arguments.dataset,
        **({"seed": arguments.seed} if arguments.dataset.startswith(SYNTHETIC) else {"split": arguments.split}),
        "dtype": arguments.dtype,
        "images": evaluated.images,
        "not_read": evaluated.unread,
        "seconds": evaluated.seconds,
        "scores": {name: _or_null(value) for name, value in figures.items()},
        "per_class": {name: _or_null(value) for name, value in per_class.items()},
    }


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number
