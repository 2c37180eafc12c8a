"""The inference form of a model: normalisations folded into convolutions, training's parts dropped."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rtdetrv2_jax.model.hybrid_encoder import RepVGGBlock
from rtdetrv2_jax.model.layers import Conv, ConvNorm
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2


def fuse(model: RTDETRv2) -> RTDETRv2:
    """A model that gives the same answer with less work, equal within float32 rounding; the argument stays as it was.

    Batch normalisation becomes part of its convolution, the two branches of a RepVGG block one convolution; decoder
    layers behind the answer and the label embedding are left out. Such a model can't be trained or saved.

    Source: RepVGG, section 3.3; lyuwenyu/RT-DETR, `deploy`, which folds the RepVGG blocks alone.
    """
    model = nnx.clone(model)
    config = model.config.inference_form()
    decoder = model.decoder
    decoder.layers = decoder.layers[: config.decoder.layers]
    decoder.class_heads = decoder.class_heads[: config.decoder.layers]
    decoder.box_heads = decoder.box_heads[: config.decoder.layers]
    model.config, model.denoising = config, None
    _fold_within(model)
    return model


def fold(layer: ConvNorm) -> Conv:
    """The convolution that does what `layer` does with its running statistics."""
    kernel, bias = _folded(layer)
    return Conv(kernel, bias, like=layer.conv, activation=layer.activation)


def fold_block(block: RepVGGBlock) -> Conv:
    """The one 3x3 convolution that does what the block's two do."""
    kernel, bias = _folded(block.wide)
    narrow_kernel, narrow_bias = _folded(block.narrow)
    return Conv(
        kernel.at[1, 1].add(narrow_kernel[0, 0]), bias + narrow_bias, like=block.wide.conv, activation=block.activation
    )


def _folded(layer: ConvNorm) -> tuple[Float[Array, "r r c_in c_out"], Float[Array, "c_out"]]:
    scale, shift = layer.norm.affine()
    return jnp.asarray(layer.conv.kernel[...]) * scale, shift


def _fold_within(module: nnx.Module) -> None:
    """Replaces every foldable child of a module, at any depth."""
    for name, child in list(vars(module).items()):
        if isinstance(child, ConvNorm):
            setattr(module, name, fold(child))
        elif isinstance(child, nnx.List):
            setattr(module, name, nnx.List([_folded_item(item) for item in child]))
        elif isinstance(child, nnx.Module):
            _fold_within(child)


def _folded_item(item: object) -> object:
    match item:
        case ConvNorm():
            return fold(item)
        case RepVGGBlock():
            return fold_block(item)
        case nnx.List():
            return nnx.List([_folded_item(inner) for inner in item])
        case nnx.Module():
            _fold_within(item)
    return item
