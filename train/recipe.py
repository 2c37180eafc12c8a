"""What a training run is, in full: frozen values with their units, and how one is changed by its dotted path."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rtdetrv2_jax.config import ModelConfig, named
from rtdetrv2_jax.objective.denoising import DenoisingSettings
from rtdetrv2_jax.objective.losses import LossSettings

from .augmentation import Augmentation, size_of_step


class RecipeError(ValueError):
    """A recipe that no run can follow, or a field that recipes do not have."""


@dataclass(frozen=True)
class Group:
    """Parameters whose whole dotted path matches `pattern`: which learning rate they have, and whether they decay."""

    pattern: str
    rate: Literal["backbone", "detector"]
    decay: Literal["decayed", "not decayed"]


@dataclass(frozen=True)
class Optimisation:
    """AdamW and all that steers it.

    Args:
        learning_rate: of the encoder and the decoder, once warm.
        backbone_learning_rate: of the groups that say so.
        weight_decay: of the groups that decay; a step takes off this share times the learning rate of that step.
        betas: of Adam's two averages.
        epsilon: added to the root in Adam's denominator.
        clip_norm: gradients are scaled down to this norm over all trained parameters together.
        warmup_steps: the learning rates rise linearly to their full height, reached with the last of these steps.
        schedule: after that they stay ("constant", as published), fall to `final_rate` along half a cosine over the
            whole run, or stay for `flat_share` of the run and then fall.
        final_rate: where a cosine ends, as a share of the full rate.
        flat_share: how much of the run "flat_cosine" stays flat.
        accumulation: how many parts a batch is taken in, one after another, before one update.
        groups: every parameter that learns belongs to exactly one.
        frozen: patterns of more parameters that do not learn than those that never do (`never_trained`).
    """

    learning_rate: float
    backbone_learning_rate: float
    groups: tuple[Group, ...]
    frozen: tuple[str, ...] = ()
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip_norm: float = 0.1
    warmup_steps: int = 2000
    schedule: Literal["constant", "cosine", "flat_cosine"] = "constant"
    final_rate: float = 0.01
    flat_share: float = 0.5
    accumulation: int = 1


@dataclass(frozen=True)
class Averaging:
    """The running average of the model, which is what gets evaluated and published.

    After t steps the old average counts for `decay` (1 - exp(-t / `ramp_steps`)): early on it follows the model.
    """

    decay: float = 0.9999
    ramp_steps: int = 2000


@dataclass(frozen=True)
class Batches:
    """How the data is cut into steps. The images of a batch are those of all devices together.

    Args:
        size: images in a batch; what is left over at the end of an epoch is dropped.
        epochs: times through the data.
        side: images are squares of this many pixels; unless the augmentation draws others.
        denoising_together: how many neighbouring images share a layout of denoising queries (`DenoisingSettings`);
            None: all of the batch.
    """

    size: int = 16
    epochs: int = 72
    side: int = 640
    denoising_together: int | None = 4

    def steps_per_epoch(self, images: int) -> int:
        """The batches that `images` make, whole ones only."""
        return images // self.size


@dataclass(frozen=True)
class Keeping:
    """How often the run is measured, told and saved.

    Args:
        evaluate_every: epochs from one evaluation of the average to the next; the last epoch has one in any case.
        save_steps: steps from one saved state to the next: what a failing machine can cost. There is one after each
            evaluation too, and when the run is asked to end.
        report_steps: steps from one line in the journal to the next.
    """

    evaluate_every: int = 1
    save_steps: int = 1000
    report_steps: int = 20


@dataclass(frozen=True)
class Recipe:
    """A whole run: the same recipe and the same data give the same model.

    Args:
        name: of the function that made it.
        model: the network; its class names give way to those of the data.
        start: what to start from: a hub id or a folder. None: random numbers.
        dtype: what the network computes in; parameters, averages and losses are float32.
        seed: of the first weights, the order of the data and every random draw.
    """

    name: str
    model: ModelConfig
    optimisation: Optimisation
    augmentation: Augmentation
    batches: Batches = field(default_factory=Batches)
    averaging: Averaging = field(default_factory=Averaging)
    loss: LossSettings = field(default_factory=LossSettings)
    keeping: Keeping = field(default_factory=Keeping)
    start: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks what can be known without the data; all faults are raised together."""
        if faults := list(_faults(self)):
            raise RecipeError("; ".join(faults))

    def side_at(self, step: int, *, epoch: int) -> int:
        """The side of a step's images: a function of the recipe and its arguments, so that all hosts agree."""
        return size_of_step(self.augmentation.sides(self.batches.side, epoch=epoch), seed=self.seed, step=step)

    def all_sides(self) -> tuple[int, ...]:
        """Every side that a run can meet, smallest first: the programs to compile ahead."""
        multi_scale = self.augmentation.multi_scale
        return tuple(sorted({self.batches.side, *(multi_scale.sides if multi_scale else ())}))

    def denoising(self) -> DenoisingSettings:
        """The denoising queries: their number and noise belong to the model, who shares a layout to the batch."""
        decoder = self.model.decoder
        return DenoisingSettings(
            decoder.denoising, decoder.label_noise, decoder.box_noise, self.batches.denoising_together
        )


def override(recipe: Recipe, changes: Mapping[str, str]) -> Recipe:
    """The recipe with fields changed by their dotted paths, say `{"optimisation.learning_rate": "1e-4"}`.

    The field's type says how its text is read: tuples as words between commas, "none" where nothing is allowed and
    "default" for what may be missing and has fields of its own; for `model`, the name of a released one. All changes
    are made at once, so that those that only fit together can be made.

    Raises:
        RecipeError: There is no such field, or a text is no value of it; the message says what would be.
    """
    if "model" in changes:
        recipe = dataclasses.replace(recipe, model=named(changes["model"]))
    fields, values = field_types(recipe), {}
    for path, text in changes.items():
        if path not in fields:
            raise RecipeError(f"a recipe has no field {path!r}: {_suggestion(path, fields)}")
        if path != "model":
            values[path] = _read(path, text, fields[path])
    return _replaced(recipe, values)


