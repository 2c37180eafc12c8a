"""Recipes: the published numbers, lengths that follow the data, and fields changed by their paths."""

import dataclasses

import pytest

from rtdetrv2_jax.config import ConfigError, named
from train.recipe import RecipeError, field_types, override
from train.recipes import NAMES, PUBLISHED, build, coco_r18, coco_r34, coco_r50, debug, finetune, summary

# name: epochs, epochs without strong augmentation, rate of the backbone, many sizes. Source: the authors' files.
WANTED = {
    "coco_r18": (120, 3, 1e-4, False),
    "coco_r34": (120, 3, 5e-5, True),
    "coco_r50_m": (84, 3, 1e-5, True),
    "coco_r50": (72, 1, 1e-5, True),
    "coco_r101": (72, 1, 1e-6, True),
    "coco_r18_dsp": (36, 3, 1e-4, False),
    "coco_r34_dsp": (12, 2, 5e-5, True),
    "coco_r50_m_dsp": (36, 3, 1e-5, True),
    "coco_r50_dsp": (12, 2, 1e-5, True),
}


@pytest.mark.parametrize("recipe", [make() for make in PUBLISHED], ids=lambda recipe: recipe.name)
def test_published_recipes_have_the_published_numbers(recipe):
    epochs, clean, backbone, many = WANTED[recipe.name]
    optimisation, augmentation = recipe.optimisation, recipe.augmentation
    assert recipe.batches.epochs == epochs
    assert (optimisation.learning_rate, optimisation.backbone_learning_rate) == (1e-4, backbone)
    assert (optimisation.clip_norm, optimisation.warmup_steps, optimisation.schedule) == (0.1, 2000, "constant")
    assert (recipe.batches.size, recipe.batches.side, recipe.averaging.decay) == (16, 640, 0.9999)
    for operation in (augmentation.photometric, augmentation.zoom_out, augmentation.crop):
        assert operation.stop_epoch == epochs - clean
    assert (augmentation.multi_scale is not None) == many
    if many:
        sides = augmentation.multi_scale.sides
        assert (len(sides), sides.count(640), min(sides), max(sides)) == (13, 3, 480, 800)
        assert augmentation.multi_scale.stop_epoch == epochs - clean
    assert recipe.model == named(recipe.name.removeprefix("coco_").replace("r18", "r18vd").replace("r34", "r34vd")
                                 .replace("r50", "r50vd").replace("r101", "r101vd"))  # fmt: skip


def test_every_published_recipe_is_listed_here():
    assert [make().name for make in PUBLISHED] == list(WANTED)


@pytest.mark.parametrize("images", [1, 20, 205, 1000, 10_000, 118_287])
def test_a_finetuning_run_is_sized_by_its_data(images):
    recipe = finetune(images)
    steps = recipe.batches.steps_per_epoch(images) * recipe.batches.epochs
    assert steps >= min(100, images)
    assert recipe.optimisation.warmup_steps <= max(1, 0.06 * steps)
    assert recipe.optimisation.warmup_steps <= 2000
    assert recipe.averaging.decay <= 0.9999
    remembered = 1 / (1 - recipe.averaging.decay)
    assert remembered <= max(10.001, 0.06 * steps)
    assert recipe.augmentation.crop.stop_epoch < recipe.batches.epochs
    assert f"{steps:,} steps" in summary(recipe, images=images)


def test_lengths_of_a_finetuning_run_follow_its_overrides():
    recipe = build("finetune", {"batches.epochs": "10", "batches.size": "6", "model": "r50vd"}, images=600)
    assert recipe == finetune(600, model="r50vd", epochs=10, batch_size=6)
    assert recipe.optimisation.warmup_steps == 50
    assert recipe.optimisation.backbone_learning_rate == 1e-5
    assert recipe.start == "PekingU/rtdetr_v2_r50vd"


def test_what_a_run_would_waste_on_warmup_is_said():
    assert "finetune" in summary(dataclasses.replace(coco_r18()), images=500)
    with pytest.raises(RecipeError, match=r"batches\.size"):
        summary(coco_r18(), images=3)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_can_be_built(name):
    recipe = build(name, {}, images=1000)
    assert recipe.name == name


