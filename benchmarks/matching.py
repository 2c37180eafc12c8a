"""How long the matching of one training step takes by itself: all layers and images in one call, as in the step."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np

from rtdetrv2_jax.arrays import Prediction, Targets
from rtdetrv2_jax.benchmark.runtimes import seconds_of
from rtdetrv2_jax.config import named
from rtdetrv2_jax.objective.matcher import match
from train.benchmark_steps import OBJECTS, scene


def matching_milliseconds(model: str, *, batch: int, rounds: int) -> float:
    """The median over some rounds, for random predictions and the targets of `python -m train benchmark`."""
    config = named(model)
    decoder = config.decoder
    dice = np.random.default_rng(1)
    shape = (decoder.layers + 1, batch, decoder.queries)  # the encoder's own predictions are matched as well
    prediction = Prediction(
        jnp.asarray(dice.normal(-4.0, 1.0, (*shape, config.classes)), jnp.float32),
        jnp.asarray(dice.uniform(0.2, 0.8, (*shape, 4)), jnp.float32),
    )
    _, labels, boxes = scene(batch=batch, side=1, classes=config.classes)
    targets = Targets(jnp.asarray(labels), jnp.asarray(boxes), jnp.ones((batch, OBJECTS), bool))
    run = jax.jit(match)
    jax.block_until_ready(run(prediction, targets))
    taken = [
        seconds
        for _ in range(rounds)
        for seconds in seconds_of(lambda: jax.block_until_ready(run(prediction, targets)), runs=5)
    ]
    return round(1000 * statistics.median(taken), 3)
