import importlib.util
import math

import numpy as np
import pytest
from PIL import Image

from train import curves
from train.curves import CURVES, MOST_POINTS, draw_curves, number
from train.journal import Journal, StepRecord

Figure = pytest.importorskip("matplotlib.figure").Figure


def write(folder, *, steps, evaluations=0, broken=()):
    """The journal of a run that learns, some of whose steps are not finite."""
    random = np.random.default_rng(0)
    with Journal(folder) as journal:
        for step in range(1, steps + 1):
            loss = (5 + 25 * math.exp(-4 * step / steps)) * random.lognormal(sigma=0.1)
            losses = {
                "loss_vfl": loss / 10,
                "loss_bbox": loss / 20,
                "loss_giou": loss / 15,
                "loss_vfl_aux_0": loss / 10,
            }
            norm, total = (math.inf, math.nan) if step in broken else (2 * loss, loss)
            skipped = sum(step >= each for each in broken)
            speed = 40 * random.lognormal(sigma=0.02)
            journal.step(StepRecord(step, step // 10, losses, total, norm, 1e-4, 9, skipped, speed, 0.003, 640, None))
        for step in np.linspace(steps, 0, evaluations, endpoint=False, dtype=int)[::-1].tolist():
            figures = {"ap": 0.5 * step / steps, "ap50": 0.7 * step / steps}
            journal.evaluation(step, epoch=step // 10, figures=figures, per_class={"ant": 0.5}, seconds=1.0)
    return folder


def colours(picture):
    """How many pixels have each colour."""
    with Image.open(picture) as image:
        found = image.convert("RGB").getcolors(2**24) or []
    return {f"#{red:02x}{green:02x}{blue:02x}": count for count, (red, green, blue) in found}


def test_a_run_is_drawn_in_the_colours_of_its_curves(tmp_path):
    picture = draw_curves(write(tmp_path / "run", steps=1200, evaluations=6, broken=(300, 301)))
    assert picture == tmp_path / "run" / CURVES
    found = colours(picture)
    for colour in (curves.BLUE, curves.ORANGE, curves.GREEN, curves.VIOLET):
        assert found[colour] > 300
    assert {path.name for path in picture.parent.iterdir()} == {CURVES, "log.jsonl"}


@pytest.mark.parametrize(
    ("steps", "evaluations", "broken"),
    [(0, 0, ()), (1, 0, ()), (1, 1, ()), (1, 0, (1,)), (3, 1, (1, 2, 3)), (40, 0, (2,))],
)
def test_few_points_none_and_none_that_are_finite_are_drawn_too(tmp_path, steps, evaluations, broken):
    write(tmp_path, steps=steps, evaluations=evaluations, broken=broken)
    picture = draw_curves(tmp_path)
    assert picture is not None
    assert colours(picture)["#ffffff"] > 100_000
    assert (curves.BLUE in colours(picture)) == bool(steps)


def test_a_folder_without_a_journal_gives_an_empty_picture(tmp_path):
    picture = draw_curves(tmp_path)
    assert picture is not None
    assert curves.BLUE not in colours(picture)


def test_numbers_written_as_null_are_gaps(tmp_path):
    with Journal(tmp_path) as journal:
        for step, value in enumerate((0.1, math.nan, 0.3), start=1):
            journal.evaluation(step, epoch=0, figures={"ap": value}, per_class={}, seconds=1.0)
    entries = curves.read_journal(tmp_path)
    line = curves._line("AP", curves.BLUE, entries, "figures", "ap")
    np.testing.assert_array_equal(line.values, [0.1, np.nan, 0.3])
    assert np.isnan(curves._line("AP50", curves.BLUE, entries, "figures", "ap50").values).all()
    assert curves._title(tmp_path, [], entries).endswith("best AP 30.0% at step 3")
    assert draw_curves(tmp_path)


def test_a_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "a_$x^{ $ 自転車 \\frac"
    assert draw_curves(write(folder, steps=2)) == folder / CURVES


@pytest.mark.parametrize(
    ("values", "scale"),
    [([30.0, 0.0, 2.0, 1.0], "log"), ([1e9, 1e-9], "log"), ([3.0, 2.0, 2.5], "linear"), ([0.0, 0.0], "linear")],
)
def test_a_scale_is_logarithmic_where_that_is_of_use_and_zeros_are_gaps(values, scale):
    axes = Figure().subplots()
    line = curves.Line("box", curves.GREEN, np.arange(len(values), dtype=float), np.array(values))
    curves._panel(axes, "Loss", [line], scale="log")
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert low <= min(filter(None, values), default=0) <= max(values) <= high


@pytest.mark.parametrize("count", [1, 7, MOST_POINTS, MOST_POINTS + 1, 7 * MOST_POINTS + 3])
def test_long_curves_are_thinned_by_their_means_and_short_ones_left_alone(count):
    values = np.linspace(0, 1, count)
    parts = curves._parts(values)
    assert len(parts) == min(count, MOST_POINTS)
    assert (np.diff(parts) > 0).all()
    assert parts.mean() == pytest.approx(values.mean(), abs=1 / MOST_POINTS)
    assert np.isnan(curves._parts(np.full(count, np.nan))).all()


def test_a_running_median_ignores_spikes_and_gaps_and_keeps_steps():
    level = np.repeat([1.0, 5.0], 50)
    noisy = level.copy()
    noisy[[10, 30, 70]] = 100, np.nan, np.inf
    np.testing.assert_array_equal(curves._running_median(noisy, window=9), level)
    np.testing.assert_array_equal(curves._running_median(level, window=0), level)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (3000, "3,000"),
        (1e-4, "1e-4"),
        (2.5e-5, "2.5e-5"),
        (2e7, "2e7"),
        (0.30000000000000004, "0.3"),
    ],
)
def test_numbers_on_an_axis_are_short(value, text):
    assert number(value) == text


def test_without_matplotlib_nothing_is_drawn_and_one_warning_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    curves._can_draw.cache_clear()
    try:
        assert draw_curves(write(tmp_path, steps=2)) is None
        assert draw_curves(tmp_path) is None
    finally:
        curves._can_draw.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "curves are not drawn, since matplotlib is missing: pip install -e '.[train]'"
    ]
    assert not (tmp_path / CURVES).exists()
