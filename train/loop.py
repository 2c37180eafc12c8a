"""The run: step after step, measured, told and saved on the way, and resumed as if it had never stopped."""

import logging
from typing import Any, Literal

import jax
from jax.sharding import Mesh
from rich.console import Console

from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.sharding import check_batch_size, data_mesh, replicate
from rtdetrv2_jax.weights.load import load_pretrained

from .batches import TrainingBatches
from .checkpoints import Checkpoints
from .curves import draw_curves
from .interruption import Interruption
from .journal import Journal, StepRecord
from .loading import TrainingSource, target_slots
from .meter import Meter
from .pictures import save_predictions
from .place import Place, agree
from .programs import Programs
from .progress import Progress
from .recipe import Recipe
from .starting import Data
from .step import Program, TrainState, init_state, jitted_step, model_of, program
from .validation import Validation

PICTURES = "pictures"
BEST, LAST, HUGGING_FACE = "best", "last", "best_hf"
Ending = Literal["finished", "interrupted"]
logger = logging.getLogger(__name__)


def train(recipe: Recipe, model: RTDETRv2, data: Data, place: Place) -> Ending:
    """Trains `model` as the recipe says, to the end or until it is asked to stop.

    The folder then holds `best` and `last`, the average models with the best and with the last weights, as folders
    that `rtdetrv2 detect --model` takes; `best_hf`, the best one for transformers; the journal, curves and pictures;
    and the states that the run can go on from.

    Raises:
        CheckpointError: The folder has a run that is not to be resumed, or another one.
        ShardingError, DataError: Batches cannot be shared out, or there is not one in the data.
        TrainingError: One step after another has had a loss that is not finite.
    """
    mesh = data_mesh()
    check_batch_size(mesh, recipe.batches.size, parts=recipe.optimisation.accumulation)
    source = training_source(recipe, data, place)
    made = program(recipe, steps_per_epoch=source.steps_per_epoch)
    with Checkpoints(place.folder, mesh=mesh) as checkpoints:
        agree(recipe, place, checkpoints.latest)
        state, notes = replicate(mesh, init_state(made, model)), {"best": None, "batches": None}
        if checkpoints.latest is not None:
            state, notes = checkpoints.restore(state)
        run = Run(made, data, place, mesh=mesh, source=source, checkpoints=checkpoints, notes=notes)
        return run.go(state)


