"""What the input pipeline hands to the training step."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Int, Int32, UInt8

from rtdetrv2_jax.arrays import Targets


class Batch(NamedTuple):
    """A batch as it comes from the hosts: geometry done, colours untouched, pixels still bytes.

    Attributes:
        images: RGB at the base size.
        targets: ground truth, padded to the same number of boxes in every batch of a run.
        image_ids: position of each image in the data set.
        content_xyxy_pixels: the part of each image that shows something, (left, top, right, bottom); zoom-out leaves
            black around it, and colours are not to be changed there.
        distort_colours: False for the images of epochs whose colours stay as they are. A value and not a constant, so
            that the end of strong augmentation needs no other program.
    """

    images: UInt8[Array, "b h w 3"]
    targets: Targets
    image_ids: Int32[Array, " b"]
    content_xyxy_pixels: Int[Array, "b 4"]
    distort_colours: Bool[Array, " b"]
