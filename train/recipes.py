"""The recipes: functions that return one in full. The published ones first, then ours."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Literal

from rtdetrv2_jax.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig, named
from rtdetrv2_jax.data.synthetic import CLASS_NAMES

from .augmentation import NO_AUGMENTATION, Augmentation, MultiScale
from .recipe import Averaging, Batches, Group, Keeping, Optimisation, Recipe, RecipeError, override

NORMS = r".*norm\.(scale|bias)"
BACKBONE = r"backbone\."


def parameter_groups(*, biases: Literal["decayed", "not decayed"] = "decayed") -> tuple[Group, ...]:
    """The published groups: the backbone at its own rate; no norm decays, and the biases behind it as told.

    The authors have the same in another cut for each model, written on their names. ResNet-18 trains its backbone at
    the detector's rate, ResNet-34 is the only one whose biases do not decay, and the deeper ones have no backbone
    norms that learn.
    """
    exempt = NORMS if biases == "decayed" else rf"{NORMS}|.*\.bias"
    return (
        Group(rf"(?={BACKBONE})(?!{NORMS}).*", "backbone", "decayed"),
        Group(rf"(?={BACKBONE})(?:{NORMS})", "backbone", "not decayed"),
        Group(rf"(?!{BACKBONE})(?:{exempt})", "detector", "not decayed"),
        Group(rf"(?!{BACKBONE})(?!{exempt}).*", "detector", "decayed"),
    )


def coco_r18() -> Recipe:
    """RT-DETRv2-S: 120 epochs, one size, and no separate rate for the backbone."""
    return _coco("r18vd", epochs=120, clean=3, sizes="one")


def coco_r34() -> Recipe:
    """RT-DETRv2-M*: 120 epochs; no bias decays."""
    return _coco("r34vd", epochs=120, clean=3, backbone_rate=5e-5, biases="not decayed")


def coco_r50_m() -> Recipe:
    """RT-DETRv2-M: 84 epochs; six decoder layers learn, three answer."""
    return _coco("r50vd_m", epochs=84, clean=3, backbone_rate=1e-5)


def coco_r50() -> Recipe:
    """RT-DETRv2-L: 72 epochs."""
    return _coco("r50vd", epochs=72, clean=1, backbone_rate=1e-5)


def coco_r101() -> Recipe:
    """RT-DETRv2-X: 72 epochs. The published weights came from the authors' other code base."""
    return _coco("r101vd", epochs=72, clean=1, backbone_rate=1e-6)


def coco_r18_dsp() -> Recipe:
    """Discrete sampling, from the trained RT-DETRv2-S: 36 epochs."""
    return _coco("r18vd_dsp", epochs=36, clean=3, sizes="one", start="PekingU/rtdetr_v2_r18vd")


def coco_r34_dsp() -> Recipe:
    """Discrete sampling, from the trained RT-DETRv2-M*: 12 epochs."""
    start = "PekingU/rtdetr_v2_r34vd"
    return _coco("r34vd_dsp", epochs=12, clean=2, backbone_rate=5e-5, biases="not decayed", start=start)


def coco_r50_m_dsp() -> Recipe:
    """Discrete sampling, from the trained RT-DETRv2-M: 36 epochs. Its checkpoint is no hub's: convert the authors'."""
    return _coco("r50vd_m_dsp", epochs=36, clean=3, backbone_rate=1e-5)


def coco_r50_dsp() -> Recipe:
    """Discrete sampling, from the trained RT-DETRv2-L: 12 epochs."""
    return _coco("r50vd_dsp", epochs=12, clean=2, backbone_rate=1e-5, start="PekingU/rtdetr_v2_r50vd")


def _coco(
    name: str,
    *,
    epochs: int,
    clean: int,
    backbone_rate: float = 1e-4,
    biases: Literal["decayed", "not decayed"] = "decayed",
    sizes: Literal["one", "many"] = "many",
    start: str | None = None,
) -> Recipe:
    """A published recipe; its last `clean` epochs are without strong augmentation.

    Source: lyuwenyu/RT-DETR, rtdetrv2_pytorch/configs/rtdetrv2. There every backbone starts from ImageNet weights,
    and half precision is float16 with a loss scale; here it is bfloat16, which needs none. Set `start` to a checkpoint
    where that is wanted: without one, all of the network starts from random numbers.
    """
    model = named(name)
    augmentation = Augmentation(multi_scale={"one": None, "many": MultiScale(resample="nearest")}[sizes])
    return Recipe(
        name=f"coco_{name.replace('vd', '')}",
        model=model,
        optimisation=Optimisation(1e-4, backbone_rate, parameter_groups(biases=biases)),
        augmentation=augmentation.stopping_at(epochs - clean),
        batches=Batches(size=16, epochs=epochs),
        start=start,
    )


