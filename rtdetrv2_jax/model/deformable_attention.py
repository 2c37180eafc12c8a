"""Deformable attention: each query reads the feature pyramid at a few points around its box."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from rtdetrv2_jax.arrays import Memory
from rtdetrv2_jax.config import DecoderConfig, Sampling
from rtdetrv2_jax.model.layers import Constant, linear, xavier
from rtdetrv2_jax.ops.sampling import deformable_sampling


class DeformableAttention(nnx.Module):
    """Cross-attention of queries to the memory, at sampling points that each level may have its own number of.

    A point's offset is in units of the query's box: `offset_scale` (one half) times the box's side, divided by the
    number of points of the level (`point_scale`, a constant that comes with the checkpoint).

    Source: RT-DETRv2, section 3.1; lyuwenyu/RT-DETR, `MSDeformableAttention` of rtdetrv2_decoder.py.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, total = config.width, sum(config.points)
        zeros = nnx.initializers.zeros_init()
        self.heads, self.points = config.heads, config.points
        self.sampling: Sampling = config.sampling
        self.offset_scale = config.offset_scale
        self.point_scale = Constant(jnp.asarray(np.repeat(1 / np.array(config.points), config.points), jnp.float32))
        self.offsets = linear(
            width, 2 * config.heads * total, kernel_init=zeros, bias_init=_star(config), dtype=dtype, rngs=rngs
        )
        self.weights = linear(width, config.heads * total, kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.value = linear(width, width, kernel_init=xavier, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.output = linear(width, width, kernel_init=xavier, bias_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self, queries: Float[Array, "b q d"], boxes: Float[Array, "b q 4"], *, memory: Memory
    ) -> Float[Array, "b q d"]:
        """What the queries read; `boxes` are their reference boxes, float32."""
        batch, count, width = queries.shape
        values = self.value(memory.tokens).reshape(batch, -1, self.heads, width // self.heads)
        read = deformable_sampling(
            values,
            self.locations(queries, boxes),
            weights=self.point_weights(queries),
            sizes=memory.sizes,
            points=self.points,
            method=self.sampling,
        )
        return self.output(read.reshape(batch, count, width))

    def locations(self, queries: Float[Array, "b q d"], boxes: Float[Array, "b q 4"]) -> Float[Array, "b q n p 2"]:
        """Where the points lie: (x, y) in units of the image, float32."""
        offsets = self.offsets(queries).astype(jnp.float32).reshape(*queries.shape[:2], self.heads, -1, 2)
        scale = self.point_scale[...][:, None] * self.offset_scale
        return boxes[:, :, None, None, :2] + offsets * scale * boxes[:, :, None, None, 2:]

    def point_weights(self, queries: Float[Array, "b q d"]) -> Float[Array, "b q n p"]:
        """The share of each point, float32: a softmax over the points of all levels together."""
        logits = self.weights(queries).astype(jnp.float32).reshape(*queries.shape[:2], self.heads, -1)
        return jax.nn.softmax(logits, axis=-1)


def _star(config: DecoderConfig) -> nnx.Initializer:
    """Each head looks its own way at first, and the points of a level lie 1, 2, 3, ... steps that way."""
    angles = 2 * math.pi * np.arange(config.heads) / config.heads
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    directions /= np.abs(directions).max(-1, keepdims=True)
    steps = np.concatenate([np.arange(1, count + 1) for count in config.points])
    bias = (directions[:, None] * steps[:, None]).reshape(-1)

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        del key, shape
        return jnp.asarray(bias, dtype)

    return init
