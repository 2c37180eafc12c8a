"""The average model of a run measured on images that it is not trained on."""

import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from rtdetrv2_jax.arrays import Detections
from rtdetrv2_jax.compilation import compiler_options
from rtdetrv2_jax.data import Dataset
from rtdetrv2_jax.detector import detect
from rtdetrv2_jax.evaluation import Evaluator, Scores
from rtdetrv2_jax.model.fuse import fuse
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.sharding import replicated, traced_for

from .batches import EvaluationBatch, evaluation_batches
from .loading import EvaluationSource, OnBadData
from .pictures import Detections as OneImage
from .step import Program, TrainState, model_of

SHOWN = 8
"""Images of whose detections a picture is drawn."""


class Validated(NamedTuple):
    """What an evaluation gives: COCO's figures, some images and what was found in them, and how long it took."""

    scores: Scores
    shown: tuple[int, ...]
    detections: tuple[OneImage, ...]
    seconds: float


class Validation:
    """Measures states of a run on a data set.

    Args:
        program: of the run.
        dataset: with the classes of the run, in the same order.
        preprocessing: how its images are prepared, as `rtdetrv2 detect` will prepare any.
        mesh: whose devices share the work.
        batch_size: images of all devices at once.
        on_bad_data: what to do with an image that cannot be read.
    """

    def __init__(
        self,
        program: Program,
        dataset: Dataset,
        *,
        preprocessing: Preprocessing,
        mesh: Mesh,
        batch_size: int,
        on_bad_data: OnBadData = "skip",
    ) -> None:
        self.dataset, self._mesh = dataset, mesh
        self._source = EvaluationSource(
            dataset=dataset,
            preprocessing=preprocessing,
            batch_size=batch_size,
            on_bad_data=on_bad_data,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self._prepare = jax.jit(lambda state: fuse(model_of(program, state)))
        self._detect = jax.jit(
            traced_for(mesh, partial(_found, preprocessing=preprocessing)),
            out_shardings=replicated(mesh),
            compiler_options=compiler_options(mesh.devices.flat[0].platform),
        )
        self._shown = np.unique(np.linspace(0, len(dataset) - 1, num=min(SHOWN, len(dataset)), dtype=int)).tolist()

    def __call__(self, state: TrainState) -> Validated:
        """The figures of the state's average model. Every process comes to the same."""
        began, evaluator, shown = time.perf_counter(), Evaluator(self.dataset), {}
        model = self._prepare(state)
        for batch in evaluation_batches(self._source, mesh=self._mesh):
            positions, real, found = jax.device_get(self._detect(model, *_arrays(batch)))
            evaluator.add(positions[real], Detections(*(values[real] for values in found)))
            for row in np.flatnonzero(real & np.isin(positions, self._shown)):
                shown[int(positions[row])] = tuple(values[row] for values in found)
        order = tuple(sorted(shown))
        detections = tuple(shown[position] for position in order)
        return Validated(evaluator.scores(), order, detections, time.perf_counter() - began)


def _arrays(batch: EvaluationBatch) -> tuple[Array, ...]:
    return batch.images, batch.scale_sizes, batch.content_sizes, batch.image_ids, batch.mask


def _found(
    model: RTDETRv2,
    images: Array,
    scale_sizes: Array,
    content_sizes: Array,
    image_ids: Int[Array, " b"],
    mask: Bool[Array, " b"],
    *,
    preprocessing: Preprocessing,
) -> tuple[Int[Array, " b"], Bool[Array, " b"], Detections]:
    with jax.default_matmul_precision("float32" if model.dtype == jnp.float32 else "default"):
        found = detect(model, images, scale_sizes, preprocessing=preprocessing, content_sizes=content_sizes)
    return image_ids, mask, found
