"""ResNet-vd: the backbone."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from rtdetrv2_jax.arrays import Pyramid
from rtdetrv2_jax.config import BackboneConfig
from rtdetrv2_jax.model.layers import Activation, ConvNorm, batch_norm, identity


class ResNet(nnx.Module):
    """A deep stem of three convolutions, then four stages; the last three give the feature pyramid.

    Source: He et al., "Bag of tricks", variant D; lyuwenyu/RT-DETR, `PResNet`.
    """

    def __init__(self, config: BackboneConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        half, width = config.stem_width // 2, config.stem_width
        self.stem = nnx.List(
            [
                ConvNorm(
                    inputs,
                    outputs,
                    kernel=3,
                    stride=stride,
                    norm=batch_norm(config, outputs),
                    activation=jax.nn.relu,
                    dtype=dtype,
                    rngs=rngs,
                )
                for inputs, outputs, stride in ((3, half, 2), (half, half, 1), (half, width, 1))
            ]
        )
        self.stages = nnx.List([])
        for index, (depth, outputs) in enumerate(zip(config.depths, config.widths, strict=True)):
            blocks = _blocks(config, index, inputs=width, outputs=outputs, depth=depth, dtype=dtype, rngs=rngs)
            self.stages.append(nnx.List(blocks))
            width = outputs

    def __call__(self, images: Float[Array, "b h w 3"]) -> Pyramid:
        """Maps at strides 8, 16 and 32."""
        x = images
        for layer in self.stem:
            x = layer(x)
        x = max_pool(x)
        maps = []
        for stage in self.stages:
            for block in stage:
                x = block(x)
            maps.append(x)
        return tuple(maps[1:])


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut: the block of ResNet-18 and -34."""

    def __init__(
        self,
        config: BackboneConfig,
        *,
        inputs: int,
        outputs: int,
        stride: int,
        first: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.layers = nnx.List(
            [
                _layer(config, inputs, outputs, kernel=3, stride=stride, last=False, dtype=dtype, rngs=rngs),
                _layer(config, outputs, outputs, kernel=3, stride=1, last=True, dtype=dtype, rngs=rngs),
            ]
        )
        self.shortcut = _shortcut(config, inputs, outputs, stride=stride, first=first, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c_out"]:
        """The block's output."""
        return residual(x, self.layers, self.shortcut)


class BottleneckBlock(nnx.Module):
    """A 3x3 convolution at a quarter of the width, between two 1x1: the block of ResNet-50 and -101."""

    def __init__(
        self,
        config: BackboneConfig,
        *,
        inputs: int,
        outputs: int,
        stride: int,
        first: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        narrow = outputs // 4
        self.layers = nnx.List(
            [
                _layer(config, inputs, narrow, kernel=1, stride=1, last=False, dtype=dtype, rngs=rngs),
                _layer(config, narrow, narrow, kernel=3, stride=stride, last=False, dtype=dtype, rngs=rngs),
                _layer(config, narrow, outputs, kernel=1, stride=1, last=True, dtype=dtype, rngs=rngs),
            ]
        )
        self.shortcut = _shortcut(config, inputs, outputs, stride=stride, first=first, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c_out"]:
        """The block's output."""
        return residual(x, self.layers, self.shortcut)


class Shortcut(nnx.Module):
    """A 1x1 convolution, behind an average pool where the block strides (variant D)."""

    def __init__(self, projection: ConvNorm, *, stride: int) -> None:
        self.projection = projection
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c_out"]:
        """`x` at the size and width of the block's output."""
        return self.projection(average_pool(x) if self.stride == 2 else x)


def residual(x: Array, layers: Iterable[Activation], shortcut: Shortcut | None) -> Array:
    """The layers' result, added to the shortcut's."""
    y = x
    for layer in layers:
        y = layer(y)
    return jax.nn.relu(y + (x if shortcut is None else shortcut(x)))


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c"]:
    """The stem's pool: 3x3, stride 2, one pixel of padding on every side. The sides are even, as for `average_pool`."""
    return jax.lax.platform_dependent(x, cpu=pool_by_halves, tpu=pool_by_windows, default=pool_on_gpus)


def pool_by_windows(x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c"]:
    """The plain definition."""
    window, strides, padding = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, np.array(-np.inf, x.dtype), jax.lax.max, window, strides, padding)


def pool_by_halves(x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c"]:
    """The same by columns and then by rows, without a loop over windows; of equal pixels the first has the gradient."""
    for axis in (2, 1):
        even, odd = (jax.lax.slice_in_dim(x, start, None, stride=2, axis=axis) for start in (0, 1))
        beside = [(int(each == axis), -int(each == axis), 0) for each in range(4)]
        before = jax.lax.pad(odd, np.array(-np.inf, x.dtype), beside)
        x = _larger(_larger(before, even), odd)
    return x


@jax.custom_vjp
def pool_on_gpus(x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c"]:
    """By windows, with the gradient of the halves: that of windows is a scatter, through a table of where each came."""
    return pool_by_windows(x)


def _pool_forward(x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h_out w_out c"], Float[Array, "b h w c"]]:
    return pool_by_windows(x), x


def _pool_backward(
    x: Float[Array, "b h w c"], gradient: Float[Array, "b h_out w_out c"]
) -> tuple[Float[Array, "b h w c"]]:
    return jax.vjp(pool_by_halves, x)[1](gradient)


pool_on_gpus.defvjp(_pool_forward, _pool_backward)


def _larger(first: Float[Array, "b h w c"], second: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return jnp.where((second > first) | (second != second), second, first)


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c"]:
    """The shortcut's pool: 2x2, stride 2. The sides are even wherever the image's are multiples of 32."""
    rows = x[:, ::2] + x[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]) * jnp.asarray(0.25, x.dtype)


def _blocks(
    config: BackboneConfig, stage: int, *, inputs: int, outputs: int, depth: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> "list[BasicBlock | BottleneckBlock]":
    block = BasicBlock if config.block == "basic" else BottleneckBlock
    return [
        block(
            config,
            inputs=outputs if number else inputs,
            outputs=outputs,
            stride=2 if stage and not number else 1,
            first=not number,
            dtype=dtype,
            rngs=rngs,
        )
        for number in range(depth)
    ]


def _layer(
    config: BackboneConfig,
    inputs: int,
    outputs: int,
    *,
    kernel: int,
    stride: int,
    last: bool,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> ConvNorm:
    return ConvNorm(
        inputs,
        outputs,
        kernel=kernel,
        stride=stride,
        norm=batch_norm(config, outputs),
        activation=identity if last else jax.nn.relu,
        dtype=dtype,
        rngs=rngs,
    )


def _shortcut(
    config: BackboneConfig, inputs: int, outputs: int, *, stride: int, first: bool, dtype: DTypeLike, rngs: nnx.Rngs
) -> Shortcut | None:
    """A projection in the first block of every stage, even where the width stays (stage one of ResNet-18 and -34)."""
    if not first:
        return None
    return Shortcut(
        _layer(config, inputs, outputs, kernel=1, stride=1, last=True, dtype=dtype, rngs=rngs), stride=stride
    )
