"""The inference form of a model: normalisations folded into convolutions, training's parts dropped."""

from collections.abc import Callable, Iterable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float

from rtdetrv2_jax.model.backbone import BasicBlock, BottleneckBlock, Shortcut, residual
from rtdetrv2_jax.model.hybrid_encoder import FusionBlock, RepVGGBlock, merge, upsample
from rtdetrv2_jax.model.layers import Activation, ConvBias, ConvNorm, Convolution, identity
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2
from rtdetrv2_jax.model.winograd import WinogradConvolution, pays_as_winograd

Convolving = Literal["direct", "winograd"]


def fuse(model: RTDETRv2, *, convolving: Convolving | None = None) -> RTDETRv2:
    """A model that gives the same answer with less work, equal within float32 rounding; the argument stays as it was.

    Batch normalisation becomes part of its convolution, the two branches of a RepVGG block one convolution, the two
    entrances of a fusion block one; the stem takes a fourth channel of zeros, which vector units like better than
    three; decoder layers behind the answer and the label embedding are left out. What layers would bring to the compute
    type in every run lies in it from the start. Such a model can't be trained or saved.

    Args:
        model: In its training form.
        convolving: "winograd" does the wide 3x3 convolutions by minimal filtering, "direct" as they stand. If none is
            named, what is fastest on the default backend: minimal filtering for float32 on a CPU.

    Source: RepVGG, section 3.3; lyuwenyu/RT-DETR, `deploy`, which folds the RepVGG blocks alone.
    """
    model = nnx.clone(model)
    config = model.config.inference_form()
    decoder = model.decoder
    for parts in ("layers", "class_heads", "box_heads"):
        setattr(decoder, parts, nnx.List(getattr(decoder, parts)[: config.decoder.layers]))
    model.config, model.denoising = config, None
    _replace_within(model, _folded)
    _widen_input(model.backbone.stem[0].conv)
    if (convolving or _fastest(model)) == "winograd":
        _replace_within(model, _filtered)
    _bring_to_compute_type(model)
    return model


def fold(layer: ConvNorm) -> ConvBias:
    """The convolution that does what `layer` does with its running statistics."""
    scale, shift = layer.norm.affine()
    conv = nnx.clone(layer.conv)
    conv.kernel[...] = conv.kernel[...] * scale
    return ConvBias(conv, shift, activation=layer.activation)


def fold_block(block: RepVGGBlock) -> ConvBias:
    """The one 3x3 convolution that does what the block's two do: the 1x1 kernel goes into the centre."""
    wide, narrow = fold(block.wide), fold(block.narrow)
    wide.conv.kernel[...] = wide.conv.kernel[...].at[1, 1].add(narrow.conv.kernel[...][0, 0])
    return ConvBias(wide.conv, wide.bias[...] + narrow.bias[...], activation=block.activation)


class FoldedBlock(nnx.Module):
    """A residual block that XLA for CPUs computes apart from the others.

    Left to itself it fuses the sum at a block's end into all that reads it, the next block's sum too, and so on: by the
    end of a stage all of its sums are computed anew, several times, from as many maps as the stage has blocks.
    """

    def __init__(self, block: BasicBlock | BottleneckBlock) -> None:
        _replace_within(block, _folded)
        self.layers, self.shortcut = block.layers, block.shortcut

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c_out"]:
        """The block's output."""
        return jax.lax.platform_dependent(x, self.layers, self.shortcut, cpu=_residual_apart, default=residual)


def _residual_apart(x: Array, layers: Iterable[Activation], shortcut: Shortcut | None) -> Array:
    with set_xla_metadata(inlineable="false"):
        return _residual_call(x, layers, shortcut)


@jax.jit
def _residual_call(x: Array, layers: Iterable[Activation], shortcut: Shortcut | None) -> Array:
    with set_xla_metadata(inlineable=None):  # that is said of this call, and of none within it
        return residual(x, layers, shortcut)


