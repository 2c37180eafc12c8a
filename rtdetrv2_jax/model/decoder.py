"""The decoder: queries that look at each other and at the image, and refine their boxes layer by layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float

from rtdetrv2_jax.arrays import Memory, Prediction, Queries
from rtdetrv2_jax.config import ModelConfig
from rtdetrv2_jax.model.deformable_attention import DeformableAttention
from rtdetrv2_jax.model.layers import MLP, LayerNorm, SelfAttention, linear, xavier
from rtdetrv2_jax.model.query_selection import box_head, class_head
from rtdetrv2_jax.ops.boxes import inverse_sigmoid


class Decoder(nnx.Module):
    """Layers with a class head and a box head each; every layer corrects the boxes of the one before.

    Source: RT-DETR, section 4.3; lyuwenyu/RT-DETR, `TransformerDecoder` of rtdetrv2_decoder.py.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, count = config.decoder.width, config.decoder.layers
        self.positions = MLP((4, 2 * width, width), kernel_init=xavier, dtype=dtype, rngs=rngs)
        # As in the authors' code, all layers start as copies of one.
        layer = DecoderLayer(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([nnx.clone(layer) for _ in range(count)])
        self.class_heads = nnx.List([class_head(config, dtype=dtype, rngs=rngs) for _ in range(count)])
        self.box_heads = nnx.List([box_head(config, dtype=dtype, rngs=rngs) for _ in range(count)])

    def __call__(
        self, queries: Queries, memory: Memory, *, mask: Bool[Array, "#b q q"] | None = None
    ) -> tuple[Prediction, ...]:
        """The prediction of every layer; `mask` tells which query (row) may attend to which (column).

        Boxes are float32 throughout. A layer sees its reference box detached, but the box it is judged by is a
        correction of the last layer's box with its gradient ("look forward twice"): a loss on it trains two box heads.
        """
        x, reference = queries.content, jax.nn.sigmoid(queries.boxes_logits)
        previous = reference
        predictions = []
        for layer, classify, correct in zip(self.layers, self.class_heads, self.box_heads, strict=True):
            x = layer(x, self.positions(reference.astype(x.dtype)), boxes=reference, memory=memory, mask=mask)
            correction = correct(x).astype(jnp.float32)
            boxes = jax.nn.sigmoid(correction + inverse_sigmoid(previous))
            predictions.append(Prediction(classify(x).astype(jnp.float32), boxes))
            previous = jax.nn.sigmoid(correction + inverse_sigmoid(reference))
            reference = jax.lax.stop_gradient(previous)
        return tuple(predictions)


class DecoderLayer(nnx.Module):
    """Self-attention, deformable cross-attention and a perceptron, each with its norm behind the residual sum."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, hidden, epsilon = config.decoder.width, config.decoder.ffn_width, config.layer_norm_epsilon
        self.self_attention = SelfAttention(width, config.decoder.heads, dtype=dtype, rngs=rngs)
        self.self_attention_norm = LayerNorm(width, epsilon=epsilon)
        self.cross_attention = DeformableAttention(config.decoder, dtype=dtype, rngs=rngs)
        self.cross_attention_norm = LayerNorm(width, epsilon=epsilon)
        self.expand = linear(width, hidden, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.contract = linear(hidden, width, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.output_norm = LayerNorm(width, epsilon=epsilon)

    def __call__(
        self,
        x: Float[Array, "b q d"],
        positions: Float[Array, "b q d"],
        *,
        boxes: Float[Array, "b q 4"],
        memory: Memory,
        mask: Bool[Array, "#b q q"] | None,
    ) -> Float[Array, "b q d"]:
        """The queries after the layer; `positions` are added where they attend, not to what they pass on."""
        x = self.self_attention_norm(x + self.self_attention(x, positions, mask=mask))
        x = self.cross_attention_norm(x + self.cross_attention(x + positions, boxes, memory=memory))
        return self.output_norm(x + self.contract(jax.nn.relu(self.expand(x))))
