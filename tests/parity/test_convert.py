"""The program against transformers: what it verifies, and what transformers makes of what it writes."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import __main__ as program
from convert import pth, source, verify
from rtdetrv2_jax.weights.load import load_pretrained, save_model
from rtdetrv2_jax.weights.table import canonical, rows
from rtdetrv2_jax.weights.transfer import WeightsError, flat_state, to_tensors, with_values

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You'd better set embed_dim:UserWarning"),
]
torch = pytest.importorskip("torch", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")
reference = pytest.importorskip("convert.reference")

HUGGING_FACE = ("r18", "r50", "discrete", "evalidx", "nonsquare")
AUTHORS = ("r18", "r50", "discrete", "evalidx", "nonsquare")
SIZE = {"do_resize": True, "size": {"height": 96, "width": 128}}


def random_model(**fields):
    """A small model in PyTorch with random weights of a natural size."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrV2Config(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[24, 32, 48],
        encoder_ffn_dim=48,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=48,
        decoder_layers=3,
        num_queries=30,
        hidden_expansion=0.5,
        id2label={0: "cat", 1: "dog", 2: "bird"},
        label2id={"cat": 0, "dog": 1, "bird": 2},
        **fields,
    )
    model = transformers.RTDetrV2ForObjectDetection(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.uniform_(0.6, 1.4, generator=generator)
            elif tensor.is_floating_point() and not name.endswith("n_points_scale"):
                size = (1.4 / np.prod(tensor.shape[1:])) ** 0.5 if tensor.ndim > 1 else 0.3
                tensor.normal_(0, size, generator=generator)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model(freeze_backbone_batch_norms=False)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "hf"
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(SIZE))
    return path


@pytest.fixture(scope="module")
def opened(folder):
    return source.open_source(str(folder))


@pytest.fixture(scope="module")
def expected(opened):
    return verify.run_reference(opened)


@pytest.fixture
def convert(capsys):
    def run(*arguments):
        capsys.readouterr()
        code = program.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_verification_passes_for_both_namings_of_transformers(model, folder, tmp_path, convert):
    code, out, err = convert(folder, tmp_path / "ours", "--verify")
    assert code == 0, err
    assert "decoder layer 3, boxes" in out
    assert "the same 30" in out
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "new")
    keys = set(load_file(tmp_path / "new" / "model.safetensors"))
    assert keys != {canonical(key) for key in keys}
    code, again, err = convert(tmp_path / "new", tmp_path / "new", "--verify")  # in its own place
    assert code == 0, err
    assert again.split("stage ")[1].split("written")[0] == out.split("stage ")[1].split("written")[0]


def test_transformers_loads_what_we_write_and_says_the_same(model, folder, tmp_path, convert):
    assert convert(folder, tmp_path / "ours")[0] == 0
    assert convert(tmp_path / "ours", tmp_path / "back", "--to", "hf")[0] == 0
    back, info = transformers.RTDetrV2ForObjectDetection.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    assert back.config.id2label == model.config.id2label
    images = torch.rand(1, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs, ours = model(images), back.eval()(images)
    assert torch.equal(theirs.logits, ours.logits)
    assert torch.equal(theirs.pred_boxes, ours.pred_boxes)
    transformers.AutoImageProcessor.from_pretrained(tmp_path / "back")


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("backbone.stages.2.0.layers.1.conv.kernel", "backbone, stride 16"),
        ("encoder.attention.0.layers.0.attention.key.bias", None),  # the softmax does not see it
        ("encoder.attention.0.layers.0.attention.value.bias", "encoder, stride 8"),
        ("memory.projections.1.norm.bias", "memory"),
        ("selection.class_head.bias", "scores of all tokens"),
        ("selection.box_head.layers.2.kernel", "boxes of selected tokens"),
        ("decoder.layers.1.cross_attention.offsets.kernel", "decoder layer 2, logits"),
    ],
)
def test_one_wrong_weight_is_found_at_its_stage(opened, expected, tmp_path, path, stage):
    values = flat_state(opened.model)
    values[path] = np.asarray(values[path]).copy()
    values[path][..., 1] += 0.5
    save_model(with_values(opened.model, values), tmp_path / "wrong", preprocessing=opened.preprocessing)
    wrong = [measure.stage for measure in verify.verify(expected, tmp_path / "wrong") if not measure.good]
    assert wrong[:1] == ([stage] if stage else [])


def test_a_conversion_that_goes_wrong_is_not_put_in_place(folder, tmp_path, convert, monkeypatch):
    def save_wrong(model, *arguments, **options):
        values = flat_state(model)
        values["decoder.positions.layers.0.bias"] += 1
        save_model(with_values(model, values), *arguments, **options)

    monkeypatch.setattr(program, "save_model", save_wrong)
    code, out, err = convert(folder, tmp_path / "ours", "--verify")
    assert code == 1
    assert "the first is decoder layer 1, logits" in err
    assert "too far" in out
    assert not list(tmp_path.iterdir())


