"""RT-DETRv2 in its inference form as an ONNX graph, made from a model's own layers and numbers."""

from typing import NamedTuple

import numpy as np
import spox.opset.ai.onnx.v17 as op
from spox import Var

from rtdetrv2_jax.arrays import Sizes
from rtdetrv2_jax.model.backbone import ResNet, Shortcut
from rtdetrv2_jax.model.decoder import Decoder, DecoderLayer
from rtdetrv2_jax.model.deformable_attention import DeformableAttention
from rtdetrv2_jax.model.fuse import FoldedEntrance, FoldedFusion, UpsampledConvolution
from rtdetrv2_jax.model.hybrid_encoder import AIFI, FusionBlock, HybridEncoder, upsample
from rtdetrv2_jax.model.layers import ConvNorm
from rtdetrv2_jax.model.query_selection import QuerySelection
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2
from rtdetrv2_jax.ops.positions import anchors, sine_positions

from .onnx_layers import (
    activated,
    channels,
    constant,
    conv_bias,
    convolution,
    expected,
    gelu,
    inverse_sigmoid,
    layer_norm,
    linear,
    mlp,
    pointwise,
    self_attention,
    shape_of,
    shaped,
    sliced,
    tokens_of,
)


class Answer(NamedTuple):
    """Class logits "b q k", and boxes "b q 4" as centre and size in units of the input."""

    logits: Var
    boxes: Var


def network(model: RTDETRv2, images: Var) -> Answer:
    """What a model answers to images "b 3 h w", float32.

    Args:
        model: In its inference form, with direct convolutions.
        images: RGB in [0, 1]; a batch of any size, of sides that are multiples of 32.
    """
    maps = encoder(model.encoder, backbone(model.backbone, images))
    memory = [conv_bias(x, project) for x, project in zip(maps, model.memory.projections, strict=True)]
    content, boxes_logits = selection(model.selection, memory)
    return decoder(model.decoder, content, boxes_logits, memory)


def backbone(module: ResNet, images: Var) -> list[Var]:
    """Maps at strides 8, 16 and 32."""
    x = images
    for layer in module.stem:
        x = conv_bias(x, layer)
    x = op.max_pool(x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)[0]
    maps = []
    for stage in module.stages:
        for block in stage:
            y = x
            for layer in block.layers:
                y = conv_bias(y, layer)
            x = op.relu(op.add(y, x if block.shortcut is None else shortcut(x, block.shortcut)))
        maps.append(x)
    return maps[1:]


def shortcut(x: Var, module: Shortcut) -> Var:
    """A map "b c h w" at the size and width of its block's output."""
    if module.stride == 2:
        x = op.average_pool(x, kernel_shape=[2, 2], strides=[2, 2])
    return conv_bias(x, module.projection)


def encoder(module: HybridEncoder, maps: list[Var]) -> list[Var]:
    """The maps, all at the encoder's width, each knowing of the others."""
    levels = [conv_bias(x, project) for x, project in zip(maps, module.projections, strict=True)]
    for level, attend in zip(module.attention_levels, module.attention, strict=True):
        levels[level] = attention(levels[level], attend)

    top = levels.pop()
    descending = []
    for lateral, fuse in zip(module.laterals, module.top_down, strict=True):
        top = conv_bias(top, lateral)
        descending.append(top)
        top = fusion(top, levels.pop(), fuse)

    outputs = [top]
    for downsample, fuse in zip(module.downsamples, module.bottom_up, strict=True):
        outputs.append(fusion(conv_bias(outputs[-1], downsample), descending.pop(), fuse))
    return outputs


def attention(x: Var, module: AIFI) -> Var:
    """A map "b d h w" after the transformer layers of one level."""
    _, width, *size = shape_of(x)
    positions = constant(sine_positions((size[0], size[1]), width, temperature=module.temperature)[None])
    tokens = tokens_of([x])
    for layer in module.layers:
        attended = self_attention(tokens, positions, layer.attention)
        tokens = layer_norm(op.add(tokens, attended), layer.attention_norm)
        changed = linear(gelu(linear(tokens, layer.expand)), layer.contract)
        tokens = layer_norm(op.add(tokens, changed), layer.output_norm)
    return shaped(op.transpose(tokens, perm=[0, 2, 1]), 0, width, *size)


def fusion(carried: Var, level: Var, module: FusionBlock | FoldedFusion) -> Var:
    """Two levels as one, at the size of the second."""
    module = expected(FoldedFusion, module)
    deep, shallow = (entrance(carried, level, each) for each in (module.deep, module.shallow))
    for block in module.blocks:
        deep = conv_bias(deep, block)
    x = op.add(deep, shallow)
    return x if channels(x) == channels(level) else conv_bias(x, module.output)


def entrance(carried: Var, level: Var, module: ConvNorm | FoldedEntrance) -> Var:
    """Two levels, convolved together."""
    module = expected(FoldedEntrance, module)
    if isinstance(module.carried, UpsampledConvolution):
        carried = activated(convolution(carried, module.carried.conv), upsample)
    else:
        carried = convolution(carried, module.carried)
    return activated(op.add(carried, convolution(level, module.level, module.bias[...])), module.activation)


