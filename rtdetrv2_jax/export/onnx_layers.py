"""The network's layers as ONNX graphs: channels first, as engines for ONNX want maps; tokens as in the network.

Each function adds to a graph what the layer of that name does; shapes of what comes and goes are in its docstring.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import spox.opset.ai.onnx.v17 as op
from flax import nnx
from jaxtyping import Array, Float
from spox import Var

from rtdetrv2_jax.model.hybrid_encoder import upsample
from rtdetrv2_jax.model.layers import MLP, Activation, ConvBias, Convolution, LayerNorm, SelfAttention, identity
from rtdetrv2_jax.ops.boxes import INVERSE_SIGMOID_FLOOR

Kind = TypeVar("Kind")


def expected(kind: type[Kind], layer: object) -> Kind:
    """The layer, which is of this kind in a model's inference form.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(layer, kind):
        raise TypeError(f"a {type(layer).__name__} is no {kind.__name__}: fuse(model, convolving='direct') comes first")
    return layer


def constant(value: Any) -> Var:
    """A number, a list or an array in float32."""
    return op.const(np.asarray(value, np.float32))


def shaped(x: Var, *shape: int) -> Var:
    """`x` with another shape, in which -1 is what is left: the batch, whose size no graph knows."""
    return op.reshape(x, op.const(np.array(shape, np.int64)))


def sliced(x: Var, start: int, stop: int, *, axis: int) -> Var:
    """What lies from `start` to `stop` along an axis."""
    bounds = (op.const(np.array([number], np.int64)) for number in (start, stop, axis))
    return op.slice(x, *bounds)


def convolution(x: Var, layer: nnx.Module, bias: Float[Array, "c_out"] | None = None) -> Var:
    """A map "b c h w" to "b c_out h_out w_out". The kernel is cut to the channels that the map has."""
    layer = expected(Convolution, layer)
    kernel = np.asarray(layer.kernel[...], np.float32)[:, :, : channels(x)].transpose(3, 2, 0, 1)
    pad, stride = (kernel.shape[-1] - 1) // 2, layer.stride
    shift = None if bias is None else constant(bias)
    return op.conv(x, constant(kernel), shift, pads=[pad] * 4, strides=[stride] * 2)


def conv_bias(x: Var, layer: nnx.Module | Activation) -> Var:
    """A map "b c h w" to "b c_out h_out w_out", activated."""
    layer = expected(ConvBias, layer)
    return activated(convolution(x, layer.conv, layer.bias[...]), layer.activation)


def activated(x: Var, activation: Activation) -> Var:
    """What an activation, or another function of a map alone, makes of `x`."""
    if activation is identity:
        return x
    if activation is jax.nn.relu:
        return op.relu(x)
    if activation is jax.nn.silu:
        return op.mul(x, op.sigmoid(x))
    if activation is upsample:
        scales = constant([1, 1, 2, 2])
        return op.resize(x, None, scales, coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    raise NotImplementedError(f"no ONNX graph is known for {activation}")


def linear(x: Var, layer: nnx.Linear) -> Var:
    """Tokens "b s d" to "b s d_out"."""
    assert layer.bias is not None  # all of ours have one
    return op.add(op.matmul(x, constant(layer.kernel[...])), constant(layer.bias[...]))


def pointwise(x: Var, layer: nnx.Linear) -> Var:
    """A linear layer over the channels of a map: "b d h w" to "b d_out h w"."""
    assert layer.bias is not None
    kernel = np.asarray(layer.kernel[...], np.float32).T[:, :, None, None]
    return op.conv(x, constant(kernel), constant(layer.bias[...]))


def mlp(x: Var, layer: MLP) -> Var:
    """Tokens "b s d" to "b s d_out"."""
    for inner in layer.layers[:-1]:
        x = op.relu(linear(x, inner))
    return linear(x, layer.layers[-1])


def layer_norm(x: Var, layer: LayerNorm) -> Var:
    """Tokens "b s d", normalised."""
    return op.layer_normalization(x, constant(layer.scale[...]), constant(layer.bias[...]), epsilon=layer.epsilon)[0]


def gelu(x: Var) -> Var:
    """The exact one."""
    return op.mul(op.mul(x, constant(0.5)), op.add(constant(1), op.erf(op.mul(x, constant(1 / math.sqrt(2))))))


def inverse_sigmoid(x: Var) -> Var:
    """The logit, with both of its floors."""
    floor = constant(INVERSE_SIGMOID_FLOOR)
    return op.log(op.div(op.max([x, floor]), op.max([op.sub(constant(1), x), floor])))


def self_attention(x: Var, positions: Var, layer: SelfAttention) -> Var:
    """Tokens "b s d" to "b s d"; `positions`, one for all images or one for each, go to queries and keys."""
    width = layer.query.in_features
    each = width // layer.heads
    located = op.add(x, positions)

    def heads(tokens: Var, projection: nnx.Linear, *order: int) -> Var:
        return op.transpose(shaped(linear(tokens, projection), 0, -1, layer.heads, each), perm=order)

    queries = op.mul(heads(located, layer.query, 0, 2, 1, 3), constant(each**-0.5))
    shares = op.softmax(op.matmul(queries, heads(located, layer.key, 0, 2, 3, 1)))
    gathered = op.matmul(shares, heads(x, layer.value, 0, 2, 1, 3))
    return linear(shaped(op.transpose(gathered, perm=[0, 2, 1, 3]), 0, -1, width), layer.output)


def tokens_of(maps: Sequence[Var]) -> Var:
    """Maps "b d h w", one after the other as tokens "b s d"."""
    return op.transpose(op.concat([shaped(x, 0, channels(x), -1) for x in maps], axis=2), perm=[0, 2, 1])


def channels(x: Var) -> int:
    """Of a map "b c h w"."""
    return shape_of(x)[1]


def shape_of(x: Var) -> tuple[int, ...]:
    """The shape of `x`, with 0 for a batch of any size."""
    shape = x.unwrap_tensor().shape
    assert shape is not None  # all sizes but the batch's are known
    return tuple(side if isinstance(side, int) else 0 for side in shape)
