"""The hybrid encoder: attention inside the coarsest level, convolutions across the levels."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from rtdetrv2_jax.arrays import Pyramid
from rtdetrv2_jax.config import EncoderConfig, ModelConfig
from rtdetrv2_jax.model.layers import (
    Activation,
    BatchNorm,
    ConvNorm,
    LayerNorm,
    SelfAttention,
    identity,
    linear,
)
from rtdetrv2_jax.ops.positions import sine_positions


class HybridEncoder(nnx.Module):
    """AIFI on chosen levels, then a top-down and a bottom-up path between the levels (CCFF).

    Source: RT-DETR, section 4.2; lyuwenyu/RT-DETR, `HybridEncoder`.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        encoder, epsilon = config.encoder, config.batch_norm_epsilon
        width = encoder.width

        def between(kernel: int, stride: int) -> ConvNorm:
            return conv_norm_silu(width, width, kernel=kernel, stride=stride, epsilon=epsilon, dtype=dtype, rngs=rngs)

        def fusion(resize: Activation) -> FusionBlock:
            return FusionBlock(encoder, resize=resize, epsilon=epsilon, dtype=dtype, rngs=rngs)

        self.attention_levels = encoder.attention_levels
        self.projections = nnx.List(
            [
                ConvNorm(inputs, width, kernel=1, norm=BatchNorm(width), activation=identity, dtype=dtype, rngs=rngs)
                for inputs in config.backbone.widths[1:]
            ]
        )
        self.attention = nnx.List([AIFI(config, dtype=dtype, rngs=rngs) for _ in encoder.attention_levels])
        self.laterals = nnx.List([between(1, 1) for _ in range(2)])
        self.top_down = nnx.List([fusion(upsample) for _ in range(2)])
        self.downsamples = nnx.List([between(3, 2) for _ in range(2)])
        self.bottom_up = nnx.List([fusion(identity) for _ in range(2)])

    def __call__(self, maps: Pyramid) -> Pyramid:
        """The maps, all at the encoder's width, each knowing of the others."""
        levels = [project(x) for project, x in zip(self.projections, maps, strict=True)]
        for level, attend in zip(self.attention_levels, self.attention, strict=True):
            levels[level] = attend(levels[level])

        top = levels.pop()
        descending = []
        for lateral, fuse in zip(self.laterals, self.top_down, strict=True):
            top = lateral(top)
            descending.append(top)
            top = fuse(top, levels.pop())

        outputs = [top]
        for downsample, fuse in zip(self.downsamples, self.bottom_up, strict=True):
            outputs.append(fuse(downsample(outputs[-1]), descending.pop()))
        return tuple(outputs)


class AIFI(nnx.Module):
    """Attention-based intra-scale feature interaction: transformer layers over one level."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.temperature = config.encoder.temperature
        self.layers = nnx.List([EncoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.encoder.layers)])

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """The map after the layers."""
        batch, height, width, channels = x.shape
        positions = jnp.asarray(sine_positions((height, width), channels, temperature=self.temperature), x.dtype)
        tokens = x.reshape(batch, height * width, channels)
        for layer in self.layers:
            tokens = layer(tokens, positions[None])
        return tokens.reshape(x.shape)


class EncoderLayer(nnx.Module):
    """A transformer layer with the norms behind the residual sums, and an exact GELU."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, hidden, epsilon = config.encoder.width, config.encoder.ffn_width, config.layer_norm_epsilon
        self.attention = SelfAttention(width, config.encoder.heads, dtype=dtype, rngs=rngs)
        self.attention_norm = LayerNorm(width, epsilon=epsilon)
        self.expand = linear(width, hidden, dtype=dtype, rngs=rngs)
        self.contract = linear(hidden, width, dtype=dtype, rngs=rngs)
        self.output_norm = LayerNorm(width, epsilon=epsilon)

    def __call__(self, x: Float[Array, "b s d"], positions: Float[Array, "1 s d"]) -> Float[Array, "b s d"]:
        """The tokens after attention and perceptron."""
        x = self.attention_norm(x + self.attention(x, positions))
        hidden = jax.nn.gelu(self.expand(x), approximate=False)
        return self.output_norm(x + self.contract(hidden))


class FusionBlock(nnx.Module):
    """Two ways through the concatenated maps of two levels, one of them three RepVGG blocks deep, summed (CSPRep).

    `resize` brings what is carried over from the other level to this one's size. The last convolution is there only
    where the hidden width is not the output's.

    Source: lyuwenyu/RT-DETR, `CSPRepLayer`.
    """

    def __init__(
        self, config: EncoderConfig, *, resize: Activation, epsilon: float, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        width, hidden = config.width, int(config.width * config.expansion)

        def pointwise(inputs: int, outputs: int) -> ConvNorm:
            return conv_norm_silu(inputs, outputs, kernel=1, stride=1, epsilon=epsilon, dtype=dtype, rngs=rngs)

        self.resize = resize
        self.deep = pointwise(2 * width, hidden)
        self.shallow = pointwise(2 * width, hidden)
        self.blocks = nnx.List([RepVGGBlock(hidden, epsilon=epsilon, dtype=dtype, rngs=rngs) for _ in range(3)])
        self.output = identity if hidden == width else pointwise(hidden, width)

    def __call__(self, carried: Float[Array, "b _h _w d"], level: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """The two levels as one."""
        x = jnp.concatenate([self.resize(carried), level], axis=-1)
        return merge(self.deep(x), self.shallow(x), blocks=self.blocks, output=self.output)


def merge(
    deep: Float[Array, "b h w c"], shallow: Float[Array, "b h w c"], *, blocks: Iterable[Activation], output: Activation
) -> Float[Array, "b h w d"]:
    """A fusion block's two ways from their first convolutions to their sum."""
    for block in blocks:
        deep = block(deep)
    return output(deep + shallow)


class RepVGGBlock(nnx.Module):
    """A 3x3 and a 1x1 convolution in parallel, which inference folds into one."""

    def __init__(self, channels: int, *, epsilon: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.wide, self.narrow = (
            ConvNorm(
                channels,
                channels,
                kernel=kernel,
                norm=BatchNorm(channels, epsilon=epsilon),
                activation=identity,
                dtype=dtype,
                rngs=rngs,
            )
            for kernel in (3, 1)
        )
        self.activation: Activation = jax.nn.silu

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The two convolutions' sum, activated."""
        return self.activation(self.wide(x) + self.narrow(x))


def conv_norm_silu(
    inputs: int, outputs: int, *, kernel: int, stride: int, epsilon: float, dtype: DTypeLike, rngs: nnx.Rngs
) -> ConvNorm:
    """The encoder's convolution: live batch normalisation and SiLU."""
    return ConvNorm(
        inputs,
        outputs,
        kernel=kernel,
        stride=stride,
        norm=BatchNorm(outputs, epsilon=epsilon),
        activation=jax.nn.silu,
        dtype=dtype,
        rngs=rngs,
    )


def upsample(x: Float[Array, "b h w d"]) -> Float[Array, "b 2*h 2*w d"]:
    """The map at twice its size: every value four times."""
    batch, height, width, channels = x.shape
    doubled = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return doubled.reshape(batch, 2 * height, 2 * width, channels)
