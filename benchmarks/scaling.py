"""How training would scale over TPU chips, from what the compiler says of one step: `python -m benchmarks.scaling`.

It writes scaling.md from results/tpu_steps.json, which `python -m train compile-check --json` wrote; nothing is
measured here, and the page says so.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results" / "tpu_steps.json"
PAGE = Path(__file__).parent / "scaling.md"

SECONDS_A_HOP = 1e-6


class Chip(NamedTuple):
    """What a chip can do, as published: FLOP and bytes of its memory and of one direction of one link, each second."""

    flops: float
    memory: float
    link: float


class Slice(NamedTuple):
    """Chips in a grid. Without links around its edges each of its two axes is a line, else a ring."""

    rows: int
    columns: int
    ring: bool

    @property
    def chips(self) -> int:
        """How many."""
        return self.rows * self.columns


# docs.cloud.google.com/tpu/docs/v5e and /v6e: four ports a chip share 400 and 800 GB/s, both directions together.
CHIPS = {"v5e": Chip(197e12, 819e9, 50e9), "v6e": Chip(918e12, 1600e9, 100e9)}
SLICES = (Slice(2, 4, ring=False), Slice(8, 8, ring=False), Slice(16, 16, ring=True))


def exchange_seconds(collectives: list[dict[str, Any]], where: Slice, chip: Chip) -> float:
    """What the exchanges of a step take by themselves, one after another.

    A chip sends and receives each byte of a sum almost twice, over two axes at once; a ring serves both directions of
    an axis, and a line is counted as one. Each exchange also waits for its first byte to go there and back.
    """
    moved = sum(each["bytes"] for each in collectives)
    speed = chip.link * 2 * (2 if where.ring else 1)
    hops = (where.rows + where.columns) / (2 if where.ring else 1)
    waits = sum(each["times"] for each in collectives) * 2 * hops * SECONDS_A_HOP
    return 2 * moved * (where.chips - 1) / where.chips / speed + waits


def least_seconds(figure: dict[str, Any], chip: Chip) -> float:
    """The shortest that the rest of a step can take: its operations or its memory traffic, whichever is longer."""
    return max(figure["flops"] / chip.flops, figure["bytes_accessed"] / chip.memory)


def efficiency(figure: dict[str, Any], where: Slice, chip: Chip) -> float:
    """Images a second and chip, over those of a chip alone, if no exchange overlaps with anything."""
    alone = least_seconds(figure, chip)
    return alone / (alone + exchange_seconds(figure["collectives"], where, chip))


def page(record: dict[str, Any]) -> str:
    """The predictions as Markdown."""
    lines = [ABOUT.strip(), ""]
    for figure in record["figures"]:
        name = figure["topology"].split(":")[0]
        chip, exchanges = CHIPS[name], figure["collectives"]
        moved = sum(each["bytes"] for each in exchanges)
        times = sum(each["times"] for each in exchanges)
        kinds = ", ".join(sorted({each["kind"] for each in exchanges}))
        lines += [
            f"## {figure['recipe']} on {name}, {figure['batch_per_chip']} images a chip, side {figure['side']}",
            "",
            f"A step is {figure['flops'] / 1e12:.2f} TFLOP and {figure['bytes_accessed'] / 1e9:,.0f} GB of memory "
            f"traffic a chip, so at least {1000 * least_seconds(figure, chip):,.0f} ms; it exchanges "
            f"{moved / 1e6:.1f} MB in {times} collectives ({kinds}).",
            "",
            "| chips | exchanges, ms | efficiency, at least |",
            "|---|---|---|",
        ]
        for where in SLICES:
            seconds = exchange_seconds(exchanges, where, chip)
            lines.append(
                f"| {where.chips} ({where.rows}x{where.columns}{', rings' * where.ring}) | {1000 * seconds:.2f} "
                f"| {efficiency(figure, where, chip):.1%} |"
            )
        lines.append("")
    lines.append(f"Compiled on {record['date']} by jax {record['versions']['jax']}: `{record['command']}`.")
    return "\n".join(lines) + "\n"


ABOUT = """
# How training would scale over TPU chips

Nobody has run this on a TPU. These are predictions from the compiled step of four chips, and the speeds that Google
publishes. `python -m benchmarks.scaling` writes this page from `results/tpu_steps.json`, which
`python -m benchmarks.merge` made of the files that the commands at the end of the page wrote.

What is assumed:

- The batch grows with the chips, and each chip does what one of the four did. Parameters are on every chip, so what is
  exchanged are gradients, statistics of batch norms and a few numbers of the loss, the same on 256 chips as on four.
- Nothing overlaps: the exchanges of a step are added to the rest of it. The compiler does overlap some, so this is the
  worst case of what is counted.
- The rest of a step takes no longer than its operations or its memory traffic at full speed would. That is its least, a
  real step takes longer, and the share of the exchanges is then smaller.
- Each link carries its published bytes in one direction, half of those of both. Slices under 256 chips have no links
  around their edges, so that an axis counts as one link and not as two. Each exchange waits for a microsecond a hop,
  there and back across the slice.
- Input keeps up: every host reads its own share.
"""


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
