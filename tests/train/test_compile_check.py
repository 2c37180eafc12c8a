"""Compiling a step for chips that are not there: what fails, what is said of it, and one tiny step in earnest."""

import argparse
import dataclasses
import importlib.util
import json

import jax
import pytest

from rtdetrv2_jax.compilation import compiler_options
from rtdetrv2_jax.sharding import data_mesh
from train import compile_check, topology
from train.compile_check import add_arguments, batch_shapes, compile_step, recipe_of, run, sides_of
from train.compiled import Compiled, Memory, faults_of
from train.hlo_report import Collective, Loop, Report, Work
from train.recipe import RecipeError
from train.recipes import coco_r50, debug
from train.step import program
from train.topology import TopologyError, topology_mesh

GIB = 2**30
REPORT = Report(
    cycles=1000,
    product_cycles=900,
    launches=7,
    bytes=6_000_000_000,
    slowest=(Work(6, "fusion: dot", "f32[8,4]", "forward dot_general step.py:12 train_step", 900, 0),),
    not_estimated=(Work(1, "fusion: scatter", "f32[8,4]", "backward scatter step.py:12 train_step", 0, 0),),
    loops=(Loop(1, "forward while", "f32[8,4]", 0, 0),),
    collectives=(Collective("all-reduce", False, 3, 4_000_000),),
    host_calls=(),
)
COMPILED = Compiled(2.0, Memory(3 * GIB, 2 * GIB, 2 * GIB, 4 * GIB, GIB, 15 * GIB), 5e12, 6e9, REPORT)


