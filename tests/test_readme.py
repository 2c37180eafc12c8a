"""The README does what it says: its commands and programs run, its numbers are right, its tree is the tree.

Run as a program, `python tests/test_readme.py` writes the tree into the README anew.

Blocks run as they stand, in a folder where `PekingU/rtdetr_v2_r18vd` is a small untrained model and `street.jpg` and
`photos` are drawn. What installs is left out, since what is to be installed runs the test, and `.venv/bin/rtdetrv2` is
the interpreter's own. A comment before a block says more: `ci: NAME`, .ci/run takes it from here and runs it whole;
`parity`, it needs PyTorch and transformers; `slow`; `skip: REASON`.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from rtdetrv2_jax import Preprocessing, Result, fuse, load_model, save_model
from rtdetrv2_jax.cli import main as rtdetrv2
from rtdetrv2_jax.commands.detect import image_record
from rtdetrv2_jax.config import COCO_CLASS_NAMES, RELEASED
from rtdetrv2_jax.data.synthetic import CLASS_NAMES, SyntheticDataset
from rtdetrv2_jax.model.rtdetrv2 import abstract_model
from rtdetrv2_jax.weights.untrained import untrained_model

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"(?:<!-- (?P<note>[^>]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
TREE = re.compile(r"(<!-- tree: [^>]* -->\n```text\n).*?(```)", re.DOTALL)


class Block(NamedTuple):
    """A block of code: `output` is what the README shows beneath it, where it shows any."""

    language: str
    text: str
    note: str
    output: str


def sections() -> dict[str, list[Block]]:
    """The blocks of every section, by its title."""
    found = {}
    for part in re.split(r"^#+ (?=.*\n\n)", README.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        blocks: list[Block] = []
        for match in BLOCK.finditer(part):
            if match["language"] == "text" and blocks:
                blocks[-1] = blocks[-1]._replace(output=match["text"])
            elif match["language"] in ("python", "sh"):
                blocks.append(Block(match["language"], match["text"], match["note"] or "", ""))
        found[part.partition("\n")[0]] = blocks
    return found


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, as words."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r"\s*(?:&&|;)\s*", line)]
    return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def run_command(words: list[str]) -> None:
    """Does what one command does, in this process."""
    from convert.__main__ import main as convert  # found by pytest alone, which puts the checkout on the path

    words = [words[0].removeprefix(".venv/bin/"), *words[1:]]
    match words:
        case ["python", "-m", "venv", _]:
            pass
        case ["pip", "install", *arguments]:
            assert set(re.findall(r"\[(\w+)\]", " ".join(arguments))) <= extras()
        case ["pytest", *_]:
            pass
        case ["rtdetrv2", *arguments]:
            assert rtdetrv2(arguments) == 0
        case ["python", "-m", "convert", *arguments]:
            assert convert(arguments) == 0
        case ["python", "-m", "train", *arguments]:  # in a process without fake devices, which share no small batch
            environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
            done = subprocess.run([sys.executable, "-m", "train", *arguments], env=environment, capture_output=True)
            assert done.returncode == 0, done.stderr.decode()
        case _:
            pytest.fail(f"the README says {shlex.join(words)!r}, and nothing here can run it")


def first_words(text: str) -> set[str]:
    return {line.split()[0].rstrip(",") for line in text.splitlines() if line.strip()}


def run_block(block: Block, namespace: dict, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a block, and holds the output that the README shows against the one that came: each line begins the same."""
    capsys.readouterr()
    if block.language == "python":
        exec(compile(block.text, str(README), "exec"), namespace)
    else:
        for words in commands(block.text):
            run_command(words)
    printed = capsys.readouterr().out
    assert first_words(block.output) - {"..."} <= first_words(printed), printed


@pytest.fixture(scope="module")
def checkpoint(tiny_config, tmp_path_factory) -> Path:
    """A small untrained model that knows the classes of COCO."""
    folder = tmp_path_factory.mktemp("readme") / "model"
    points = tiny_config.decoder.points[:1] * 3  # Hugging Face's form has one number for all levels
    decoder = type(tiny_config.decoder)(**{**vars(tiny_config.decoder), "points": points})
    config = type(tiny_config)(**{**vars(tiny_config), "decoder": decoder, "class_names": COCO_CLASS_NAMES})
    save_model(untrained_model(config), folder, to="hf")
    return folder


