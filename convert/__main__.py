"""`python -m convert`: the command line."""

import argparse
import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.image import ImageError
from rtdetrv2_jax.model.rtdetrv2 import ImageSizeError, RTDETRv2
from rtdetrv2_jax.weights.config_json import to_hugging_face
from rtdetrv2_jax.weights.files import replaced_checkpoint
from rtdetrv2_jax.weights.hub import SourceError
from rtdetrv2_jax.weights.load import Format, inference_layers_only, save_model
from rtdetrv2_jax.weights.transfer import WeightsError

from .report import Line, describe, written
from .source import Source, open_source, read_class_names, rename_classes
from .verify import Measure, VerificationError, check_installed, run_reference, verify

# What can be wrong with what a user gave. Anything else is a fault of the program, and shows where.
_EXPECTED = (
    *(SourceError, WeightsError, ConfigError, ImageError, ImageSizeError, VerificationError),
    *(OSError, UnicodeError),
)

_DESCRIPTION = """\
Converts an RT-DETRv2 checkpoint. SOURCE is an id on the Hugging Face hub, a Hugging Face folder, a folder of ours, or a
file of weights of the authors' repository (.pth or .safetensors). DESTINATION becomes a folder of ours, or with --to hf
one that transformers loads; it is replaced at once or not at all.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code: 0, 1 for what the user can mend, 130 for an interruption."""
    arguments = _arguments(argv)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        _convert(arguments, Console(highlight=False, soft_wrap=True), errors)
    except KeyboardInterrupt:
        errors.print(f"interrupted: {escape(arguments.destination)} is as it was")
        return 130
    except _EXPECTED as error:
        errors.print(f"[red]error:[/] {escape(_message(error))}")
        return 1
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m convert", description=_DESCRIPTION)
    parser.add_argument("source", metavar="SOURCE", help="what to convert, such as PekingU/rtdetr_v2_r18vd")
    parser.add_argument("destination", metavar="DESTINATION", help="the folder to write; replaces a checkpoint")
    parser.add_argument("--to", choices=("orbax", "hf"), default="orbax", help="what to write (default: %(default)s)")
    parser.add_argument("--revision", metavar="R", help="a branch, tag or commit of the hub's repository")
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="for a file of weights: a released model such as r50vd_m, or a config.json (default: inferred)",
    )
    parser.add_argument("--classes", metavar="FILE", help="names for the classes, one a line, by label")
    parser.add_argument(
        "--drop-unused-layers",
        action="store_true",
        help="leave out the decoder layers behind the answer, which only training uses",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run the source in PyTorch and the result in JAX on one image, and fail where they differ",
    )
    parser.add_argument("--image", metavar="FILE", help="the image to verify on (default: one of gradients and noise)")
    arguments = parser.parse_args(argv)
    if arguments.image and not arguments.verify:
        parser.error("--image is the image to verify on: it goes with --verify")
    if arguments.revision and Path(arguments.source).expanduser().exists():
        parser.error("--revision goes with the id of a model on the hub, and SOURCE is a path")
    return arguments


def _convert(arguments: argparse.Namespace, out: Console, progress: Console) -> None:
    """Reads, writes beside DESTINATION, verifies what was written, and only then puts it in place."""
    destination, to = Path(arguments.destination).expanduser(), arguments.to
    if arguments.verify:
        check_installed()
    with _stage(progress, f"reading {arguments.source}"):
        source = open_source(arguments.source, revision=arguments.revision, config=arguments.config)
    if arguments.classes:
        rename_classes(source.model, read_class_names(arguments.classes))
    _print_lines(out, describe(source))
    _check_place(source, destination)
    model = _to_write(source, out, to=to, drop_unused_layers=arguments.drop_unused_layers)
    with replaced_checkpoint(destination) as partial:
        reference = None
        if arguments.verify:
            with _stage(progress, "running the source in PyTorch"):
                reference = run_reference(source, image=arguments.image)
        with _stage(progress, f"writing {destination}"):
            _write(model, partial, source, to=to)
        if reference is not None:
            with _stage(progress, "running the result in JAX"):
                measures = verify(reference, partial)
            _judge(out, measures)
    _print_lines(out, written(destination, to))


def _to_write(source: Source, out: Console, *, to: Format, drop_unused_layers: bool) -> RTDETRv2:
    """The model in the form that is to be written.

    Raises:
        ConfigError: The form can't say what the model is; the message says what to do.
    """
    model = source.model
    layers = model.config.decoder.layers
    if drop_unused_layers:
        model = inference_layers_only(model)
        left = model.config.decoder.layers
        what = f"decoder layers {left + 1} to {layers} (behind the answer)" if left < layers else "no layer is unused"
        _print_lines(out, [("left out", what)])
    if to == "hf":
        try:
            to_hugging_face(model.config)
        except ConfigError as error:
            raise ConfigError(f"{error}. A folder of ours holds the model as it is: --to orbax") from None
    return model


def _check_place(source: Source, destination: Path) -> None:
    """Raises `FileExistsError` where the file that is read would go when DESTINATION is replaced."""
    if source.path.is_file() and source.path.resolve().parent.is_relative_to(destination.resolve()):
        raise FileExistsError(f"{destination} holds {source.path.name}, which is being converted: name another folder")


def _write(model: RTDETRv2, partial: Path, source: Source, *, to: Format) -> None:
    """Writes the checkpoint into a folder that is not yet in its place."""
    new = partial / "new"
    save_model(model, new, preprocessing=source.preprocessing, to=to)
    for entry in new.iterdir():
        entry.rename(partial / entry.name)
    new.rmdir()


def _judge(out: Console, measures: list[Measure]) -> None:
    """Prints the measures; raises `VerificationError` if one is above its tolerance."""
    table = Table("stage", "difference", "tolerance", "", "", box=None, pad_edge=False)
    for measure in measures:
        verdict = "[green]ok[/]" if measure.good else "[red]too far[/]"
        table.add_row(measure.stage, f"{measure.difference:.1e}", f"{measure.tolerance:.1e}", verdict, measure.note)
    out.print(table)
    wrong = [measure.stage for measure in measures if not measure.good]
    if wrong:
        raise VerificationError(
            f"the result is not the source: {len(wrong)} of {len(measures)} stages differ, the first is {wrong[0]}. "
            "Nothing was written"
        )


@contextlib.contextmanager
def _stage(console: Console, what: str) -> Iterator[None]:
    """Shows that something is going on, and in the end how long it took."""
    start = time.monotonic()
    with console.status(f"{escape(what)} ..."):
        yield
    console.print(f"[dim]{escape(what)}: {time.monotonic() - start:.1f} s[/]")


def _print_lines(out: Console, lines: list[Line]) -> None:
    for about, what in lines:
        out.print(f"[bold]{about:<13}[/]{escape(what)}")


def _message(error: BaseException) -> str:
    """What an error says, without the numbers of the system's."""
    if isinstance(error, OSError) and error.strerror:
        full = error.errno == errno.ENOSPC
        return error.strerror if full or not error.filename else f"{os.fspath(error.filename)}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    # Nothing here needs an accelerator, and the check is one of float32 on a CPU.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
