"""Several files of one measurement, taken on one machine, made one: `python -m benchmarks.merge RESULT PART...`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtdetrv2_jax.weights.files import write_json

SAME = ("what", "machine", "versions")
"""What the parts of one result must agree in."""


class MergeError(ValueError):
    """Parts that do not belong together."""


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record with the figures of all, in order; its date and commands are those of the parts.

    Raises:
        MergeError: They measured different things, or on different machines, or with different versions.
    """
    for name in SAME:
        if len({json.dumps(part[name], sort_keys=True) for part in parts}) > 1:
            raise MergeError(f"the parts differ in {name!r}: {', '.join(str(part[name]) for part in parts)}")
    return parts[0] | {
        "date": " to ".join(sorted({parts[0]["date"], parts[-1]["date"]})),
        "command": "; ".join(dict.fromkeys(part["command"] for part in parts)),
        "figures": [figure for part in parts for figure in part["figures"]],
        "failed": [one for part in parts for one in part["failed"]],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Merges, and gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=__doc__)
    parser.add_argument("result", type=Path, metavar="RESULT")
    parser.add_argument("parts", type=Path, nargs="+", metavar="PART")
    arguments = parser.parse_args(argv)
    try:
        record = merged([json.loads(part.read_text(encoding="utf-8")) for part in arguments.parts])
    except MergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_json(arguments.result, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
