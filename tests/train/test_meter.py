"""The meter: which steps it tells of and when, what it counts as speed, and when it sounds the alarm."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdetrv2_jax.arrays import Targets
from rtdetrv2_jax.objective.losses import Losses, Terms
from train import meter as module
from train.batch import Batch
from train.batches import LoadedBatch
from train.journal import StepRecord
from train.meter import LATE, MOST_SKIPPED, Meter, TrainingError
from train.recipe import override
from train.recipes import debug
from train.step import Metrics

SIZE = 2
RECIPE = override(debug(), {"batches.size": str(SIZE), "keeping.report_steps": "4"})


class Named(NamedTuple):
    image_id: str


PICTURES = [Named(f"picture {position}") for position in range(100)]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that the meter sees, in seconds: a list of one."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def loaded(step: int, *, wait: float = 0.0) -> LoadedBatch:
    """A batch whose images are numbers `SIZE * step` and on."""
    ids = jnp.arange(SIZE * step, SIZE * step + SIZE, dtype=jnp.int32)
    targets = Targets(np.zeros((SIZE, 1), np.int32), np.zeros((SIZE, 1, 4), np.float32), np.zeros((SIZE, 1), bool))
    images, content = np.zeros((SIZE, 8, 8, 3), np.uint8), np.zeros((SIZE, 4), np.int32)
    batch = Batch(images, targets, ids, content, np.zeros(SIZE, bool))
    return LoadedBatch(step, step // 10, batch, wait, ())


def metrics(step: int, *, finite: bool = True) -> Metrics:
    """Figures in which the number of the step can be seen."""
    value = jnp.float32(step if finite else np.nan)
    none = Terms(*(jnp.zeros(0, jnp.float32),) * 3)
    losses = Losses(value, Terms(*(value[None],) * 3), Terms(*(value,) * 3), none)
    return Metrics(losses, value, value / 100, jnp.int32(step), jnp.bool_(finite), jnp.int32(0))


def after(meter: Meter, step: int, *, finite: bool = True, last: bool = False, wait: float = 0.0) -> list[StepRecord]:
    return meter.after(loaded(step, wait=wait), metrics(step, finite=finite), side=64, last=last)


def test_records_are_of_the_first_step_and_of_every_so_many_and_never_twice():
    meter = Meter(RECIPE, PICTURES)
    given = [record for step in range(14) for record in after(meter, step)] + meter.flush()
    assert [record.step for record in given] == [1, 4, 8, 12]
    assert meter.flush() == []


def test_a_record_has_the_figures_of_its_own_step():
    meter = Meter(RECIPE, PICTURES)
    for record in [record for step in range(20) for record in after(meter, step)]:
        step = record.step - 1
        assert (record.total, record.gradient_norm, record.boxes, record.epoch) == (step, step, step, step // 10)
        assert record.losses == dict.fromkeys(
            ("loss_vfl", "loss_bbox", "loss_giou", "loss_vfl_enc_0", "loss_bbox_enc_0", "loss_giou_enc_0"), step
        )
        assert record.learning_rate == pytest.approx(step / 100)
        assert (record.side, record.skipped) == (64, 0)


def test_figures_are_read_when_later_steps_are_on_their_way():
    meter = Meter(RECIPE, PICTURES)
    came = {record.step: step + 1 for step in range(14) for record in after(meter, step)}
    assert came == {1: 1 + LATE, 4: 4 + LATE, 8: 8 + LATE, 12: 12 + LATE}


@pytest.mark.parametrize("flushed_after", range(1, 10))
def test_a_flush_neither_loses_nor_adds_a_record(flushed_after: int):
    meter, given = Meter(RECIPE, PICTURES), []
    for step in range(14):
        given += after(meter, step)
        if step + 1 == flushed_after:
            given += meter.flush()
    assert [record.step for record in given] == [1, 4, 8, 12]


@pytest.mark.parametrize(("steps", "wanted"), [(10, [1, 4, 8, 10]), (12, [1, 4, 8, 12]), (1, [1])])
def test_the_last_step_has_a_record_in_any_case(steps: int, wanted: list[int]):
    meter, given = Meter(RECIPE, PICTURES), []
    for step in range(steps):
        given += after(meter, step, last=step + 1 == steps)
    assert [record.step for record in given] == wanted


def test_speed_is_images_by_time_since_the_last_record_and_waiting_a_mean(clock):
    meter, given = Meter(RECIPE, PICTURES), []
    for step in range(12):
        clock[0] += 0.5
        given += after(meter, step, wait=0.1)
    assert [record.images_per_second for record in given] == pytest.approx([SIZE / 0.5] * 3)
    assert [record.wait_seconds for record in given] == pytest.approx([0.1] * 3)


def test_images_a_second_leave_evaluation_out(clock):
    meter, given = Meter(RECIPE, PICTURES), []
    for step in range(12):
        clock[0] += 0.5
        given += after(meter, step)
        if step == 7:
            given += meter.flush()
            clock[0] += 1000
            meter.restart_clock()
    assert [record.step for record in given] == [1, 4, 8]
    given += meter.flush()
    assert [record.images_per_second for record in given] == pytest.approx([SIZE / 0.5] * 4)


def test_records_that_come_together_share_their_speed(clock):
    every_step = override(RECIPE, {"keeping.report_steps": "1"})
    meter, given = Meter(every_step, PICTURES), []
    for step in range(6):
        clock[0] += 0.5
        given = after(meter, step, last=step == 5)
    assert [record.step for record in given] == [4, 5, 6]
    assert [record.images_per_second for record in given] == pytest.approx([SIZE / 0.5] * 3)


def test_five_steps_in_a_row_that_are_not_finite_end_the_run_and_name_their_images():
    meter = Meter(RECIPE, PICTURES)
    after(meter, 0)
    with pytest.raises(TrainingError) as raised:  # noqa: PT012
        for step in range(1, 1 + MOST_SKIPPED):
            after(meter, step, finite=False)
        meter.flush()
    said = str(raised.value)
    assert meter.alarmed
    assert said.startswith("5 steps one after another")
    for step in range(1, 1 + MOST_SKIPPED):
        assert f"step {step + 1}: images picture {2 * step}, picture {2 * step + 1}\n" in said
    assert "picture 0," not in said
    assert "--resume" in said


def test_four_in_a_row_do_not():
    meter = Meter(RECIPE, PICTURES)
    for step in range(MOST_SKIPPED - 1):
        after(meter, step, finite=False)
    meter.flush()
    assert not meter.alarmed


def test_one_finite_step_in_between_and_the_count_starts_anew():
    meter = Meter(RECIPE, PICTURES)
    for step in range(4 * MOST_SKIPPED):
        after(meter, step, finite=step % MOST_SKIPPED == 0)
    meter.flush()
    assert not meter.alarmed
    with pytest.raises(TrainingError, match="step 22: "):  # noqa: PT012
        for step in range(4 * MOST_SKIPPED, 5 * MOST_SKIPPED + 1):
            after(meter, step, finite=step == 4 * MOST_SKIPPED)
        meter.flush()


def test_a_step_that_is_not_finite_is_told_as_such():
    meter = Meter(RECIPE, PICTURES)
    (record,) = after(meter, 0, finite=False, last=True)
    assert np.isnan(record.total)
    assert record.step == 1
    assert jax.tree.all(jax.tree.map(np.isnan, record.losses))
