"""Kept programs: found again by whoever would make the same, made anew where anything is wrong with them."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from rtdetrv2_jax import Detector, executables
from rtdetrv2_jax.compilation import enable_persistent_cache
from rtdetrv2_jax.executables import KeptProgram
from rtdetrv2_jax.weights.untrained import untrained_model

WEIGHTS = [jnp.arange(3.0), jnp.ones(3)]
INPUT = np.array([1, 2, 3], np.float32)
ANSWER = [1, 3, 7]


class Scaled:
    """A function that counts how often it is traced."""

    __name__ = "scaled"

    def __init__(self):
        self.traced = 0

    def __call__(self, weights, x):
        self.traced += 1
        return (weights[0] * x + weights[1],)


def run(*, about="a test", x=INPUT, weights=WEIGHTS):
    """What a new program gives, and how often it was traced for that: as in a new process."""
    function = Scaled()
    program = KeptProgram(function, weights, about=about)
    for _ in range(2):
        (found,) = program(x)
    return found.tolist(), function.traced


def test_what_one_process_compiled_the_next_does_not_trace(kept_programs):
    assert run() == (ANSWER, 1)
    assert run() == (ANSWER, 0)
    assert len(list(kept_programs.iterdir())) == 1


def test_each_shape_has_a_program(kept_programs):
    function = Scaled()
    program = KeptProgram(function, [jnp.ones(()), jnp.ones(())], about="a test")
    for count in (1, 2, 1, 2):
        assert program(np.ones(count, np.float32))[0].tolist() == [2] * count
    assert function.traced == 2
    assert len(list(kept_programs.iterdir())) == 2


def test_weights_lie_in_memory_as_the_compiler_chose(kept_programs, monkeypatch):
    """On a CPU it always chooses the usual layout; here it is as on a GPU."""
    columns_first = Format(Layout((1, 0)), SingleDeviceSharding(jax.devices()[0]))
    monkeypatch.setattr(executables, "COMPILERS_CHOICE", columns_first)
    weights = [jnp.arange(6.0).reshape(2, 3), np.ones((2, 3), np.float32)]
    traced = []
    for about in ("a test", "a test", None):
        function = Scaled()
        program = KeptProgram(function, weights, about=about)
        for _ in range(2):
            assert program(INPUT)[0].tolist() == [[1, 3, 7], [4, 9, 16]]
        assert [each.format.layout.major_to_minor for each in program.bound] == [(1, 0), (1, 0)]
        traced.append(function.traced)
    assert traced == [1, 0, 1]
    assert len(list(kept_programs.iterdir())) == 1


@pytest.mark.usefixtures("kept_programs")
@pytest.mark.parametrize("other", ["about", "input", "weights", "source", "machine", "setting", "flags"])
def test_a_program_that_anything_else_would_be_made_from_is_another(other, monkeypatch):
    assert run()[1] == 1
    match other:
        case "about":
            assert run(about="another test")[1] == 1
        case "input":
            assert run(x=INPUT[:1])[1] == 1
        case "weights":
            assert run(weights=[WEIGHTS[0][:1], WEIGHTS[1]])[1] == 1
        case "source" | "machine":
            monkeypatch.setattr(executables, f"_{other}", lambda: "another")
            assert run()[1] == 1
        case "setting":
            with jax.default_matmul_precision("bfloat16"):
                assert run()[1] == 1
        case "flags":
            monkeypatch.setenv("LIBTPU_INIT_ARGS", "--another")
            assert run()[1] == 1


@pytest.mark.parametrize("damage", [b"", b"no program", "half"])
def test_a_damaged_file_is_made_anew(kept_programs, damage):
    run()
    (file,) = kept_programs.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    assert run() == (ANSWER, 1)
    assert run() == (ANSWER, 0)


def test_a_program_that_jax_has_in_its_own_cache_is_compiled_again_so_that_it_can_be_kept(kept_programs):
    """On a CPU a program that was read from JAX's cache can be written once more, but then not run."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for _ in range(2):
        jax.clear_caches()
        assert jax.jit(Scaled())(WEIGHTS, INPUT)[0].tolist() == ANSWER
    assert run() == (ANSWER, 1)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    assert run() == (ANSWER, 0)
    assert len(list(kept_programs.iterdir())) == 1


@pytest.mark.parametrize("does", ["serialize", "deserialize_and_load"])
def test_a_backend_whose_programs_can_not_be_kept_is_left_to_jax_and_its_cache(kept_programs, monkeypatch, does):
    asked = []

    def refuse(*arguments, **options):
        asked.append(does)
        raise ValueError("no")

    monkeypatch.setattr(executables.serialize_executable, does, refuse)
    assert run() == (ANSWER, 2)  # to be kept, and then as ever
    assert asked == [does]
    assert run() == (ANSWER, 1)
    assert asked == [does]
    assert [file.read_bytes() for file in kept_programs.iterdir()] == [executables.NOT_KEPT]


def test_where_nothing_can_be_kept_it_runs_all_the_same(kept_programs, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(executables, "_write", full)
    assert run() == (ANSWER, 1)
    assert list(kept_programs.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(kept_programs, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(executables.Path, "replace", full)
    assert run() == (ANSWER, 1)
    assert list(kept_programs.iterdir()) == []


def test_nothing_is_kept_where_what_it_does_cannot_be_said_or_is_not_for_one_device(kept_programs):
    assert run(about=None) == (ANSWER, 1)
    assert run(weights=jax.device_put(WEIGHTS, jax.devices()[1])) == (ANSWER, 1)
    mesh = jax.make_mesh((1,), ("data",))
    with jax.set_mesh(mesh):
        assert run() == (ANSWER, 1)
    assert not kept_programs.exists()


def test_programs_that_were_not_used_for_longest_go(kept_programs, monkeypatch):
    monkeypatch.setattr(executables, "MOST_FILES", 2)
    for about in ("first", "second"):
        run(about=about)
        for age, file in enumerate(sorted(kept_programs.iterdir(), key=lambda file: -file.stat().st_mtime)):
            os.utime(file, (1000 - age, 1000 - age))  # the file system's clock is too coarse for this test
    for about in ("first", "third"):
        run(about=about)
    assert [run(about=about)[1] for about in ("first", "third", "second")] == [0, 0, 1]
    assert len(list(kept_programs.iterdir())) == 2


def test_a_model_that_someone_changed_gets_nothing_that_was_kept_for_the_plain_one(kept_programs, tiny_config):
    Detector(untrained_model(tiny_config))
    kept = list(kept_programs.iterdir())
    assert len(kept) == 1
    changed = untrained_model(tiny_config)
    changed.backbone.stem[0].activation = jnp.tanh
    kept[0].write_bytes(b"would be found out, and taken away")
    assert Detector(changed).model.backbone.stem[0].activation is jnp.tanh
    assert [file.read_bytes() for file in kept_programs.iterdir()] == [b"would be found out, and taken away"]


@pytest.mark.usefixtures("kept_programs")
def test_where_the_name_of_the_cache_is_empty_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jax.config.update("jax_compilation_cache_dir", "")
    assert enable_persistent_cache() is None
    assert run() == (ANSWER, 1)
    assert not list(tmp_path.iterdir())
