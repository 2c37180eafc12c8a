"""The input pipeline: batches read ahead by other processes or threads, put on the devices; the one door of grain.

Grain reads ahead, in order, and brings arrays over from its processes in shared memory. What a batch is, is decided in
`loading`, as a function of its number, so that grain's own shuffling, sharding and saved state are not needed.
"""

import gc
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32, UInt8

from rtdetrv2_jax.arrays import Targets
from rtdetrv2_jax.data import DataError
from rtdetrv2_jax.sharding import along_data

from .batch import Batch
from .loading import BadImage, EvaluationSource, HostBatch, HostEvaluationBatch, TrainingSource

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = 2**16
"""Arrays of fewer bytes are cheaper to send than to share."""
BATCHES_ALIVE = 4
"""Batches a process can have in shared memory at a time: being made, queued, fetched, in use."""
GRACE_SECONDS = 20.0
"""A process that is told to end gives the program so much time to need it no more."""
THREADS = max(2, min(8, os.cpu_count() or 1))
"""Without processes, so many threads of this one read ahead, a batch each. About a quarter of their work waits for
Python's lock, so that more of them gain nothing."""


class LoadedBatch(NamedTuple):
    """A batch on the devices, and how it came about.

    Attributes:
        step: its number in the run, from 0.
        epoch: the epoch that the step belongs to, from 0.
        batch: what the training step takes.
        wait_seconds: how long the program stood still for it.
        bad_images: those of this host that could not be read, and have been replaced by others.
    """

    step: int
    epoch: int
    batch: Batch
    wait_seconds: float
    bad_images: tuple[BadImage, ...]


class EvaluationBatch(NamedTuple):
    """Prepared images on the devices.

    Attributes:
        images: as `Preprocessing.prepare` makes them.
        scale_sizes: `Prepared.scale_size` of each.
        content_sizes: `Prepared.content_size` of each.
        image_ids: position of each image in the data set.
        mask: False where there is no image: behind the last one, or unreadable.
        bad_images: those of this host that could not be read.
    """

    images: UInt8[Array, "b h w 3"]
    scale_sizes: Float32[Array, "b 2"]
    content_sizes: Int32[Array, "b 2"]
    image_ids: Int32[Array, " b"]
    mask: Bool[Array, " b"]
    bad_images: tuple[BadImage, ...]


class TrainingBatches:
    """The batches of a run, one after another, from where it stopped; to be closed, or used in `with`.

    Copying to the devices goes on while the program does, so that it overlaps with the step before.

    Args:
        source: all batches of the run, by number.
        mesh: whose devices get them, images along its data axis.
        workers: processes that read ahead, for which the program's entry must be guarded by `if __name__ ==
            "__main__"`. 0: threads of this one do, for debugging and for hosts whose processor has time.
        state: what `state` gave when the run was saved; None begins it.

    Raises:
        DataError: `state` belongs to other data, or to another size of batch or seed.
    """

    def __init__(
        self, source: TrainingSource, *, mesh: Mesh, workers: int = 0, state: Mapping[str, int] | None = None
    ) -> None:
        self.source = source
        self.mesh = mesh
        self.step = _checked(state, _identity(source))
        self._host_batches = _read_ahead(source, start=self.step, workers=workers)

    def state(self) -> dict[str, int]:
        """Where the run is, for JSON: it goes on with the batch after the last one given. Hosts may come or go."""
        return {"step": self.step} | _identity(self.source)

    def __iter__(self) -> Iterator[LoadedBatch]:
        return self

    def __next__(self) -> LoadedBatch:
        began = time.perf_counter()
        host: HostBatch = next(self._host_batches)
        waited = time.perf_counter() - began
        batch = Batch(
            images=_on_devices(self.mesh, host.images),
            targets=Targets(
                labels=_on_devices(self.mesh, host.labels),
                boxes=_on_devices(self.mesh, host.boxes),
                mask=_on_devices(self.mesh, host.mask),
            ),
            image_ids=_on_devices(self.mesh, host.image_ids),
            content_xyxy_pixels=_on_devices(self.mesh, host.content_xyxy_pixels),
            distort_colours=_on_devices(self.mesh, host.distort_colours),
        )
        step = self.step
        self.step += 1
        for image in host.bad_images:
            logger.warning("image %d is replaced by another: %s", image.position, image.reason)
        return LoadedBatch(step, self.source.epoch_of(step), batch, waited, host.bad_images)

    def close(self) -> None:
        """Ends the processes that read ahead."""
        self._host_batches.close()
        gc.collect()  # the exception that ended the iteration refers to itself, and to the last batches

    def __enter__(self) -> "TrainingBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def evaluation_batches(source: EvaluationSource, *, mesh: Mesh) -> Iterator[EvaluationBatch]:
    """All batches of an evaluation, read ahead by threads: starting processes takes longer than many an evaluation."""
    host_batches = _read_ahead(source, start=0, workers=0)
    try:
        host: HostEvaluationBatch
        for host in host_batches:
            for image in host.bad_images:
                logger.warning("image %d counts as one in which nothing is found: %s", image.position, image.reason)
            yield EvaluationBatch(
                images=_on_devices(mesh, host.images),
                scale_sizes=_on_devices(mesh, host.scale_sizes),
                content_sizes=_on_devices(mesh, host.content_sizes),
                image_ids=_on_devices(mesh, host.image_ids),
                mask=_on_devices(mesh, host.mask),
                bad_images=host.bad_images,
            )
    finally:
        host_batches.close()


