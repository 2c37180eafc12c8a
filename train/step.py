"""The training step: one program from images and boxes to the next state, with nothing of it on the host."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rtdetrv2_jax.arrays import Denoising, DenoisingTargets, Output, Targets
from rtdetrv2_jax.compilation import compiler_options
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2, abstract_model
from rtdetrv2_jax.objective.denoising import denoising_queries, draw_noise
from rtdetrv2_jax.objective.losses import Losses, criterion
from rtdetrv2_jax.sharding import along_data, check_batch_size, replicated, traced_for
from rtdetrv2_jax.weights.transfer import flat_state, with_values

from . import ema
from .batch import Batch
from .device_augmentation import augment_batch
from .optimizer import Roles, Schedule, Values, adamw, global_norm, roles, schedule
from .recipe import Recipe

Size = tuple[int, int]
Images = Float[Array, "b h w 3"]
Noised = tuple[Denoising, DenoisingTargets]
Augment = Callable[[Batch, PRNGKeyArray, Size], tuple[Images, Targets]]
"""What a step first makes of a batch, given its key and a (height, width): images in [0, 1], and their targets."""


class TrainState(NamedTuple):
    """All that a run is at a moment: saved and restored, it goes on as if nothing had happened.

    Attributes:
        step: steps made, skipped ones included: warm-up, schedule, averaging and random draws go by it.
        skipped: how many of them changed nothing, since something in them was not finite.
        trained: the parameters that learn, by dotted path.
        frozen: parameters and constants that do not.
        statistics: of batch normalisation.
        optimizer: Adam's averages, and its count of steps that were not skipped.
        average: the running average of trained parameters and statistics.
        key: where the random draws of all steps come from.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    trained: Values
    frozen: Values
    statistics: Values
    optimizer: optax.OptState
    average: Values
    key: PRNGKeyArray


class Metrics(NamedTuple):
    """What a step tells. `losses.named(recipe.loss)` has the terms by name; `learning_rate` is the detector's."""

    losses: Losses
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    boxes: Int[Array, ""]
    finite: Bool[Array, ""]
    skipped: Int[Array, ""]


class Gradients(NamedTuple):
    """What the forward and backward passes of a batch, or of a part of it, give."""

    gradients: Values
    statistics: Values
    losses: Losses
    output: Output | None = None


@dataclass(frozen=True, eq=False)
class Program:
    """All of a step that is known before the first batch."""

    recipe: Recipe
    model: RTDETRv2
    roles: Roles
    share: Schedule
    optimizer: optax.GradientTransformationExtraArgs
    augment: Augment


def program(recipe: Recipe, *, steps_per_epoch: int, augment: Augment | None = None) -> Program:
    """The program of a run; `augment` in place of the recipe's own augmentation on the device is for tests.

    Raises:
        RecipeError: A parameter of the model is not in exactly one group of the recipe.
    """
    model = abstract_model(recipe.model, dtype=recipe.dtype)
    assigned = roles(model, recipe.optimisation)
    share = schedule(recipe.optimisation, steps=recipe.batches.epochs * steps_per_epoch)
    optimizer = adamw(recipe.optimisation, assigned.trained, share=share)
    augment = augment or partial(augment_batch, augmentation=recipe.augmentation)
    return Program(recipe, model, assigned, share, optimizer, augment)


def init_state(program: Program, model: RTDETRv2) -> TrainState:
    """The state before the first step of a run that starts from `model`, which keeps its own numbers."""
    values = {path: jnp.array(value, copy=True) for path, value in flat_state(model).items()}
    trained = {path: values[path] for path in program.roles.trained}
    statistics = {path: values[path] for path in program.roles.statistics}
    moving = trained | statistics
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        trained=trained,
        frozen={path: values[path] for path in program.roles.frozen},
        statistics=statistics,
        optimizer=program.optimizer.init(trained),
        average={path: jnp.array(moving[path], copy=True) for path in ema.averaged_paths(moving)},
        key=jax.random.key(program.recipe.seed),
    )


def model_of(program: Program, state: TrainState, *, weights: Literal["average", "trained"] = "average") -> RTDETRv2:
    """The model that a state holds, for inference; "average" is the one to evaluate and to publish."""
    values = state.frozen | state.trained | state.statistics
    return with_values(program.model, values | (state.average if weights == "average" else {}))


