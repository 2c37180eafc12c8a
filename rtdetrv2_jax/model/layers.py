"""The parts that every box of the figure is made of: convolutions with their norms, perceptrons, attention."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float

from rtdetrv2_jax.config import BackboneConfig
from rtdetrv2_jax.ops.channels import affine, moments

Activation = Callable[[Array], Array]

TORCH_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.1
"""The share of a new batch in the running statistics. PyTorch's sense of the word: Flax would say 0.9."""

xavier = nnx.initializers.xavier_uniform()
fan_in_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's default for convolutions and linear layers: uniform within ±1/sqrt(fan in)."""


class Constant(nnx.Variable):
    """A number that belongs to the model and is never trained."""


def identity(x: Array) -> Array:
    """`x` itself: the activation of a layer that has none."""
    return x


class NoKeys(nnx.Rngs):
    """In place of keys, for a model of which only shapes are wanted: to draw its numbers would be most of the work."""

    def __init__(self) -> None:
        pass

    def params(self) -> None:
        """No key."""


def drawn(start: nnx.Initializer) -> nnx.Initializer:
    """An initialiser that draws numbers if it is given a key, and else gives zeros."""

    def init(key: Array | None, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return jnp.zeros(shape, dtype) if key is None else start(key, shape, dtype)

    return init


def linear(
    inputs: int,
    outputs: int,
    *,
    kernel_init: nnx.Initializer = fan_in_uniform,
    bias_init: nnx.Initializer | None = None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear layer that starts as PyTorch's do, unless told otherwise."""

    def uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    return nnx.Linear(
        inputs, outputs, kernel_init=drawn(kernel_init), bias_init=drawn(bias_init or uniform), dtype=dtype, rngs=rngs
    )


class LayerNorm(nnx.Module):
    """Layer normalisation; mean and variance are float32 whatever the compute type."""

    def __init__(self, width: int, *, epsilon: float) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """`x`, normalised over its last axis."""
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normalised = centred * jax.lax.rsqrt(variance + self.epsilon)
        return (normalised * self.scale[...] + self.bias[...]).astype(x.dtype)


class FrozenBatchNorm(nnx.Module):
    """Batch normalisation by constants: neither the statistics nor the affine part learn."""

    def __init__(self, channels: int, *, epsilon: float = TORCH_EPSILON) -> None:
        self.epsilon = epsilon
        self.scale = Constant(jnp.ones(channels))
        self.bias = Constant(jnp.zeros(channels))
        self.mean = Constant(jnp.zeros(channels))
        self.variance = Constant(jnp.ones(channels))

    def affine(self) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
        """The scale and shift that the normalisation comes down to, float32."""
        scale = self.scale[...] * jax.lax.rsqrt(self.variance[...] + self.epsilon)
        return scale, self.bias[...] - self.mean[...] * scale

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """`x`, normalised."""
        scale, shift = self.affine()
        return x * scale.astype(x.dtype) + shift.astype(x.dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation that learns, with PyTorch's running statistics: the variance kept is the unbiased one.

    In training the statistics are those of the whole batch that the program sees: sharded over devices under `jit`,
    that is the global batch. `batches` counts them, as PyTorch does; nothing depends on it.
    """

    def __init__(self, channels: int, *, epsilon: float = TORCH_EPSILON) -> None:
        self.epsilon = epsilon
        self.use_running_average = True
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.variance = nnx.BatchStat(jnp.ones(channels))
        self.batches = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def affine(self) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
        """The scale and shift that the running statistics come down to, float32."""
        scale = self.scale[...] * jax.lax.rsqrt(self.variance[...] + self.epsilon)
        return scale, self.bias[...] - self.mean[...] * scale

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """`x`, normalised: by the running statistics, or in training by its own, which it adds to them."""
        scale, shift = self.affine() if self.use_running_average else self._batch_affine(x)
        return affine(x, scale, shift)

    def _batch_affine(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
        mean, variance = moments(x)
        count = x.size // x.shape[-1]
        unbiased = variance * (count / max(count - 1, 1))
        self.mean[...] += BATCH_NORM_MOMENTUM * (jax.lax.stop_gradient(mean) - self.mean[...])
        self.variance[...] += BATCH_NORM_MOMENTUM * (jax.lax.stop_gradient(unbiased) - self.variance[...])
        self.batches[...] += 1
        scale = self.scale[...] * jax.lax.rsqrt(variance + self.epsilon)
        return scale, self.bias[...] - mean * scale


def batch_norm(config: BackboneConfig, channels: int) -> FrozenBatchNorm | BatchNorm:
    """The backbone's kind of batch normalisation."""
    return FrozenBatchNorm(channels) if config.batch_norm == "frozen" else BatchNorm(channels)


class Convolution(nnx.Module):
    """A convolution without bias, padded by (kernel - 1) // 2 on every side.

    The padding is symmetric as PyTorch's; "SAME" would pad strided convolutions on one side alone. A kernel with more
    input channels than the map has meets zeros in them.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: int,
        kernel_init: nnx.Initializer,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        shape = kernel, kernel, inputs, outputs
        self.kernel = nnx.Param(drawn(kernel_init)(rngs.params(), shape, jnp.float32))
        self.stride = stride
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c_out"]:
        """`x`, convolved."""
        pad = (self.kernel.shape[0] - 1) // 2
        absent = self.kernel.shape[2] - x.shape[-1]
        return jax.lax.conv_general_dilated(
            jnp.pad(x.astype(self.dtype), ((0, 0), (0, 0), (0, 0), (0, absent))),
            self.kernel[...].astype(self.dtype),
            (self.stride, self.stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class ConvNorm(nnx.Module):
    """A convolution, a batch normalisation, an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: int = 1,
        norm: FrozenBatchNorm | BatchNorm,
        activation: Activation,
        kernel_init: nnx.Initializer = fan_in_uniform,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = Convolution(
            inputs, outputs, kernel=kernel, stride=stride, kernel_init=kernel_init, dtype=dtype, rngs=rngs
        )
        self.norm = norm
        self.activation = activation

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c_out"]:
        """`x`, convolved, normalised and activated."""
        return self.activation(self.norm(self.conv(x)))


class ConvBias(nnx.Module):
    """A convolution, a bias, an activation: what a `ConvNorm` is folded into."""

    def __init__(self, conv: Convolution, bias: Float[Array, "c_out"], *, activation: Activation) -> None:
        self.conv = conv
        self.bias = nnx.Param(bias)
        self.activation = activation

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c_out"]:
        """`x`, convolved, shifted and activated."""
        x = self.conv(x)
        return self.activation(x + self.bias[...].astype(x.dtype))


class MLP(nnx.Module):
    """Linear layers with a ReLU between them: the box heads, and the queries' positional code."""

    def __init__(
        self,
        widths: tuple[int, ...],
        *,
        kernel_init: nnx.Initializer = fan_in_uniform,
        last: nnx.Initializer | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        pairs = list(itertools.pairwise(widths))
        self.layers = nnx.List(
            [linear(inputs, outputs, kernel_init=kernel_init, dtype=dtype, rngs=rngs) for inputs, outputs in pairs[:-1]]
            + [linear(*pairs[-1], kernel_init=last or kernel_init, bias_init=last, dtype=dtype, rngs=rngs)]
        )

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d_out"]:
        """The last layer's output, without activation."""
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class SelfAttention(nnx.Module):
    """Multi-head attention of a sequence to itself; softmax in float32."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        # PyTorch draws the three projections as one matrix of 3 x width rows: its Xavier limit is that of the whole.
        stacked = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")
        zeros = nnx.initializers.zeros_init()
        self.heads = heads
        self.query, self.key, self.value = (
            linear(width, width, kernel_init=stacked, bias_init=zeros, dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.output = linear(width, width, bias_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b q d"], positions: Float[Array, "#b q d"], *, mask: Bool[Array, "#b q q"] | None = None
    ) -> Float[Array, "b q d"]:
        """What each element gathers; `positions` are added to queries and keys, not to values."""
        split = (*x.shape[:2], self.heads, -1)
        located = x + positions
        queries, keys = self.query(located).reshape(split), self.key(located).reshape(split)
        logits = jnp.einsum("bqne,bsne->bnqs", queries, keys, preferred_element_type=jnp.float32)
        logits *= queries.shape[-1] ** -0.5
        if mask is not None:
            logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        gathered = jnp.einsum("bnqs,bsne->bqne", weights, self.value(x).reshape(split))
        return self.output(gathered.reshape(x.shape))
