"""Deformable sampling against hand-made numbers, the reference's, and itself in another form."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from safetensors.numpy import load_file

from rtdetrv2_jax.config import Sampling
from rtdetrv2_jax.ops.sampling import deformable_sampling
from rtdetrv2_jax.sharding import along_data, data_mesh, traced_for

READINGS = ("gather", "unrolled")
GOLDEN = (
    "bilinear",
    "bilinear_exact",
    "bilinear_points",
    "discrete_exact",
    "discrete_square",
    "discrete_tall",
    "discrete_wide",
)

# (x, y), bilinear, discrete on the map [[1, 2], [3, 4]]
BY_HAND = (
    ((0.5, 0.5), 2.5, 4),
    ((0.25, 0.25), 1, 4),
    ((0.75, 0.25), 2, 4),
    ((0.0, 0.0), 0.25, 1),
    ((1.0, 1.0), 1, 4),
    ((0.3, 0.6), 2.5, 4),
    ((-0.2, 0.5), 0.2, 3),
    ((0.2, 0.2), 0.81, 1),
    ((0.24, 0.26), 1.0192, 3),
    ((1.3, 0.5), 0, 4),
)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("method", ["bilinear", "discrete"])
def test_single_points_read_what_a_hand_computes(method, reading):
    locations = jnp.array([point for point, _, _ in BY_HAND], jnp.float32).reshape(1, -1, 1, 1, 2)
    read = deformable_sampling(
        jnp.arange(1.0, 5.0).reshape(1, 4, 1, 1),
        locations,
        weights=jnp.ones(locations.shape[:-1]),
        sizes=((2, 2),),
        points=(1,),
        method=method,
        reading=reading,
    )
    wanted = [row[1 if method == "bilinear" else 2] for row in BY_HAND]
    np.testing.assert_allclose(read.reshape(-1), wanted, atol=1e-6)


def sample(case, arrays, *, reading):
    sizes = tuple(tuple(size) for size in case["spatial_shapes_hw"])
    return deformable_sampling(
        arrays["value"],
        arrays["sampling_locations"],
        weights=arrays["attention_weights"],
        sizes=sizes,
        points=tuple(case["num_points"]),
        method="discrete" if "discrete" in case["name"] else "bilinear",
        reading=reading,
    )


def golden(shared, name):
    case = json.loads((shared / "golden" / f"sampling_{name}.json").read_text())
    tensors = load_file(shared / "golden" / f"sampling_{name}.safetensors")
    return case | {"name": name}, tensors


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", GOLDEN)
def test_outputs_and_gradients_are_the_references(shared, name, reading):
    case, tensors = golden(shared, name)
    inputs = {key: jnp.asarray(tensors[key]) for key in ("value", "sampling_locations", "attention_weights")}
    cotangent = jnp.asarray(tensors["cotangent"])

    def total(inputs):
        output = sample(case, inputs, reading=reading).reshape(cotangent.shape)
        return jnp.sum(output * cotangent), output

    (_, output), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)
    # On maps wider than high the authors clamp columns to the height; ours, as transformers', to the width.
    per_axis = "output_clamped_per_axis"
    np.testing.assert_allclose(output, tensors.get(per_axis, tensors["output"]), atol=2e-6)
    if name == "discrete_wide":
        return
    for key, gradient in gradients.items():
        np.testing.assert_allclose(gradient, tensors[f"grad_{key}"], atol=3e-5, err_msg=key)


def test_both_forms_read_the_same_from_levels_of_any_shape():
    generator = np.random.default_rng(0)
    sizes, points = ((6, 10), (3, 5), (2, 3)), (3, 1, 2)
    values = jnp.asarray(generator.standard_normal((2, 81, 4, 8)), jnp.float32)
    locations = jnp.asarray(generator.uniform(-0.3, 1.3, (2, 7, 4, 6, 2)), jnp.float32)
    weights = jnp.asarray(generator.random((2, 7, 4, 6)), jnp.float32)
    for method in ("bilinear", "discrete"):
        one, other = (
            deformable_sampling(
                values, locations, weights=weights, sizes=sizes, points=points, method=method, reading=reading
            )
            for reading in READINGS
        )
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("reading", READINGS)
def test_gradients_of_cells_that_many_queries_read_are_summed_in_float32(reading):
    """Summed in bfloat16, ones would stop at 256."""
    count = 1000
    locations = jnp.full((1, count, 1, 1, 2), 0.25)

    def total(values):
        weights = jnp.ones((1, count, 1, 1))
        read = partial(deformable_sampling, sizes=((2, 2),), points=(1,), method="bilinear", reading=reading)
        return jnp.sum(read(values, locations, weights=weights).astype(jnp.float32))

    gradient = jax.grad(total)(jnp.zeros((1, 4, 1, 1), jnp.bfloat16))
    assert gradient.reshape(-1).tolist() == [count, 0, 0, 0]


def test_the_form_follows_the_devices_that_a_program_is_for_not_those_of_the_process():
    arrays = jnp.ones((1, 4, 1, 1)), jnp.zeros((1, 3, 1, 1, 2)), jnp.ones((1, 3, 1, 1))

    def lowered(platform, reading=None):
        def read(values, locations, weights):
            return deformable_sampling(
                values, locations, weights=weights, sizes=((2, 2),), points=(1,), method="bilinear", reading=reading
            )

        return jax.jit(read).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()

    gathers = {name: lowered("tpu", name).count("stablehlo.gather") for name in READINGS}
    assert gathers["gather"] < gathers["unrolled"]
    assert lowered("cuda").count("stablehlo.gather") == gathers["gather"]
    assert lowered("cpu").count("stablehlo.gather") == gathers["unrolled"]


@pytest.mark.parametrize(
    ("sizes", "points", "queries", "heads", "channels"),
    [
        # two groups of heads; rows that are no multiple of eight, levels that end anywhere
        pytest.param(((6, 10), (3, 5), (2, 3)), (3, 6, 3), 7, 8, 32, marks=pytest.mark.slow),
        # a tile with the reads of two heads; a level of a full chunk and part of one; rows of one token
        (((24, 64), (3, 1)), (1, 2), 67, 2, 16),
        # a loop over chunks; one query more than a tile, and a head as wide as a tile
        (((54, 48),), (1,), 129, 1, 128),
    ],
)
def test_products_of_matrices_are_the_plain_definition_and_so_are_their_gradients(
    sizes, points, queries, heads, channels
):
    arrays = drawn(sizes, points, queries=queries, heads=heads, channels=channels)
    found, wanted = (read_and_gradients(arrays, sizes, points, reading) for reading in ("matmul", "gather"))
    for name, one, other in zip(("read", "values", "locations", "weights"), found, wanted, strict=True):
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, atol=1e-6 * scale, err_msg=name)


@pytest.mark.slow
def test_products_of_matrices_in_bfloat16_err_as_the_plain_definition_does():
    sizes, points = ((8, 8), (4, 4)), (4, 4)
    values, locations, weights, change = drawn(sizes, points, queries=40, heads=4, channels=32)
    half = values.astype(jnp.bfloat16), locations, weights, change.astype(jnp.bfloat16)
    whole = half[0].astype(jnp.float32), locations, weights, half[3].astype(jnp.float32)
    exact = read_and_gradients(whole, sizes, points, "gather")
    found, plain = (read_and_gradients(half, sizes, points, reading) for reading in ("matmul", "gather"))
    for name, one, other, truth in zip(("read", "values", "locations", "weights"), found, plain, exact, strict=True):
        errors = [jnp.sqrt(jnp.mean((array.astype(jnp.float32) - truth) ** 2)) for array in (one, other)]
        scale = jnp.sqrt(jnp.mean(truth**2))
        assert errors[0] <= 1.5 * errors[1] + 1e-6 * scale, name


def test_products_of_matrices_are_shared_out_by_images():
    sizes, points, mesh = ((4, 6), (2, 3)), (2, 1), data_mesh()
    arrays = drawn(sizes, points, queries=5, heads=2, channels=16, batch=mesh.size)

    def read(values, locations, weights, change):
        return read_and_gradients((values, locations, weights, change), sizes, points, "matmul")

    program = jax.jit(traced_for(mesh, read), in_shardings=along_data(mesh), out_shardings=along_data(mesh))
    compiled = program.lower(*arrays).compile()
    text = compiled.as_text() or ""
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all"))
    for one, other in zip(compiled(*jax.device_put(arrays, along_data(mesh))), read(*arrays), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_tpu_multiplies_where_it_can_and_gathers_where_it_cannot():
    def lowered(channels, method: Sampling = "bilinear"):
        arrays = drawn(((2, 2),), (1,), queries=3, heads=1, channels=channels)
        read = partial(deformable_sampling, sizes=((2, 2),), points=(1,), method=method)
        traced = jax.jit(lambda values, locations, weights: read(values, locations, weights=weights)).trace(*arrays[:3])
        return traced.lower(lowering_platforms=("tpu",)).as_text()

    assert "tpu_custom_call" in lowered(16)
    assert "stablehlo.gather" not in lowered(16)
    for text in (lowered(12), lowered(16, "discrete")):
        assert "tpu_custom_call" not in text
        assert "stablehlo.gather" in text


@pytest.mark.parametrize(("channels", "method"), [(12, "bilinear"), (16, "discrete")])
def test_what_was_named_and_does_not_apply_is_an_error(channels, method):
    values, locations, weights, _ = drawn(((2, 2),), (1,), queries=3, heads=1, channels=channels)
    with pytest.raises(ValueError, match="matmul"):
        deformable_sampling(
            values, locations, weights=weights, sizes=((2, 2),), points=(1,), method=method, reading="matmul"
        )


def drawn(sizes, points, *, queries, heads, channels, batch=2):
    """Values, locations inside and outside the map and on its pixels, weights, and a gradient of what is read."""
    generator = np.random.default_rng(0)
    tokens, reads = sum(height * width for height, width in sizes), (batch, queries, heads)
    locations = generator.uniform(-0.3, 1.3, (*reads, sum(points), 2))
    locations[:, ::3] = np.round(locations[:, ::3] * 8) / 8
    return (
        jnp.asarray(generator.standard_normal((batch, tokens, heads, channels)), jnp.float32),
        jnp.asarray(locations, jnp.float32),
        jnp.asarray(generator.random((*reads, sum(points))), jnp.float32),
        jnp.asarray(generator.standard_normal((*reads, channels)), jnp.float32),
    )


def read_and_gradients(arrays, sizes, points, reading):
    """What is read, and the gradients of values, locations and weights."""

    def read(values, locations, weights):
        return deformable_sampling(
            values, locations, weights=weights, sizes=sizes, points=points, method="bilinear", reading=reading
        )

    def all_of_it(values, locations, weights, change):
        output, back = jax.vjp(read, values, locations, weights)
        return output, *back(change)

    return jax.jit(all_of_it)(*arrays)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_kernels_compile_for_chips_that_each_read_their_own_images(dtype):
    pytest.importorskip("libtpu")
    mesh = data_mesh(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)
    sizes, points = ((80, 80), (40, 40), (20, 20)), (4, 4, 4)

    def read(arrays):
        return read_and_gradients(arrays, sizes, points, None)

    def inputs():
        values, locations, weights, change = drawn(sizes, points, queries=300, heads=8, channels=32, batch=mesh.size)
        return values.astype(dtype), locations, weights, change.astype(dtype)

    shared = along_data(mesh)
    program = jax.jit(traced_for(mesh, read), in_shardings=(shared,), out_shardings=shared)
    text = program.lower(jax.eval_shape(inputs)).compile().as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all"))