@pytest.fixture
def newcomer(checkpoint, tmp_path, monkeypatch) -> Path:
    """The folder in which the README's blocks run."""
    (tmp_path / "PekingU").mkdir()
    (tmp_path / "PekingU" / "rtdetr_v2_r18vd").symlink_to(checkpoint, target_is_directory=True)
    (tmp_path / "photos").mkdir()
    scenes = SyntheticDataset(3, seed=0, sizes=((240, 320),))
    for name, scene in zip(("street.jpg", "photos/a.png", "photos/b.png"), scenes, strict=True):
        Image.fromarray(scene.read()).save(tmp_path / name)
    write_yolo(tmp_path / "my_data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_yolo(folder: Path) -> None:
    """A small data set in YOLO's form."""
    for split, seed in (("train", 1), ("val", 2)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index, scene in enumerate(SyntheticDataset(6, seed=seed, sizes=((128, 128),))):
            Image.fromarray(scene.read()).save(folder / "images" / split / f"{index}.png")
            corners = scene.boxes_xyxy_pixels / 128
            centres, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
            rows = [
                f"{label} {x:.6f} {y:.6f} {w:.6f} {h:.6f}"
                for label, (x, y), (w, h) in zip(scene.labels, centres, sides, strict=True)
            ]
            (folder / "labels" / split / f"{index}.txt").write_text("\n".join(rows))
    (folder / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames: {list(CLASS_NAMES)}\n")


@pytest.mark.parametrize("title", [title for title, blocks in sections().items() if blocks])
def test_what_a_section_says_runs(title, newcomer, capsys):
    namespace: dict = {}
    for block in sections()[title]:
        if not block.note.startswith(("skip: ", "parity", "slow")):
            run_block(block, namespace, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for blocks in sections().values() for b in blocks if b.note == "slow"])
def test_what_takes_long_runs(block, newcomer, capsys):
    run_block(block, {}, capsys)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_needs_pytorch_runs(newcomer, capsys):
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="needs the parity extra")
    # With fewer tokens no two have nearly the same score, and both programs surely select the same.
    model, _ = load_model("PekingU/rtdetr_v2_r18vd")
    (newcomer / "PekingU" / "rtdetr_v2_r18vd").unlink()
    save_model(model, "PekingU/rtdetr_v2_r18vd", preprocessing=Preprocessing(size=(128, 128)), to="hf")
    (block,) = [block for blocks in sections().values() for block in blocks if block.note == "parity"]
    run_block(block, {}, capsys)


def test_what_is_skipped_says_why_and_is_well_formed():
    skipped = [block for blocks in sections().values() for block in blocks if block.note.startswith("skip: ")]
    assert all(len(block.note) > len("skip: ") and commands(block.text) for block in skipped)


def test_the_two_commands_are_there_for_newcomers_and_for_ci():
    notes = {block.note: block.text for blocks in sections().values() for block in blocks}
    for name, last in (("ci: main", "rtdetrv2 demo"), ("ci: tests", "pytest")):
        words = commands(notes[name])
        assert words[0] == ["python", "-m", "venv", ".venv"]
        assert words[1][:2] == [".venv/bin/pip", "install"]
        assert shlex.join(words[-1]) == f".venv/bin/{last}"


@pytest.mark.slow
def test_the_models_and_their_parameters_are_those_of_the_configurations():
    section = README.read_text(encoding="utf-8").split("\n## Models\n")[1].split("\n## ")[0]
    table = re.findall(r"^\| (r\d\w+) \| (.*) \|$", section, re.MULTILINE)
    assert [name for name, _ in table] == list(RELEASED)
    counted: dict[object, tuple[str, str]] = {}
    for name, row in table:
        config = RELEASED[name]
        decoder = config.decoder
        shape = (config.backbone, config.encoder, decoder.points, decoder.layers, decoder.inference_layers)
        if shape not in counted:
            model = abstract_model(config)
            trained = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
            fused = jax.eval_shape(partial(fuse, convolving="direct"), model)
            inference = sum(leaf.size for leaf in jax.tree.leaves(fused))
            counted[shape] = f"{trained / 1e6:.1f}", f"{inference / 1e6:.1f}"
        _, layers, trained, inference, *_ = [cell.strip() for cell in row.split("|")]
        assert (trained, inference) == counted[shape], name
        assert layers.split(" of ")[0] == str(decoder.inference_layers), name
        assert layers.split(" of ")[-1] == str(decoder.layers), name


def test_the_example_of_json_is_what_detect_writes():
    (shown,) = json.loads(next(m["text"] for m in BLOCK.finditer(README.read_text()) if m["language"] == "json"))
    found = shown["detections"][0]
    result = Result(
        np.array([found["score"]]), np.array([39]), ("bottle",), np.array([found["box"]]), (shown["height"], 640)
    )
    assert image_record(shown["image"], result) == shown


def tree() -> str:
    """Every module of the library and of the programs with the first line of its docstring; of tests, the folders."""
    lines = []

    def add(path: Path, about: str) -> None:
        relative = path.relative_to(ROOT)
        name = "  " * (len(relative.parts) - 1) + relative.name + ("/" if path.is_dir() else "")
        line(name, about)

    def line(name: str, about: str) -> None:
        lines.append(f"{name:<28}{about.rstrip('.')}")

    def visit(folder: Path) -> None:
        add(folder, summary(folder / "__init__.py"))
        entries = [path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
        for path in sorted(entries, key=lambda path: (path.is_dir(), path.name)):
            if path.is_dir():
                visit(path)
            elif path.name != "__init__.py":
                add(path, summary(path))

    for name in ("rtdetrv2_jax", "convert", "train", "benchmarks"):
        if (ROOT / name / "__init__.py").is_file():
            visit(ROOT / name)
    line("  results/", "Every published figure as it was measured: machine, versions, date, command")
    line("tests/", "The same tree once more, in tests")
    line("  parity/", "Ours against PyTorch and transformers")
    line(".ci/run", "Every check on a clean machine: the README's two commands, parity, packaging, lint, types")
    return "\n".join(lines) + "\n"


def summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def test_the_tree_is_the_tree():
    shown = TREE.search(README.read_text(encoding="utf-8"))
    assert shown, "README.md has lost its tree"
    listed = shown[0].removeprefix(shown[1]).removesuffix(shown[2])
    assert listed == tree(), "the tree has changed: python tests/test_readme.py writes it into README.md"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    README.write_text(TREE.sub(lambda match: match[1] + tree() + match[2], text), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
