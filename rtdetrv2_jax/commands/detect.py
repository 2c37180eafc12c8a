"""`rtdetrv2 detect`: everything in some images, as a table, as JSON, as pictures."""

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.detector import DEFAULT_THRESHOLD, Detector, Found, Result, Threshold
from rtdetrv2_jax.image import ImageError
from rtdetrv2_jax.replacing import replaced_file
from rtdetrv2_jax.sources import describe, find_images
from rtdetrv2_jax.visualize import draw_detections

DEFAULT_MODEL = "PekingU/rtdetr_v2_r18vd"
_UNBOUNDED = 100_000
_WHOLE_TABLE = 8
"""Up to this many images every detection has a row; beyond, every image has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rtdetrv2 detect`."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, globs (quoted or not) and URLs")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="hub id, Hugging Face folder or folder of ours (default: %(default)s)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--threshold",
        action="append",
        metavar="T|NAME=T",
        help=f"keep scores above this (default: {DEFAULT_THRESHOLD}); NAME=T sets one class, and may be repeated",
    )
    parser.add_argument("--json", metavar="FILE", help="write all detections as JSON; - for standard output")
    parser.add_argument("--save", metavar="FOLDER", type=Path, help="save each picture with its boxes and names")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--batch", type=_positive, default=None, help="images at once (default: 16, on CPU 1)")


def run(arguments: argparse.Namespace) -> int:
    """Detects, and gives the exit status: 0, or 1 where an image could not be read, 130 where it was interrupted.

    What was found before an interruption is written and shown all the same.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    threshold = parse_threshold(arguments.threshold or [])
    sources = find_images(arguments.images)
    began = time.perf_counter()
    with console.status(f"loading {escape(arguments.model)}"):
        detector = Detector.from_pretrained(
            arguments.model, dtype=arguments.dtype, revision=arguments.revision, max_batch=arguments.batch
        )
    progress = _Progress(len(sources), console=console, loading=time.perf_counter() - began)
    save = _Saver(arguments.save).save if arguments.save else None
    done: list[tuple[str, Result]] = []
    with contextlib.suppress(KeyboardInterrupt), progress.bar:
        for found in progress.watch(detector.stream(sources, threshold=threshold)):
            if isinstance(found.result, ImageError):
                console.print(f"[red]not read[/red] {escape(str(found.result))}")
                continue
            if save:
                save(found)
            done.append((str(found.source), found.result))

    if arguments.json:
        write_json([image_record(name, result) for name, result in done], arguments.json)
    if arguments.json != "-":
        # Into a file or a pipe lines go whole; a terminal folds them at its width.
        Console(highlight=False, width=None if sys.stdout.isatty() else _UNBOUNDED).print(_table(done))
    console.print(f"[dim]{progress.summary(read=len(done))}[/dim]")
    if progress.count < len(sources):
        return 130
    return int(len(done) < len(sources))


def parse_threshold(values: list[str]) -> Threshold:
    """One threshold for all classes, or one for each named class, from what the user typed.

    Raises:
        ConfigError: A value is not a number from 0 to 1, or two of them contradict each other.
    """
    common: list[float] = []
    named: dict[str, float] = {}
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            score = float(number)
        except ValueError:
            score = -1.0
        if not 0 <= score <= 1:
            raise ConfigError(f"--threshold {value}: expected a number from 0 to 1, or NAME=NUMBER")
        if name:
            named[name] = score
        else:
            common.append(score)
    if (named and common) or len(common) > 1:
        raise ConfigError("--threshold: give one number for all classes, or NAME=NUMBER for some of them")
    return named or (common[0] if common else DEFAULT_THRESHOLD)


def image_record(name: str, result: Result) -> dict[str, Any]:
    """One image's detections as the JSON says them; boxes are left, top, right, bottom in pixels."""
    return {
        "image": name,
        "width": result.size[1],
        "height": result.size[0],
        "detections": [
            {"label": int(label), "name": label_name, "score": float(score), "box": [float(x) for x in box]}
            for label, label_name, score, box in zip(
                result.labels, result.names, result.scores, result.boxes, strict=True
            )
        ],
    }


def write_json(records: list[dict[str, Any]], destination: str) -> None:
    """Writes the records to a file, at once or not at all, or to standard output ("-")."""
    text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    if destination == "-":
        sys.stdout.write(text)
        return
    with replaced_file(Path(destination)) as partial:
        partial.write_text(text, encoding="utf-8")


class _Saver:
    """Saves pictures under their own names in one folder; a name that is taken gets a number."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.taken: Counter[str] = Counter()

    def save(self, found: Found) -> None:
        if found.image is None or isinstance(found.result, ImageError):
            return
        result = found.result
        name = Path(describe(found.source))
        suffix = name.suffix.lower() if name.suffix.lower() in (".png", ".webp") else ".jpg"
        self.taken[name.stem] += 1
        number = f"_{self.taken[name.stem]}" if self.taken[name.stem] > 1 else ""
        picture = draw_detections(
            found.image,
            boxes_xyxy_pixels=result.boxes,
            labels=result.labels,
            names=result.names,
            scores=result.scores,
        )
        Image.fromarray(picture).save(self.folder / f"{name.stem}{number}{suffix}", quality=92)


class _Progress:
    """A bar with how many, how fast and how long still, and the figures of the run."""

    def __init__(self, total: int, *, console: Console, loading: float) -> None:
        self.total, self.loading = total, loading
        self.count, self.first, self.rest = 0, 0.0, 0.0
        self.bar = Progress(
            TextColumn("detecting"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}", style="dim", markup=False),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task("", total=total, rate="compiling", last="")

    def watch(self, stream: Iterator[Found]) -> Iterator[Found]:
        """The stream, counted and timed."""
        began = time.perf_counter()
        for found in stream:
            self.count += 1
            elapsed = time.perf_counter() - began
            self.first = self.first or elapsed
            self.rest = elapsed - self.first
            rate, last = f"{self.count / elapsed:.1f}/s", describe(found.source)
            self.bar.update(self.task, advance=1, rate=rate, last=last)
            yield found

    def summary(self, *, read: int) -> str:
        """What was done, what was not, and where the time went."""
        parts = [f"{read} images done, {self.count - read} not read"]
        if self.count < self.total:
            parts.append(f"{self.total - self.count} left when it was interrupted")
        parts.append(f"model loaded in {self.loading:.1f} s")
        parts.append(f"first result, with compilation, after {self.first:.1f} s")
        if self.count > 1 and self.rest:
            parts.append(f"then {(self.count - 1) / self.rest:.1f} images a second")
        return "; ".join(parts)


def _table(done: list[tuple[str, Result]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    if len(done) > _WHOLE_TABLE:
        table.add_column("image", overflow="fold")
        table.add_column("found", overflow="fold")
        for name, result in done:
            counts = Counter(result.names).most_common()
            table.add_row(escape(name), ", ".join(f"{count} {escape(label)}" for label, count in counts) or "nothing")
        return table
    for column in ("image", "name", "score", "left", "top", "right", "bottom"):
        justify = "left" if column in ("image", "name") else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column != "image")
    for name, result in done:
        for label, score, box in zip(result.names, result.scores, result.boxes, strict=True):
            table.add_row(escape(name), escape(label), f"{score:.3f}", *(f"{x:.1f}" for x in box))
        if not len(result):
            table.add_row(escape(name), "[dim]nothing above the threshold[/dim]")
    return table


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