@pytest.mark.parametrize(
    ("path", "text", "wanted"),
    [
        ("optimisation.learning_rate", "3e-4", 3e-4),
        ("optimisation.schedule", "cosine", "cosine"),
        ("optimisation.betas", "0.8, 0.99", (0.8, 0.99)),
        ("optimisation.frozen", "backbone.*,encoder.*", ("backbone.*", "encoder.*")),
        ("augmentation.crop.stop_epoch", "none", None),
        ("augmentation.crop.stop_epoch", "7", 7),
        ("augmentation.zoom_out", "none", None),
        ("augmentation.multi_scale.sides", "320,640", (320, 640)),
        ("batches.denoising_together", "none", None),
        ("model.decoder.queries", "100", 100),
        ("start", "somewhere", "somewhere"),
    ],
)
def test_a_field_is_read_by_its_type(path, text, wanted):
    value = override(coco_r50(), {path: text})
    for name in path.split("."):
        value = getattr(value, name)
    assert value == wanted
    assert type(value) is type(wanted)


def test_fields_that_only_fit_together_are_changed_together():
    recipe = override(coco_r50(), {"batches.size": "6", "batches.denoising_together": "3", "model": "r18vd"})
    assert (recipe.batches.size, recipe.batches.denoising_together) == (6, 3)
    assert recipe.model == named("r18vd")
    recipe = override(coco_r50(), {"model.decoder.queries": "50", "model": "r18vd"})
    assert (recipe.model.decoder.queries, recipe.model.backbone.block) == (50, "basic")


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        ("learning_rate", "1", r"did you mean optimisation\.learning_rate\?"),
        ("optimisation.lerning_rate", "1", r"did you mean optimisation\.learning_rate"),
        ("batches", "1", r"its fields are batches\.size"),
        ("optimisation.schedule", "step", "must be one of constant, cosine, flat_cosine"),
        ("batches.size", "many", "a whole number, not 'many'"),
        ("batches.size", "6", "denoising_together"),
        ("batches.side", "100", "multiples of 32, not 100"),
        ("optimisation.accumulation", "3", "must divide"),
        ("optimisation.betas", "1", "takes 2 values"),
        ("augmentation.crop", "yes", "none or default"),
        ("averaging.decay", "1.5", r"averaging\.decay must lie"),
        ("optimisation.clip_norm", "nan", "finite"),
    ],
)
def test_a_wrong_field_or_value_says_what_would_be_right(path, text, said):
    with pytest.raises(RecipeError, match=said):
        override(coco_r50(), {path: text})


def test_unknown_models_and_recipes_get_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'r34vd'"):
        override(coco_r50(), {"model": "r34"})
    with pytest.raises(RecipeError, match="did you mean 'coco_r18'"):
        build("coco_r18vd", {}, images=10)


def test_every_field_can_be_overridden_by_what_it_says():
    recipe = coco_r34()
    for path in field_types(recipe):
        value = recipe
        for name in path.split("."):
            value = getattr(value, name)
        if not dataclasses.is_dataclass(value):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert override(recipe, {path: text}) == recipe, path


def test_all_hosts_draw_the_same_size_for_a_step_and_many_over_a_run():
    recipe = coco_r50()
    sides = [recipe.side_at(step, epoch=0) for step in range(400)]
    assert sides == [recipe.side_at(step, epoch=0) for step in range(400)]
    assert set(sides) == set(recipe.all_sides())
    assert 0.15 < sides.count(640) / 400 < 0.32
    assert {recipe.side_at(step, epoch=71) for step in range(50)} == {640}
    assert debug().all_sides() == (256,)


@pytest.mark.parametrize("devices", [1, 3, 8, 32])
@pytest.mark.parametrize("images", [6, 100, 5000])
def test_a_derived_batch_is_shared_out_evenly(images, devices):
    assert finetune(images, devices=devices).batches.size % devices == 0
    assert build("finetune", {}, images=images, devices=devices) == finetune(images, devices=devices)
