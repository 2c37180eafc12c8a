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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.detector import DEFAULT_THRESHOLD, Detector, Found, Result, Threshold
from rtdetrv2_jax.image import ImageError
from rtdetrv2_jax.sources import describe, find_images
from rtdetrv2_jax.visualize import draw_detections

DEFAULT_MODEL = "PekingU/rtdetr_v2_r18vd"
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
    """Detects, and gives the exit status: 0, or 1 where an image could not be read."""
    errors = Console(stderr=True, highlight=False)
    started = time.perf_counter()
    threshold = parse_threshold(arguments.threshold or [])
    sources = find_images(arguments.images)
    with errors.status(f"loading {arguments.model}"):
        detector = Detector.from_pretrained(
            arguments.model, dtype=arguments.dtype, revision=arguments.revision, max_batch=arguments.batch
        )
    loaded = time.perf_counter()
    saver = _Saver(arguments.save) if arguments.save else None
    done: list[tuple[str, Result]] = []
    failed = 0
    stopped = False
    first = None
    try:
        for found in _with_progress(detector.stream(sources, threshold=threshold), total=len(sources), console=errors):
            first = first or time.perf_counter()
            if isinstance(found.result, ImageError):
                failed += 1
                errors.print(f"[red]not read[/red] {found.result}", soft_wrap=True)
                continue
            done.append((str(found.source), found.result))
            if saver:
                saver.save(found)
    except KeyboardInterrupt:
        stopped = True
    ended = time.perf_counter()

    if arguments.json:
        write_json([image_record(name, result) for name, result in done], arguments.json)
    if arguments.json != "-":
        Console(highlight=False).print(_table(done))
    errors.print(
        f"[dim]{len(done)} images done, {failed} not read"
        f"{f', {len(sources) - len(done) - failed} left when it was stopped' if stopped else ''}; "
        f"model loaded in {loaded - started:.1f} s, first result (with compilation) after {(first or ended) - loaded:.1f} s, "
        f"{max(len(done) - 1, 0) / max(ended - (first or ended), 1e-9):.1f} images a second from then on"
        f"{f'; pictures in {arguments.save}' if saver else ''}[/dim]",
        soft_wrap=True,
    )
    return 130 if stopped else int(failed > 0)


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
    partial = f"{destination}.partial"
    Path(partial).write_text(text, encoding="utf-8")
    Path(partial).replace(destination)


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


def _with_progress(stream: Iterator[Found], *, total: int, console: Console) -> Iterator[Found]:
    """The stream, with a bar that shows how many, how fast, and how long still, where a person watches."""
    columns = (
        TextColumn("detecting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[last]}"),
    )
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=console, transient=True))
        task = progress.add_task("", total=total, rate="compiling", last="")
        began = time.perf_counter()
        for count, found in enumerate(stream, start=1):
            progress.update(
                task,
                advance=1,
                rate=f"{count / (time.perf_counter() - began):.1f}/s",
                last=describe(found.source),
            )
            yield found


def _table(done: list[tuple[str, Result]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    if len(done) > _WHOLE_TABLE:
        table.add_column("image", overflow="fold")
        table.add_column("found", overflow="fold")
        for name, result in done:
            counts = Counter(result.names).most_common()
            table.add_row(name, ", ".join(f"{count} {label}" for label, count in counts) or "nothing")
        return table
    for column in ("image", "name", "score", "left", "top", "right", "bottom"):
        table.add_column(column, justify="left" if column in ("image", "name") else "right")
    for name, result in done:
        for label, score, box in zip(result.names, result.scores, result.boxes, strict=True):
            table.add_row(name, label, f"{score:.3f}", *(f"{x:.1f}" for x in box))
        if not len(result):
            table.add_row(name, "[dim]nothing above the threshold[/dim]")
    return table


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
