"""What every test runs under: eight fake devices, strict promotion, checked shapes, and the reference data if it is there."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

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