def jitted_step(program: Program, mesh: Mesh) -> jax.stages.Wrapped:
    """`train_step` compiled, a function of state, batch and size.

    The state lies on every device of `mesh`, and is given up to the next one; the batch is shared out. The size is a
    constant of the compiled program: `.lower(state, batch, size).compile()` makes one ahead.

    Raises:
        ShardingError: The batch cannot be shared out evenly.
    """
    check_batch_size(mesh, program.recipe.batches.size, parts=program.recipe.optimisation.accumulation)
    whole = replicated(mesh)
    return jax.jit(
        traced_for(mesh, partial(train_step, program)),
        static_argnums=2,
        donate_argnums=0,
        in_shardings=(whole, along_data(mesh)),
        out_shardings=(whole, whole),
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def train_step(program: Program, state: TrainState, batch: Batch, size: Size) -> tuple[TrainState, Metrics]:
    """One update. `size` is the (height, width) that the augmentation on the device brings the images to.

    Random draws depend on the state's key and step alone.
    """
    augment_key, noise_key = step_keys(state.key, state.step)
    images, targets = program.augment(batch, augment_key, size)
    found = accumulated(program, state, images, targets, noise_key)
    return update(program, state, found, boxes=jnp.sum(targets.mask))


def step_keys(key: PRNGKeyArray, step: Int[Array, ""] | int) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """What a step draws from, in a run with this key: for the augmentation, and for the denoising queries."""
    augment_key, noise_key = jax.random.split(jax.random.fold_in(key, step))
    return augment_key, noise_key


def accumulated(program: Program, state: TrainState, images: Images, targets: Targets, key: PRNGKeyArray) -> Gradients:
    """The gradients of a batch, taken in as many parts, one after another, as the recipe says.

    Losses and gradients are divided by the number of boxes in the whole batch, so that taking it in parts changes
    neither. What the parts do change: each is normalised by its own batch statistics and moves the running ones in
    turn (PyTorch's way with small batches), and denoising queries are laid out within a part. Part j has the images
    j, j + parts, ...: on every device as many.
    """
    parts = program.recipe.optimisation.accumulation
    values = state.frozen | state.trained
    if parts == 1:
        return gradients(program, values, state.statistics, images, targets, noised(program, key, targets))
    boxes = jnp.maximum(jnp.sum(targets.mask), 1)

    def one(carry: tuple[Values, Values], part: Any) -> tuple[tuple[Values, Values], Losses]:
        total, statistics = carry
        images, targets, key = part
        share = (jnp.maximum(jnp.sum(targets.mask), 1) / boxes).astype(jnp.float32)
        found = gradients(program, values, statistics, images, targets, noised(program, key, targets), share=share)
        return (jax.tree.map(jnp.add, total, found.gradients), found.statistics), found.losses

    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), (images, targets))
    zeros = jax.tree.map(jnp.zeros_like, state.trained)
    (total, statistics), losses = jax.lax.scan(one, (zeros, state.statistics), (*split, jax.random.split(key, parts)))
    return Gradients(total, statistics, jax.tree.map(lambda terms: jnp.sum(terms, axis=0), losses))


def noised(program: Program, key: PRNGKeyArray, targets: Targets) -> Noised | None:
    """Denoising queries for a batch and what they are to find, if the model has any."""
    decoder, settings, classes = program.recipe.model.decoder, program.recipe.denoising(), program.recipe.model.classes
    if not decoder.denoising:
        return None
    noise = draw_noise(key, targets, classes=classes, settings=settings)
    return denoising_queries(targets, noise, classes=classes, queries=decoder.queries, settings=settings)


def gradients(
    program: Program,
    values: Values,
    statistics: Values,
    images: Images,
    targets: Targets,
    noised: Noised | None,
    *,
    share: Float[Array, ""] | float = 1.0,
) -> Gradients:
    """The gradients of the total loss with respect to the trained ones of `values`; `share` scales losses and them."""
    trained = {path: values[path] for path in program.roles.trained}
    fixed = {path: values[path] for path in program.roles.frozen} | statistics
    queries, wanted = noised or (None, None)

    def loss(trained: Values) -> tuple[Float[Array, ""], tuple[Values, Losses, Output]]:
        model = with_values(program.model, fixed | trained)
        model.train()
        output = model(images, queries)
        losses = criterion(output, targets, denoising=wanted, settings=program.recipe.loss)
        losses = jax.tree.map(lambda term: term * share, losses)
        moved = flat_state(model)
        return losses.total, ({path: moved[path] for path in statistics}, losses, output)

    found, rest = jax.grad(loss, has_aux=True)(trained)
    return Gradients(_laid_out_as_parameters(found), *rest)


def _laid_out_as_parameters(gradients: Values) -> Values:
    """The gradients of kernels, turned on GPUs into the layout of what they change.

    They come as cuDNN wants kernels. Left so, the parameter, its average and both of Adam's are turned instead, each
    into that layout and back.
    """

    def as_written(x: Array) -> Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    def turned(x: Array) -> Array:
        return jax.lax.platform_dependent(x, cuda=as_written, rocm=as_written, default=lambda x: x)

    return {path: turned(gradient) if gradient.ndim == 4 else gradient for path, gradient in gradients.items()}


def update(
    program: Program, state: TrainState, found: Gradients, *, boxes: Int[Array, ""]
) -> tuple[TrainState, Metrics]:
    """The state after a step with these gradients.

    A step whose loss or gradient is not finite leaves everything as it was, to the bit, but for the two counters of
    steps. So warm-up and averaging go on counting, as in the reference, where the gradient scaler skips such steps;
    Adam's bias correction does not, nor is the unchanged model averaged once more.
    """
    norm = global_norm(found.gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(found.losses.total)
    step = state.step + 1
    changes, optimizer = program.optimizer.update(found.gradients, state.optimizer, state.trained, step=state.step)
    trained = jax.tree.map(jnp.add, state.trained, changes)
    average = ema.average(program.recipe.averaging, state.average, trained | found.statistics, updates=step)
    old = (state.trained, state.statistics, state.optimizer, state.average)
    new = (trained, found.statistics, optimizer, average)
    trained, statistics, optimizer, average = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    skipped = state.skipped + (~finite).astype(jnp.int32)
    rate = program.share(state.step) * program.recipe.optimisation.learning_rate
    return (
        TrainState(step, skipped, trained, state.frozen, statistics, optimizer, average, state.key),
        Metrics(found.losses, norm, rate, boxes, finite, skipped),
    )
