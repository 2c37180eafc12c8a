"""The inference form of a model: normalisations folded into convolutions, training's parts dropped."""

from flax import nnx

from rtdetrv2_jax.model.hybrid_encoder import RepVGGBlock
from rtdetrv2_jax.model.layers import ConvBias, ConvNorm
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
    for parts in ("layers", "class_heads", "box_heads"):
        setattr(decoder, parts, nnx.List(getattr(decoder, parts)[: config.decoder.layers]))
    model.config, model.denoising = config, None
    _fold_within(model)
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
