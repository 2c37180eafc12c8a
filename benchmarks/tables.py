"""The tables of measurements, made from the files of results/: `python -m benchmarks.tables` writes them.

They stand in the project's README, and more of them in this folder's.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
PAGES = Path(__file__).parents[1] / "README.md", Path(__file__).parent / "README.md"
PLACE = re.compile(
    r"(?P<begin><!-- table: results/(?P<name>[\w.-]+)\.json[^>]*-->\n).*?(?P<end><!-- end of table -->)", re.DOTALL
)
"""Where a table stands in a page; the comment before it names its file."""
ABOUT = ("model", "dtype", "batch", "side")
SAME = (*ABOUT, "problems", "queries", "targets", "costs")
"""What figures share that are of the same work."""


def written(text: str, results: Path = RESULTS) -> str:
    """A page with every table made anew."""

    def table(place: re.Match[str]) -> str:
        record = json.loads((results / f"{place['name']}.json").read_text(encoding="utf-8"))
        return place["begin"] + layout(record) + place["end"]

    return PLACE.sub(table, text)


def layout(record: dict[str, Any]) -> str:
    """A measurement as Markdown: a sentence with what, where, when and how, and a table of its figures.

    What all figures share (the model, say) is in the sentence, and what differs is in columns.
    """
    figures, rows = record["figures"], ROWS[record["what"]]
    shared = {name: figures[0][name] for name in ABOUT if name in figures[0] and _one(figures, name)}
    differing = [name for name in ABOUT if name in figures[0] and name not in shared]
    cells = [
        {name: str(figure[name]) for name in differing}
        | rows(figure)
        | _ratio(figure, figures, TIMES.get(record["what"]))
        for figure in figures
    ]
    columns = list(dict.fromkeys(column for row in cells for column in row))
    words = [f"{name} {value}" if name in ("batch", "side") else str(value) for name, value in shared.items()]
    sentence = "; ".join([*filter(None, [", ".join(words)]), record["machine"], record["date"]])
    return "\n".join(
        [
            f"{sentence}; `{record['command']}`:",
            "",
            _line(columns),
            "|---" * len(columns) + "|",
            *(_line([row.get(column, "") for column in columns]) for row in cells),
            "",
        ]
    )


def network(figure: Row) -> dict[str, str]:
    """A runtime's times; "whole" is from JPEG bytes to boxes."""
    row = {
        "runtime": f"this library, {figure['version']}" if figure["runtime"] == "jax" else figure["version"],
        "network alone, ms": number(figure["device_p50_ms"]),
        "whole, ms": number(figure["whole_p50_ms"]),
        "images a second": f"{figure['images_per_second']:.1f}",
    }
    return row | _reached(figure)


def training_step(figure: Row) -> dict[str, str]:
    """A program's steps, and how much of ours is matching."""
    row = {
        "program": f"this one, {figure['version']}" if figure["kind"] == "jax" else figure["version"],
        "step, ms": number(1000 * figure["step_p50_s"]),
        "images a second": f"{figure['images_per_second']:.1f}",
    }
    share = {"matching": f"{figure['matching_share']:.1%}"} if "matching_share" in figure else {}
    return row | share | _reached(figure)


def assignment(figure: Row) -> dict[str, str]:
    """A solver's time for a number of problems."""
    return {
        "problems": f"{figure['problems']} of {figure['queries']} by {figure['targets']}",
        "costs": figure["costs"],
        "solver": figure["version"],
        "ms": number(figure["p50_ms"]),
    }


def images(figure: Row) -> dict[str, str]:
    """How fast training images are made."""
    return {
        "what is done": figure["work"],
        "images a second and core": f"{figure['images_per_second']:.1f}",
        "ms an image": number(1000 / figure["images_per_second"]),
    }


def compiled_step(figure: Row) -> dict[str, str]:
    """What a training step takes of a chip, as its compiler counts it."""
    moved = sum(each["bytes"] for each in figure["collectives"])
    return {
        "recipe": figure["recipe"],
        "chips": figure["topology"],
        "images a chip": str(figure["batch_per_chip"]),
        **_counted(figure),
        **({"exchanged, MB": number(moved / 1e6)} if moved else {}),
    }


def compiled_detection(figure: Row) -> dict[str, str]:
    """What detecting in a batch takes of a chip, as its compiler counts it."""
    row = {"chip": figure["topology"].partition(":")[0]} | _counted(figure)
    if "full_speed_ms" in figure:
        rate = 1000 * figure["batch"] / figure["full_speed_ms"]
        row |= {"at full speed, ms": number(figure["full_speed_ms"]), "images a second": number(rate)}
    return row


ROWS = {
    "network": network,
    "training step": training_step,
    "assignment": assignment,
    "input": images,
    "compiled step": compiled_step,
    "compiled detection": compiled_detection,
}
"""How a figure becomes a row, by what was measured."""


TIMES = {"network": "device_p50_ms", "training step": "step_p50_s", "assignment": "p50_ms"}
"""The time by which those that did the same are compared, where several did."""


def number(value: float) -> str:
    """With three digits, or as many as stand before the point."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _counted(figure: Row) -> dict[str, str]:
    """Compilers count operations for TPUs, and estimate cycles; for GPUs kernels are counted."""
    row = {
        "memory, GiB": f"{figure['memory'] / 2**30:.1f} of {figure['memory_limit'] / 2**30:.1f}",
        **({"TFLOP": number(figure["flops"] / 1e12)} if figure["flops"] else {}),
        "accessed, GB": number(figure["bytes_accessed"] / 1e9),
    }
    if not figure["cycles"]:
        return row | {"kernels": f"{figure['launches']:,}"}
    share = f"{figure['product_cycles'] / figure['cycles']:.0%}"
    return row | {"million cycles": number(figure["cycles"] / 1e6), "with products": share}


def _ratio(figure: Row, figures: Sequence[Row], time: str | None) -> dict[str, str]:
    """The time of the first that did the same, over this one's."""
    if time is None:
        return {}
    first = next(each for each in figures if all(each.get(name) == figure.get(name) for name in SAME))
    return {"ratio": f"{first[time] / figure[time]:.2f}"}


def _reached(figure: Row) -> dict[str, str]:
    return {"TFLOP/s": number(figure["tflop_per_second"])} if "tflop_per_second" in figure else {}


def _one(figures: Sequence[Row], name: str) -> bool:
    return len({figure.get(name) for figure in figures}) == 1


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Writes the tables into their pages."""
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
