"""`rtdetrv2`: the command line."""

import argparse
import gc
import sys
from collections.abc import Sequence
from importlib.metadata import version

from rtdetrv2_jax.commands import benchmark, demo, detect, evaluate, export
from rtdetrv2_jax.compilation import keep_freed_memory
from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.data import DataError
from rtdetrv2_jax.evaluation import EvaluationError
from rtdetrv2_jax.image import ImageError
from rtdetrv2_jax.model.rtdetrv2 import ImageSizeError
from rtdetrv2_jax.weights.hub import SourceError
from rtdetrv2_jax.weights.transfer import WeightsError

COMMANDS = {
    "detect": (detect, "find objects in images"),
    "demo": (demo, "draw scenes and detect in them: everything this program does, offline"),
    "evaluate": (evaluate, "measure average precision on a data set, as COCO does"),
    "export": (export, "write a detector as one ONNX file, and check it"),
    "benchmark": (benchmark, "measure speed, beside other runtimes where they are installed"),
}

ERRORS = (ConfigError, DataError, EvaluationError, ImageError, ImageSizeError, SourceError, WeightsError, OSError)
"""Those whose message says all that a person needs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit status: 0 done, 1 failed with a message, 2 wrong usage, 130 interrupted."""
    gc.freeze()  # what was imported is no garbage: looking through it again takes a tenth of a start
    keep_freed_memory()
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stderr.close()
        return 0
    except ERRORS as error:
        print(f"rtdetrv2: {error}", file=sys.stderr)
        return 1
    finally:
        gc.freeze()  # and the end of the process would look through everything


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rtdetrv2", description="RT-DETRv2, the real-time detection transformer, in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"rtdetrv2_jax {version('rtdetrv2-jax')}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (command, purpose) in COMMANDS.items():
        verb = verbs.add_parser(name, help=purpose, description=command.__doc__, allow_abbrev=False)
        command.add_arguments(verb)
        verb.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
