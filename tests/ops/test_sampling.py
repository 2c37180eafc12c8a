"""Deformable sampling against hand-made numbers, the reference's, and itself in another form."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rtdetrv2_jax.ops.sampling import deformable_sampling

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
    assert lowered("tpu").count("stablehlo.gather") == gathers["gather"]
    assert lowered("cpu").count("stablehlo.gather") == gathers["unrolled"]
