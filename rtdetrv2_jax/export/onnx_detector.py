"""`detect` as an ONNX graph: from resized images to pixel boxes, with what a program has to know written in it."""

import json

import numpy as np
import onnx
import onnx.helper
import spox.opset.ai.onnx.v17 as op
from spox import Tensor, Var, argument, build

from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.model.fuse import fuse
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2
from rtdetrv2_jax.preprocessing import Preprocessing

from .onnx_layers import constant, shaped, sliced
from .onnx_network import Answer, network

INPUTS, OUTPUTS = ("images", "sizes"), ("scores", "labels", "boxes")


def onnx_detector(model: RTDETRv2, preprocessing: Preprocessing, *, batch: int | None = None) -> onnx.ModelProto:
    """A graph that does what `rtdetrv2_jax.detect` does.

    It takes "images", uint8 "b h w 3", RGB and resized as the preprocessing says, and "sizes", float32 "b 2", the
    (height, width) in original pixels that each input spans. It gives "scores", float32 "b q", "labels", int64 "b q",
    and "boxes", float32 "b q 4", the corners in original pixels; best first. "class_names" and "preprocessing", in
    its metadata, are the names by label and the content of a `preprocessor_config.json`, both as JSON.

    Args:
        model: In its training form.
        preprocessing: How images become numbers; all of one size.
        batch: How many images at once; any number if None.

    Raises:
        ConfigError: The size of inputs depends on the image, or padding has to be known apart.
    """
    size = preprocessing.input_size
    if size is None:
        raise ConfigError("an exported detector takes images of one size, and this preprocessing has many: set a size")
    if preprocessing.mean is not None and preprocessing.pad != "none":
        raise ConfigError("a preprocessing that pads and normalises can't be exported: images have to be stretched")
    images = argument(Tensor(np.uint8, (batch, *size, 3)))
    sizes = argument(Tensor(np.float32, (batch, 2)))
    answer = network(fuse(model, convolving="direct"), normalised(images, preprocessing))
    found = best_detections(answer, sizes, queries=model.config.decoder.queries, classes=model.config.classes)
    graph = build(dict(zip(INPUTS, (images, sizes), strict=True)), dict(zip(OUTPUTS, found, strict=True)))
    about = {"class_names": list(model.config.class_names), "preprocessing": preprocessing.to_hugging_face()}
    onnx.helper.set_model_props(graph, {name: json.dumps(value) for name, value in about.items()})
    graph.producer_name = "rtdetrv2_jax"
    return graph


def normalised(images: Var, preprocessing: Preprocessing) -> Var:
    """Levels "b h w 3" as the network takes them, "b 3 h w"."""
    x = op.cast(op.transpose(images, perm=[0, 3, 1, 2]), to=np.float32)
    if preprocessing.rescale_factor is not None:
        x = op.mul(x, constant(preprocessing.rescale_factor))
    if preprocessing.mean is not None and preprocessing.std is not None:
        mean, std = (constant(np.reshape(each, (3, 1, 1))) for each in (preprocessing.mean, preprocessing.std))
        x = op.div(op.sub(x, mean), std)
    return x


def best_detections(answer: Answer, sizes: Var, *, queries: int, classes: int) -> tuple[Var, Var, Var]:
    """Scores "b q", labels "b q" and pixel corners "b q 4" of the best pairs of query and class."""
    best, index = op.top_k(shaped(answer.logits, 0, queries * classes), op.const(np.array([queries], np.int64)))
    count = op.const(np.array(classes, np.int64))
    chosen = op.unsqueeze(op.div(index, count), op.const(np.array([2], np.int64)))
    boxes = op.gather_nd(answer.boxes, chosen, batch_dims=1)
    centre, half = sliced(boxes, 0, 2, axis=2), op.mul(sliced(boxes, 2, 4, axis=2), constant(0.5))
    corners = op.concat([op.sub(centre, half), op.add(centre, half)], axis=2)
    height, width = sliced(sizes, 0, 1, axis=1), sliced(sizes, 1, 2, axis=1)
    pixels = shaped(op.concat([width, height, width, height], axis=1), 0, 1, 4)
    return op.sigmoid(best), op.mod(index, count), op.mul(corners, pixels)
