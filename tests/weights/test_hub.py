"""Finding a model: paths as they are, hub ids through the cache, and what is said where neither is there."""

import json

import pytest

from rtdetrv2_jax.weights.hub import SourceError, find


def test_a_path_is_taken_as_it_is(tmp_path):
    assert find(tmp_path) == tmp_path
    assert find(str(tmp_path)) == tmp_path


def test_what_is_neither_a_path_nor_an_id_is_said_to_be_so():
    with pytest.raises(SourceError, match=r"no file or folder './nowhere', and it is not a hub id such as"):
        find("./nowhere")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A hub that can't be reached, and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_without_network_and_cache_the_error_says_how_to_get_the_files_otherwise(offline):
    with pytest.raises(SourceError) as error:
        find("PekingU/rtdetr_v2_r18vd", revision="v1")
    for said in ("not in the local cache", "config.json", "model.safetensors", "/tree/v1", "HF_ENDPOINT", "HF_HOME"):
        assert said in str(error.value)


def test_a_cached_model_is_found_without_network(offline):
    commit = "0123456789012345678901234567890123456789"
    repository = offline / "models--someone--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "rt_detr_v2"}))
    assert find("someone/model") == snapshot
    assert find("someone/model", revision=commit) == snapshot
