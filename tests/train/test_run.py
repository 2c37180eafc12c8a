"""Whole runs of `python -m train`: killed and resumed, on one process and on two, and what they leave in the folder.

The processes share a cache of compiled programs, so that the network, as small as one can be, is compiled once.
"""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from rtdetrv2_jax import load_model
from rtdetrv2_jax.cli import main as rtdetrv2
from rtdetrv2_jax.data import DataError, SyntheticDataset
from rtdetrv2_jax.sharding import ShardingError, data_mesh
from rtdetrv2_jax.weights.files import read_json, write_json
from rtdetrv2_jax.weights.load import save_model
from rtdetrv2_jax.weights.transfer import flat_state
from train.__main__ import main as command
from train.batches import TrainingBatches
from train.checkpoints import STATES, CheckpointError, Checkpoints
from train.journal import LOG, read_journal
from train.loop import BEST, HUGGING_FACE, LAST, PICTURES, train, training_source
from train.place import RECIPE, Place
from train.recipe import override
from train.recipes import build
from train.starting import Data, open_data, starting_point
from train.step import TrainState

ROOT = Path(__file__).parents[2]
PER_EPOCH, STEPS = 15, 30
SCENES = ("--data", f"synthetic:{2 * PER_EPOCH}", "--val-data", "synthetic:4")
TINY = {
    "batches.side": "64",
    "batches.size": "2",
    "batches.epochs": "2",
    "keeping.report_steps": "1",
    "keeping.evaluate_every": "1",
    "keeping.save_steps": "5",
    "model.backbone.stem_width": "8",
    "model.backbone.widths": "8,8,16,16",
    "model.encoder.width": "16",
    "model.encoder.ffn_width": "16",
    "model.encoder.heads": "2",
    "model.decoder.width": "16",
    "model.decoder.ffn_width": "16",
    "model.decoder.heads": "2",
    "model.decoder.layers": "1",
    "model.decoder.inference_layers": "1",
    "model.decoder.queries": "12",
    "model.decoder.points": "2,2,2",
    "model.decoder.denoising": "6",
}
PATIENCE = 900.0
"""Seconds that a run of some seconds may take where others want the processor too."""
INTERRUPTED = 130
FIGURES = ("epoch", "losses", "total", "gradient_norm", "learning_rate", "boxes", "skipped", "side")
"""What the journal says of a step that does not depend on the time it took."""


class Runner:
    """Starts runs that share compiled programs; ends those that are left over."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.started = cache, []

    def start(self, folder: Path, *more: str) -> "Started":
        """A run in this folder; what it says is kept beside it."""
        fields = [word for path, text in TINY.items() for word in (f"--{path}", text)]
        command = [sys.executable, "-m", "train", "debug", *SCENES, *fields, "--output", str(folder), *more]
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        started = Started(command, folder, os.environ | settings, number=len(self.started))
        self.started.append(started)
        return started


class Started:
    """A run that has been started as a process."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], *, number: int) -> None:
        self.folder, self.said = folder, folder.with_name(f"{folder.name}_{number}.txt")
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)

    def wait_until(self, reached: Callable[[], object]) -> None:
        """Waits for something to happen while the process runs."""
        end = time.monotonic() + PATIENCE
        while not reached():
            assert self.process.poll() is None, f"it ended before:\n{self.text()}"
            assert time.monotonic() < end, f"it takes too long:\n{self.text()}"
            time.sleep(0.005)

    def ended(self) -> int:
        """Its exit status; kills it if there is none for too long."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"it does not end:\n{self.text()}") from None

    def text(self) -> str:
        return self.said.read_text(errors="replace")


@pytest.fixture(scope="session")
def runner(tmp_path_factory) -> Iterator[Runner]:
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or tmp_path_factory.mktemp("compiled")
    runner = Runner(Path(cache))
    yield runner
    for started in runner.started:
        started.process.kill()
        started.process.wait()


@pytest.fixture(scope="session")
def straight(runner, tmp_path_factory) -> Path:
    """The folder of a run that nothing has disturbed."""
    run = runner.start(tmp_path_factory.mktemp("straight") / "run")
    assert run.ended() == 0, run.text()
    return run.folder


def recorded(folder: Path) -> dict[int, dict[str, Any]]:
    """What the journal says of each step."""
    return {entry["step"]: entry for entry in read_journal(folder) if entry["kind"] == "step"}


def steps_done(folder: Path) -> int:
    return max(recorded(folder), default=0)


def saved_steps(folder: Path) -> list[int]:
    """The steps whose states are whole."""
    states = folder / STATES
    return sorted(int(path.name) for path in states.iterdir() if path.name.isdecimal()) if states.is_dir() else []


def half_saved(folder: Path) -> list[Path]:
    return list((folder / STATES).glob("*.orbax-checkpoint-tmp*"))


def saved_state(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a saved state by its path, as the numbers that lie on disk."""
    place = folder / STATES / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        kinds = checkpointer.metadata(place).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), kinds)
        tree = checkpointer.restore(place, args=ocp.args.PyTreeRestore(restore_args=plain))
    return {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(tree)}


