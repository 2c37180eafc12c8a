"""Who learns and how: groups, clipping, AdamW and schedules, against the authors' code and by law."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rtdetrv2_jax.config import ModelConfig, named
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2, abstract_model
from rtdetrv2_jax.weights.table import rows
from rtdetrv2_jax.weights.transfer import flat_state
from train.optimizer import adamw, clip_by_norm, decay, describe, global_norm, rate, roles, schedule
from train.recipe import Group, Optimisation, RecipeError
from train.recipes import PUBLISHED, coco_r18, coco_r18_dsp, coco_r34, coco_r50, coco_r50_dsp, coco_r50_m, finetune


@functools.cache
def abstract(config: ModelConfig) -> RTDETRv2:
    return abstract_model(config)


SHIPPED = {
    "rtdetrv2_r18vd_120e_coco": coco_r18(),
    "rtdetrv2_r18vd_dsp_3x_coco": coco_r18_dsp(),
    "rtdetrv2_r18vd_sp1_120e_coco": dataclasses.replace(coco_r18(), model=named("r18vd_sp1")),
    "rtdetrv2_r34vd_120e_coco": coco_r34(),
    "rtdetrv2_r50vd_6x_coco": coco_r50(),
    "rtdetrv2_r50vd_dsp_1x_coco": coco_r50_dsp(),
    "rtdetrv2_r50vd_m_7x_coco": coco_r50_m(),
}


def test_the_reference_data_of_every_resnet_configuration_is_compared(shared):
    found = {path.stem.removeprefix("optim_groups_") for path in (shared / "golden").glob("optim_groups_*.json")}
    assert {name for name in found if "hgnet" not in name} == SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_parameter_has_the_authors_rate_and_decay(shared, name):
    said = json.loads((shared / "golden" / f"optim_groups_{name}.json").read_text())
    recipe = SHIPPED[name]
    assigned = roles(abstract(recipe.model), recipe.optimisation)
    authors = {row.ours: row.authors for row in rows(recipe.model)}
    ours = {
        (authors[path], rate(recipe.optimisation, group), decay(recipe.optimisation, group))
        for path, group in assigned.trained.items()
    }
    theirs = {(path, group["lr"], group["weight_decay"]) for group in said["groups"] for path in group["params"]}
    assert ours == theirs
    assert len({path for path, _, _ in ours}) == sum(group["tensors"] for group in said["groups"])
    frozen = {authors[path] for path, reason in assigned.frozen.items() if reason.startswith("the pattern")}
    assert frozen == set(said["not_trainable"])
    assert recipe.batches.epochs == said["epochs"]
    assert recipe.optimisation.clip_norm == said["clip_max_norm"]
    assert recipe.averaging.decay == said["ema"]["decay"]
    assert recipe.averaging.ramp_steps == said["ema"]["warmups"]
    assert recipe.optimisation.warmup_steps == said["lr_warmup_scheduler"]["warmup_duration"]


@pytest.mark.parametrize("recipe", [*(make() for make in PUBLISHED), finetune(500)], ids=lambda recipe: recipe.name)
def test_every_array_of_a_model_has_exactly_one_role(recipe):
    model = abstract(recipe.model)
    assigned = roles(model, recipe.optimisation)
    paths = [*assigned.trained, *assigned.frozen, *assigned.statistics]
    assert sorted(paths) == sorted(flat_state(model))
    said = describe(model, recipe.optimisation)
    assert sum(int(line.split(" tensors")[0].split()[-1]) for line in said.splitlines()) == len(paths) - len(
        assigned.statistics
    )


def test_parameters_in_no_group_and_in_two_are_all_named():
    groups = (Group(r"backbone\..*", "backbone", "decayed"), Group(r".*norm\..*", "detector", "not decayed"))
    optimisation = dataclasses.replace(coco_r18().optimisation, groups=groups)
    with pytest.raises(RecipeError) as caught:
        roles(abstract(named("r18vd")), optimisation)
    assert "backbone.stages.0.0.layers.0.norm.scale is in 2 groups" in str(caught.value)
    assert "more" in str(caught.value)
    with pytest.raises(RecipeError, match="in no group"):
        roles(abstract(named("r18vd")), dataclasses.replace(optimisation, groups=groups[:1]))


def gradients_of(trace: dict[str, np.ndarray], said: dict, number: int) -> dict[str, jax.Array]:
    """The gradients of a step before clipping: the trace has them after it, and the norm that they had."""
    scale = max(1.0, (said["grad_norm_before_clip_per_step"][number] + 1e-6) / said["clip_max_norm"])
    names = [name for group in said["groups"] for name in group["params"]]
    return {name: jnp.asarray(trace[f"grad.{number}.{name}"] * np.float32(scale)) for name in names}


@pytest.mark.parametrize("family", ["r18", "r50"])
def test_five_steps_of_adamw_are_the_authors(shared, family):
    said = json.loads((shared / "golden" / f"optim_adamw_{family}.json").read_text())
    trace = load_file(shared / "golden" / f"optim_adamw_{family}.safetensors")
    optimisation = Optimisation(1e-4, 1e-5, (), warmup_steps=said["warmup_duration"])
    kinds = {1e-4: "detector", 1e-5: "backbone"}
    groups = {
        name: Group("", kinds[group["initial_lr"]], "decayed" if group["weight_decay"] else "not decayed")
        for group in said["groups"]
        for name in group["params"]
    }
    share = schedule(optimisation, steps=5)
    optimizer = adamw(optimisation, groups, share=share)
    parameters = {name: jnp.asarray(trace[f"start.{name}"]) for name in groups}
    state = optimizer.init(parameters)
    step = jax.jit(lambda g, s, p, number: optimizer.update(g, s, p, step=number))
    for number in range(5):
        changes, state = step(gradients_of(trace, said, number), state, parameters, jnp.asarray(number))
        parameters = {name: parameters[name] + changes[name] for name in groups}
        rates = [float(share(jnp.asarray(number))) * group["initial_lr"] for group in said["groups"]]
        np.testing.assert_allclose(rates, said["lr_per_step_per_group"][number], rtol=1e-6)
        for name in groups:
            moved = np.asarray(parameters[name]) - trace[f"start.{name}"]
            # A float32 parameter cannot move by less than its last digit: that is the absolute part.
            noise = 2 * said["max_abs_diff_param_f32_f64"]
            np.testing.assert_allclose(moved, trace[f"f64_delta.{number}.{name}"], rtol=1e-3, atol=noise)


@pytest.mark.parametrize("family", ["r18", "r50"])
def test_clipping_is_pytorchs(shared, family):
    said = json.loads((shared / "golden" / f"optim_adamw_{family}.json").read_text())
    trace = load_file(shared / "golden" / f"optim_adamw_{family}.safetensors")
    clip = clip_by_norm(said["clip_max_norm"])
    for number, norm in enumerate(said["grad_norm_before_clip_per_step"]):
        gradients = gradients_of(trace, said, number)
        assert float(global_norm(gradients)) == pytest.approx(norm, rel=1e-5)
        clipped, _ = clip.update(gradients, clip.init(gradients))
        for name, value in clipped.items():
            np.testing.assert_allclose(value, trace[f"grad.{number}.{name}"], rtol=5e-6)


def test_warmup_is_the_authors_at_every_iteration(shared):
    said = json.loads((shared / "golden" / "optim_schedule.json").read_text())
    share = schedule(Optimisation(1e-4, 1e-5, (), warmup_steps=2000), steps=500_000)
    for iteration, factor in said["warmup_factor_2000"].items():
        assert float(share(jnp.asarray(int(iteration)))) == pytest.approx(factor, rel=1e-6)
    for case in said["cases"]:
        share = schedule(Optimisation(1e-4, 1e-5, (), warmup_steps=case["warmup_duration"]), steps=1000)
        # Milestones, which no shipped configuration reaches, are not ours: compare until the first takes effect.
        warm = case["warmup_finished_at_epoch_end"].index(True) if True in case["warmup_finished_at_epoch_end"] else 0
        until = (warm + case["milestones"][0]) * case["iterations_per_epoch"]
        for iteration, rates in enumerate(case["lr_used_at_iteration"][:until]):
            now = float(share(jnp.asarray(iteration)))
            assert [now * base for base in case["base_lrs"]] == pytest.approx(rates, rel=1e-6)


@pytest.mark.parametrize("kind", ["constant", "cosine", "flat_cosine"])
def test_schedules_start_warm_never_rise_after_it_and_end_where_they_should(kind):
    optimisation = Optimisation(1e-4, 1e-5, (), warmup_steps=10, schedule=kind, final_rate=0.05)
    values = np.asarray(jax.vmap(schedule(optimisation, steps=1000))(jnp.arange(1000)))
    assert values[0] == pytest.approx(0.1, rel=1e-3)
    assert (np.diff(values[10:]) <= 0).all()
    assert values[-1] == pytest.approx(1.0 if kind == "constant" else 0.05, abs=1e-4)
    assert values[500] == pytest.approx({"constant": 1.0, "cosine": 0.525, "flat_cosine": 1.0}[kind], abs=1e-3)
