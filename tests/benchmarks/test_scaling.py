"""Predictions of scaling: arithmetic that can be checked by hand."""

import json

import pytest

from benchmarks.scaling import PAGE, RESULTS, Chip, Slice, efficiency, exchange_seconds, least_seconds, page

CHIP = Chip(flops=100.0, memory=10.0, link=1.0)
LINE, RING = Slice(2, 4, ring=False), Slice(16, 16, ring=True)
EXCHANGES = [{"kind": "all-reduce", "in_loop": False, "times": 0, "bytes": 80}]


def test_a_sum_crosses_the_links_almost_twice():
    assert exchange_seconds(EXCHANGES, LINE, CHIP) == pytest.approx(2 * 80 * 7 / 8 / 2)
    assert exchange_seconds(EXCHANGES, RING, CHIP) == pytest.approx(2 * 80 * 255 / 256 / 4)


def test_each_exchange_waits_for_the_hops_there_and_back():
    waiting = [EXCHANGES[0] | {"times": 3, "bytes": 0}]
    assert exchange_seconds(waiting, LINE, CHIP) == pytest.approx(3 * 12e-6)
    assert exchange_seconds(waiting, RING, CHIP) == pytest.approx(3 * 32e-6)


def test_a_step_takes_its_operations_or_its_memory_whichever_is_longer():
    figure = {"flops": 1000.0, "bytes_accessed": 50.0, "collectives": EXCHANGES}
    assert least_seconds(figure, CHIP) == 10
    assert least_seconds(figure | {"bytes_accessed": 200.0}, CHIP) == 20
    assert efficiency(figure, LINE, CHIP) == pytest.approx(10 / 80)


def test_the_page_is_what_the_figures_say():
    assert PAGE.read_text(encoding="utf-8") == page(json.loads(RESULTS.read_text(encoding="utf-8")))
