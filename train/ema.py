"""The running average of a model, parameters and batch statistics alike: what is evaluated and published."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .recipe import Averaging


def fresh_share(averaging: Averaging, updates: Int[Array, ""]) -> Float[Array, ""]:
    """How much the new model counts in the update of this number, counted from 1: one minus the decay.

    Computed as such: in float32, one minus a decay of 0.9999 is wrong from the fourth digit on.
    """
    ramp = jnp.exp(-updates.astype(jnp.float32) / averaging.ramp_steps)
    return (1.0 - averaging.decay) + averaging.decay * ramp


def average(
    averaging: Averaging, old: dict[str, Array], new: dict[str, Array], *, updates: Int[Array, ""]
) -> dict[str, Array]:
    """The average after one more model; `old` says which arrays are averaged, all of them floats.

    Source: lyuwenyu/RT-DETR, optim/ema.py, `ModelEMA`, which averages every float of the model's state. Frozen
    parameters and constants are left out here, since their average is themselves. Written as a step towards the new
    model, so that the average of a model that stands still is that model to the bit.
    """
    share = fresh_share(averaging, updates)
    return {path: value + share * (new[path] - value) for path, value in old.items()}


def averaged_paths(values: dict[str, Array]) -> list[str]:
    """The arrays that an average holds: those of floats. Counters stay what they were at the start."""
    return [path for path, value in values.items() if jnp.issubdtype(value.dtype, jnp.floating)]