def parsed(*words: str, **overrides: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(words)
    arguments.overrides = overrides
    return arguments


@pytest.fixture
def without_compiling(monkeypatch):
    """The devices of this machine in place of chips, and instead of a compilation what is put into the list."""
    results = [COMPILED]

    def compile_step(*_, **__):
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    monkeypatch.setattr(compile_check, "topology_mesh", lambda name: data_mesh())
    monkeypatch.setattr(compile_check, "program", lambda recipe, **_: recipe)
    monkeypatch.setattr(compile_check, "compile_step", compile_step)
    return results


def test_figures_are_written_for_programs_to_read(without_compiling, tmp_path):
    assert run(parsed("--recipe", "coco_r50", "--side", "640", "--json", str(tmp_path / "figures.json"))) == 0
    (figure,) = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert (figure["recipe"], figure["side"], figure["batch_per_chip"]) == ("coco_r50", 640, 16)
    assert figure["memory"] == 8 * GIB
    assert figure["collectives"] == [{"kind": "all-reduce", "in_loop": False, "times": 3, "bytes": 4_000_000}]


def test_a_step_that_fits_passes_and_is_described(without_compiling, capsys):
    assert run(parsed("--recipe", "debug")) == 0
    said = capsys.readouterr().out
    for part in (
        "debug at",
        "8.00 GiB of 15.00 GiB",
        "5 TFLOP",
        "3 all-reduce, 4,000,000 b",
        "90.0%",
        "fusion: scatter",
    ):
        assert part in said
    assert "fails" not in said


def test_of_a_gpu_the_kernels_and_what_they_move_are_told(without_compiling, capsys):
    moving = REPORT.slowest[0]._replace(cycles=0, bytes=3_000_000_000)
    found = REPORT._replace(cycles=0, product_cycles=0, slowest=(moving,), not_estimated=())
    without_compiling[0] = COMPILED._replace(flops=None, report=found)
    assert run(parsed("--recipe", "debug", "--topology", "h200")) == 0
    said = capsys.readouterr().out
    for part in ("6.0 GB accessed by 7 kernels (loops once)", "moves most:", "3,000 MB  50.0%    6 times  fusion: dot"):
        assert part in said
    assert "TFLOP" not in said
    assert "cycles" not in said


def test_every_size_of_a_recipe_is_compiled_unless_some_are_named(without_compiling, capsys):
    assert run(parsed("--recipe", "coco_r50", "--batch-per-chip", "2")) == 0
    assert capsys.readouterr().out.count("coco_r50 at") == len(coco_r50().all_sides())
    assert run(parsed("--recipe", "coco_r50", "--batch-per-chip", "2", "--side", "640", "480")) == 0
    assert capsys.readouterr().out.count("coco_r50 at") == 2


def test_too_much_memory_fails_whoever_finds_out(without_compiling, capsys):
    without_compiling[0] = COMPILED._replace(memory=COMPILED.memory._replace(temporaries=20 * GIB))
    assert run(parsed("--recipe", "debug")) == 1
    assert "it needs 24.00 GiB of memory, and a chip has 15.00 GiB" in capsys.readouterr().out
    without_compiling[0] = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 15.75G hbm")
    assert run(parsed("--recipe", "debug")) == 1
    assert "does not fit into memory. The compiler says: RESOURCE_EXHAUSTED" in capsys.readouterr().out


def test_an_error_that_is_not_about_memory_is_not_hidden(without_compiling):
    without_compiling[0] = jax.errors.JaxRuntimeError("INTERNAL: something broke")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something broke"):
        run(parsed("--recipe", "debug"))


def test_a_call_to_the_host_fails_and_slow_loops_only_warn(without_compiling, capsys):
    without_compiling[0] = COMPILED._replace(report=REPORT._replace(host_calls=("send of f32[8] for pure_callback",)))
    assert run(parsed("--recipe", "debug")) == 1
    assert "fails: the step waits for the host: send of f32[8]" in capsys.readouterr().out
    without_compiling[0] = COMPILED._replace(report=REPORT._replace(loops=(Loop(2, "scatter", "f32[8]", 1, 0),)))
    assert run(parsed("--recipe", "debug")) == 0
    assert "2 loops around a scatter" in capsys.readouterr().out


def test_on_chips_of_an_unknown_kind_only_the_compiler_knows_the_limit():
    assert faults_of(COMPILED._replace(memory=COMPILED.memory._replace(temporaries=10**15, limit=None))) == []


def test_the_batch_is_that_of_all_chips_and_fields_can_be_changed(without_compiling):
    recipe = recipe_of(parsed("--recipe", "coco_r50", **{"batches.epochs": "9"}), devices=4)
    assert (recipe.batches.size, recipe.batches.epochs) == (64, 9)
    with pytest.raises(RecipeError, match="--batch-per-chip"):
        run(parsed("--recipe", "coco_r50", **{"batches.size": "8"}))


def test_a_size_that_no_run_meets_is_refused():
    with pytest.raises(RecipeError, match="no images of side 9, 100: its sides are 480"):
        sides_of(coco_r50(), [100, 640, 9])


def test_a_batch_without_numbers_has_the_shapes_of_one():
    shapes = batch_shapes(coco_r50(), slots=5)
    assert shapes.images.shape == (16, 640, 640, 3)
    assert shapes.targets.boxes.shape == (16, 5, 4)
    assert {each.shape[0] for each in jax.tree.leaves(shapes)} == {16}


def test_options_are_those_of_the_devices_that_a_program_is_for():
    assert compiler_options("tpu") == {}
    assert compiler_options("cpu") == compiler_options()


@pytest.fixture
def chips():
    """Four chips that are not there."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, which the tpu extra brings")
    return topology_mesh("v5e:2x2")


def test_a_machine_without_libtpu_is_told_what_to_install(monkeypatch):
    def missing(**_):
        raise RuntimeError("no TPU support")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", missing)
    with pytest.raises(TopologyError, match=r"takes libtpu: pip install -e '\.\[tpu\]'"):
        topology_mesh("v5e:2x2")


def test_a_machine_without_the_cuda_plugin_is_told_what_to_install(monkeypatch):
    asked = []

    def missing(**options):
        asked.append(options)
        raise NotImplementedError("no CUDA here")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", missing)
    for name in ("h100:8", "a100"):
        with pytest.raises(TopologyError, match=r"its CUDA plugin: pip install -e '\.\[cuda\]' \(no CUDA here\)"):
            topology_mesh(name)
    assert [(each["platform"], each["topology"]) for each in asked] == [("cuda", "1x1x8"), ("cuda", "1x1x1")]
    assert 'device_description_str: "NVIDIA H100"' in asked[0]["target_config"]
    for name in ("h100:2x2", "h200:0"):
        with pytest.raises(TopologyError, match="says no number of GPUs"):
            topology_mesh(name)


@pytest.mark.slow
def test_a_step_compiles_for_gpus_that_are_not_there(tiny_config):
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs JAX's CUDA plugin, which the cuda extra brings")
    tiny = dataclasses.replace(tiny_config, decoder=dataclasses.replace(tiny_config.decoder, denoising=8))
    batches = dataclasses.replace(debug().batches, size=8, side=64)
    made = program(dataclasses.replace(debug(), model=tiny, batches=batches, dtype="bfloat16"), steps_per_epoch=10)
    compiled = compile_step(made, topology_mesh("h200:2"), side=64, slots=16)
    assert faults_of(compiled) == []
    assert compiled.memory.needed < compiled.memory.limit == 139 * GIB
    assert [loop.largest for loop in compiled.report.loops] == ["f32[3,4,16,20]"]  # the assignment's, and no other
    assert "all-reduce" in {each.kind for each in compiled.report.collectives}
    assert compiled.report.launches > 500


@pytest.mark.tpu_aot
def test_devices_that_nobody_makes_are_refused(chips):
    with pytest.raises(TopologyError, match="no devices are called 'v9:2x2': give a kind and a grid"):
        topology_mesh("v9:2x2")


@pytest.mark.tpu_aot
def test_a_tiny_step_compiles_for_four_chips_without_a_loop_around_a_scatter(chips, tiny_config):
    tiny = dataclasses.replace(tiny_config, decoder=dataclasses.replace(tiny_config.decoder, denoising=8))
    batches = dataclasses.replace(debug().batches, size=8, side=64)
    made = program(dataclasses.replace(debug(), model=tiny, batches=batches, dtype="bfloat16"), steps_per_epoch=10)
    compiled = compile_step(made, chips, side=64, slots=16)
    assert faults_of(compiled) == []
    assert compiled.memory.needed < compiled.memory.limit == int(15.75 * GIB)
    assert compiled.memory.aliased > 0.9 * compiled.memory.outputs  # the old state is given up to the new one
    assert compiled.flops > 0
    assert compiled.report.cycles > 0
    assert not any(loop.scatters for loop in compiled.report.loops)
    # Of the two ways to sample this is the accelerator's, though the process that compiles runs on a CPU.
    assert any("read_gathered" in work.source for work in compiled.report.not_estimated)
    assert "all-reduce" in {each.kind for each in compiled.report.collectives}
