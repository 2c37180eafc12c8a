"""The training step compiled for each size of images, ahead of the steps that need it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from .batch import Batch
from .step import Metrics, TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class Programs:
    """One compiled step a size, made in the background in the order given; to be closed.

    Args:
        step: `jitted_step`.
        state: what the step will be given, or its shapes.
        batch: likewise.
        sides: of the square images that the run can meet, the first one needed first.
    """

    def __init__(self, step: jax.stages.Wrapped, state: TrainState, batch: Batch, *, sides: Sequence[int]) -> None:
        state, batch = jax.tree.map(_shape, (state, batch))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile-step")
        self._compiled: dict[int, Future[Step]] = {
            side: self._pool.submit(_compile, step, state, batch, side) for side in sides
        }

    def __call__(self, side: int) -> Step:
        """The step for images of this side; waits until it is compiled."""
        return self._compiled[side].result()

    def close(self) -> None:
        """Compiles no more than what is being compiled."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _compile(step: jax.stages.Wrapped, state: TrainState, batch: Batch, side: int) -> Step:
    return step.lower(state, batch, (side, side)).compile()


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