def _identity(source: TrainingSource) -> dict[str, int]:
    """What the numbering of batches depends on."""
    return {"images": len(source.dataset), "batch_size": source.batch_size, "seed": source.seed}


def _checked(state: Mapping[str, int] | None, identity: dict[str, int]) -> int:
    if state is None:
        return 0
    differing = [f"{name} was {state.get(name)}, is {now}" for name, now in identity.items() if state.get(name) != now]
    if differing:
        raise DataError(
            f"The saved run cannot go on, its batches would be others: {'; '.join(differing)}. Give it the same data "
            "and settings, or start a new run from its weights."
        )
    return state["step"]


def _on_devices(mesh: Mesh, share: np.ndarray) -> Array:
    """The batch that the shares of all hosts make. Returns at once, while copying goes on.

    On a CPU JAX would not copy, and hold on to the shared memory for as long as the batch lives.
    """
    in_place = mesh.devices.flat[0].platform == "cpu"
    return jax.make_array_from_process_local_data(along_data(mesh), np.array(share, copy=True if in_place else None))


def _read_ahead(source: TrainingSource | EvaluationSource, *, start: int, workers: int) -> grain.DatasetIterator[Any]:
    """The batches from `start` on, each made by one thread or process."""
    threads = 0 if workers else THREADS
    batches = grain.MapDataset.source(cast(grain.sources.RandomAccessDataSource[Any], source)).slice(slice(start, None))
    stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if not workers:
        return iter(stream)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks absl for its flags, whoever parses the command line
    options = grain.experimental.DatasetOptions(min_shm_size=_least_shared(source, workers=workers))
    stream = grain.experimental.WithOptionsIterDataset(stream, options)
    return iter(stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_begin_worker))


def _least_shared(source: TrainingSource | EvaluationSource, *, workers: int) -> int:
    """Bytes from which on arrays go through shared memory: none do where it is too small, as in many containers.

    A process that writes beyond its end dies of a bus error.
    """
    if not SHARED_MEMORY.is_dir():
        return LEAST_SHARED
    needed, free = BATCHES_ALIVE * workers * _batch_bytes(source), shutil.disk_usage(SHARED_MEMORY).free
    if needed < free:
        return LEAST_SHARED
    logger.warning(
        "%s has %d MB free, and %d processes may need %d: batches go through pipes, which is slower. Containers take "
        "a size for it (docker run --shm-size).",
        *(SHARED_MEMORY, free >> 20, workers, needed >> 20),
    )
    return 2**62


def _batch_bytes(source: TrainingSource | EvaluationSource) -> int:
    size = source.size if isinstance(source, TrainingSource) else source.preprocessing.input_size or (0, 0)
    return source.batch_size // source.process_count * size[0] * size[1] * 3


def _begin_worker(index: int, count: int) -> None:
    """Leaves signals, which often go to all processes alike, to the program: it may still need its workers.

    It ends them itself when it closes the batches; and should it be gone, they are too.
    """
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=_end_after_grace, daemon=True).start())
    threading.Thread(target=_end_with_program, daemon=True).start()


def _end_after_grace() -> None:
    time.sleep(GRACE_SECONDS)
    os._exit(0)


def _end_with_program() -> None:
    program = multiprocessing.parent_process()
    if program is not None:
        program.join()
        os._exit(1)
