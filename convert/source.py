"""What a user names as SOURCE, opened: a model, how its images are prepared, and how much of that was assumed."""

import os
from pathlib import Path
from typing import NamedTuple

from rtdetrv2_jax.config import COCO_CLASS_NAMES, ConfigError, ModelConfig, named
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.weights.config_json import from_hugging_face
from rtdetrv2_jax.weights.files import ORBAX, read_json, read_tensors
from rtdetrv2_jax.weights.hub import SourceError, find
from rtdetrv2_jax.weights.infer import Inferred, infer_config
from rtdetrv2_jax.weights.load import load_pretrained
from rtdetrv2_jax.weights.transfer import Tensors, WeightsError, from_tensors, naming_of

from .pth import is_pth, read_pth

_FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")


class Source(NamedTuple):
    """A checkpoint to convert.

    `kind` says in words what it was. `dropped` are keys that the model does without, with the reasons; `assumed` is
    what no file said. `hugging_face` is the folder that transformers can load as it is, if it is such a one.
    """

    path: Path
    kind: str
    model: RTDETRv2
    preprocessing: Preprocessing
    dropped: dict[str, str]
    assumed: tuple[str, ...]
    hugging_face: Path | None


def open_source(name: str, *, revision: str | None = None, config: str | None = None) -> Source:
    """The checkpoint that `name` means: a hub id, a folder of Hugging Face's or of ours, a file of weights.

    Args:
        name: What the user wrote.
        revision: A branch, tag or commit, where it is a hub id.
        config: For a file of weights, the name of a released model or a `config.json`; inferred where None.

    Raises:
        SourceError: There is no such thing, or it can't be fetched.
        ConfigError, WeightsError: It is there, and is no RT-DETRv2 that the library has.
    """
    if Path(name).suffix in _FILE_SUFFIXES and not Path(name).expanduser().exists():
        raise SourceError(f"there is no file {name!r}")
    path = find(name, revision=revision)
    if not path.is_dir():
        return _from_file(path, config=config)
    if config is not None:
        raise SourceError(f"{path} has a config.json of its own: --config goes with a file of weights that has none")
    ours = (path / ORBAX).is_dir()
    model, preprocessing, dropped = load_pretrained(path)
    kind = "a folder of ours" if ours else "a Hugging Face folder"
    return Source(path, kind, model, preprocessing, dropped, (), None if ours else path)


def read_class_names(path: str) -> tuple[str, ...]:
    """The class names of a text file, one a line, in the order of their labels.

    Raises:
        ConfigError: It has no name, or one twice.
    """
    names = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path} names a class twice: {', '.join(twice)}")
    if not names:
        raise ConfigError(f"{path} holds no class name: one is expected on each line")
    return names


def rename_classes(model: RTDETRv2, names: tuple[str, ...]) -> None:
    """Gives the classes of a model other names; their number stays.

    Raises:
        ConfigError: There are more or fewer names than classes.
    """
    if len(names) != model.config.classes:
        raise ConfigError(f"the model tells {model.config.classes} classes apart, and {len(names)} names were given")
    model.config = model.config.with_classes(names)


def _from_file(path: Path, *, config: str | None) -> Source:
    if is_pth(path):
        tensors, place = read_pth(path)
        kind = f"a PyTorch file; the weights are those of {place}"
    else:
        tensors, kind = read_tensors(path), "a file of weights"
    found, assumed = _configuration(tensors, path, config)
    model, dropped = from_tensors(tensors, found)
    assumed = (*assumed, "images stretched to 640 x 640, levels divided by 255, as the authors prepare them")
    return Source(path, kind, model, Preprocessing(), dropped, assumed, None)


def _configuration(tensors: Tensors, path: Path, config: str | None) -> Inferred:
    """The configuration of a bare file of weights, and what of it was assumed."""
    naming = naming_of(tensors)
    if config is None and naming == "hugging_face":
        raise WeightsError(
            f"{path} has Hugging Face's names, and such files go with a config.json: give the folder that holds both, "
            "or name the other file with --config"
        )
    if config is None:
        inferred = infer_config(tensors)
        return Inferred(inferred.config, (*inferred.assumed, _assumed_classes(inferred.config)))
    if config.endswith(".json") or os.sep in config:
        return Inferred(from_hugging_face(read_json(Path(config).expanduser())), ())
    released = named(config)
    head = "decoder.enc_score_head.bias" if naming == "authors" else "model.enc_score_head.bias"
    classes = tensors[head].shape[0] if head in tensors else released.classes
    if classes != released.classes:
        released = released.with_classes(tuple(f"class_{label}" for label in range(classes)))
    return Inferred(released, (_assumed_classes(released),))


def _assumed_classes(config: ModelConfig) -> str:
    coco = config.class_names == COCO_CLASS_NAMES
    return f"{'COCO' if coco else 'placeholders'} for the {config.classes} class names (--classes FILE gives others)"
