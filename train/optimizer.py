"""Who learns, how fast, and by what rule: parameter groups, AdamW, clipping, warm-up and schedules."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from rtdetrv2_jax.config import ModelConfig
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2

from .recipe import Group, Optimisation, RecipeError

Values = dict[str, Array]
"""Arrays by their dotted path, as `rtdetrv2_jax.weights.transfer.flat_state` writes it."""

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]
"""The share of the full learning rate at a step, counted from 0."""

STEM = r"backbone\.stem\..*"
OFFSETS = r"decoder\.layers\.\d+\.cross_attention\.offsets\..*"
CLIP_FLOOR = 1e-6
_LISTED = 8


class Roles(NamedTuple):
    """What each array of a model does in training, by its path: every path stands in exactly one of the first three.

    Attributes:
        trained: the group of each parameter that learns.
        frozen: parameters and constants that do not, each with what says so.
        statistics: of batch normalisation: moved by the forward pass, not by the optimizer.
    """

    trained: dict[str, Group]
    frozen: dict[str, str]
    statistics: tuple[str, ...]


def never_trained(config: ModelConfig) -> tuple[str, ...]:
    """Patterns of the parameters that a model keeps whatever the recipe.

    They are the stem of a backbone whose norms are frozen, as published; and the offsets of discrete sampling, which
    have no gradient but would decay all the same.
    """
    stem = (STEM,) if config.backbone.batch_norm == "frozen" else ()
    return stem + ((OFFSETS,) if config.decoder.sampling == "discrete" else ())


def roles(model: RTDETRv2, optimisation: Optimisation) -> Roles:
    """The role of every array of a model, which may be abstract.

    Raises:
        RecipeError: A parameter that should learn is in no group or in several; all such are listed.
    """
    trained, frozen, statistics, faults = {}, {}, [], []
    kept = never_trained(model.config) + optimisation.frozen
    for keys, variable in nnx.to_flat_state(nnx.state(model)):
        path = ".".join(map(str, keys))
        pattern = next((pattern for pattern in kept if re.fullmatch(pattern, path)), None)
        if isinstance(variable, nnx.BatchStat):
            statistics.append(path)
        elif not isinstance(variable, nnx.Param):
            frozen[path] = f"a constant ({type(variable).__name__})"
        elif pattern is not None:
            frozen[path] = f"the pattern {pattern}"
        else:
            groups = [group for group in optimisation.groups if re.fullmatch(group.pattern, path)]
            if len(groups) == 1:
                trained[path] = groups[0]
            else:
                said = " and ".join(group.pattern for group in groups)
                faults.append(f"{path} is in {f'{len(groups)} groups: {said}' if groups else 'no group'}")
    if faults:
        shown = "\n  ".join(faults[:_LISTED]) + (f"\n  and {len(faults) - _LISTED} more" if faults[_LISTED:] else "")
        raise RecipeError(
            f"every parameter that learns must be in exactly one of optimisation.groups, and {len(faults)} are not:\n"
            f"  {shown}\nChange the groups' patterns, or freeze these parameters with optimisation.frozen"
        )
    return Roles(trained, frozen, tuple(statistics))


def rate(optimisation: Optimisation, group: Group) -> float:
    """A group's full learning rate."""
    return {"backbone": optimisation.backbone_learning_rate, "detector": optimisation.learning_rate}[group.rate]


def decay(optimisation: Optimisation, group: Group) -> float:
    """A group's weight decay."""
    return {"decayed": optimisation.weight_decay, "not decayed": 0.0}[group.decay]


def schedule(optimisation: Optimisation, *, steps: int) -> Schedule:
    """Warm-up, and what comes after it in a run of `steps`.

    Warm-up gives step i the share (i + 1) / `warmup_steps`, at most 1. It multiplies what the schedule says, which
    counts from the first step of the run.

    Source: lyuwenyu/RT-DETR, optim/warmup.py, `LinearWarmup`. Its milestones lie beyond the end of every published
    run, so that the rate stays; the cosines are ours.
    """
    warmup, final = optimisation.warmup_steps, optimisation.final_rate
    flat = {"constant": 1.0, "cosine": 0.0, "flat_cosine": optimisation.flat_share}[optimisation.schedule]

    def share(step: Int[Array, ""]) -> Float[Array, ""]:
        warm = jnp.minimum(1.0, (step + 1).astype(jnp.float32) / max(warmup, 1))
        if flat == 1.0:
            return warm
        progress = jnp.clip((step.astype(jnp.float32) / max(steps, 1) - flat) / (1 - flat), 0.0, 1.0)
        return warm * (final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))

    return share


def adamw(
    optimisation: Optimisation, trained: Mapping[str, Group], *, share: Schedule
) -> optax.GradientTransformationExtraArgs:
    """Clipping by the norm of all gradients together, then AdamW with each group's own rate and decay.

    `update` wants the number of the step as the extra argument `step`: warm-up counts every step of the run, Adam's
    own count only those that were not skipped.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101); torch.optim.AdamW, whose decay too is scaled by the learning
    rate of the moment.
    """
    rates = {path: rate(optimisation, group) for path, group in trained.items()}
    decays = {path: decay(optimisation, group) for path, group in trained.items()}
    first, second = optimisation.betas
    return optax.chain(
        clip_by_norm(optimisation.clip_norm),
        _loosely_typed(optax.scale_by_adam(b1=first, b2=second, eps=optimisation.epsilon)),
        _decay_and_rate(rates, decays, share),
    )


def clip_by_norm(limit: float) -> optax.GradientTransformation:
    """Scales gradients to a global norm of at most `limit`.

    Source: torch.nn.utils.clip_grad_norm_. It divides by the norm plus 1e-6, which `optax.clip_by_global_norm` does
    not.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scale = jnp.minimum(1.0, limit / (global_norm(updates) + CLIP_FLOOR))
        return jax.tree.map(lambda leaf: leaf * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _loosely_typed(part: optax.GradientTransformation) -> optax.GradientTransformation:
    """A part of optax that mixes integers and floats, which JAX's strict promotion (our tests') would refuse."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return part.update(updates, state, params)

    return optax.GradientTransformation(part.init, update)


def global_norm(gradients: Any) -> Float[Array, ""]:
    """The norm of all gradients as one vector."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)), start=jnp.zeros(())))


def _decay_and_rate(
    rates: Mapping[str, float], decays: Mapping[str, float], share: Schedule
) -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("AdamW needs the parameters: call update(gradients, state, parameters, step=...)")
        now = share(extra["step"])
        return {path: -now * rates[path] * (u + decays[path] * params[path]) for path, u in updates.items()}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def describe(model: RTDETRv2, optimisation: Optimisation) -> str:
    """The groups as lines to print: rate, decay, tensors and numbers of each, and what does not learn."""
    assigned = roles(model, optimisation)
    sizes = {".".join(map(str, keys)): leaf.get_value().size for keys, leaf in nnx.to_flat_state(nnx.state(model))}
    lines = []
    for group in optimisation.groups:
        members = [path for path, own in assigned.trained.items() if own == group]
        if members:
            lines.append(
                f"learning rate {rate(optimisation, group):g}, decay {decay(optimisation, group):g}: "
                f"{len(members)} tensors, {sum(sizes[path] for path in members):,} numbers  {group.pattern}"
            )
    for reason in sorted(set(assigned.frozen.values())):
        members = [path for path, own in assigned.frozen.items() if own == reason]
        lines.append(f"frozen by {reason}: {len(members)} tensors, {sum(sizes[path] for path in members):,} numbers")
    return "\n".join(lines)
