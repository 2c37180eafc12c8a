"""RT-DETRv2: backbone, hybrid encoder, query selection, decoder."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from rtdetrv2_jax.arrays import Denoising, Output, Prediction, Queries
from rtdetrv2_jax.config import ModelConfig
from rtdetrv2_jax.model.backbone import ResNet
from rtdetrv2_jax.model.decoder import Decoder
from rtdetrv2_jax.model.hybrid_encoder import HybridEncoder
from rtdetrv2_jax.model.layers import NoKeys, drawn
from rtdetrv2_jax.model.query_selection import MemoryProjection, QuerySelection

STRIDE = 32
"""The coarsest level's stride: the sides of an image must be multiples of it."""


class ImageSizeError(ValueError):
    """An image that the network cannot take: its sides do not divide, or it has fewer tokens than queries."""


class RTDETRv2(nnx.Module):
    """The detection transformer. Parameters are float32; `dtype` is what it computes in.

    Source: arXiv 2407.17140 and, for the architecture, 2304.08069.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = dtype = jnp.dtype(dtype)
        self.backbone = ResNet(config.backbone, dtype=dtype, rngs=rngs)
        self.encoder = HybridEncoder(config, dtype=dtype, rngs=rngs)
        self.memory = MemoryProjection(config, dtype=dtype, rngs=rngs)
        self.selection = QuerySelection(config, dtype=dtype, rngs=rngs)
        self.denoising = LabelEmbedding(config, rngs=rngs) if config.decoder.denoising else None
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"], denoising: Denoising | None = None) -> Output:
        """What the network sees in images, RGB in [0, 1] with sides that are multiples of 32.

        `denoising` queries, in training, go first through the decoder, and come out apart.

        Raises:
            ImageSizeError: The images' sides do not divide by 32, or give fewer tokens than there are queries.
        """
        check_image_size(images.shape[1:3], queries=self.config.decoder.queries)
        maps = self.backbone(images.astype(self.dtype))
        memory = self.memory(self.encoder(maps))
        selection = self.selection(memory)
        queries, mask = self.with_denoising(selection.queries, denoising)
        predictions = self.decoder(queries, memory, mask=mask)
        noised, layers = split(predictions, queries.content.shape[1] - self.config.decoder.queries)
        answer = layers[self.config.decoder.inference_layers - 1]
        return Output(*answer, layers, noised, selection.prediction, selection.tokens)

    def with_denoising(
        self, queries: Queries, denoising: Denoising | None
    ) -> tuple[Queries, Bool[Array, "#b q q"] | None]:
        """The denoising queries followed by the selected ones, and who may attend to whom."""
        if denoising is None:
            return queries, None
        if self.denoising is None:
            raise ValueError("this model has no label embedding: it is in its inference form, or has denoising=0")
        content = self.denoising(denoising.labels).astype(queries.content.dtype)
        together = Queries(
            jnp.concatenate([content, queries.content], axis=1),
            jnp.concatenate([denoising.boxes_logits, queries.boxes_logits], axis=1),
        )
        return together, denoising.mask


class LabelEmbedding(nnx.Module):
    """A vector for each class, and a last one for an empty slot: zero at first, and without a gradient.

    Source: lyuwenyu/RT-DETR, `denoising_class_embed`, an embedding with a padding row.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        table = drawn(nnx.initializers.normal(1.0))(rngs.params(), (config.classes + 1, config.decoder.width))
        self.table = nnx.Param(table.at[-1].set(0))

    def __call__(self, labels: Int[Array, "b q"]) -> Float[Array, "b q d"]:
        """The vectors of labels."""
        table = self.table[...]
        table = jnp.concatenate([table[:-1], jax.lax.stop_gradient(table[-1:])])
        return table[labels]


def abstract_model(config: ModelConfig, *, dtype: DTypeLike = jnp.float32) -> RTDETRv2:
    """The model with shapes and types in place of numbers: what a checkpoint is read into."""
    shapes, structure = _shapes(config, jnp.dtype(dtype))
    return jax.tree.unflatten(structure, shapes)


@functools.cache
def _shapes(config: ModelConfig, dtype: np.dtype) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    """A model's shapes, and its structure: to make a model only for these takes half a second."""
    return jax.tree.flatten(nnx.eval_shape(lambda: RTDETRv2(config, dtype=dtype, rngs=NoKeys())))


def split(predictions: tuple[Prediction, ...], count: int) -> tuple[tuple[Prediction, ...], tuple[Prediction, ...]]:
    """The predictions of the first `count` queries, and those of the others."""
    if not count:
        return (), predictions
    first = tuple(Prediction(p.logits[:, :count], p.boxes[:, :count]) for p in predictions)
    return first, tuple(Prediction(p.logits[:, count:], p.boxes[:, count:]) for p in predictions)


def check_image_size(size: tuple[int, ...], *, queries: int) -> None:
    """Raises `ImageSizeError` unless the network can take images of `size` (height, width)."""
    height, width = size
    if height % STRIDE or width % STRIDE or not height or not width:
        near = [max(STRIDE, round(side / STRIDE) * STRIDE) for side in size]
        raise ImageSizeError(
            f"images of {height}x{width} (height x width) do not fit: both sides must be multiples of {STRIDE}, "
            f"for instance {near[0]}x{near[1]}"
        )
    tokens = sum((height // stride) * (width // stride) for stride in (8, 16, 32))
    if tokens < queries:
        side = STRIDE
        while 21 * (side // STRIDE) ** 2 < queries:
            side += STRIDE
        raise ImageSizeError(
            f"images of {height}x{width} give {tokens} tokens, fewer than the model's {queries} queries: "
            f"use larger images ({side}x{side} is enough), or a model with fewer queries"
        )
