"""The house keeps its own rules: who imports whom, which file opens which heavy package, what the wheel holds."""

import ast
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY, PROGRAMS, MEASUREMENTS = "rtdetrv2_jax", ("convert", "train"), "benchmarks"

LAYERS = (
    ("compilation", "config", "palette", "replacing", "sharding", "sources"),
    ("arrays", "executables", "image", "preprocessor_json"),
    ("data", "ops", "preprocessing", "visualize"),
    ("evaluation", "model", "objective", "postprocess"),
    ("weights",),
    ("detector",),
    ("export",),
    ("benchmark",),
    ("commands",),
    ("cli",),
)
"""The parts of the library, lowest first. A part imports itself and what lies below; its neighbours, never."""

NEEDS_NO_JAX = {"data": ("image", "sources"), "image": ("sources",), "sources": ()}
"""Parts that must load where no accelerator is wanted, in a worker process for instance; what they import of ours."""

PLAIN_PACKAGES = ("jaxtyping", "numpy", "PIL", "yaml")
"""The packages that such parts may import beside the standard library."""

DOORS = {
    "torch": ("convert/*", "rtdetrv2_jax/benchmark/peers.py", "train/benchmark_steps.py", "tests/parity/*"),
    "transformers": ("convert/*", "rtdetrv2_jax/benchmark/peers.py", "train/benchmark_steps.py", "tests/parity/*"),
    "onnxruntime": ("rtdetrv2_jax/benchmark/engines.py", "rtdetrv2_jax/export/onnx_check.py", "tests/*"),
    "openvino": ("rtdetrv2_jax/benchmark/engines.py", "tests/*"),
    "spox": ("rtdetrv2_jax/export/onnx_*.py", "rtdetrv2_jax/benchmark/exported.py", "tests/*"),
    "onnx": ("rtdetrv2_jax/export/onnx_*.py", "tests/export/*"),
    "grain": ("train/batches.py", "train/loading.py", "tests/train/*"),
    "matplotlib": ("train/curves.py", "tests/train/test_curves.py"),
    "tensorboardX": ("train/journal.py", "tests/train/test_journal.py"),
    "orbax": ("rtdetrv2_jax/weights/checkpoint.py", "train/checkpoint*.py", "tests/*"),
    # transformers refuses a bad config.json with an error that is the hub's.
    "huggingface_hub": ("rtdetrv2_jax/weights/hub.py", "convert/reference.py", "tests/*"),
    "faster_coco_eval": ("rtdetrv2_jax/evaluation/*",),
    "pycocotools": ("tests/evaluation/*",),
    "jax.experimental.pallas": ("rtdetrv2_jax/ops/sampling_*.py", "tests/ops/*"),
}
"""The only files that may import each heavy package."""


class Import(NamedTuple):
    """One module that a file imports, by its full name, at any depth of the file."""

    module: str
    line: int
    relative: bool


def sources(root: Path, *folders: str) -> list[Path]:
    """The Python files below some folders, by their paths from the root."""
    found = (path for folder in folders for path in (root / folder).rglob("*.py"))
    return sorted(path.relative_to(root) for path in found)


def imports(root: Path, path: Path) -> Iterator[Import]:
    """What a file imports: by statement, or by name in a call such as `pytest.importorskip("torch")`."""
    package = list(path.parent.parts)
    for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (Import(alias.name, node.lineno, False) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = [*package[: len(package) - level + 1], *(module or "").split(".")] if level else [module or ""]
                for alias in names:
                    yield Import(".".join(filter(None, [*base, alias.name])), node.lineno, bool(level))
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]
            ):
                if called in ("import_module", "importorskip", "__import__"):
                    yield Import(name, node.lineno, False)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def direction_faults(root: Path) -> list[str]:
    """Every import that goes up, sideways, from one program to the other, or to the measurements of all."""
    rank = {part: index for index, parts in enumerate(LAYERS) for part in parts}
    faults = []
    for path in sources(root, LIBRARY):
        part = path.parts[1].removesuffix(".py")
        if part == "__init__":
            continue
        if part not in rank:
            faults.append(f"{path}: {part} has no place in LAYERS; give it one")
            continue
        for found in imports(root, path):
            names = found.module.split(".")
            if names[0] in (*PROGRAMS, MEASUREMENTS):
                faults.append(f"{path}:{found.line} the library imports the program {names[0]}")
            if names[0] != LIBRARY or names[1:2] == [part]:
                continue
            other = names[1] if len(names) > 1 else "the whole library"
            if rank.get(other, len(LAYERS)) >= rank[part]:
                faults.append(f"{path}:{found.line} {part} imports {other}, which does not lie below it")
    for program in PROGRAMS:
        for path in sources(root, program):
            for found in imports(root, path):
                first = found.module.split(".")[0]
                if first in (*PROGRAMS, MEASUREMENTS) and first != program:
                    faults.append(f"{path}:{found.line} {program} imports {first}")
                if first == program and not found.relative:
                    faults.append(f"{path}:{found.line} siblings of {program} import each other relatively")
    return faults


