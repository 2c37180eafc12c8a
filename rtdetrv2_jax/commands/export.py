"""`rtdetrv2 export`: a detector as one ONNX file, for ONNX Runtime, OpenVINO and other engines.

The file takes resized images, "images" (uint8, batch x height x width x RGB), and "sizes" (float32, batch x 2: the
height and width in pixels to give boxes in); it gives "scores", "labels" and "boxes", best first. Its metadata have the
names of the classes and how images are to be resized. It is run on drawn scenes before it is written, and is not
written if it finds there something else than the library.
"""

import argparse
import importlib.util
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rtdetrv2_jax.commands.detect import DEFAULT_MODEL
from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.data.synthetic import SyntheticDataset
from rtdetrv2_jax.replacing import replaced_file
from rtdetrv2_jax.weights.load import load_pretrained

NEEDS = ("onnx", "onnxruntime", "spox")
SCENES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rtdetrv2 export`."""
    parser.add_argument("file", type=Path, metavar="FILE.onnx", help="where to write")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="hub id, Hugging Face folder or folder of ours (default: %(default)s)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--batch", type=int, metavar="N", help="images at once, no more and no less (default: any)")


def run(arguments: argparse.Namespace) -> int:
    """Exports, checks, writes, and gives the exit status: 1 where the check found a difference.

    Raises:
        ConfigError: Packages are missing, the file's name is of another format, or the model can't be exported.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if arguments.file.suffix != ".onnx":
        raise ConfigError(f"{arguments.file}: only ONNX can be written, to a file whose name ends in .onnx")
    if arguments.batch is not None and arguments.batch < 1:
        raise ConfigError(f"--batch {arguments.batch}: at least one image")
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"export takes {', '.join(missing)}: pip install -e '.[export]'")
    from rtdetrv2_jax.export.onnx_check import agreement
    from rtdetrv2_jax.export.onnx_detector import onnx_detector

    with console.status(f"loading {escape(arguments.model)}") as status:
        model, preprocessing, _ = load_pretrained(arguments.model, revision=arguments.revision)
        status.update("making the graph")
        graph = onnx_detector(model, preprocessing, batch=arguments.batch)
        status.update("running it on drawn scenes")
        scenes = SyntheticDataset(SCENES, seed=0)
        found = agreement(graph, model, preprocessing, [scenes[index].read() for index in range(SCENES)])
    said = f"{found.found} of {found.total} detections in {SCENES} drawn scenes are those of the library"
    if not found.good:
        console.print(f"[red]not written[/red] {escape(str(arguments.file))}: only {said}")
        return 1
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(arguments.file) as partial:
        partial.write_bytes(graph.SerializeToString())
    size = arguments.file.stat().st_size / 1e6
    console.print(
        f"{escape(str(arguments.file))}: {size:.1f} MB, {model.config.classes} classes; {said}, scores within "
        f"{found.score:.0e}, boxes within {found.pixels:.1g} pixels"
    )
    return 0
