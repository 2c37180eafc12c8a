import json
import math
import struct
import sys
import time

import numpy as np
import pytest

from train.journal import LOG, TENSORBOARD, Journal, JournalError, StepRecord, read_journal

FIGURES = {"ap": 0.25, "ap50": 0.5}


def record(step, **changes):
    fields = {
        "epoch": step // 10,
        "losses": {"loss_vfl": 1.5, "loss_giou_aux_0": 0.5},
        "total": 2.0,
        "gradient_norm": 3.0,
        "learning_rate": 1e-4,
        "boxes": 7,
        "skipped": 0,
        "images_per_second": 40.0,
        "wait_seconds": 0.01,
        "side": 640,
        "memory_bytes": 2**33,
    }
    return StepRecord(step=step, **(fields | changes))


def evaluate(journal, step, **figures):
    journal.evaluation(
        step, epoch=step // 10, figures=FIGURES | figures, per_class={"traffic light": 0.25}, seconds=8.5
    )


def strict(folder):
    """The lines of a journal, read by a parser that takes nothing but JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_what_is_written_down_can_be_read_again(tmp_path):
    began = time.time()
    with Journal(tmp_path / "runs" / "first") as journal:
        journal.event(0, "began", devices=8)
        journal.step(record(10))
        evaluate(journal, 10)
    event, step, evaluation = read_journal(tmp_path / "runs" / "first")
    assert event.pop("time") == pytest.approx(began, abs=5)
    assert event == {"kind": "event", "step": 0, "text": "began", "facts": {"devices": 8}}
    assert step.pop("time") >= round(began, 3)
    assert step == {"kind": "step"} | record(10)._asdict()
    assert evaluation.pop("time") >= round(began, 3)
    assert evaluation == {
        "kind": "evaluation",
        "step": 10,
        "epoch": 1,
        "figures": FIGURES,
        "per_class": {"traffic light": 0.25},
        "seconds": 8.5,
    }


def test_a_run_that_has_written_nothing_has_an_empty_journal(tmp_path):
    assert read_journal(tmp_path) == []
    assert read_journal(tmp_path / "nowhere") == []
    Journal(tmp_path).close()
    assert read_journal(tmp_path) == []


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    with Journal(tmp_path) as journal:
        for step in (1, 2, 3):
            journal.step(record(step))
            assert [entry["step"] for entry in strict(tmp_path)] == list(range(1, step + 1))


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with Journal(tmp_path) as journal:
        journal.step(
            record(1, total=math.nan, gradient_norm=math.inf, losses={"loss_vfl": -math.inf, "loss_bbox": 1.0})
        )
        evaluate(journal, 1, ap=np.float32("nan"))
    step, evaluation = strict(tmp_path)
    assert step["total"] is step["gradient_norm"] is None
    assert step["losses"] == {"loss_vfl": None, "loss_bbox": 1.0}
    assert evaluation["figures"] == {"ap": None, "ap50": 0.5}


def test_numbers_and_arrays_of_numpy_and_other_things_are_written_as_json_has_them(tmp_path):
    values = {"scalar": np.float32(0.5), "count": np.int64(3), "array": np.array([1.0, np.nan]), "flag": np.True_}
    with Journal(tmp_path) as journal:
        journal.event(np.int32(4), "mixed", folder=tmp_path, pair=(1, None), **values)
    (event,) = strict(tmp_path)
    expected = {"scalar": 0.5, "count": 3, "array": [1.0, None], "flag": True}
    assert event["facts"] == {"folder": str(tmp_path), "pair": [1, None]} | expected
    assert event["step"] == 4


@pytest.mark.parametrize(
    "text", ["größe, 自転車 🚲", "two\nlines\r\u2028and\u0085more", 'a "quote" \\ and \0', "\udcff"]
)
def test_any_text_is_one_line_and_comes_back(tmp_path, text):
    with Journal(tmp_path) as journal:
        journal.event(1, text)
        journal.event(2, "next")
    assert (tmp_path / LOG).read_bytes().count(b"\n") == 2
    assert [entry["text"] for entry in read_journal(tmp_path)] == [text, "next"]


def test_resuming_drops_the_lines_of_later_steps_and_goes_on(tmp_path):
    with Journal(tmp_path) as journal:
        for step in range(1, 10):
            journal.step(record(step))
        evaluate(journal, 9)
    before = (tmp_path / LOG).read_bytes()
    with Journal(tmp_path, at_step=6) as journal:
        assert (tmp_path / LOG).read_bytes() == b"".join(before.splitlines(keepends=True)[:6])
        journal.step(record(7, total=5.0))
    assert [(entry["step"], entry["total"]) for entry in strict(tmp_path)] == [(n, 2.0) for n in range(1, 7)] + [
        (7, 5.0)
    ]
    assert [path.name for path in tmp_path.iterdir()] == [LOG]


def test_what_was_said_at_the_saved_step_itself_stays(tmp_path):
    with Journal(tmp_path) as journal:
        journal.step(record(5))
        journal.event(5, "saved")
    before = (tmp_path / LOG).read_bytes()
    Journal(tmp_path, at_step=5).close()
    assert (tmp_path / LOG).read_bytes() == before


@pytest.mark.parametrize("cut", [1, 2, 20, 150])
def test_a_line_torn_by_a_kill_is_left_out_and_the_next_stands_alone(tmp_path, cut):
    with Journal(tmp_path) as journal:
        journal.step(record(1))
        journal.event(1, "é" * 200)
    whole = (tmp_path / LOG).read_bytes()
    (tmp_path / LOG).write_bytes(whole[:-cut])
    expected = [1, 1] if cut == 1 else [1]  # without its newline alone, a line is whole
    assert [entry["step"] for entry in read_journal(tmp_path)] == expected
    with Journal(tmp_path, at_step=1) as journal:
        journal.step(record(2))
    assert [entry["step"] for entry in strict(tmp_path)] == [*expected, 2]


def test_a_kill_while_later_lines_are_dropped_loses_none(tmp_path, monkeypatch):
    with Journal(tmp_path) as journal:
        for step in (1, 2):
            journal.step(record(step))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        Journal(tmp_path, at_step=1)
    assert [entry["step"] for entry in read_journal(tmp_path)] == [1, 2]


def test_closing_twice_is_closing(tmp_path):
    journal = Journal(tmp_path)
    journal.close()
    journal.close()


def test_without_its_package_tensorboard_is_an_error_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(JournalError, match=r"pip install -e '\.\[tensorboard\]'"):
        Journal(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
    Journal(tmp_path / "run").close()


def scalars(folder):
    """Every (tag, step, value) of TensorBoard's files, and the steps from which on earlier ones are to be forgotten."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found, restarts = [], []
    for file in sorted((folder / TENSORBOARD).iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            found += [(value.tag, event.step, pytest.approx(value.simple_value)) for value in event.summary.value]
            restarts += [event.step] if event.HasField("session_log") else []
    return found, restarts


def test_tensorboard_gets_the_finite_numbers_and_is_told_where_a_run_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    with Journal(tmp_path, at_step=4, tensorboard=True) as journal:
        journal.step(record(5, total=math.nan, memory_bytes=None))
        evaluate(journal, 5, ap50=math.nan)
    found, restarts = scalars(tmp_path)
    assert restarts == [5]
    assert {step for _, step, _ in found} == {5}
    values = {tag: value for tag, _, value in found}
    assert values["loss/loss_vfl"] == 1.5
    assert values["run/learning_rate"] == 1e-4
    assert values["evaluation/ap"] == 0.25
    assert values["ap_of_classes/traffic_light"] == 0.25
    assert not {"loss/total", "run/memory_bytes", "evaluation/ap50"} & set(values)