WARMUP_SHARE = 0.05
AVERAGE_SHARE = 0.05
CLEAN_SHARE = 0.1
WANTED_STEPS = 4000
LEAST_EPOCHS, MOST_EPOCHS = 12, 150
ON_THE_HUB = ("r18vd", "r34vd", "r50vd", "r101vd")
BACKBONE_RATES = {"r18vd": 1e-4, "r34vd": 5e-5, "r50vd_m": 1e-5, "r50vd": 1e-5, "r101vd": 1e-6}


def finetune(
    images: int,
    *,
    model: str = "r18vd",
    epochs: int | None = None,
    batch_size: int | None = None,
    devices: int = 1,
) -> Recipe:
    """A recipe for `images` of your own, from a checkpoint trained on COCO; all lengths are shares of the run.

    The published lengths fit half a million steps. On 500 images their warm-up alone lasts 65 epochs, and the average
    remembers ten thousand steps of a run that may have three. So, at most the published lengths, and:

    - epochs: what makes about 4000 steps, between 12 and 150;
    - warm-up: the first 5 % of the steps: time for Adam's averages to settle, while new class heads are far off;
    - averaging: it remembers 5 % of the steps, and ramps up over a fifth of that, the published proportion;
    - schedule: flat for half the run, then down a cosine. The published runs never lower the rate: their long average
      does the smoothing, for which a short run has no time;
    - strong augmentation stops for the last 10 % of the epochs, at least one: the average forgets it by the end;
    - one size of images: others cost a compilation each, and pay off over many epochs.

    Args:
        images: how many the training set has.
        model: which released one to start from.
        epochs: instead of what is derived.
        batch_size: likewise; 16, but fewer where the data would not make eight batches.
        devices: that share a batch, whose size is a multiple of their number unless it is given.
    """
    if images < 1:
        raise RecipeError("there are no images to train on")
    size = min(16, max(1, images // 8 // 4 * 4 or images // 8))
    size = batch_size or max(1, round(size / devices)) * devices
    per_epoch = max(1, images // size)
    epochs = epochs or min(MOST_EPOCHS, max(LEAST_EPOCHS, round(WANTED_STEPS / per_epoch)))
    steps = per_epoch * epochs
    remembered = min(10_000, max(10, round(AVERAGE_SHARE * steps)))
    plain = model.removesuffix("_dsp").split("_sp")[0]
    return Recipe(
        name="finetune",
        model=named(model),
        optimisation=Optimisation(
            learning_rate=1e-4,
            backbone_learning_rate=BACKBONE_RATES[plain],
            groups=parameter_groups(),
            warmup_steps=min(2000, max(1, round(WARMUP_SHARE * steps))),
            schedule="flat_cosine",
        ),
        augmentation=Augmentation(multi_scale=None).stopping_at(epochs - max(1, round(CLEAN_SHARE * epochs))),
        batches=Batches(size=size, epochs=epochs, denoising_together=4 if size % 4 == 0 else None),
        averaging=Averaging(decay=1 - 1 / remembered, ramp_steps=max(1, remembered // 5)),
        start=f"PekingU/rtdetr_v2_{plain}" if plain in ON_THE_HUB and "_sp" not in model else None,
    )


DEMO_SIDE = 256
DEMO_MODEL = ModelConfig(
    backbone=BackboneConfig(
        block="basic", depths=(1, 1, 1, 1), stem_width=16, widths=(16, 32, 64, 128), batch_norm="live"
    ),
    encoder=EncoderConfig(width=64, ffn_width=128, expansion=0.5),
    decoder=DecoderConfig(width=64, ffn_width=128, layers=3, queries=60, denoising=40),
    class_names=CLASS_NAMES,
)
"""Less than a million parameters."""


def demo() -> Recipe:
    """The small model of `rtdetrv2 demo`, from random numbers on 25,000 scenes that the program draws itself.

    Made to be trained on two processor cores in two hours: small images, few queries, float32, and a run so short that
    narrow layers need a tenfold rate. Without pretrained weights the backbone has the same. The scenes are made with
    clutter, scale and occlusion already, so that zoom-out and crop, which cost most, are left out.
    """
    return Recipe(
        name="demo",
        model=DEMO_MODEL,
        optimisation=Optimisation(1e-3, 1e-3, parameter_groups(), warmup_steps=500, schedule="flat_cosine"),
        augmentation=Augmentation(zoom_out=None, crop=None, multi_scale=None).stopping_at(2),
        batches=Batches(size=16, epochs=3, side=DEMO_SIDE),
        averaging=Averaging(decay=0.998, ramp_steps=200),
        keeping=Keeping(save_steps=250),
        dtype="float32",
    )


def debug() -> Recipe:
    """Learns a few images by heart, with the small model: a first sign that data, losses and updates are sound."""
    return Recipe(
        name="debug",
        model=DEMO_MODEL,
        optimisation=Optimisation(1e-3, 1e-3, parameter_groups(), weight_decay=0.0, warmup_steps=20, schedule="cosine"),
        augmentation=NO_AUGMENTATION,
        batches=Batches(size=2, epochs=400, side=DEMO_SIDE, denoising_together=None),
        averaging=Averaging(decay=0.98, ramp_steps=10),
        keeping=Keeping(evaluate_every=200),
        dtype="float32",
    )


PUBLISHED: tuple[Callable[[], Recipe], ...] = (
    coco_r18,
    coco_r34,
    coco_r50_m,
    coco_r50,
    coco_r101,
    coco_r18_dsp,
    coco_r34_dsp,
    coco_r50_m_dsp,
    coco_r50_dsp,
)
FIXED = {recipe.__name__: recipe for recipe in (*PUBLISHED, demo, debug)}
NAMES = (*FIXED, "finetune")


def build(name: str, overrides: Mapping[str, str], *, images: int, devices: int = 1) -> Recipe:
    """The recipe of this name for so many training images, with fields overridden by their dotted paths.

    `finetune` derives its lengths anew where its model, its epochs or its batch size are overridden; `devices` is how
    many share its batch.

    Raises:
        RecipeError: There is no such recipe or field, or a value is none of the field's.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"no recipe is called {name!r}: {hint}there are {', '.join(NAMES)}")
    if name != "finetune":
        recipe = FIXED[name]()
    else:
        given = {path: overrides[path] for path in ("batches.epochs", "batches.size") if path in overrides}
        sizes = override(finetune(images), {"batches.denoising_together": "none"} | given).batches
        recipe = finetune(
            images,
            model=overrides.get("model", "r18vd"),
            epochs=sizes.epochs if "batches.epochs" in overrides else None,
            batch_size=sizes.size if "batches.size" in overrides else None,
            devices=devices,
        )
    return override(recipe, overrides)


def summary(recipe: Recipe, *, images: int) -> str:
    """The lengths of a run in steps and in shares of it, as lines to print before it starts."""
    per_epoch = recipe.batches.steps_per_epoch(images)
    epochs, optimisation, averaging = recipe.batches.epochs, recipe.optimisation, recipe.averaging
    steps = per_epoch * epochs
    if not steps:
        raise RecipeError(f"{images} images do not fill a batch of {recipe.batches.size}: lower batches.size")
    remembered = 1 / (1 - averaging.decay)
    lines = [
        f"{recipe.name}: {images:,} images in batches of {recipe.batches.size} make {per_epoch:,} steps an epoch; "
        f"{epochs} epochs, {steps:,} steps",
        f"start: {recipe.start or 'random numbers'}",
        f"warm-up: {optimisation.warmup_steps:,} steps ({optimisation.warmup_steps / steps:.1%} of the run)",
        f"learning rate: {optimisation.learning_rate:g}, backbone {optimisation.backbone_learning_rate:g}, "
        f"{optimisation.schedule.replace('_', ' ')}",
        f"average: remembers {remembered:,.0f} steps ({remembered / steps:.1%})",
    ]
    for each in dataclasses.fields(recipe.augmentation):
        operation = getattr(recipe.augmentation, each.name)
        if dataclasses.is_dataclass(operation):
            stop = getattr(operation, "stop_epoch", None)
            lines.append(f"{each.name}: " + ("to the end" if stop is None else f"until epoch {stop} of {epochs}"))
    if optimisation.warmup_steps > 0.2 * steps:
        lines.append("most of a short run would be warm-up: the recipe finetune derives all lengths from the data")
    return "\n".join(lines)
