"""Runtimes in turns: what fails is told, what is slow is ended, and the rest is measured. Played by small programs."""

import stat
import sys
import time
from types import SimpleNamespace

import pytest

from rtdetrv2_jax.benchmark import turns
from rtdetrv2_jax.benchmark.turns import Measured, measure, roofline

PLAYER = """\
#!{python}
import json, sys, time
name = sys.argv[3]
if name == "broken":
    sys.exit("no compiler is there: install one")
if name == "silent":
    time.sleep(60)
print("x" * 200_000, file=sys.stderr)
print(json.dumps(dict(ready=1.5, version=name + " 1.0", scores=[0.5, 0.25], cost=[2e9, 1e9])), flush=True)
for line in sys.stdin:
    kind, runs = line.split()
    if name == "fragile" and kind == "whole":
        sys.exit("out of memory")
    print(json.dumps(dict(seconds=[0.5] * int(runs))), flush=True)
"""


@pytest.fixture(autouse=True)
def players(tmp_path, monkeypatch):
    """In the place of Python, a program that plays the runtime that is asked for."""
    player = tmp_path / "player"
    player.write_text(PLAYER.format(python=sys.executable))
    player.chmod(player.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(turns, "sys", SimpleNamespace(executable=str(player)))
    monkeypatch.setattr(turns, "PAUSE_SECONDS", 0.0)


def test_a_runtime_that_fails_is_told_of_and_the_others_are_measured(tmp_path):
    measured, failed = measure(["good", "broken", "fragile", "other"], tmp_path, dtype="float32", batch=4, rounds=3)
    assert [(one.runtime, len(one.device), len(one.whole)) for one in measured] == [("good", 3, 3), ("other", 3, 3)]
    assert [(one.runtime, one.batch) for one in failed] == [("broken", 4), ("fragile", 4)]
    assert "install one" in failed[0].reason
    assert "out of memory" in failed[1].reason


def test_where_all_fail_nothing_is_measured(tmp_path):
    measured, failed = measure(["broken"], tmp_path, dtype="float32", batch=1, rounds=1)
    assert not measured
    assert len(failed) == 1


def test_a_runtime_that_is_not_ready_in_time_is_ended_and_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "GRACE_SECONDS", 0.2)
    _, (failed,) = measure(["silent"], tmp_path, dtype="float32", batch=1, rounds=1, until=time.monotonic())
    assert failed.reason.startswith("silent said nothing")


def test_when_the_time_is_over_no_round_begins_but_the_first(tmp_path):
    (one,), _ = measure(["good"], tmp_path, dtype="float32", batch=1, rounds=1000, until=time.monotonic() - 1.0)
    assert len(one.device) == len(one.whole) == 1


def test_a_turn_may_be_of_several_runs(tmp_path):
    (one,), _ = measure(["good"], tmp_path, dtype="float32", batch=1, rounds=2, runs=5)
    assert len(one.device) == len(one.whole) == 10


def test_a_summary_tells_times_and_what_they_mean():
    one = Measured("jax", "jax 1", 8, 1.0, [0.1, 0.2, 0.4], [0.5], 0.0, (4e9, 2e9)).summary()
    assert one["device_p50_ms"] == 200.0
    assert one["images_per_second"] == 40.0
    assert one["whole_images_per_second"] == 16.0
    assert (one["gflop"], one["tflop_per_second"], one["tbyte_per_second"]) == (4.0, 0.02, 0.01)
    assert roofline(None, seconds=1.0) == {}
