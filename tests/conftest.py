"""What every test runs under: eight fake devices, strict promotion, checked shapes; and what many of them use.

Compiled programs are kept beside pytest's own cache, for all its workers and for the next time: compiling is most of
what the tests take.
"""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
hook = install_import_hook("rtdetrv2_jax", "beartype.beartype")


@pytest.fixture
def shared() -> Path:
    """The folder of reference tensors and real images that lies beside a checkout, where there is one."""
    folder = Path(os.environ.get("RTDETRV2_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the reference data, and {folder} is not there (RTDETRV2_SHARED names another place)")
    return folder


@pytest.fixture
def kept_programs(tmp_path):
    """The folder of kept programs, for this test alone."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "executables"
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="session")
def tiny_config():
    """A whole network, as small as one can be: two decoder layers, widths that differ everywhere."""
    from rtdetrv2_jax.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig

    return ModelConfig(
        backbone=BackboneConfig(
            block="basic", depths=(1, 1, 1, 1), stem_width=8, widths=(8, 12, 16, 20), batch_norm="live"
        ),
        encoder=EncoderConfig(width=32, ffn_width=48, heads=4, expansion=0.5),
        decoder=DecoderConfig(width=24, ffn_width=40, heads=2, layers=2, queries=20, points=(2, 3, 1)),
        class_names=("ant", "bee", "cat", "dog", "eel"),
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """The small network with well-spread random numbers."""
    from rtdetrv2_jax.weights.untrained import untrained_model

    return untrained_model(tiny_config)