def training_source(recipe: Recipe, data: Data, place: Place) -> TrainingSource:
    """The batches of a run, by number."""
    side = recipe.batches.side
    return TrainingSource(
        dataset=data.training,
        augmentation=recipe.augmentation,
        size=(side, side),
        batch_size=recipe.batches.size,
        epochs=recipe.batches.epochs,
        seed=recipe.seed,
        slots=target_slots(data.training, most=recipe.model.decoder.queries),
        on_bad_data=place.on_bad_data,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


class Run:
    """A run under way. Of several processes the first one writes and talks; all of them count, measure and save."""

    def __init__(
        self,
        program: Program,
        data: Data,
        place: Place,
        *,
        mesh: Mesh,
        source: TrainingSource,
        checkpoints: Checkpoints,
        notes: dict[str, Any],
    ) -> None:
        self.program, self.recipe, self.data, self.place = program, program.recipe, data, place
        self.mesh, self.source, self.checkpoints, self.notes = mesh, source, checkpoints, notes
        self.steps, self.writes = len(source), jax.process_index() == 0
        side = self.recipe.batches.side
        self.preprocessing = Preprocessing(size=(side, side))
        self.validation: Validation | None = None
        if data.validation is not None:
            self.validation = Validation(
                program,
                data.validation,
                preprocessing=self.preprocessing,
                mesh=mesh,
                batch_size=self.recipe.batches.size,
                on_bad_data=place.on_bad_data,
            )

    def go(self, state: TrainState) -> Ending:
        """All steps from where `state` stands."""
        start, folder = int(state.step), self.place.folder
        console = None if self.writes else Console(quiet=True, force_interactive=False)
        with (
            Interruption() as interruption,
            Progress(
                steps=self.steps, at_step=start, steps_per_epoch=self.source.steps_per_epoch, console=console
            ) as self.progress,
            Journal(
                folder if self.writes else folder / f"process_{jax.process_index()}",
                at_step=start,
                tensorboard=self.place.tensorboard and self.writes,
            ) as self.journal,
        ):
            self.say(start, f"going on after step {start}" if start else f"starting in {folder}")
            if start < self.steps:
                state = self._steps(state, interruption)
            if interruption.signal:
                self._leave(state, interruption.signal)
                return "interrupted"
            self._finish(state)
            return "finished"

    def _steps(self, state: TrainState, interruption: Interruption) -> TrainState:
        """The steps until the end, or until the run is asked to stop."""
        meter, sizes = Meter(self.recipe, self.data.training), self.recipe.all_sides()
        batches = TrainingBatches(self.source, mesh=self.mesh, workers=self.place.workers, state=self.notes["batches"])
        step, programs = int(state.step), None
        try:
            for loaded in batches:
                side = self.recipe.side_at(loaded.step, epoch=loaded.epoch)
                if programs is None:
                    order = sorted(sizes, key=lambda each: each != side)
                    programs = Programs(jitted_step(self.program, self.mesh), state, loaded.batch, sides=order)
                state, metrics = programs(side)(state, loaded.batch)
                step = loaded.step + 1
                self.notes["batches"] = batches.state()
                last, evaluates = step == self.steps, self._is_due(step, epoch=loaded.epoch)
                saves = last or evaluates or step % self.recipe.keeping.save_steps == 0
                self._tell(meter.after(loaded, metrics, side=side, last=last))
                if saves:
                    self._tell(meter.flush())  # the journal has no gap if the run is killed, and goes on from there
                if evaluates:
                    self._evaluate(state, epoch=loaded.epoch)
                    meter.restart_clock()
                if interruption.asked(step):
                    break
                if saves:
                    self._save(state)
            self._tell(meter.flush())
        finally:
            if meter.alarmed:
                self._save(state)
            batches.close()
            if programs is not None:
                programs.close()
        return state

    def _is_due(self, step: int, *, epoch: int) -> bool:
        """Whether the model is to be evaluated after this step."""
        if step % self.source.steps_per_epoch:
            return False
        return step == self.steps or (epoch + 1) % self.recipe.keeping.evaluate_every == 0

    def _evaluate(self, state: TrainState, *, epoch: int) -> None:
        """Measures the average model, and keeps it if none was better."""
        if self.validation is None:
            return
        step, found = int(state.step), self.validation(state)
        figures = found.scores._asdict()
        per_class = figures.pop("per_class")
        self.journal.evaluation(step, epoch=epoch, figures=figures, per_class=per_class, seconds=found.seconds)
        if self.writes:
            self.progress.evaluated(step, figures)
            picture = self.place.folder / PICTURES / f"step_{step:07}.jpg"
            try:
                picture.parent.mkdir(exist_ok=True)
                save_predictions(picture, self.validation.dataset, found.shown, found.detections)
            except OSError as error:  # a full disk, say: no reason to lose the run
                self.say(step, f"{picture} could not be written: {error}")
        best = self.notes["best"]
        if (best is None or not found.scores.ap < best["ap"]) and self._keep(BEST, state):
            self.notes["best"] = {"step": step, "ap": found.scores.ap, "ap50": found.scores.ap50}
            self.say(step, f"best so far: AP {found.scores.ap:.1%}, in {self.place.folder / BEST}")

    def _tell(self, records: list[StepRecord]) -> None:
        for record in records:
            self.journal.step(record)
            self.progress.step(record)

    def _leave(self, state: TrainState, signal: str) -> None:
        """Saves a run that is asked to end, and says so."""
        step = int(state.step)
        self._save(state)
        self.checkpoints.wait()
        self._tell_failures(step)
        saved = self.checkpoints.latest
        hint = "nothing is saved" if saved is None else f"saved after step {saved}; --resume goes on from there"
        self.say(step, f"{signal}: {hint}")

    def _save(self, state: TrainState) -> None:
        step = int(state.step)
        self.checkpoints.save_state(step, state, notes=self.notes)
        self._tell_failures(step)

    def _finish(self, state: TrainState) -> None:
        """Writes the models of a run that has come to its end, and draws its curves."""
        step, folder, best = int(state.step), self.place.folder, self.notes["best"]
        self._save(state)
        if self.writes:
            self._keep(LAST, state)
            if best is not None or self._keep(BEST, state):
                model = load_pretrained(folder / BEST).model
                self.checkpoints.save_model(HUGGING_FACE, model, preprocessing=self.preprocessing, to="hf")
            draw_curves(folder)
        self.checkpoints.wait()
        self._tell_failures(step)
        said = f"; the best, AP {best['ap']:.1%}, after step {best['step']}" if best else ""
        self.say(step, f"done{said}: rtdetrv2 detect IMAGE --model {folder / BEST}")

    def _keep(self, name: str, state: TrainState) -> bool:
        """Writes the average model, if this is the process that writes; tells whether it is there."""
        if not self.writes:
            return True
        local = jax.device_get(state._replace(optimizer=()))  # of several processes, others hold parts of `state`
        return self.checkpoints.save_model(name, model_of(self.program, local), preprocessing=self.preprocessing)

    def _tell_failures(self, step: int) -> None:
        for failure in self.checkpoints.failures():
            self.say(step, failure)

    def say(self, step: int, text: str) -> None:
        """Puts something down in the journal and on the terminal."""
        self.journal.event(step, text)
        if self.writes:
            self.progress.say(text)