def jax_faults(root: Path) -> list[str]:
    """Every import by which a part that needs no JAX would come to it, or to another package than the plain ones."""
    allowed = {*sys.stdlib_module_names, *PLAIN_PACKAGES}
    faults = []
    for path in sources(root, LIBRARY):
        part = path.parts[1].removesuffix(".py")
        for found in imports(root, path) if part in NEEDS_NO_JAX else ():
            ours = [f"{LIBRARY}.{other}" for other in (part, *NEEDS_NO_JAX[part])]
            if found.module.split(".")[0] not in allowed and not any(within(found.module, name) for name in ours):
                faults.append(f"{path}:{found.line} {part} imports {found.module}")
    return faults


def door_faults(root: Path) -> list[str]:
    """Every import of a heavy package by a file that is not its door."""
    return [
        f"{path}:{found.line} imports {package}, whose doors are {', '.join(doors)}"
        for path in sources(root, LIBRARY, *PROGRAMS, MEASUREMENTS, "tests")
        for found in imports(root, path)
        for package, doors in DOORS.items()
        if within(found.module, package) and not any(fnmatchcase(path.as_posix(), door) for door in doors)
    ]


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def show(faults: Sequence[str]) -> str:
    return "\n".join(["", *faults])


def test_imports_go_down_the_house():
    faults = direction_faults(ROOT)
    assert not faults, show(faults)


def test_data_and_images_load_without_jax():
    faults = jax_faults(ROOT)
    assert not faults, show(faults)


def test_each_heavy_package_has_its_doors():
    faults = door_faults(ROOT)
    assert not faults, show(faults)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("rtdetrv2_jax/objective/losses.py", "from rtdetrv2_jax.model.decoder import Decoder", "imports model"),
        ("rtdetrv2_jax/model/decoder.py", "from rtdetrv2_jax import weights", "imports weights"),
        ("rtdetrv2_jax/ops/boxes.py", "def f():\n    import rtdetrv2_jax.detector", "imports detector"),
        ("rtdetrv2_jax/model/layers.py", "from ..weights import table", "imports weights"),
        ("rtdetrv2_jax/weights/table.py", "import rtdetrv2_jax", "imports the whole library"),
        ("rtdetrv2_jax/weights/load.py", "from train.step import step", "imports the program train"),
        ("rtdetrv2_jax/cli.py", "import benchmarks.tables", "imports the program benchmarks"),
        ("rtdetrv2_jax/attic.py", "", "no place in LAYERS"),
        ("convert/source.py", "from train import ema", "convert imports train"),
        ("train/step.py", "from benchmarks import tables", "train imports benchmarks"),
        ("train/step.py", "from train.ema import average", "relatively"),
    ],
)
def test_an_import_in_the_wrong_direction_is_found(tmp_path, name, text, complaint):
    (fault,) = direction_faults(plant(tmp_path, {name: text}))
    assert fault.startswith(name)
    assert complaint in fault


