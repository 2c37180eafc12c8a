"""How fast one core makes training images of a data set: decoded, augmented, and laid into batches.

It all happens in this thread, as it would in one worker of a run; the seconds are those of the processor, so that
others on the machine change little. What the device does to images is not in it.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rtdetrv2_jax.benchmark.record import record
from rtdetrv2_jax.data import DataError, FileDataset, open_dataset
from rtdetrv2_jax.weights.files import write_json
from train.augmentation import NO_AUGMENTATION, Augmentation
from train.loading import TrainingSource, target_slots

QUERIES = 300
WORKS: dict[str, Augmentation | None] = {
    "decode": None,
    "decode, resize, batch": NO_AUGMENTATION,
    "decode, augment, resize, batch": Augmentation(),
}
"""What is done to every image; the last is all of it, as published."""


def works(dataset: FileDataset, *, batch: int, side: int) -> dict[str, Callable[[int], Any]]:
    """For every amount of work, the function that does a batch of it."""

    def decode(step: int) -> None:
        for index in range(step * batch, (step + 1) * batch):
            dataset[index % len(dataset)].read()

    sources = {
        name: TrainingSource(
            dataset=dataset,
            augmentation=augmentation,
            size=(side, side),
            batch_size=batch,
            epochs=1_000_000,
            seed=0,
            slots=target_slots(dataset, most=QUERIES),
            on_bad_data="refuse",
        ).__getitem__
        for name, augmentation in WORKS.items()
        if augmentation is not None
    }
    return {"decode": decode} | sources


def measure(dataset: FileDataset, *, batch: int, side: int, rounds: int) -> list[dict[str, Any]]:
    """The speed of each amount of work over some rounds, each of a batch, in which all take turns."""
    runs = works(dataset, batch=batch, side=side)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(rounds):
        for name, run in runs.items():
            began = time.thread_time()
            run(step)
            seconds[name].append(time.thread_time() - began)
    return [
        {
            "work": name,
            "side": side,
            "batch": batch,
            "images": len(dataset),
            "images_per_second": round(batch / statistics.median(taken), 2),
            "runs": len(taken),
        }
        for name, taken in seconds.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a line for each amount of work, and gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.input", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="the folder of a data set, in the form of COCO for instance")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="images in a batch (default: %(default)s)")
    parser.add_argument("--side", type=int, default=640, help="of the batch's images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="batches of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, with machine and versions")
    arguments = parser.parse_args(argv)
    try:
        dataset = open_dataset(arguments.data, split=arguments.split)
        figures = measure(dataset, batch=arguments.batch, side=arguments.side, rounds=arguments.rounds)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for one in figures:
        print(f"{one['images_per_second']:8.1f} images a second and core  {one['work']}")
    if arguments.json:
        write_json(arguments.json, record("input", figures, program="python -m benchmarks.input"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
