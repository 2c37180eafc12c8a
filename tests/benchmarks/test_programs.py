"""The measuring programs start, and their parts do what they are to measure. No time is looked at."""

import ast
import json
from pathlib import Path

import jax
import pytest
from PIL import Image

import benchmarks
from benchmarks import assignment, compiled, gpu, input, merge
from benchmarks.matching import matching_milliseconds
from rtdetrv2_jax.data import open_dataset
from rtdetrv2_jax.data.synthetic import SyntheticDataset

ROOT = Path(benchmarks.__file__).parents[1]


@pytest.mark.parametrize("program", [assignment, compiled, gpu, input, merge])
def test_a_program_tells_how_it_is_used(program, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    assert ended.value.code == 0
    assert "usage: python -m benchmarks." in capsys.readouterr().out


@pytest.mark.parametrize("costs", ["random", "crowded"])
def test_all_solvers_find_matchings_of_one_cost(costs):
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        figures = assignment.measure(3, 12, 5, costs=costs, rounds=1)
    assert [one["solver"] for one in figures] == ["ours", "optax", "scipy"]
    assert {(one["problems"], one["queries"], one["targets"], one["costs"]) for one in figures} == {(3, 12, 5, costs)}


def test_a_solver_that_does_not_find_the_least_cost_is_found_out(monkeypatch):
    right = assignment.solvers

    def wrong(cost):
        queries, targets = right(cost)["scipy"]()
        return {"ours": lambda: (queries[:, ::-1], targets), "scipy": lambda: (queries, targets)}

    monkeypatch.setattr(assignment, "solvers", wrong)
    with pytest.raises(RuntimeError, match="do not agree"):
        assignment.measure(3, 12, 5, costs="random", rounds=1)


def test_images_of_a_folder_are_made_in_three_amounts_of_work(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for index, scene in enumerate(SyntheticDataset(3, seed=0, sizes=((64, 96),))):
        Image.fromarray(scene.read()).save(tmp_path / "images" / f"{index}.png")
        (tmp_path / "labels" / f"{index}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [thing]\n")
    figures = input.measure(open_dataset(tmp_path), batch=2, side=64, rounds=2)
    assert [one["work"] for one in figures] == list(input.WORKS)
    assert all(one["images_per_second"] > 0 and one["runs"] == 2 for one in figures)


def test_matching_is_measured_on_all_sets_of_predictions():
    assert matching_milliseconds("r18vd", batch=1, rounds=1) > 0


def test_a_data_set_that_is_not_there_is_an_error_that_says_so(tmp_path, capsys):
    assert input.main([str(tmp_path / "nothing")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_what_is_measured_is_kept_at_once_and_what_no_time_is_left_for_is_named(tmp_path):
    taking = gpu.Taking("network", tmp_path / "network.json", seconds=1000)
    assert taking.begins({"model": "r18vd"})
    taking.add([{"model": "r18vd", "device_p50_ms": 1.0}])
    assert json.loads((tmp_path / "network.json").read_text())["figures"] == taking.figures
    taking.end -= 990
    assert not taking.begins({"model": "r50vd"})
    assert json.loads((tmp_path / "network.json").read_text())["failed"] == [
        {"model": "r50vd", "reason": "no time left"}
    ]


def test_the_stand_in_for_jaxtyping_has_every_name_that_is_used():
    def names(path: Path) -> set[str]:
        return {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
            for alias in node.names
        }

    used = {
        name
        for folder in ("rtdetrv2_jax", "train", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for name in names(path)
    }
    namespace: dict = {}
    exec((ROOT / "benchmarks" / "stand_ins" / "jaxtyping.py").read_text(), namespace)
    assert used <= set(namespace)
    assert namespace["Float"][jax.Array, "b 4"] | None == jax.Array | None
