"""The comparison of stages, without PyTorch: a model against itself."""

import numpy as np
import pytest

from convert.stages import Answer, aligned, run
from convert.verify import LOGITS, compare, prepare
from rtdetrv2_jax.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def images():
    return prepare(Preprocessing(size=(128, 96)), None)


@pytest.fixture(scope="module")
def stages(small, images):
    """The small model's stages, in the order of its own tokens."""
    first = run(small, images, tokens=np.arange(small.config.decoder.queries))
    return run(small, images, tokens=first.tokens)


def test_the_image_is_the_same_every_time_and_prepared_as_the_checkpoint_says(images):
    assert images.shape == (1, 128, 96, 3)
    assert images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    np.testing.assert_array_equal(images, prepare(Preprocessing(size=(128, 96)), None))
    assert prepare(Preprocessing(resize="shortest_edge", size=(320, 640), pad="multiple"), None).shape[1] == 320


def test_alignment_finds_every_token():
    tokens = np.random.default_rng(0).permutation(1000)[:50]
    ours = np.random.default_rng(1).permutation(tokens)
    np.testing.assert_array_equal(ours[aligned(ours, tokens)], tokens)
    assert aligned(ours, np.append(tokens[:-1], 1000)) is None


def test_the_stages_end_in_the_models_own_answer(small, stages):
    assert len(stages.layers) == small.config.decoder.layers
    for said, answered in zip(stages.layers[-1], stages.output, strict=True):
        np.testing.assert_array_equal(said, answered)
    best = np.argsort(-stages.scores, kind="stable")[: len(stages.tokens)]
    np.testing.assert_array_equal(stages.tokens, best)
    assert all(measure.good and measure.difference == 0 for measure in compare(stages, stages, exact=stages, share=1.0))


def test_the_order_of_queries_does_not_matter(small, images, stages):
    shuffled = np.random.default_rng(0).permutation(len(stages.tokens))
    theirs = stages._replace(
        tokens=stages.tokens[shuffled],
        selected_boxes=stages.selected_boxes[shuffled],
        layers=tuple(Answer(layer.logits[shuffled], layer.boxes[shuffled]) for layer in stages.layers),
        output=Answer(stages.output.logits[shuffled], stages.output.boxes[shuffled]),
    )
    ours = run(small, images, tokens=theirs.tokens)
    assert all(measure.difference == 0 for measure in compare(ours, theirs, exact=theirs, share=1.0))


def test_a_tie_at_the_end_of_the_list_is_forgiven_and_a_wrong_choice_is_not(small, images, stages):
    ranked = np.argsort(-stages.scores, kind="stable")
    count = len(stages.tokens)
    tokens = np.append(stages.tokens[:-1], ranked[count])
    ours = run(small, images, tokens=tokens)
    assert len(ours.layers) == len(stages.layers)
    np.testing.assert_array_equal(ours.tokens, stages.tokens)

    for gap, good in ((LOGITS, True), (3 * LOGITS, False)):
        scores = stages.scores.copy()
        scores[ranked[count - 1]] = scores[ranked[count]] - gap
        theirs = ours._replace(tokens=tokens, scores=scores)
        measures = {measure.stage: measure for measure in compare(ours, theirs, exact=theirs, share=1.0)}
        assert measures["selected tokens"].good == good
        assert measures["decoder layer 1, boxes"].difference == 0
        assert "output, boxes" not in measures


@pytest.mark.parametrize("stage", ["memory", "scores", "selected_boxes"])
@pytest.mark.parametrize("wrong", [0.01, np.nan])
def test_one_wrong_number_is_found(stages, stage, wrong):
    values = getattr(stages, stage).copy()
    values[3] += wrong
    found = [
        measure
        for measure in compare(stages._replace(**{stage: values}), stages, exact=stages, share=1.0)
        if not measure.good
    ]
    assert len(found) == 1


def test_discrete_sampling_lets_a_few_queries_off_and_not_all(stages):
    for count, good in ((2, True), (20, False)):
        logits = stages.layers[0].logits.copy()
        logits[:count] += 1
        ours = stages._replace(layers=(stages.layers[0]._replace(logits=logits), *stages.layers[1:]))
        assert all(measure.good for measure in compare(ours, stages, exact=stages, share=0.9)) == good
        assert not all(measure.good for measure in compare(ours, stages, exact=stages, share=1.0))