def selection(module: QuerySelection, memory: list[Var]) -> tuple[Var, Var]:
    """The queries' content "b q d" and the logits of their boxes "b q 4"."""
    anchor_logits, valid = anchors(sizes_of(memory))
    tokens = op.mul(tokens_of(memory), constant(valid[:, None]))
    content = layer_norm(linear(tokens, module.output), module.output_norm)
    logits = linear(content, module.class_head)
    chosen = op.top_k(op.reduce_max(logits, axes=[2], keepdims=0), op.const(np.array([module.queries], np.int64)))[1]
    content = op.gather_nd(content, op.unsqueeze(chosen, op.const(np.array([2], np.int64))), batch_dims=1)
    return content, op.add(mlp(content, module.box_head), op.gather(constant(anchor_logits), chosen))


def decoder(module: Decoder, content: Var, boxes_logits: Var, memory: list[Var]) -> Answer:
    """The answer of the last layer that there is."""
    x, boxes, logits = content, op.sigmoid(boxes_logits), content
    for layer, classify, correct in zip(module.layers, module.class_heads, module.box_heads, strict=True):
        x = decoder_layer(x, boxes, memory, layer=layer, positions=mlp(boxes, module.positions))
        boxes = op.sigmoid(op.add(mlp(x, correct), inverse_sigmoid(boxes)))
        logits = linear(x, classify) if layer is module.layers[-1] else logits
    return Answer(logits, boxes)


def decoder_layer(x: Var, boxes: Var, memory: list[Var], *, layer: DecoderLayer, positions: Var) -> Var:
    """The queries "b q d" after the layer."""
    x = layer_norm(op.add(x, self_attention(x, positions, layer.self_attention)), layer.self_attention_norm)
    read = deformable_attention(op.add(x, positions), boxes, memory, layer.cross_attention)
    x = layer_norm(op.add(x, read), layer.cross_attention_norm)
    changed = linear(op.relu(linear(x, layer.expand)), layer.contract)
    return layer_norm(op.add(x, changed), layer.output_norm)


def deformable_attention(queries: Var, boxes: Var, memory: list[Var], module: DeformableAttention) -> Var:
    """What the queries "b q d" read around their boxes "b q 4"; every head as an image of its own."""
    heads, total = module.heads, sum(module.points)
    width = channels(memory[0])
    count = shape_of(queries)[1]

    def by_head(x: Var, *last: int) -> Var:
        """What queries have for each head and point, "b q (n p ...)", as "(b n) q p ..."."""
        split = shaped(x, 0, count, heads, total, *last)
        order = [0, 2, 1, *range(3, 4 + len(last))]
        return shaped(op.transpose(split, perm=order), -1, count, total, *last)

    logits = shaped(linear(queries, module.weights), 0, count, heads, total)
    weights = by_head(op.softmax(logits))
    scale = np.asarray(module.point_scale[...], np.float32)[:, None] * np.float32(module.offset_scale)
    offsets = op.mul(shaped(linear(queries, module.offsets), 0, count, heads, total, 2), constant(scale))
    here = shaped(boxes, 0, count, 1, 1, 4)
    locations = op.add(sliced(here, 0, 2, axis=4), op.mul(offsets, sliced(here, 2, 4, axis=4)))
    locations = by_head(locations, 2)

    reads, start = [], 0
    for level, points in zip(memory, module.points, strict=True):
        values = pointwise(level, module.value)
        values = shaped(values, -1, width // heads, *shape_of(level)[2:])
        at = sliced(locations, start, start + points, axis=2)
        reads.append(sampled(values, at, method=module.sampling))
        start += points
    read = op.mul(op.concat(reads, axis=3), shaped(weights, -1, 1, count, total))
    read = op.reduce_sum(read, op.const(np.array([3], np.int64)), keepdims=0)
    return linear(op.transpose(shaped(read, -1, width, count), perm=[0, 2, 1]), module.output)


def sampled(values: Var, locations: Var, *, method: str) -> Var:
    """Values "n e h w" at locations "n q p 2", (x, y) in units of the map: "n e q p"."""
    if method == "bilinear":
        grid = op.sub(op.mul(locations, constant(2)), constant(1))
        return op.grid_sample(values, grid)
    size = np.array(shape_of(values)[:1:-1], np.float32)  # (width, height)
    cells = op.floor(op.add(op.mul(locations, constant(size)), constant(0.5)))
    cells = op.min([op.max([cells, constant(0)]), constant(size - 1)])
    grid = op.sub(op.mul(op.add(cells, constant(0.5)), constant(2 / size)), constant(1))
    return op.grid_sample(values, grid, mode="nearest")


def sizes_of(maps: list[Var]) -> Sizes:
    """(height, width) of each."""
    return tuple((shape_of(x)[2], shape_of(x)[3]) for x in maps)
