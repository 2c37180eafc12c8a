import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rtdetrv2_jax.model.fuse import fuse
from rtdetrv2_jax.model.layers import Convolution, fan_in_uniform
from rtdetrv2_jax.model.winograd import WinogradConvolution, pays_as_winograd
from rtdetrv2_jax.weights.untrained import untrained_model


def convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> Convolution:
    return Convolution(
        inputs,
        outputs,
        kernel=kernel,
        stride=stride,
        kernel_init=fan_in_uniform,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )


def images_of(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


@pytest.fixture(scope="module")
def wide_model(tiny_config):
    """The small network, with some convolutions wide enough for minimal filtering to pay."""
    backbone = dataclasses.replace(tiny_config.backbone, widths=(8, 12, 64, 64))
    return untrained_model(dataclasses.replace(tiny_config, backbone=backbone))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 4), (7, 5), (24, 18)])
def test_it_gives_what_the_plain_convolution_gives_on_maps_of_any_size(size):
    plain, images = convolution(6, 5), images_of(2, *size, 6)
    np.testing.assert_allclose(WinogradConvolution(plain)(images), plain(images), atol=5e-6)


def test_it_is_as_close_to_the_exact_result_as_the_plain_convolution():
    plain, images = convolution(128, 128), images_of(1, 20, 20, 128)
    kernel, padded = np.float64(plain.kernel[...]), np.pad(np.float64(images), ((0, 0), (1, 1), (1, 1), (0, 0)))
    exact = sum(padded[:, i : i + 20, j : j + 20] @ kernel[i, j] for i in range(3) for j in range(3))
    rounding = np.abs(np.asarray(plain(images)) - exact)
    filtered = np.abs(np.asarray(WinogradConvolution(plain)(images)) - exact)
    assert np.sqrt(np.mean(filtered**2)) <= 1.2 * np.sqrt(np.mean(rounding**2))


def test_it_is_for_wide_kernels_of_three_by_three_at_stride_one():
    assert pays_as_winograd(convolution(64, 64))
    for other in (convolution(63, 64), convolution(64, 64, kernel=1), convolution(64, 64, stride=2)):
        assert not pays_as_winograd(other)


def test_a_fused_model_gives_the_same_answer_in_either_form(wide_model):
    images = jax.random.uniform(jax.random.key(0), (2, 96, 160, 3))
    direct, filtered = (fuse(wide_model, convolving=name) for name in ("direct", "winograd"))
    kinds = [sum(type(m) is WinogradConvolution for _, m in nnx.iter_modules(model)) for model in (direct, filtered)]
    assert kinds == [0, 2]  # the second convolution of each wide stage
    run = jax.jit(lambda model, images: model(images))
    expected, answer = run(direct, images), run(filtered, images)
    np.testing.assert_array_equal(answer.tokens, expected.tokens)
    np.testing.assert_allclose(answer.logits, expected.logits, atol=2e-4)
    np.testing.assert_allclose(answer.boxes, expected.boxes, atol=2e-5)


def test_a_cpu_gets_it_where_none_is_named_and_halved_numbers_do_not(wide_model):
    halved = untrained_model(wide_model.config, dtype=jnp.bfloat16)
    for model, wanted in ((wide_model, True), (halved, False)):
        modules = [type(module) for _, module in nnx.iter_modules(fuse(model))]
        assert (WinogradConvolution in modules) == wanted