def test_what_transformers_would_do_without_is_a_fault(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    optional = {key for key in tensors if key.endswith("num_batches_tracked")}
    assert optional
    shutil.copytree(folder, tmp_path / "hf")
    images = verify.prepare(load_pretrained(folder).preprocessing, None)
    save_file({key: tensors[key] for key in tensors.keys() - optional}, tmp_path / "hf" / "model.safetensors")
    reference.run(tmp_path / "hf", images)
    tensors["model.enc_output.2.bias"] = tensors.pop("model.enc_output.1.bias")
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(WeightsError, match=r"(?s)missing: model.enc_output.1.bias.*left over: model.enc_output.2.bias"):
        reference.run(tmp_path / "hf", images)


def test_an_early_exit_is_verified_in_its_trimmed_form(folder, tmp_path, convert):
    early = load_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    save_model(early.model, tmp_path / "early", preprocessing=early.preprocessing)
    (tmp_path / "early" / "config.json").write_text(json.dumps(config | {"rtdetrv2_jax": {"inference_layers": 2}}))
    code, out, err = convert(tmp_path / "early", tmp_path / "again", "--verify")
    assert code == 0, err
    assert "decoder layer 2, boxes" in out
    assert "decoder layer 3, boxes" not in out


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", [("ema", "module"), ("model",), ()])
def test_a_training_state_of_the_authors(folder, tmp_path, place, legacy):
    tensors = authors_tensors(load_pretrained(folder).model)
    content = {f"module.{key}" if place == ("model",) else key: torch.tensor(x) for key, x in tensors.items()}
    for key in reversed(place):
        content = {key: content, "last_epoch": 71, "date": "today"}
    content["optimizer" if place else "decoder.anchors"] = {"state": {}} if place else torch.zeros(1, 5, 4)
    torch.save(content, tmp_path / "state.pth", _use_new_zipfile_serialization=not legacy)
    assert pth.is_pth(tmp_path / "state.pth")
    opened = source.open_source(str(tmp_path / "state.pth"))
    assert opened.dropped.keys() == (set() if place else {"decoder.anchors"})
    theirs = flat_state(load_pretrained(folder).model)
    for path, value in flat_state(opened.model).items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


def test_half_precision_in_a_pth(folder, tmp_path):
    tensors = authors_tensors(load_pretrained(folder).model)
    content = {key: torch.tensor(x) for key, x in tensors.items()}
    half = {key: x.bfloat16() if x.is_floating_point() else x for key, x in content.items()}
    torch.save(half, tmp_path / "half.pth")
    for key, tensor in pth.read_pth(tmp_path / "half.pth")[0].items():
        np.testing.assert_array_equal(tensor, half[key].to(content[key].dtype).numpy(), err_msg=key)


class Trap:
    """What a pickle may do to whoever opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, convert, legacy):
    content = {"model": {"a.b": torch.zeros(1)}, "trap": Trap(tmp_path / "sprung")}
    torch.save(content, tmp_path / "trap.pth", _use_new_zipfile_serialization=not legacy)
    code, _, err = convert(tmp_path / "trap.pth", tmp_path / "ours")
    assert code == 1
    assert "was not read" in err
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_no_training_state(tmp_path, convert):
    torch.save({"model": {"a.b": torch.zeros(1000)}}, tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps([1, 2, 3]))
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    torch.save({"model": {"a.b": "text"}}, tmp_path / "text.pth")
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    for name, words in {
        "cut.pth": "download complete",
        "plain.pkl": "was not read",
        "list.pth": "holds a list",
        "empty.pth": "but: epoch",
        "text.pth": "a.b is a str",
        "other.pth": "conv.weight",
    }.items():
        code, _, err = convert(tmp_path / name, tmp_path / "ours")
        assert code == 1, name
        assert words in err, err


@pytest.mark.slow
@pytest.mark.parametrize("case", HUGGING_FACE)
def test_hugging_face_folders_of_the_reference_data_verify(shared, tmp_path, convert, case):
    code, out, err = convert(shared / "golden" / f"model_{case}.hf", tmp_path / "ours", "--verify")
    assert code == 0, out + err


@pytest.mark.slow
@pytest.mark.parametrize("case", AUTHORS)
def test_weights_of_the_authors_code_verify(shared, tmp_path, convert, case):
    weights = shared / "golden" / f"model_{case}.weights.safetensors"
    code, out, err = convert(weights, tmp_path / "hf", "--to", "hf", "--verify")
    assert code == 0, out + err
    transformers.RTDetrV2ForObjectDetection.from_pretrained(tmp_path / "hf")


def test_points_that_differ_by_level_cannot_be_verified(shared, tmp_path, convert):
    code, _, err = convert(shared / "golden" / "model_points.weights.safetensors", tmp_path / "ours", "--verify")
    assert code == 1
    assert "can't be verified" in err
    assert not list(tmp_path.iterdir())


def authors_tensors(model) -> dict[str, np.ndarray]:
    """The model's tensors as the authors name and stack them."""
    tensors, stacked = to_tensors(model), {}
    for row in rows(model.config):
        stacked.setdefault(row.authors, []).append(tensors[row.hugging_face])
    return {key: np.concatenate(parts) if len(parts) > 1 else parts[0] for key, parts in stacked.items()}
