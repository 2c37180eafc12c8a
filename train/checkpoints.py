"""What a run keeps on disk: states to go on from, through Orbax, and models to use, each whole or not there at all."""

import errno
import logging
import os
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.sharding import replicated
from rtdetrv2_jax.weights.load import Format, save_model

from .step import TrainState

STATES = "states"
KEPT = 2
"""States kept: the last, and one before, should the disk have damaged the last."""
MOST_SAID = 600
"""Letters of an error of Orbax's, which can hold the numbers of whole arrays."""
logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A state that cannot be read or written; the message says what to do."""


class Resumed(NamedTuple):
    """A saved state, and what the loop noted beside it."""

    state: TrainState
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, written while it goes on; to be closed, or used in `with`.

    A save that fails, say for want of space, does not end the run and takes away nothing that was saved before:
    `failures` tells of it.

    Args:
        folder: of the run. All processes of a run see the same folder.
        mesh: where states lie.
    """

    def __init__(self, folder: Path, *, mesh: Mesh) -> None:
        self.folder = folder.absolute()
        self._mesh = mesh
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._states = ocp.CheckpointManager(self.folder / STATES, options=options)
        self._failures: list[str] = []

    @property
    def latest(self) -> int | None:
        """How many steps the last saved state has made."""
        return self._states.latest_step()

    def save_state(self, step: int, state: TrainState, *, notes: dict[str, Any]) -> None:
        """Saves a state, unless it is saved already; returns as soon as the state may change."""
        self.wait()  # else Orbax would raise here what befell the last save, and leave this one out
        if step == self.latest:
            return
        copy = jax.tree.map(lambda x: x.copy(), _plain(state))  # the next step is given the state's own memory
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(copy), notes=ocp.args.JsonSave(notes))
        self._try(lambda: self._states.save(step, args=arguments), f"the state after step {step}")

    def restore(self, like: TrainState) -> Resumed:
        """The last saved state, which has the shapes of `like`.

        Raises:
            CheckpointError: There is none, or it is of another model or damaged.
        """
        if self.latest is None:
            raise CheckpointError(f"{self.folder} has no saved state")
        whole = replicated(self._mesh)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), _plain(like))
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), notes=ocp.args.JsonRestore())
        try:
            found = self._states.restore(self.latest, args=wanted)
        except (ValueError, KeyError, TypeError, OSError) as error:
            others = [str(step) for step in self._states.all_steps() if step != self.latest]
            hint = f" Remove it to go on from step {', '.join(others)}." if others else ""
            raise CheckpointError(
                f"{self.folder / STATES / str(self.latest)} cannot be read as a state of this run: {error}.{hint}"
            ) from error
        key = jax.random.wrap_key_data(found["state"].key)
        return Resumed(TrainState(*found["state"])._replace(key=key), found["notes"])

    def save_model(self, name: str, model: RTDETRv2, *, preprocessing: Preprocessing, to: Format = "orbax") -> bool:
        """Writes a model to a folder of this name in the run's folder, in the place of an earlier one.

        `rtdetrv2 detect --model` takes it, even while the run goes on. Of several processes one writes. It returns when
        the model is on disk, and tells whether it is: no state that is saved later tells of a model that is not there.
        """
        return self._try(lambda: save_model(model, self.folder / name, preprocessing=preprocessing, to=to), name)

    def failures(self) -> list[str]:
        """What could not be saved since the last call, and why."""
        self._try(self._states.check_for_errors, "a state")
        found, self._failures = self._failures, []
        return found

    def wait(self) -> None:
        """Returns once all that is to be saved has been, or has failed."""
        self._try(self._states.wait_until_finished, "a state")
        if jax.process_index() == 0:
            for half in (self.folder / STATES).glob("*.orbax-checkpoint-tmp*"):  # of a save that failed
                shutil.rmtree(half, ignore_errors=True)

    def close(self) -> None:
        """Waits, and ends what writes."""
        self.wait()
        self._try(self._states.close, "a state")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _try(self, write: Callable[[], object], what: str) -> bool:
        try:
            write()
            return True
        except ConfigError as error:
            self._failures.append(f"{what} is not written: {error}")
        except Exception as error:  # Orbax hands on what its threads met in types of its own
            full = os.strerror(errno.ENOSPC) in str(error) or getattr(error, "errno", None) == errno.ENOSPC
            hint = " Free some space: the run goes on, and tries again at the next save." if full else ""
            said = textwrap.shorten(str(error), MOST_SAID).rstrip(".")
            self._failures.append(f"{what} could not be saved: {said}.{hint}")
        return False


def _plain(state: TrainState) -> TrainState:
    """The state with its key as numbers, which Orbax can write."""
    return state._replace(key=jax.random.key_data(state.key))