def field_types(recipe: Recipe) -> dict[str, Any]:
    """The type of every field that `override` can change, by its dotted path."""
    return {"model": ModelConfig} | dict(_field_types(recipe))


def fields_of(recipe: Recipe) -> list[str]:
    """Every field that `override` can change, with its value, as the command line takes them; one a line."""
    lines = []
    for path in field_types(recipe):
        value: Any = recipe
        for name in path.split("."):
            value = getattr(value, name)
        if dataclasses.is_dataclass(value):
            continue  # its own fields follow
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        lines.append(f"--{path} {text!r}" if " " in text or not text else f"--{path} {text}")
    return lines


def _field_types(node: Any, *, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(type(node))
    for each in dataclasses.fields(node):
        value = getattr(node, each.name)
        optional = type(None) in typing.get_args(hints[each.name])
        if dataclasses.is_dataclass(value):
            yield from _field_types(value, prefix=f"{prefix}{each.name}.")
        if optional or not (dataclasses.is_dataclass(value) or each.name == "groups"):
            yield f"{prefix}{each.name}", hints[each.name]


def _replaced(node: Any, values: Mapping[str, Any]) -> Any:
    """`node` with the values of dotted paths; the part nearest to the root comes first, and the rest inside it."""
    changed: dict[str, Any] = {}
    for name in sorted({path.partition(".")[0] for path in values}):
        inner = {path.partition(".")[2]: value for path, value in values.items() if path.partition(".")[0] == name}
        own = inner.pop("", getattr(node, name))
        changed[name] = _replaced(own, inner) if inner else own
    return dataclasses.replace(node, **changed)


def _suggestion(path: str, fields: dict[str, Any]) -> str:
    leaf = path.rsplit(".", 1)[-1]
    inside = [name for name in fields if name.startswith(f"{path}.")]
    same = [name for name in fields if name.rsplit(".", 1)[-1] == leaf]
    near = inside or same or difflib.get_close_matches(path, fields, n=3, cutoff=0.5)
    if not near:
        leaves = {name.rsplit(".", 1)[-1]: name for name in fields}
        near = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=3, cutoff=0.5)]
    if not near:
        return f"its fields begin with {', '.join(dict.fromkeys(name.partition('.')[0] for name in fields))}"
    return ("its fields are " if inside else "did you mean ") + ", ".join(near) + ("" if inside else "?")


def _read(path: str, text: str, kind: Any) -> Any:
    """`text` as a value of type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if text not in arguments:
            raise RecipeError(f"{path} must be one of {', '.join(arguments)}, not {text!r}")
        return text
    if origin in (types.UnionType, typing.Union):
        if text.lower() == "none" and type(None) in arguments:
            return None
        return _read(path, text, next(argument for argument in arguments if argument is not type(None)))
    if origin is tuple:
        words = [word.strip() for word in text.strip("()[] ").split(",") if word.strip()]
        kinds = [arguments[0]] * len(words) if arguments[-1] is Ellipsis else list(arguments)
        if len(words) != len(kinds):
            raise RecipeError(f"{path} takes {len(kinds)} values between commas, not {len(words)}: {text!r}")
        return tuple(_read(path, word, each) for word, each in zip(words, kinds, strict=True))
    if dataclasses.is_dataclass(kind):
        if text.lower() != "default":
            raise RecipeError(f"{path} is none or default, not {text!r}; what it is made of has fields of its own")
        return typing.cast(type, kind)()
    try:
        return kind(text)
    except ValueError as error:
        raise RecipeError(f"{path} must be {'a whole number' if kind is int else 'a number'}, not {text!r}") from error


def _faults(recipe: Recipe) -> typing.Iterator[str]:
    optimisation, batches, averaging = recipe.optimisation, recipe.batches, recipe.averaging
    if batches.size < 1 or batches.epochs < 1 or optimisation.accumulation < 1:
        yield "batches.size, batches.epochs and optimisation.accumulation must be at least 1"
        return
    if batches.size % optimisation.accumulation:
        yield f"optimisation.accumulation ({optimisation.accumulation}) must divide batches.size ({batches.size})"
    if min(dataclasses.astuple(recipe.keeping)) < 1:
        yield "keeping.evaluate_every, keeping.save_steps and keeping.report_steps must be at least 1"
    together, part = batches.denoising_together, batches.size // optimisation.accumulation
    if together is not None and (together < 1 or part % together):
        yield f"batches.denoising_together ({together}) must divide the {part} images of a part of a batch, or be none"
    if bad := [side for side in recipe.all_sides() if side < 32 or side % 32]:
        yield f"the sides of images must be multiples of 32, not {', '.join(map(str, bad))}"
    if not 0 <= averaging.decay < 1 or averaging.ramp_steps < 1:
        yield "averaging.decay must lie in [0, 1), and averaging.ramp_steps be at least 1"
    for name in ("learning_rate", "backbone_learning_rate", "weight_decay", "clip_norm", "epsilon"):
        value = getattr(optimisation, name)
        if not math.isfinite(value) or value < 0:
            yield f"optimisation.{name} must be a finite number of at least 0, not {value}"
    if not 0 <= optimisation.flat_share <= 1 or not 0 <= optimisation.final_rate <= 1:
        yield "optimisation.flat_share and optimisation.final_rate are shares: 0 to 1"
