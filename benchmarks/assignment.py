"""How long matching queries with targets takes: ours, optax's and SciPy's solver in turns on the same problems.

The costs are "random", where most targets want queries of their own, or "crowded", where all queries look nearly alike
to all targets, as in the first steps of training.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Float

from rtdetrv2_jax.benchmark.record import record, versions
from rtdetrv2_jax.benchmark.runtimes import seconds_of
from rtdetrv2_jax.ops.assignment import assign
from rtdetrv2_jax.weights.files import write_json

Costs = Literal["random", "crowded"]
TOLERANCE = 1e-3
"""Of the sums of chosen costs, relative: matchings may differ, what they cost may not."""


def problems(number: int, queries: int, targets: int, *, costs: Costs) -> Float[np.ndarray, "b q t"]:
    """Costs of so many problems, the same everywhere."""
    dice = np.random.default_rng(0)
    noise = dice.normal(size=(number, queries, targets))
    if costs == "random":
        return noise.astype(np.float32)
    common = dice.normal(size=(number, queries, 1)) + dice.normal(size=(number, 1, targets))
    return (common + 0.1 * noise).astype(np.float32)


def solvers(cost: Float[np.ndarray, "b q t"]) -> dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]]:
    """Each solver on these problems: it gives the queries and the targets of all pairs."""
    on_device = jax.device_put(cost)
    mask = jnp.ones((len(cost), cost.shape[-1]), bool)
    targets = np.broadcast_to(np.arange(cost.shape[-1]), mask.shape)
    ours = jax.jit(assign)
    theirs = jax.jit(jax.vmap(optax.assignment.hungarian_algorithm))

    def scipy_pairs() -> tuple[np.ndarray, np.ndarray]:
        pairs = [scipy.optimize.linear_sum_assignment(one) for one in cost]
        return np.stack([rows for rows, _ in pairs]), np.stack([columns for _, columns in pairs])

    return {
        "ours": lambda: (np.asarray(ours(on_device, mask)), targets),
        "optax": lambda: jax.device_get(theirs(on_device)),
        "scipy": scipy_pairs,
    }


def measure(number: int, queries: int, targets: int, *, costs: Costs, rounds: int) -> list[dict[str, Any]]:
    """The times of each solver over some rounds in which all take turns.

    Raises:
        RuntimeError: A solver's matchings cost more than another's.
    """
    cost = problems(number, queries, targets, costs=costs)
    runs = solvers(cost)
    totals = {name: _total(cost, *run()) for name, run in runs.items()}  # compiles, too
    if max(totals.values()) - min(totals.values()) > TOLERANCE * max(1.0, abs(totals["scipy"])):
        raise RuntimeError(f"the solvers do not agree: their matchings cost {totals}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name] += seconds_of(run, runs=1)
    about = {"problems": number, "queries": queries, "targets": targets, "costs": costs}
    known = versions() | {"ours": f"this library, jax {jax.__version__}"}
    names = {"ours": known["ours"], "optax": f"optax {known.get('optax')}", "scipy": f"SciPy {known.get('scipy')}"}
    return [
        about
        | {
            "solver": name,
            "version": names[name],
            "p50_ms": round(1000 * statistics.median(taken), 3),
            "p90_ms": round(1000 * float(np.percentile(taken, 90)), 3),
            "runs": len(taken),
        }
        for name, taken in seconds.items()
    ]


def _total(cost: np.ndarray, queries: np.ndarray, targets: np.ndarray) -> float:
    return float(cost[np.arange(len(cost))[:, None], queries, targets].sum(dtype=np.float64))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a line for each, and gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.assignment", description=__doc__)
    parser.add_argument("--problems", type=int, default=64, help="at once (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--targets", type=int, nargs="+", default=[10, 30, 100], help="default: 10 30 100")
    parser.add_argument("--costs", nargs="+", choices=("random", "crowded"), default=["random", "crowded"])
    parser.add_argument("--rounds", type=int, default=20, help="runs of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, with machine and versions")
    arguments = parser.parse_args(argv)
    figures = []
    for costs in arguments.costs:
        for targets in arguments.targets:
            found = measure(arguments.problems, arguments.queries, targets, costs=costs, rounds=arguments.rounds)
            for one in found:
                print(f"{costs:8} {targets:4} targets  {one['p50_ms']:10.3f} ms  {one['version']}", flush=True)
            figures += found
    if arguments.json:
        write_json(arguments.json, record("assignment", figures, program="python -m benchmarks.assignment"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