class FoldedFusion(nnx.Module):
    """A fusion block that never concatenates: each of its two maps meets its own half of the kernels."""

    def __init__(self, block: FusionBlock) -> None:
        self.deep, self.shallow = (FoldedEntrance(layer, resize=block.resize) for layer in (block.deep, block.shallow))
        self.blocks = nnx.List([fold_block(inner) for inner in block.blocks])
        self.output = fold(block.output) if isinstance(block.output, ConvNorm) else identity

    def __call__(self, carried: Float[Array, "b _h _w d"], level: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """The two levels as one."""
        deep, shallow = self.deep(carried, level), self.shallow(carried, level)
        return merge(deep, shallow, blocks=self.blocks, output=self.output)


class FoldedEntrance(nnx.Module):
    """A 1x1 convolution of two levels: of a level, and of what is carried over to it from another.

    A 1x1 convolution and a repetition of pixels can change places, so what is carried over from a coarser level is
    convolved at that level's size, with a quarter of the work.
    """

    def __init__(self, layer: ConvNorm, *, resize: Activation) -> None:
        folded = fold(layer)
        kernel = folded.conv.kernel[...]
        half = kernel.shape[2] // 2
        carried, self.level = folded.conv, nnx.clone(folded.conv)
        carried.kernel, self.level.kernel = nnx.Param(kernel[:, :, :half]), nnx.Param(kernel[:, :, half:])
        self.carried = UpsampledConvolution(carried) if resize is upsample else carried
        self.bias, self.activation = folded.bias, folded.activation

    def __call__(self, carried: Float[Array, "b _h _w d"], level: Float[Array, "b h w d"]) -> Float[Array, "b h w c"]:
        """The two maps, convolved together."""
        x = self.carried(carried) + self.level(level)
        return self.activation(x + self.bias[...].astype(x.dtype))


class UpsampledConvolution(nnx.Module):
    """A 1x1 convolution, and every pixel of its result four times, as a square."""

    def __init__(self, conv: Convolution) -> None:
        self.conv = conv

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b 2*h 2*w c"]:
        """`x`, convolved, at twice its size."""
        return jax.lax.platform_dependent(x, self.conv, tpu=upsampled_by_transposition, default=upsampled_by_repetition)


def upsampled_by_repetition(x: Float[Array, "b h w d"], conv: Convolution) -> Float[Array, "b 2*h 2*w c"]:
    """The plain definition."""
    return upsample(conv(x))


def upsampled_by_transposition(x: Float[Array, "b h w d"], conv: Convolution) -> Float[Array, "b 2*h 2*w c"]:
    """The same as a transposed convolution by a 2x2 kernel of one matrix: a TPU repeats pixels slowly."""
    matrix = conv.kernel[...].astype(conv.dtype)
    return jax.lax.conv_general_dilated(
        x.astype(conv.dtype),
        jnp.broadcast_to(matrix, (2, 2, *matrix.shape[2:])),
        (1, 1),
        ((1, 1), (1, 1)),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _fastest(model: RTDETRv2) -> Convolving:
    wide = model.backbone.stem[0].conv.dtype == jnp.float32
    return "winograd" if wide and jax.default_backend() == "cpu" else "direct"


def _widen_input(conv: Convolution) -> None:
    conv.kernel = nnx.Param(jnp.pad(conv.kernel[...], ((0, 0), (0, 0), (0, 1), (0, 0))))


def _bring_to_compute_type(model: RTDETRv2) -> None:
    """Of the layers that would do so themselves in every run; norms and what goes with boxes stay float32."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, Convolution | ConvBias | FoldedEntrance | nnx.Linear):
            parameters = {name: value for name, value in vars(layer).items() if isinstance(value, nnx.Param)}
            for name, value in parameters.items():
                setattr(layer, name, nnx.Param(value[...].astype(model.dtype)))


def _replace_within(module: nnx.Module, replaced: Callable[[nnx.Module], nnx.Module]) -> None:
    """Puts something else in the place of every child of a module."""
    for name, child in list(vars(module).items()):
        if isinstance(child, nnx.Module):
            setattr(module, name, replaced(child))


def _folded(module: nnx.Module) -> nnx.Module:
    match module:
        case ConvNorm():
            return fold(module)
        case RepVGGBlock():
            return fold_block(module)
        case FusionBlock():
            return FoldedFusion(module)
        case BasicBlock() | BottleneckBlock():
            return FoldedBlock(module)
        case nnx.List():
            return nnx.List([_folded(item) for item in module])
    _replace_within(module, _folded)
    return module


def _filtered(module: nnx.Module) -> nnx.Module:
    match module:
        case Convolution():
            return WinogradConvolution(module) if pays_as_winograd(module) else module
        case nnx.List():
            return nnx.List([_filtered(item) for item in module])
    _replace_within(module, _filtered)
    return module
