"""Query selection: which tokens of the encoder become the decoder's queries."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from rtdetrv2_jax.arrays import Memory, Prediction, Pyramid, Queries, Selection
from rtdetrv2_jax.config import ModelConfig
from rtdetrv2_jax.model.layers import MLP, BatchNorm, ConvNorm, LayerNorm, identity, linear, xavier
from rtdetrv2_jax.ops.positions import anchors

PRIOR_PROBABILITY = 0.01
"""The score that a class head starts with for everything. Source: lyuwenyu/RT-DETR, `bias_init_with_prob(0.01)`."""


class MemoryProjection(nnx.Module):
    """The encoder's maps at the decoder's width, as one sequence of tokens."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = config.decoder.width
        self.projections = nnx.List(
            [
                ConvNorm(
                    config.encoder.width,
                    width,
                    kernel=1,
                    norm=BatchNorm(width, epsilon=config.batch_norm_epsilon),
                    activation=identity,
                    kernel_init=xavier,
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in config.decoder.points
            ]
        )

    def __call__(self, maps: Pyramid) -> Memory:
        """The tokens of all levels, and the levels' sizes."""
        levels = [project(x) for project, x in zip(self.projections, maps, strict=True)]
        tokens = [x.reshape(x.shape[0], -1, x.shape[-1]) for x in levels]
        return Memory(jnp.concatenate(tokens, axis=1), tuple((x.shape[1], x.shape[2]) for x in levels))


class QuerySelection(nnx.Module):
    """Scores every token, and makes queries of those with the best class score.

    Source: RT-DETR, section 4.3; lyuwenyu/RT-DETR, `RTDETRTransformerv2._get_decoder_input`.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = config.decoder.width
        self.queries = config.decoder.queries
        self.output = linear(width, width, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.output_norm = LayerNorm(width, epsilon=config.layer_norm_epsilon)
        self.class_head = class_head(config, dtype=dtype, rngs=rngs)
        self.box_head = box_head(config, dtype=dtype, rngs=rngs)

    def __call__(self, memory: Memory) -> Selection:
        """The selected tokens as queries. Tokens whose anchor is not valid compete with a content of zeros."""
        anchor_logits, valid = anchors(memory.sizes)
        content = self.output_norm(self.output(jnp.where(valid[:, None], memory.tokens, 0)))
        # Top-k and box arithmetic are float32 whatever the compute type: scores that bfloat16 would tie stay apart.
        logits = self.class_head(content).astype(jnp.float32)
        tokens = jax.lax.top_k(logits.max(-1), self.queries)[1]

        content = jnp.take_along_axis(content, tokens[..., None], axis=1)
        logits = jnp.take_along_axis(logits, tokens[..., None], axis=1)
        # The box head of a token needs no other token: it runs on the selected ones alone.
        boxes_logits = self.box_head(content).astype(jnp.float32) + jnp.asarray(anchor_logits)[tokens]
        return Selection(
            queries=Queries(jax.lax.stop_gradient(content), jax.lax.stop_gradient(boxes_logits)),
            prediction=Prediction(logits, jax.nn.sigmoid(boxes_logits)),
            tokens=tokens,
        )


def class_head(config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """Class logits of a query; at first every class has the prior probability."""
    bias = nnx.initializers.constant(-math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    return linear(config.decoder.width, config.classes, bias_init=bias, dtype=dtype, rngs=rngs)


def box_head(config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> MLP:
    """A query's correction of its reference box, as logits; at first nothing."""
    width = config.decoder.width
    return MLP((width, width, width, 4), last=nnx.initializers.zeros_init(), dtype=dtype, rngs=rngs)
