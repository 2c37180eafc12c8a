"""`rtdetrv2 benchmark` tells what it measured and what it could not. Nothing is measured here."""

import json

import pytest

from rtdetrv2_jax.benchmark.turns import Failed, Measured
from rtdetrv2_jax.cli import main
from rtdetrv2_jax.commands import benchmark


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What would have been measured; torch.compile always fails."""
    calls = []

    def measure(runtimes, folder, *, dtype, batch, rounds, runs):
        calls.append((batch, dtype, rounds, runs))
        good = [
            Measured(name, f"{name} 1.0", batch, 2.0, [0.25], [0.5], 0.0, None)
            for name in runtimes
            if name != "torch.compile"
        ]
        return good, [Failed(name, batch, "it needs [a] compiler") for name in runtimes if name == "torch.compile"]

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "write_checkpoint", lambda name, folder: None)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # as the command sets it, and here undone afterwards
    return calls


def test_models_and_batches_go_together_in_one_run(asked, tmp_path, capsys):
    file = tmp_path / "speed.json"
    command = ["benchmark", "--model", "r18vd", "r50vd", "--batch", "1", "8", "--rounds", "3", "--runs", "2"]
    assert main([*command, "--runtimes", "jax", "transformers", "--json", str(file)]) == 0
    assert asked == [(batch, "float32", 3, 2) for _ in range(2) for batch in (1, 8)]
    record = json.loads(file.read_text())
    assert set(record) == {"what", "machine", "date", "command", "versions", "figures", "failed"}
    rows = [(one["model"], one["batch"], one["runtime"]) for one in record["figures"]]
    assert rows == [(m, b, r) for m in ("r18vd", "r50vd") for b in (1, 8) for r in ("jax", "transformers")]
    assert "transformers 1.0" in capsys.readouterr().out


def test_a_runtime_that_fails_is_shown_and_is_in_the_exit_status(asked, tmp_path, capsys):
    file = tmp_path / "speed.json"
    assert main(["benchmark", "--runtimes", "jax", "torch.compile", "--json", str(file)]) == 1
    printed = capsys.readouterr().out
    assert "jax 1.0" in printed
    assert "it needs [a] compiler" in printed
    (failed,) = json.loads(file.read_text())["failed"]
    assert (failed["model"], failed["runtime"], failed["batch"]) == ("r18vd", "torch.compile", 1)
