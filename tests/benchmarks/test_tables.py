"""The README's tables are made from the published results, and results that do not belong together stay apart."""

import json

import pytest

from benchmarks.merge import MergeError, merged
from benchmarks.tables import PAGES, RESULTS, layout, number, written


def record(what: str, *figures: dict) -> dict:
    return {
        "what": what,
        "machine": "a machine",
        "date": "2026-01-01",
        "command": "measure it",
        "versions": {"jax": "1"},
        "figures": list(figures),
        "failed": [],
    }


def network(**other) -> dict:
    figure = {"model": "r18vd", "batch": 1, "runtime": "jax", "version": "jax 1", "device_p50_ms": 247.4}
    return figure | {"whole_p50_ms": 12.34, "images_per_second": 4.04} | other


@pytest.mark.parametrize("page", PAGES, ids=["project", "benchmarks"])
def test_the_pages_show_what_was_measured(page):
    text = page.read_text(encoding="utf-8")
    assert written(text) == text, f"results have changed: python -m benchmarks.tables writes them into {page}"


def test_every_result_is_in_a_page_and_complete():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in RESULTS.glob("*.json"):
        assert f"<!-- table: results/{path.name}" in text
        assert set(json.loads(path.read_text())) == set(record(""))


def test_what_all_figures_share_is_said_once_and_the_rest_in_columns():
    others = [
        network(runtime="other", version="other 2", batch=batch, tflop_per_second=0.2, device_p50_ms=494.8)
        for batch in (1, 8)
    ]
    lines = layout(record("network", network(), *others)).splitlines()
    assert lines[0] == "r18vd; a machine; 2026-01-01; `measure it`:"
    assert lines[2] == "| batch | runtime | network alone, ms | whole, ms | images a second | ratio | TFLOP/s |"
    assert lines[4] == "| 1 | this library, jax 1 | 247 | 12.3 | 4.0 | 1.00 |  |"
    assert lines[5] == "| 1 | other 2 | 495 | 12.3 | 4.0 | 0.50 | 0.20 |"
    assert lines[6] == "| 8 | other 2 | 495 | 12.3 | 4.0 | 1.00 | 0.20 |"  # the first of its batch


COUNTED = {
    "topology": "v5e:2x2",
    "batch_per_chip": 16,
    "memory": 2 * 2**30,
    "memory_limit": 16 * 2**30,
    "flops": 4e12,
    "bytes_accessed": 70e9,
    "cycles": 160e6,
    "product_cycles": 120e6,
    "collectives": [{"kind": "all-reduce", "in_loop": False, "times": 2, "bytes": 41e6}],
}
ON_GPU = {"topology": "h200", "cycles": 0, "product_cycles": 0, "launches": 1234}


@pytest.mark.parametrize(
    ("what", "figure", "row"),
    [
        (
            "training step",
            {"kind": "jax", "version": "jax 1", "step_p50_s": 0.05, "images_per_second": 80, "matching_share": 0.021},
            "| this one, jax 1 | 50.0 | 80.0 | 2.1% | 1.00 |",
        ),
        (
            "assignment",
            {"problems": 64, "queries": 300, "targets": 10, "costs": "random", "version": "SciPy 1", "p50_ms": 0.123},
            "| 64 of 300 by 10 | random | SciPy 1 | 0.12 | 1.00 |",
        ),
        ("input", {"work": "decode", "images_per_second": 200.0}, "| decode | 200.0 | 5.00 |"),
        (
            "compiled step",
            COUNTED | {"recipe": "coco_r18"},
            "| coco_r18 | v5e:2x2 | 16 | 2.0 of 16.0 | 4.00 | 70.0 | 160 | 75% | 41.0 |",
        ),
        ("compiled detection", COUNTED | {"batch": 1}, "| v5e | 2.0 of 16.0 | 4.00 | 70.0 | 160 | 75% |"),
        (
            "compiled detection",
            COUNTED | ON_GPU | {"batch": 32, "full_speed_ms": 4.0},
            "| h200 | 2.0 of 16.0 | 4.00 | 70.0 | 1,234 | 4.00 | 8000 |",
        ),
        (
            "compiled step",
            COUNTED | ON_GPU | {"recipe": "coco_r18", "flops": None, "collectives": []},
            "| coco_r18 | h200 | 16 | 2.0 of 16.0 | 70.0 | 1,234 |",
        ),
    ],
)
def test_every_sort_of_measurement_has_a_table(what, figure, row):
    assert layout(record(what, figure)).splitlines()[-1] == row


def test_numbers_have_three_digits_or_what_they_need():
    assert [number(value) for value in (0.5, 12.34, 247.4, 1234.5)] == ["0.50", "12.3", "247", "1234"]


def test_parts_of_one_result_are_put_together():
    one, other = record("network", network()), record("network", network(batch=8))
    whole = merged([one, other | {"command": "measure more", "date": "2026-01-02"}])
    assert [figure["batch"] for figure in whole["figures"]] == [1, 8]
    assert (whole["command"], whole["date"]) == ("measure it; measure more", "2026-01-01 to 2026-01-02")


@pytest.mark.parametrize("name", ["what", "machine", "versions"])
def test_parts_that_differ_in_what_matters_stay_apart(name):
    with pytest.raises(MergeError, match=name):
        merged([record("network", network()), record("network", network()) | {name: "another"}])
