"""Folders of ours: an Orbax tree of the model's numbers, beside `config.json` and `preprocessor_config.json`."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from rtdetrv2_jax.config import ModelConfig
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2, abstract_model
from rtdetrv2_jax.weights.files import ORBAX
from rtdetrv2_jax.weights.transfer import WeightsError, flat_state, with_values


def write_orbax(folder: Path, model: RTDETRv2) -> None:
    """Writes the model's numbers below `folder`, by their dotted paths."""
    with _checkpointer() as checkpointer:
        checkpointer.save(folder.absolute() / ORBAX, {path: np.asarray(x) for path, x in flat_state(model).items()})


def read_orbax(folder: Path, config: ModelConfig, *, dtype: DTypeLike = jnp.float32) -> RTDETRv2:
    """The model of a folder of ours.

    Raises:
        WeightsError: The numbers there are not those that the configuration asks for.
    """
    model = abstract_model(config, dtype=dtype)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
        path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=device)
        for path, value in flat_state(model).items()
    }
    with _checkpointer() as checkpointer:
        try:
            values = checkpointer.restore(folder.absolute() / ORBAX, target)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise WeightsError(
                f"{folder / ORBAX} does not hold the model that {folder}/config.json describes: {error}"
            ) from None
    return with_values(model, values)


def _checkpointer() -> Any:
    """Orbax, reading and writing in this process alone: of several, it waits for none, and none waits for it."""
    import orbax.checkpoint as ocp  # slow to import, and folders of Hugging Face's need none of it

    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)
