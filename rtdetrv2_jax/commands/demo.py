"""`rtdetrv2 demo`: the whole way from a checkpoint to pictures with boxes, offline, on scenes that it draws itself.

The project carries no trained model yet: the checkpoint is one of random numbers, made on the spot, so what it finds
means nothing; that it runs from end to end does.
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console

from rtdetrv2_jax.commands import detect
from rtdetrv2_jax.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig
from rtdetrv2_jax.data.synthetic import CLASS_NAMES, scene
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.weights.load import save_model
from rtdetrv2_jax.weights.untrained import untrained_model

SIDE = 256
MODEL = ModelConfig(
    backbone=BackboneConfig(
        block="basic", depths=(1, 1, 1, 1), stem_width=16, widths=(16, 32, 64, 128), batch_norm="live"
    ),
    encoder=EncoderConfig(width=64, ffn_width=128, expansion=0.5),
    decoder=DecoderConfig(width=64, ffn_width=128, layers=3, queries=60, denoising=40),
    class_names=tuple(CLASS_NAMES),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rtdetrv2 demo`."""
    parser.add_argument("--save", type=Path, default=Path("demo"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--scenes", type=int, default=4, help="how many to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Draws, detects, and gives the exit status."""
    console = Console(stderr=True, highlight=False)
    console.print(
        "[yellow]These weights are random numbers: the project carries no trained model yet. Boxes and names below "
        "show that everything runs, not what a trained model finds.[/yellow]"
    )
    with tempfile.TemporaryDirectory() as folder:
        scenes = Path(folder) / "scenes"
        scenes.mkdir()
        for index in range(arguments.scenes):
            image = scene(arguments.seed, index, size=(SIDE, SIDE)).image
            Image.fromarray(image).save(scenes / f"scene_{index}.png")
        model = Path(folder) / "model"
        save_model(untrained_model(MODEL), model, preprocessing=Preprocessing(size=(SIDE, SIDE)), to="hf")
        parser = argparse.ArgumentParser()
        detect.add_arguments(parser)
        words = [str(scenes), "--model", str(model), "--threshold", "0.95", "--save", str(arguments.save)]
        status = detect.run(parser.parse_args(words))
    console.print(f"pictures with boxes are in {arguments.save}/")
    return status
