"""3x3 convolutions by Winograd's minimal filtering: sixteen products where the plain way takes thirty-six."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from rtdetrv2_jax.model.layers import Convolution

Grid = list[list[Array]]
"""Maps of equal shape, at each place of a small matrix."""

FEWEST_CHANNELS = 64
"""With fewer, going to tiles and back takes longer than the products that it saves."""

INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])


class WinogradConvolution(nnx.Module):
    """What a 3x3 convolution of stride one does, over tiles of 2x2 pixels: F(2x2, 3x3).

    The kernel is kept as the sixteen matrices that it comes down to, each an array of its own: of parts of one array
    XLA for CPUs makes a copy in every run. The result differs from the plain one's by rounding alone, and is no further
    from the exact one; larger tiles would save more, and lose digits.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", section 4.1.
    """

    def __init__(self, conv: Convolution) -> None:
        self.dtype = conv.dtype
        matrices = _transformed_kernel(conv.kernel[...]).astype(self.dtype)
        self.kernels = nnx.List([nnx.Param(matrix) for matrix in matrices])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c_out"]:
        """`x`, convolved."""
        _, height, width, _ = x.shape
        tiles = _transformed(INPUT, _tiles(x.astype(self.dtype)))
        pixels = _transformed(OUTPUT, _products(tiles, [matrix[...] for matrix in self.kernels]))
        return _interleaved(pixels)[:, :height, :width]


def pays_as_winograd(conv: Convolution) -> bool:
    """Whether a convolution can be done this way, and is faster for it on a CPU."""
    height, width, inputs, outputs = conv.kernel.shape
    return (height, width, conv.stride) == (3, 3, 1) and min(inputs, outputs) >= FEWEST_CHANNELS


def _transformed_kernel(kernel: Float[Array, "3 3 c c_out"]) -> Float[Array, "16 c c_out"]:
    with jax.default_matmul_precision("float32"):
        grid = jnp.einsum("ai,bj,ijco->abco", KERNEL, KERNEL, kernel)
    return grid.reshape(16, *kernel.shape[2:])


def _tiles(x: Float[Array, "b h w c"]) -> Grid:
    """Tiles of 4x4 pixels, two pixels apart: at [i][j], pixel (i, j) of every tile."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    x = jnp.pad(x, ((0, 0), (1, 1 + 2 * rows - height), (1, 1 + 2 * columns - width), (0, 0)))

    def pixel(i: int, j: int) -> Array:
        last = (batch, i + 2 * rows - 1, j + 2 * columns - 1, channels)
        return lax.slice(x, (0, i, j, 0), last, (1, 2, 2, 1))

    return [[pixel(i, j) for j in range(4)] for i in range(4)]


def _transformed(matrix: np.ndarray, grid: Grid) -> Grid:
    """A matrix of signs, times the grid, times the matrix transposed: in sums and differences.

    By `lax`, since tracing `jax.numpy`'s operators for a whole network would take half a second of every start.
    """

    def combined(signs: np.ndarray, maps: list[Array]) -> Array:
        first, *rest = ((sign, each) for sign, each in zip(signs, maps, strict=True) if sign)
        total = first[1] if first[0] > 0 else lax.neg(first[1])
        for sign, each in rest:
            total = lax.add(total, each) if sign > 0 else lax.sub(total, each)
        return total

    columns = [[combined(signs, list(column)) for signs in matrix] for column in zip(*grid, strict=True)]
    return [[combined(signs, list(row)) for signs in matrix] for row in zip(*columns, strict=True)]


def _products(tiles: Grid, matrices: list[Array]) -> Grid:
    """At each place the pixels times the matrix of that place."""
    maps = [each for row in tiles for each in row]
    found = [lax.dot_general(*pair, (((3,), (0,)), ((), ()))) for pair in zip(maps, matrices, strict=True)]
    return [found[start : start + 4] for start in range(0, 16, 4)]


def _interleaved(pixels: Grid) -> Float[Array, "b h w c"]:
    """The whole map from the maps that hold every second pixel of every second row."""
    rows = [jnp.stack(row, axis=3) for row in pixels]
    batch, height, width, _, channels = rows[0].shape
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)
