import io
import math
import re

import pytest
from rich.console import Console

from train import progress
from train.journal import StepRecord
from train.progress import LINE_SECONDS, Progress, duration


class Clock:
    """A time that passes when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


def record(step, **changes):
    fields = {"epoch": (step - 1) // 50, "losses": {}, "total": 20.0, "gradient_norm": 1.0, "learning_rate": 1e-4}
    fields |= {"boxes": 9, "skipped": 0, "images_per_second": 44.4, "wait_seconds": 0.5, "side": 640}
    return StepRecord(step=step, **(fields | {"memory_bytes": 11_000_000_000} | changes))


def plain():
    """A console of a log file."""
    return Console(file=io.StringIO(), width=40, force_terminal=False)


def lines(console):
    """What a log file has, without the times of day."""
    written = console.file.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in written)
    return [line[9:] for line in written]


def shown(shown_by, *, width=200):
    """What the lines at the bottom of a terminal show."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(shown_by.picture())
    return console.file.getvalue().splitlines()


def test_a_log_file_gets_the_first_step_the_last_and_one_now_and_then(clock):
    console = plain()
    with Progress(steps=200, at_step=0, steps_per_epoch=50, console=console) as shown_by:
        for step in range(1, 201):
            clock.now += 1.0
            shown_by.step(record(step))
    said = [int(re.match(r"step (\d+)/200", line)[1]) for line in lines(console)]
    assert said == [*range(1, 201, int(LINE_SECONDS)), 200]


def test_a_line_of_a_log_file_has_all_figures_and_is_never_folded(clock):
    console = plain()
    with Progress(steps=200, at_step=100, steps_per_epoch=50, console=console) as shown_by:
        shown_by.step(record(101))
        clock.now += 60.0
        shown_by.step(record(131, skipped=2))
    first, second = lines(console)
    assert first == "step 101/200 · epoch 3/4 · loss 20 · 44.4 images/s · 11.0 GB"
    assert second == (
        "step 131/200 · epoch 3/4 · loss 20 · 2 skipped · 44.4 images/s · input wait 25% · 11.0 GB · 2 min left"
    )


def test_what_is_said_comes_at_once_as_it_is(clock):
    console = plain()
    with Progress(steps=200, at_step=0, steps_per_epoch=50, console=console) as shown_by:
        shown_by.say("saved step 10 to runs/[bold]a[/bold]")
        shown_by.evaluated(10, {"ap": 0.34567, "ap50": 0.5, "ap_small": math.nan, "ap_large": 0.75, "ar1": 0.5})
    assert lines(console) == ["saved step 10 to runs/[bold]a[/bold]", "step 10: AP 34.6%, AP50 50.0%, AP large 75.0%"]


def test_the_bar_shows_step_figures_the_last_ap_and_what_was_done_last(clock):
    shown_by = Progress(steps=200, at_step=100, steps_per_epoch=50, console=plain())
    (bar,) = shown(shown_by)
    assert bar.endswith("100/200 50% compiling")
    shown_by.step(record(101))
    clock.now += 60.0
    shown_by.step(record(131))
    shown_by.evaluated(131, {"ap": 0.34567, "ap50": 0.5, "ap_small": math.nan, "ap_large": 0.75, "ar1": 0.5})
    shown_by.say("saved\nstep 131")
    bar, figures, last = shown(shown_by)
    assert bar.endswith("131/200 65% 2 min left")
    assert figures == "epoch 3/4 · loss 20 · 44.4 images/s · input wait 25% · 11.0 GB"
    assert last == "AP 34.6% · saved step 131"


@pytest.mark.parametrize("width", [20, 40, 80])
def test_the_bar_never_takes_more_than_three_lines(clock, width):
    shown_by = Progress(steps=200_000, at_step=0, steps_per_epoch=50, console=plain())
    shown_by.step(record(100_000, skipped=3))
    clock.now += 1e6
    shown_by.step(record(123_456, skipped=3))
    shown_by.say("saved " + "x" * 300)
    written = shown(shown_by, width=width)
    assert len(written) == 3
    assert all(len(line) <= width for line in written)


def test_a_terminal_has_a_live_bar_below_what_was_said(clock):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, force_interactive=True)
    with Progress(steps=200, at_step=0, steps_per_epoch=50, console=console) as shown_by:
        shown_by.step(record(1))
        shown_by.say("saved step 1")
        shown_by.step(record(2))
    shown_by.close()
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", console.file.getvalue())
    assert re.search(r"\d\d:\d\d:\d\d saved step 1\n", text)
    assert text.rindex("2/200 1%") > text.index("saved step 1\n")
    assert "step 2/200" not in text


def test_a_loss_that_is_not_finite_is_told_and_forgotten(clock):
    shown_by = Progress(steps=200, at_step=0, steps_per_epoch=50, console=plain())
    shown_by.step(record(1, total=math.nan))
    assert "loss not finite" in shown_by.figures()
    shown_by.step(record(2, total=30.0))
    shown_by.step(record(3, total=math.inf))
    assert "loss not finite" in shown_by.figures()
    shown_by.step(record(4, total=20.0))
    assert "loss 29" in shown_by.figures()


def test_time_left_is_reckoned_from_the_first_record_and_with_pauses(clock):
    shown_by = Progress(steps=100, at_step=0, steps_per_epoch=10, console=plain())
    clock.now += 500  # compilation
    shown_by.step(record(1))
    assert shown_by.time_left() == ""
    clock.now += 8
    shown_by.step(record(9))
    clock.now += 12  # an evaluation
    shown_by.step(record(11))
    assert shown_by.time_left() == f"{duration(89 * 20 / 10)} left"


def test_input_wait_is_a_share_of_the_time_and_never_more_than_all(clock):
    shown_by = Progress(steps=100, at_step=0, steps_per_epoch=10, console=plain())
    shown_by.step(record(1))
    clock.now += 1
    shown_by.step(record(11, wait_seconds=7.0))
    assert shown_by.waiting == 1.0
    for step in range(12, 100):
        clock.now += 1
        shown_by.step(record(step, wait_seconds=0.25))
    assert shown_by.waiting == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3599, "1 h 00 min"),
        (3900, "1 h 05 min"),
        (47.4 * 3600, "47 h 24 min"),
        (47.9 * 3600, "2 d 0 h"),
        (1e6, "11 d 14 h"),
    ],
)
def test_a_duration_is_said_in_its_largest_units(seconds, text):
    assert duration(seconds) == text


def test_a_run_with_nothing_left_to_do_is_shown_too(clock):
    shown_by = Progress(steps=0, at_step=0, steps_per_epoch=1, console=plain())
    assert "0/0" in shown(shown_by)[0]
