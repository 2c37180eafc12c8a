"""`curves.png`: a run at a glance, drawn from its journal; the one door of matplotlib."""

import functools
import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from rtdetrv2_jax.replacing import replaced_file

from .journal import read_journal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

CURVES = "curves.png"
MOST_POINTS = 500
"""Longer curves are drawn as the means of so many parts, about what a picture can show."""
WINDOW = 0.06
"""The share of a curve that a running median is taken over."""
FEW_POINTS = 40
"""Up to this many points, each has a dot."""
LOG_FROM = 4.0
"""Values that differ by less than this factor need no logarithmic scale."""
INK, GREY, GRID = "#1f2937", "#6b7280", "#e5e7eb"
BLUE, ORANGE, GREEN, VIOLET = "#2563eb", "#ea580c", "#059669", "#7c3aed"
TERMS = {
    "loss_vfl": ("class", ORANGE),
    "loss_focal": ("class", ORANGE),
    "loss_bbox": ("box, L1", GREEN),
    "loss_giou": ("box, GIoU", VIOLET),
}
"""The terms of the final decoder layer: what the picture calls them, and their colours."""
FIGURES = {"ap50": ("AP50", ORANGE), "ap": ("AP", BLUE)}
"""The figures of evaluations: what the picture calls them, and their colours."""

Entries = Sequence[dict[str, Any]]


class Line(NamedTuple):
    """A curve: values by step, NaN where there is none. In "noisy" ones a running median is what one sees first."""

    name: str
    colour: str
    steps: np.ndarray
    values: np.ndarray
    style: Literal["noisy", "plain"] = "noisy"


def draw_curves(folder: Path) -> Path | None:
    """Draws how the run in a folder has gone so far, and gives the picture, which then lies there too.

    Terms of the loss are those of the final decoder layer; the total has those of all other layers too. A line is a
    running median, the paler one behind it what it is the median of. Where matplotlib is missing nothing is drawn, and
    a warning says so once.
    """
    if not _can_draw():
        return None
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    entries = read_journal(folder)
    steps = [entry for entry in entries if entry["kind"] == "step"]
    evaluations = list({entry["step"]: entry for entry in entries if entry["kind"] == "evaluation"}.values())
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(15, 8), dpi=100, layout=layout, facecolor="white")
    style: dict[str, Any] = {"color": INK, "fontsize": 13, "fontweight": "bold", "parse_math": False}
    figure.suptitle(_title(folder, steps, evaluations), x=0.012, ha="left", **style)
    loss, score, rate, norm, speed, wait = figure.subplots(2, 3, sharex=True).flat

    terms = [(name, *look) for name, look in TERMS.items() if any(name in entry["losses"] for entry in steps)]
    lines = [_line(label, colour, steps, "losses", name) for name, label, colour in terms]
    _panel(loss, "Loss", [_line("total", BLUE, steps, "total"), *lines], scale="log")
    figures = [_line(*look, evaluations, "figures", name) for name, look in FIGURES.items()]
    figures = [line._replace(values=100 * line.values, style="plain") for line in figures]
    _panel(score, "Average precision by evaluation, percent", figures)
    _panel(rate, "Learning rate", [_line("", BLUE, steps, "learning_rate")._replace(style="plain")])
    _panel(norm, "Norm of the gradient, before clipping", [_line("", VIOLET, steps, "gradient_norm")], scale="log")
    _panel(speed, "Images a second", [_line("", GREEN, steps, "images_per_second")])
    waits = _line("", ORANGE, steps, "wait_seconds")
    _panel(wait, "Wait for input, milliseconds a step", [waits._replace(values=1000 * waits.values)])
    for axes in (norm, speed, wait):
        axes.set_xlabel("step", color=GREY)

    with warnings.catch_warnings(), replaced_file(folder / CURVES) as partial:
        warnings.filterwarnings("ignore", message="Glyph")  # that the font lacks for the name of the folder
        figure.savefig(partial, format="png")
    return folder / CURVES


@functools.cache
def _can_draw() -> bool:
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        logger.warning("curves are not drawn, since matplotlib is missing: pip install -e '.[train]'")
    return found


def _title(folder: Path, steps: Entries, evaluations: Entries) -> str:
    """The name of a run, how far it is, and how good it was at its best."""
    said = [folder.resolve().name]
    if steps:
        said.append(f"step {steps[-1]['step']:,} in epoch {steps[-1]['epoch'] + 1}")
    scored = [
        (entry["figures"]["ap"], entry["step"]) for entry in evaluations if entry["figures"].get("ap") is not None
    ]
    if scored:
        best, step = max(scored)
        said.append(f"best AP {best:.1%} at step {step:,}")
    if skipped := steps[-1]["skipped"] if steps else 0:
        said.append(f"{skipped:,} step{'s' if skipped > 1 else ''} skipped")
    return "   ·   ".join(said)


def _line(label: str, colour: str, entries: Entries, *path: str) -> Line:
    """The line of the values that entries have under some names, one inside the other."""
    found = [functools.reduce(lambda value, name: (value or {}).get(name), path, entry) for entry in entries]
    return Line(label, colour, np.array([entry["step"] for entry in entries], float), np.array(found, float))


def _panel(axes: "Axes", title: str, lines: Sequence[Line], *, scale: Literal["linear", "log"] = "linear") -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(which="both", colors=GREY)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    lines = [line for line in lines if np.isfinite(line.values).any()]
    for line in lines:
        _draw(axes, line)
    _scale(axes, np.concatenate([line.values for line in lines] or [np.zeros(0)]), scale=scale)
    if not lines:
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", va="center", color=GREY)
    elif lines[0].name:
        axes.legend(frameon=False, labelcolor=INK, ncols=2, loc="best")


def _draw(axes: "Axes", line: Line) -> None:
    steps, values = _parts(line.steps), _parts(line.values)
    if line.style == "noisy":
        axes.plot(steps, values, color=line.colour, alpha=0.25, linewidth=1)
        values = _running_median(values, window=round(WINDOW * len(values)))
    marker = "o" if len(values) <= FEW_POINTS else ""
    axes.plot(steps, values, color=line.colour, label=line.name, linewidth=1.8, marker=marker, markersize=4.5)


def _scale(axes: "Axes", values: np.ndarray, *, scale: Literal["linear", "log"]) -> None:
    """The scales of a panel with these values: from 0, or logarithmic where that is asked for and of use.

    Zeros, such as a box loss without boxes, are gaps on a logarithmic scale.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    values = values[np.isfinite(values) & (values > 0)]
    if scale == "log" and len(values) and values.max() > LOG_FROM * values.min():
        axes.set_yscale("log", nonpositive="mask")
        wide = values.max() > 1000 * values.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.1 * max(values, default=0.0) or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def number(value: float) -> str:
    """A value on an axis: `0.25`, `3,000`, `2.5e-5`."""
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.6g}"


def _parts(values: np.ndarray) -> np.ndarray:
    """The means of the finite values in each of `MOST_POINTS` parts, or the values themselves if they are fewer."""
    if len(values) <= MOST_POINTS:
        return values
    starts = np.linspace(0, len(values), MOST_POINTS, endpoint=False).astype(int)
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite.astype(float), starts)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    return np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)


def _running_median(values: np.ndarray, *, window: int) -> np.ndarray:
    """The median of the finite values up to half a window away, fewer at the ends; NaN where there is none."""
    medians = np.full(len(values), np.nan)
    for index in range(len(values)):
        near = values[max(0, index - window // 2) : index + window // 2 + 1]
        near = near[np.isfinite(near)]
        medians[index] = np.median(near) if len(near) else np.nan
    return medians