@pytest.mark.parametrize("module", ["jax", "flax.nnx", "rtdetrv2_jax.config", "rtdetrv2_jax.preprocessing"])
def test_an_import_that_leads_data_to_jax_is_found(tmp_path, module):
    (fault,) = jax_faults(plant(tmp_path, {"rtdetrv2_jax/data/sample.py": f"import numpy\nimport {module}"}))
    assert fault == f"rtdetrv2_jax/data/sample.py:2 data imports {module}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rtdetrv2_jax/detector.py", "def f():\n    import torch"),
        ("tests/test_boxes.py", 'torch = pytest.importorskip("torch.nn")'),
        ("train/step.py", "from transformers import AutoModel"),
        ("train/step.py", "import grain.python as grain"),
        ("rtdetrv2_jax/weights/load.py", "import orbax.checkpoint as ocp"),
        ("rtdetrv2_jax/weights/load.py", "from huggingface_hub import snapshot_download"),
        ("rtdetrv2_jax/ops/sampling.py", "from jax.experimental import pallas as pl"),
        ("train/metrics.py", "from faster_coco_eval import COCO"),
    ],
)
def test_a_heavy_package_that_comes_in_elsewhere_is_found(tmp_path, name, text):
    (fault,) = door_faults(plant(tmp_path, {name: text}))
    assert fault.startswith(name)


def test_what_is_allowed_is_not_found(tmp_path):
    plant(
        tmp_path,
        {
            "rtdetrv2_jax/model/layers.py": "import jax\nfrom rtdetrv2_jax.config import BackboneConfig",
            "rtdetrv2_jax/model/decoder.py": "from rtdetrv2_jax.model import layers",
            "rtdetrv2_jax/ops/sampling_tpu.py": "from jax.experimental import pallas as pl",
            "rtdetrv2_jax/data/sample.py": "from rtdetrv2_jax.image import read_image",
            "convert/pth.py": "import torch\nfrom .source import Source\nfrom rtdetrv2_jax.weights import table",
            "train/batches.py": "import grain\nimport torchlike",
        },
    )
    assert not direction_faults(tmp_path) + jax_faults(tmp_path) + door_faults(tmp_path)


def test_every_module_says_what_it_is():
    silent = [
        str(path)
        for path in sources(ROOT, LIBRARY, *PROGRAMS, MEASUREMENTS)
        if not ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    ]
    assert not silent, show(silent)


def test_annotations_are_never_postponed():
    postponed = [
        str(path)
        for path in sources(ROOT, LIBRARY, *PROGRAMS, MEASUREMENTS, "tests")
        if any(found.module == "__future__.annotations" for found in imports(ROOT, path))
    ]
    assert not postponed, show(postponed)


def test_no_file_names_a_place_on_one_machine():
    place = re.compile(r"(?<![\w.}])/(home|root|Users|work|mnt|tmp|opt|data)/\w|\b[A-Z]:\\\\?\w")
    written = [
        *(ROOT / path for path in sources(ROOT, LIBRARY, *PROGRAMS, MEASUREMENTS, "tests")),
        *(path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"),
        *(path for path in (ROOT / ".ci").rglob("*") if path.is_file()),
    ]
    found = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in written
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if place.search(line)
    ]
    assert not found, show(found)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> dict[str, bytes]:
    """What every file of the wheel holds, which is built without a network."""
    builders = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling, which the test extra brings")
    (path,) = builders.WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")))
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = [name for name in wheel if ".dist-info/" not in name]
    assert {name.partition("/")[0] for name in names} == {LIBRARY}
    assert sorted(name for name in names if name.endswith(".py")) == [p.as_posix() for p in sources(ROOT, LIBRARY)]


def test_the_wheel_carries_a_small_model(wheel):
    model = {name.rpartition("/")[2]: len(held) for name, held in wheel.items() if "/demo_model/" in name}
    assert set(model) == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert sum(model.values()) < 8e6


def test_the_wheel_brings_its_licence_and_its_command_and_asks_for_no_heavy_package(wheel):
    about = {name.partition(".dist-info/")[2]: text.decode() for name, text in wheel.items() if ".dist-info/" in name}
    assert about["licenses/LICENSE"] == (ROOT / "LICENSE").read_text()
    assert about["licenses/NOTICE"] == (ROOT / "NOTICE").read_text()
    assert "rtdetrv2 = rtdetrv2_jax.cli:main" in about["entry_points.txt"]
    needed = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*; extra)", about["METADATA"], re.MULTILINE)
    assert "jax" in needed
    assert not {"torch", "transformers", "grain", "faster-coco-eval", "onnx", "onnxruntime"} & set(needed)
