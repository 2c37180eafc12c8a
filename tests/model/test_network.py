"""Laws of the network that hold whatever its numbers are."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rtdetrv2_jax.arrays import Denoising
from rtdetrv2_jax.config import RELEASED, named
from rtdetrv2_jax.model.backbone import average_pool, max_pool
from rtdetrv2_jax.model.decoder import Decoder
from rtdetrv2_jax.model.fuse import fuse, upsampled_by_repetition, upsampled_by_transposition
from rtdetrv2_jax.model.layers import BatchNorm, Convolution, FrozenBatchNorm, fan_in_uniform
from rtdetrv2_jax.model.rtdetrv2 import ImageSizeError, abstract_model
from rtdetrv2_jax.weights.untrained import untrained_model

# Trained and counted by the authors' code, buffers of frozen normalisation left out.
PUBLISHED_PARAMETERS = {
    "r18vd": 20_184_464,
    "r34vd": 31_441_668,
    "r50vd_m": 36_593_772,
    "r50vd": 42_891_372,
    "r101vd": 76_556_268,
    "r18vd_sp1": 20_017_928,
    "r18vd_sp2": 20_073_440,
    "r18vd_sp3": 20_128_952,
}

forward = jax.jit(lambda model, images, denoising: model(images, denoising))


def images_of(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random(shape, np.float32))


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_every_size_has_the_published_number_of_parameters(name):
    parameters = jax.tree.leaves(nnx.state(abstract_model(named(name)), nnx.Param))
    assert sum(leaf.size for leaf in parameters) == PUBLISHED_PARAMETERS[name]


def test_discrete_sizes_differ_from_the_others_in_their_sampling_alone():
    for name, config in RELEASED.items():
        if name.endswith("_dsp"):
            decoder = dataclasses.replace(config.decoder, sampling="bilinear")
            assert dataclasses.replace(config, decoder=decoder) == named(name.removesuffix("_dsp"))


def test_a_fused_model_gives_the_same_answer(tiny_model):
    fused = fuse(tiny_model)
    expected = forward(tiny_model, images_of((2, 128, 160, 3)), None)
    answer = forward(fused, images_of((2, 128, 160, 3)), None)
    np.testing.assert_array_equal(answer.tokens, expected.tokens)
    np.testing.assert_allclose(answer.logits, expected.logits, atol=2e-4)
    np.testing.assert_allclose(answer.boxes, expected.boxes, atol=2e-5)


def test_fusing_leaves_the_model_as_it_was_and_drops_what_only_training_uses(tiny_config):
    early = dataclasses.replace(tiny_config, decoder=dataclasses.replace(tiny_config.decoder, inference_layers=1))
    model = untrained_model(early)
    before = jax.tree.leaves(model)
    fused = fuse(model)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(before, jax.tree.leaves(model), strict=True))
    kinds = {type(module) for _, module in nnx.iter_modules(fused)}
    assert not kinds & {BatchNorm, FrozenBatchNorm}
    assert len(fused.decoder.layers) == 1
    assert fused.denoising is None


def test_a_fused_model_holds_its_weights_in_the_type_that_it_computes_in(tiny_config):
    """Else every run would convert them all."""
    fused = fuse(untrained_model(tiny_config, dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(fused) if leaf.ndim > 1} == {jnp.dtype(jnp.bfloat16)}
    program = jax.make_jaxpr(lambda model, x: model(x).logits)(fused, jnp.zeros((1, 128, 160, 3)))
    weights = {id(given) for given in program.jaxpr.invars if given.aval.ndim > 1 and given.aval.dtype == jnp.bfloat16}
    converted = [each for each in program.eqns if each.primitive.name == "convert_element_type"]
    assert len(weights) > 50
    assert not [each for each in converted if id(each.invars[0]) in weights]


def test_upsampling_by_a_transposed_convolution_repeats_pixels():
    conv = Convolution(3, 5, kernel=1, stride=1, kernel_init=fan_in_uniform, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = images_of((2, 4, 6, 3))
    one, other = (form(x, conv) for form in (upsampled_by_repetition, upsampled_by_transposition))
    assert one.shape == (2, 8, 12, 5)
    np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-6)


def test_an_image_does_not_depend_on_its_batch(tiny_model):
    together = forward(tiny_model, images_of((2, 128, 160, 3)), None)
    swapped = forward(tiny_model, images_of((2, 128, 160, 3))[::-1], None)
    np.testing.assert_allclose(swapped.logits[::-1], together.logits, atol=1e-4)
    np.testing.assert_allclose(swapped.boxes[::-1], together.boxes, atol=1e-5)


def test_denoising_queries_that_none_may_see_change_nothing(tiny_model):
    images, count = images_of((2, 128, 160, 3)), tiny_model.config.decoder.queries
    hidden = Denoising(
        labels=jnp.zeros((2, 6), jnp.int32),
        boxes_logits=jnp.zeros((2, 6, 4)),
        mask=jnp.ones((1, count + 6, count + 6), bool).at[:, 6:, :6].set(False),
    )
    plain, noised = forward(tiny_model, images, None), forward(tiny_model, images, hidden)
    np.testing.assert_allclose(noised.logits, plain.logits, atol=1e-4)
    assert [prediction.logits.shape for prediction in noised.denoising] == [(2, 6, tiny_model.config.classes)] * 2


def test_the_answer_is_that_of_the_last_layer_that_inference_runs(tiny_config):
    early = dataclasses.replace(tiny_config, decoder=dataclasses.replace(tiny_config.decoder, inference_layers=1))
    output = forward(untrained_model(early), images_of((1, 128, 160, 3)), None)
    np.testing.assert_array_equal(output.logits, output.layers[0].logits)
    np.testing.assert_array_equal(output.boxes, output.layers[0].boxes)


@pytest.mark.slow
def test_bfloat16_computes_near_float32_and_answers_in_float32(tiny_config):
    images = images_of((1, 128, 160, 3))
    wide = forward(untrained_model(tiny_config), images, None)
    narrow = forward(untrained_model(tiny_config, dtype=jnp.bfloat16), images, None)
    assert narrow.logits.dtype == narrow.boxes.dtype == jnp.float32
    shared = np.intersect1d(wide.tokens, narrow.tokens)
    assert len(shared) > 0.6 * wide.tokens.shape[1]


@pytest.mark.parametrize("size", [(100, 128), (128, 0), (130, 130)])
def test_sides_that_do_not_divide_are_an_error_that_says_what_does(tiny_model, size):
    with pytest.raises(ImageSizeError, match="multiples of 32, for instance"):
        tiny_model(jnp.zeros((1, *size, 3)))


def test_an_image_with_fewer_tokens_than_queries_is_an_error_that_says_what_is_enough():
    model = abstract_model(named("r18vd"))
    with pytest.raises(ImageSizeError, match=r"96x96 give 189 tokens, fewer than the model's 300 queries.*128x128"):
        nnx.eval_shape(lambda model: model(jnp.zeros((1, 96, 96, 3))), model)


def test_batch_statistics_are_torchs():
    norm = BatchNorm(1)
    norm.train()
    norm(jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 2, 2, 1))
    np.testing.assert_allclose(norm.mean[...], [0.25], rtol=1e-6)
    np.testing.assert_allclose(norm.variance[...], [1.0666667], rtol=1e-6)
    assert norm.batches[...] == 1


def test_pools_are_torchs():
    grid = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(average_pool(grid)[0, ..., 0], [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(max_pool(-grid)[0, ..., 0], [[0, -1], [-4, -5]])
    gradient = jax.jit(jax.grad(lambda grid: max_pool(grid).sum()))(grid)
    np.testing.assert_array_equal(gradient[0, ..., 0] > 0, [[0] * 4, [0, 1, 0, 1], [0] * 4, [0, 1, 0, 1]])


def test_layers_of_a_new_decoder_start_as_copies_of_one_and_its_heads_do_not(tiny_config):
    decoder = Decoder(tiny_config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    first, second = (jax.tree.leaves(layer) for layer in decoder.layers)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert not np.array_equal(decoder.class_heads[0].kernel[...], decoder.class_heads[1].kernel[...])
    np.testing.assert_allclose(decoder.class_heads[0].bias[...], -4.5951199, rtol=1e-6)
    assert not np.any(decoder.box_heads[0].layers[-1].kernel[...])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere blocks are no calls")
def test_on_a_cpu_each_block_is_computed_apart(tiny_config):
    """A sum that is fused into its readers has the maps of all earlier blocks of its stage among what it reads."""
    config = dataclasses.replace(tiny_config, backbone=dataclasses.replace(tiny_config.backbone, depths=(4, 1, 1, 1)))
    fused = fuse(untrained_model(config), convolving="direct")
    text = jax.jit(lambda model, x: model(x).logits).lower(fused, jnp.zeros((1, 96, 96, 3))).compile().as_text()
    assert text.count(" call(") == 7
    sums = [line for line in text.splitlines() if "/max" in line and re.search(r" fusion\(", line)]
    assert sums
    assert max(line.partition("fusion(")[2].partition(")")[0].count("%") for line in sums) <= 4
