"""The demonstration: offline, with the model that the package carries, on scenes that it has never seen."""

import re

import numpy as np
import pytest

from rtdetrv2_jax import Detector
from rtdetrv2_jax.cli import main
from rtdetrv2_jax.commands import demo
from rtdetrv2_jax.commands.evaluate import evaluate
from rtdetrv2_jax.data import SyntheticDataset
from rtdetrv2_jax.evaluation import Evaluator


@pytest.fixture
def offline(monkeypatch):
    def refuse(*arguments, **options):
        pytest.fail("the demonstration asks the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


def test_the_demo_finds_most_of_what_it_draws_without_a_network(offline, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--scenes", "3", "--save", "pictures"]) == 0
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"scene_{i}.png" for i in range(3)]
    said = capsys.readouterr()
    rows = re.findall(r"^(scene_\d)\.png +(\w+) +(\d\.\d+)", said.out, re.MULTILINE)
    drawn = SyntheticDataset(3, seed=demo.SEED)
    for index in range(3):
        there = [drawn.class_names[label] for label in drawn[index].labels]
        found = [name for scene, name, _ in rows if scene == f"scene_{index}"]
        assert sum(name in there for name in found) >= 0.6 * len(there)
    assert f"average precision of {demo.AVERAGE_PRECISION:.1%}" in said.err.replace("\n", " ")


@pytest.mark.slow
def test_the_precision_that_the_demo_names_is_what_is_measured():
    from rich.console import Console

    dataset = SyntheticDataset(500, seed=demo.SEED)
    detector = Detector.from_pretrained(demo.MODEL)
    found = evaluate(detector, dataset, Evaluator(dataset), console=Console(quiet=True))
    np.testing.assert_allclose(found.scores.ap, demo.AVERAGE_PRECISION, atol=2e-3)