def notes_of(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / STATES / str(step) / "notes" / "metadata").read_text())


def assert_same_arrays(ours: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Equal to the bit."""
    assert ours.keys() == wanted.keys()
    for path, value in wanted.items():
        one, other = np.asarray(ours[path]), np.asarray(value)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), path


def assert_same_run(folder: Path, wanted: Path) -> None:
    """Two runs that have come to their end have learned the same from the same batches, to the bit, step by step."""
    ours, theirs = recorded(folder), recorded(wanted)
    assert sorted(ours) == sorted(theirs) == list(range(1, STEPS + 1))
    for step, entry in theirs.items():
        assert {name: ours[step][name] for name in FIGURES} == {name: entry[name] for name in FIGURES}, step
    evaluations = [
        [(entry["step"], entry["figures"]) for entry in read_journal(each) if entry["kind"] == "evaluation"]
        for each in (folder, wanted)
    ]
    assert evaluations[0] == evaluations[1]
    assert [step for step, _ in evaluations[0]] == [PER_EPOCH, STEPS]
    assert_same_arrays(saved_state(folder, STEPS), saved_state(wanted, STEPS))
    assert notes_of(folder, STEPS) == notes_of(wanted, STEPS)
    for name in (BEST, LAST, HUGGING_FACE):
        assert_same_arrays(flat_state(load_model(folder / name)[0]), flat_state(load_model(wanted / name)[0]))


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_goes_on_as_if_it_had_not(runner, straight, tmp_path):
    run = runner.start(tmp_path / "run")
    run.wait_until(lambda: steps_done(run.folder) >= 2)
    run.process.send_signal(signal.SIGTERM)
    assert run.ended() == INTERRUPTED, run.text()
    step = saved_steps(run.folder)[-1]
    assert 2 <= step < PER_EPOCH  # in mid-epoch
    assert f"SIGTERM: saved after step {step}; --resume goes on from there" in run.text()
    assert "Traceback" not in run.text()
    assert sorted(recorded(run.folder)) == list(range(1, step + 1))

    resumed = runner.start(run.folder, "--resume", "--keeping.save_steps", "7", "--workers", "1")
    assert resumed.ended() == 0, resumed.text()
    assert f"going on after step {step}" in resumed.text()
    assert_same_run(run.folder, straight)


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_as_if_it_had_not(runner, straight, tmp_path):
    run = runner.start(tmp_path / "run")
    run.wait_until(lambda: saved_steps(run.folder))
    delay = random.uniform(0, 1)
    time.sleep(delay)
    run.process.kill()
    assert run.ended() == -signal.SIGKILL, f"after {delay} s: {run.text()}"
    before = {step: saved_state(run.folder, step) for step in saved_steps(run.folder)}
    assert before, delay

    again = runner.start(run.folder, "--resume")
    again.wait_until(lambda: steps_done(again.folder) > max(before) and half_saved(again.folder))
    again.process.kill()
    assert again.ended() == -signal.SIGKILL, again.text()
    assert half_saved(again.folder)
    assert saved_steps(again.folder)
    for step in saved_steps(again.folder):
        state = saved_state(again.folder, step)
        if step in before:
            assert_same_arrays(state, before[step])

    resumed = runner.start(run.folder, "--resume")
    assert resumed.ended() == 0, resumed.text()
    assert f"going on after step {saved_steps(run.folder)[0]}" not in resumed.text()
    assert_same_run(run.folder, straight)
    assert not half_saved(run.folder)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_leave_together_when_one_is_asked_to(runner, straight, tmp_path):
    """Evaluating, saving, leaving and going on included.

    The only difference is the order in which numbers of float32 are added up: over both halves of a batch, for the
    statistics of batch normalisation, the losses and the gradients. On the first step, where the weights are the same,
    it is a few millionths of a loss, and gradients, which nearly cancel, differ by more. From there it grows: Adam
    divides small gradients by their own size, and an object whose two best queries are almost as good may get the
    other one. A sum that left out a half of a batch would be wrong by tens of percent on the first step.
    """

    def both(*more: str) -> list[Started]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = ("--coordinator", f"127.0.0.1:{port}", "--processes", "2")
        return [runner.start(folder, *where, "--process", str(index), *more) for index in range(2)]

    folder = tmp_path / "run"
    first, second = both()
    first.wait_until(lambda: second.process.poll() is None and steps_done(folder) >= PER_EPOCH + 2)
    second.process.send_signal(signal.SIGTERM)
    assert [run.ended() for run in (first, second)] == [INTERRUPTED] * 2, first.text() + second.text()
    step = saved_steps(folder)[-1]
    assert PER_EPOCH + 2 <= step < STEPS
    ends = [read_journal(each)[-1] for each in (folder, folder / "process_1")]
    assert [(end["step"], end["text"]) for end in ends] == [
        (step, f"SIGTERM: saved after step {step}; --resume goes on from there")
    ] * 2
    assert not second.text().replace("[Gloo]", "").count("step ")  # the first one talks for both

    resumed = both("--resume")
    assert [run.ended() for run in resumed] == [0, 0], "".join(run.text() for run in resumed)
    assert "could not be saved" not in resumed[0].text()
    ours, theirs = recorded(folder), recorded(straight)
    assert sorted(ours) == sorted(theirs)
    for number, entry in theirs.items():
        share = {1: 1e-5}.get(number, 1e-4 if number <= 5 else 0.05)
        assert ours[number]["boxes"] == entry["boxes"]
        assert ours[number]["total"] == pytest.approx(entry["total"], rel=share), number
    assert ours[1]["losses"] == pytest.approx(theirs[1]["losses"], rel=1e-4)
    assert ours[1]["gradient_norm"] == pytest.approx(theirs[1]["gradient_norm"], rel=1e-3)
    learned, wanted = (saved_state(each, STEPS) for each in (folder, straight))
    assert learned.keys() == wanted.keys()
    model = starting_point("debug", TINY, training=SyntheticDataset(2 * PER_EPOCH))[1]
    start = {f"['trained']['{path}']": np.asarray(value) for path, value in flat_state(model).items()}
    paths = [path for path in start if path in wanted]
    way = [np.linalg.norm(wanted[path] - start[path]) for path in paths]
    apart = [np.linalg.norm(wanted[path] - learned[path]) for path in paths]
    assert np.linalg.norm(apart) < 0.05 * np.linalg.norm(way)
    for name in (BEST, LAST, HUGGING_FACE):
        load_model(folder / name)
    assert {path.name for path in folder.iterdir()} == {path.name for path in straight.iterdir()} | {"process_1"}


@pytest.mark.slow
def test_the_folder_of_a_run_has_all_that_one_wants_of_it(straight):
    assert {path.name for path in straight.iterdir()} == {
        *(BEST, LAST, HUGGING_FACE, STATES, PICTURES, LOG, RECIPE, "curves.png")
    }
    assert sorted(path.name for path in (straight / PICTURES).iterdir()) == ["step_0000015.jpg", "step_0000030.jpg"]
    for picture in (straight / "curves.png", *(straight / PICTURES).iterdir()):
        with Image.open(picture) as image:
            assert min(image.size) > 100
    recipe = read_json(straight / RECIPE)
    assert (recipe["name"], recipe["batches"]["side"], recipe["model"]["decoder"]["queries"]) == ("debug", 64, 12)
    assert len(saved_steps(straight)) == 2
    said = [entry["text"] for entry in read_journal(straight) if entry["kind"] == "event"]
    assert said[0].startswith("starting in")
    assert said[-1].startswith("done; the best, AP ")


@pytest.mark.slow
def test_the_best_model_is_the_same_in_either_form_and_detects(straight, tmp_path):
    (ours, config), (theirs, _) = (load_model(straight / name) for name in (BEST, HUGGING_FACE))
    assert config.class_names == SyntheticDataset(1).class_names
    images = jax.random.uniform(jax.random.key(0), (2, 64, 64, 3))
    one, other = ours(images), theirs(images)
    np.testing.assert_array_equal(one.logits, other.logits)
    np.testing.assert_array_equal(one.boxes, other.boxes)
    assert read_json(straight / BEST / "preprocessor_config.json")["size"] == {"height": 64, "width": 64}

    scene = tmp_path / "scene.png"
    Image.fromarray(SyntheticDataset(1)[0].read()).save(scene)
    words = ["detect", str(scene), "--model", str(straight / BEST), "--threshold", "0", "--json"]
    assert rtdetrv2([*words, str(tmp_path / "found.json")]) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert len(found["detections"]) == 12
    assert {each["name"] for each in found["detections"]} <= set(config.class_names)


@pytest.mark.slow
def test_the_average_model_is_what_is_kept(straight):
    last, state = flat_state(load_model(straight / LAST)[0]), saved_state(straight, STEPS)
    averaged = {path: f"['average']['{path}']" for path in last if f"['average']['{path}']" in state}
    assert len(averaged) > 100
    assert_same_arrays({path: last[path] for path in averaged}, {path: state[key] for path, key in averaged.items()})
    unlike = {path for path in averaged if not np.array_equal(last[path], state.get(f"['trained']['{path}']"))}
    assert len(unlike) > 100


# Errors at the border.


@pytest.fixture
def program(monkeypatch, capsys) -> Callable[..., str]:
    """`python -m train` in this process: gives what it says, and expects it to end with an error."""
    monkeypatch.setattr("train.__main__.keep_freed_memory", lambda: None)
    monkeypatch.setattr("train.__main__.enable_persistent_cache", lambda: None)

    def run(*words: str) -> str:
        assert command(words) == 1
        return " ".join(capsys.readouterr().err.split())

    return run


SMALL = Data(SyntheticDataset(16), None)
WHOLE = override(build("debug", TINY, images=16), {"batches.size": "8"})


def saved_run(folder: Path, mesh: jax.sharding.Mesh) -> None:
    """What there is of a run of `WHOLE` after four steps, as far as anybody looks who comes to it."""
    number = jax.numpy.zeros((), jax.numpy.int32)
    with Checkpoints(folder, mesh=mesh) as checkpoints:
        state = TrainState(number, number, {}, {}, {}, (), {}, jax.random.key(0))
        checkpoints.save_state(4, state, notes={"best": None, "batches": None})
    write_json(folder / RECIPE, dataclasses.asdict(WHOLE))


def test_an_unknown_recipe_gets_a_suggestion(program):
    assert "no recipe is called 'debgu': did you mean 'debug'?" in program("debgu", "--data", "synthetic:4")


def test_an_unknown_field_gets_a_suggestion(program):
    said = program("debug", "--data", "synthetic:4", "--batches.sise", "2")
    assert "a recipe has no field 'batches.sise': did you mean batches.size" in said


def test_a_value_that_a_field_cannot_have_is_refused(program):
    said = program("debug", "--data", "synthetic:4", "--batches.size", "two")
    assert "batches.size must be a whole number, not 'two'" in said


def test_without_data_there_is_nothing_to_train_on(program):
    assert "--data is missing: the path of a data set" in program("finetune")


def test_a_data_set_that_is_not_there_is_told_by_its_name(program, tmp_path):
    assert "nowhere does not exist" in program("finetune", "--data", str(tmp_path / "nowhere"))


def test_too_few_images_for_a_batch_are_refused(program):
    said = program("debug", "--data", "synthetic:3", *[f"--{path}={text}" for path, text in TINY.items()], "--images=1")
    assert "1 images do not fill a batch of 2: lower batches.size" in said


def test_a_field_without_its_value_is_refused(capsys):
    with pytest.raises(SystemExit) as raised:
        command(["debug", "--data", "synthetic:4", "--batches.size"])
    assert raised.value.code == 2
    assert "--batches.size has no value" in capsys.readouterr().err


def test_a_word_that_belongs_to_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        command(["debug", "synthetic:4"])
    assert "'synthetic:4' belongs to nothing" in capsys.readouterr().err


def test_half_an_address_of_several_processes_is_refused(program):
    assert "give processes, index too" in program("debug", "--coordinator", "127.0.0.1:1")


def test_a_batch_that_the_devices_cannot_share_is_refused_before_anything_is_written(tmp_path):
    recipe = override(WHOLE, {"batches.size": "6"})
    with pytest.raises(ShardingError, match="6 images cannot be shared out evenly over 8 devices"):
        train(recipe, None, SMALL, Place(folder=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(DataError, match="3 hosts cannot share a batch of 8 images evenly"):
        training_source(WHOLE, SMALL, Place(folder=Path("run")))


def test_a_folder_that_has_a_run_is_not_begun_anew(tmp_path):
    saved_run(tmp_path, data_mesh())
    with pytest.raises(CheckpointError, match=r"has a run that has made 4 steps: --resume.*another --output"):
        train(WHOLE, None, SMALL, Place(folder=tmp_path))
    assert saved_steps(tmp_path) == [4]


def test_resuming_with_other_settings_names_what_differs(tmp_path):
    saved_run(tmp_path, data_mesh())
    changes = {"optimisation.learning_rate": "0.5", "model.decoder.queries": "13", "keeping.save_steps": "9"}
    with pytest.raises(CheckpointError) as raised:
        train(override(WHOLE, changes), None, SMALL, Place(folder=tmp_path, resume=True))
    said = str(raised.value)
    assert "optimisation.learning_rate was 0.001, is 0.5" in said
    assert "model.decoder.queries was 12, is 13" in said
    assert "keeping" not in said
    assert "--start" in said


def test_images_of_another_number_than_before_are_told_from_those(tmp_path):
    before = {"step": 4, "images": 16, "batch_size": 8, "seed": 0}
    source = training_source(WHOLE, open_data("synthetic:17", validation_split="none"), Place(folder=tmp_path))
    with pytest.raises(DataError, match="images was 16, is 17"):
        TrainingBatches(source, mesh=data_mesh(), state=before)


def test_a_start_from_another_network_is_refused(program, tmp_path, tiny_model):
    save_model(tiny_model, tmp_path / "model")
    said = program("debug", "--data", "synthetic:4", "--start", str(tmp_path / "model"))
    assert "is of another network than recipe debug" in said
