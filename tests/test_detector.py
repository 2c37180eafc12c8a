"""The detector as a program meets it."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax import ConfigError, Detector, ImageError, Preprocessing, detect
from rtdetrv2_jax.model.rtdetrv2 import ImageSizeError
from rtdetrv2_jax.weights.untrained import untrained_model

SIZE = (128, 160)


@pytest.fixture(scope="module")
def detector(tiny_model):
    return Detector(tiny_model, Preprocessing(size=SIZE), max_batch=4)


def picture(seed, size=(90, 120)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def same(one, other, *, atol=1e-3):
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    np.testing.assert_allclose(one.boxes, other.boxes, atol=atol)


def test_a_result_says_what_is_where(detector):
    (result,) = detector(picture(0), threshold=0.0)
    assert len(result) == 20
    assert result.names == tuple(detector.config.class_names[label] for label in result.labels)
    assert np.all(np.diff(result.scores) <= 0)
    assert result.size == (90, 120)
    assert result.boxes.shape == (20, 4)


def test_images_of_all_kinds_and_sizes_give_what_each_gives_alone(detector, tmp_path):
    Image.fromarray(picture(1, (200, 60))).save(tmp_path / "tall.png")
    buffer = io.BytesIO()
    Image.fromarray(picture(2)).save(buffer, "PNG")
    sources = [
        picture(0),
        tmp_path / "tall.png",
        str(tmp_path / "tall.png"),
        buffer.getvalue(),
        Image.fromarray(picture(3, (33, 44))),
        picture(4).astype(np.float64) / 255,
    ]
    together = detector(sources, threshold=0.0)
    for source, result in zip(sources, together, strict=True):
        same(detector(source, threshold=0.0)[0], result)


def test_every_batch_size_runs_one_of_a_few_programs(tiny_model, kept_programs):
    detector = Detector(tiny_model, Preprocessing(size=SIZE), max_batch=4)
    one = detector([picture(0)], threshold=0.0)[0]
    for count in (3, 4, 5, 7):
        same(detector([picture(0)] * count, threshold=0.0)[-1], one)
    names = [file.name.split("-")[0] for file in kept_programs.iterdir()]
    assert sorted(names) == ["fold", "run", "run"]  # for one image and for four


def test_thresholds_hold_for_all_or_for_each_class(detector):
    everything = detector(picture(0), threshold=0.0)[0]
    middle = float(np.median(everything.scores))
    assert np.all(detector(picture(0), threshold=middle)[0].scores > middle)
    name = everything.names[0]
    others_off = dict.fromkeys(detector.config.class_names, 1.0) | {name: 0.0}
    assert set(detector(picture(0), threshold=others_off)[0].names) == {name}


def test_a_threshold_for_a_class_that_is_not_there_is_an_error(detector):
    with pytest.raises(ConfigError, match=r"does not have: cow; it has ant, bee"):
        detector(picture(0), threshold={"cow": 0.5})


def test_no_images_give_no_results(detector):
    assert detector([]) == []


def test_a_bad_image_stops_a_call_but_not_a_stream(detector, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"not a picture")
    sources = [picture(0), tmp_path / "bad.jpg", picture(1)]
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        detector(sources)
    found = list(detector.stream(iter(sources), threshold=0.0))
    assert [isinstance(item.result, ImageError) for item in found] == [False, True, False]
    assert found[1].image is None
    same(found[2].result, detector(picture(1), threshold=0.0)[0])


def test_a_stream_reads_no_further_ahead_than_it_must(detector):
    taken = []

    def sources():
        for index in range(1000):
            taken.append(index)
            yield picture(index % 3)

    stream = detector.stream(sources())
    next(stream)
    stream.close()
    assert len(taken) < 20


def test_boxes_are_in_pixels_of_the_original(tiny_model):
    detector = Detector(tiny_model, Preprocessing(size=SIZE))
    small = detector(picture(0, SIZE), threshold=0.0)[0]
    doubled = np.repeat(np.repeat(picture(0, SIZE), 2, axis=0), 2, axis=1)  # shrinks back to the same pixels
    large = Detector(tiny_model, Preprocessing(size=SIZE, resample="box"))(doubled, threshold=0.0)[0]
    np.testing.assert_allclose(large.boxes, 2 * small.boxes, atol=1e-2)


def test_images_that_keep_their_aspect_are_padded_and_found_in_their_own_pixels(tiny_model):
    keeping = Preprocessing(resize="fit_inside", size=(160, 160), pad="multiple")
    small, large = picture(1, (64, 160)), picture(2, (128, 320))
    found = Detector(tiny_model, keeping, max_batch=1)([small, large], threshold=0.0)
    assert [result.size for result in found] == [(64, 160), (128, 320)]
    same(found[0], Detector(tiny_model, Preprocessing(size=(64, 160)))(small, threshold=0.0)[0])


def test_an_input_size_with_too_few_tokens_is_refused_at_once(tiny_config):
    many = dataclasses.replace(tiny_config, decoder=dataclasses.replace(tiny_config.decoder, queries=30))
    with pytest.raises(ImageSizeError, match="fewer than the model's 30 queries"):
        Detector(untrained_model(many), Preprocessing(size=(32, 32)))


def test_the_function_below_is_pure_and_can_be_exported(tiny_model, detector):
    prepared = detector.preprocessing.prepare(picture(0))
    images, sizes = jnp.asarray(prepared.pixels)[None], jnp.array([prepared.scale_size], jnp.float32)

    def whole(images, sizes):
        return detect(tiny_model, images, sizes, preprocessing=detector.preprocessing)

    expected = detector(picture(0), threshold=0.0)[0]
    exported = jax.export.export(jax.jit(whole))(images, sizes)
    scores, labels, boxes = jax.export.deserialize(exported.serialize()).call(images, sizes)
    np.testing.assert_allclose(scores[0], expected.scores, atol=1e-5)
    np.testing.assert_array_equal(labels[0], expected.labels)
    np.testing.assert_allclose(boxes[0], expected.boxes, atol=1e-2)
