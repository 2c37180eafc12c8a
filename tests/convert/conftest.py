"""One small model with random weights, and the program as a function."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from flax import nnx

from convert.__main__ import main
from rtdetrv2_jax.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.weights.load import save_model
from rtdetrv2_jax.weights.transfer import flat_state, with_values

SMALL = ModelConfig(
    backbone=BackboneConfig(
        block="basic", depths=(1, 1, 1, 1), stem_width=16, widths=(16, 24, 32, 48), batch_norm="live"
    ),
    encoder=EncoderConfig(width=32, ffn_width=48, expansion=0.5),
    decoder=DecoderConfig(width=32, ffn_width=48, layers=2, queries=30, points=(2, 2, 2)),
    class_names=("cat", "dog", "bird", "fish", "horse"),
)
PREPROCESSING = Preprocessing(size=(128, 96))


class Run(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def make_model() -> Callable[[ModelConfig], RTDETRv2]:
    """Makes a model with random weights of a natural size, all different."""

    def make(config: ModelConfig) -> RTDETRv2:
        random = np.random.default_rng(0)
        model = nnx.eval_shape(lambda: RTDETRv2(config, rngs=nnx.Rngs(0)))
        values = {}
        for path, leaf in flat_state(model).items():
            name, shape = path.rsplit(".", 1)[-1], leaf.shape
            if name == "batches":
                values[path] = np.int32(random.integers(100))
            elif name == "point_scale":
                values[path] = np.repeat(1 / np.array(config.decoder.points), config.decoder.points).astype(np.float32)
            elif name in ("scale", "variance"):
                values[path] = random.uniform(0.6, 1.4, shape).astype(np.float32)
            else:
                size = np.sqrt(1.4 / np.prod(shape[:-1])) if name == "kernel" else 0.3
                values[path] = (random.standard_normal(shape) * size).astype(np.float32)
        return with_values(model, values)

    return make


@pytest.fixture(scope="session")
def small(make_model) -> RTDETRv2:
    return make_model(SMALL)


@pytest.fixture(scope="session")
def hf_folder(small, tmp_path_factory) -> Path:
    """The small model as a Hugging Face folder; not to be written to."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    save_model(small, folder, preprocessing=PREPROCESSING, to="hf")
    return folder


@pytest.fixture
def convert(capsys) -> Callable[..., Run]:
    """Runs the program on its arguments."""

    def run(*arguments: object) -> Run:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Run(code, *capsys.readouterr())

    return run
