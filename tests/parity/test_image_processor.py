"""Our preprocessing against the image processor of transformers, which is what the checkpoints were published with."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax.image import read_image
from rtdetrv2_jax.preprocessing import Preprocessing

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
pytest.importorskip("torch", reason="needs the parity extra")
pytest.importorskip("transformers", reason="needs the parity extra")

MAX = {"max_height": 640, "max_width": 640}
SHORT = {"shortest_edge": 480, "longest_edge": 640}
SQUARE = {"height": 640, "width": 640}
FORMS = [
    {},
    {"size": {"height": 320, "width": 480}, "resample": 3},
    {"size": {"height": 64, "width": 64}, "resample": 0},
    {"size": {"height": 96, "width": 64}, "resample": 1},
    {"size": {"height": 96, "width": 64}, "resample": 4},
    {"size": {"height": 96, "width": 64}, "resample": 5},
    {"size": MAX, "do_pad": True, "pad_size": SQUARE},
    {"size": {"max_height": 320, "max_width": 640}, "do_pad": True, "pad_size": {"height": 320, "width": 640}},
    {"size": SHORT, "do_pad": True, "pad_size": SQUARE},
    {"size": {"shortest_edge": 97, "longest_edge": 231}, "do_pad": True, "pad_size": {"height": 256, "width": 256}},
    {"size": MAX, "do_pad": True, "pad_size": SQUARE, "do_normalize": True},
    {"do_resize": False, "do_pad": True, "pad_size": {"height": 704, "width": 672}},
    {"do_normalize": True},
    {"do_normalize": True, "do_rescale": False, "image_mean": [120, 110, 100], "image_std": [60, 50, 70]},
    {"do_rescale": False},
    {"rescale_factor": 1 / 127.5, "do_normalize": True, "image_mean": 1.0, "image_std": 1.0},
]
SIZES = [(480, 640), (427, 640), (640, 427), (333, 500), (100, 80), (35, 650), (700, 33), (640, 640), (97, 97)]


@pytest.fixture(scope="module")
def processor_class():
    from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

    return RTDetrImageProcessorPil


def noise(height, width):
    return np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ours(this, image):
    prepared = this.prepare(image)
    content_sizes = np.array([prepared.content_size], np.int32)
    return prepared, np.asarray(this.normalise(prepared.pixels[None], content_sizes=content_sizes)[0])


def theirs(processor, image):
    answer = processor(images=Image.fromarray(image), return_tensors="np")
    return answer["pixel_values"][0].transpose(1, 2, 0), answer.get("pixel_mask")


@pytest.mark.parametrize("fields", FORMS, ids=json.dumps)
def test_every_form_of_the_file_gives_the_references_pixels(processor_class, fields):
    this = Preprocessing.from_hugging_face(fields)
    processor = processor_class(**fields)
    for height, width in SIZES:
        prepared, values = ours(this, noise(height, width))
        expected, mask = theirs(processor, noise(height, width))
        assert values.shape == expected.shape
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)
        if mask is not None:
            assert prepared.content_size == (mask[0].sum(0).max(), mask[0].sum(1).max())


@pytest.mark.parametrize(
    "fields", [{"size": SHORT}, {"size": MAX}, {"size": {"shortest_edge": 97, "longest_edge": 231}}]
)
def test_kept_aspects_have_the_references_sizes(processor_class, fields):
    this = Preprocessing.from_hugging_face({**fields, "do_pad": True})
    processor = processor_class(**fields)
    random = np.random.default_rng(0)
    for height, width in random.integers(1, 400, (150, 2)):
        if max(height, width) > 40 * min(height, width):
            continue
        image = np.zeros((height, width, 3), np.uint8)
        assert this.prepare(image).content_size == theirs(processor, image)[0].shape[:2]


def test_without_pad_size_a_lone_image_differs_by_our_padding_alone(processor_class):
    fields = {"size": SHORT, "do_pad": True}
    prepared, values = ours(Preprocessing.from_hugging_face(fields), noise(333, 500))
    expected, _ = theirs(processor_class(**fields), noise(333, 500))
    height, width = prepared.content_size
    assert expected.shape == (height, width, 3)
    np.testing.assert_allclose(values[:height, :width], expected, rtol=1e-6)
    assert not values[height:].any()


@pytest.mark.parametrize("fields", FORMS, ids=json.dumps)
def test_transformers_loads_what_we_write(tmp_path, fields):
    from transformers import AutoImageProcessor

    this = Preprocessing.from_hugging_face(fields)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(this.to_hugging_face()))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__.startswith("RTDetrImageProcessor")
    tolerance = 1.01 / 255 if "torchvision" in sys.modules else 1e-6  # torchvision rounds its resize another way
    expected, _ = theirs(processor, noise(100, 80))
    np.testing.assert_allclose(ours(this, noise(100, 80))[1], expected, rtol=1e-6, atol=tolerance)


def test_we_read_what_transformers_writes(processor_class, tmp_path):
    for fields in FORMS:
        processor_class(**fields).save_pretrained(tmp_path)
        assert Preprocessing.from_folder(tmp_path) == Preprocessing.from_hugging_face(fields)


def test_the_cats_give_the_references_pixels_and_the_published_ones(processor_class, shared):
    picture = read_image(shared / "data/coco_039769/000000039769.png")
    _, values = ours(Preprocessing(), picture)
    expected, _ = theirs(processor_class(), picture)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    published = [0.5490196347236633, 0.5647059082984924, 0.572549045085907]
    np.testing.assert_allclose(values[0, :3, 0], published, rtol=0, atol=1e-5)


PUBLISHED_GREEN = {  # the second channel's first three values of COCO val2017 images
    "000000000139": (0.533333, 0.556863, 0.564706),
    "000000000285": (0.537255, 0.470588, 0.427451),
    "000000000632": (0.396078, 0.356863, 0.368627),
    "000000000724": (0.207843, 0.188235, 0.152941),
    "000000000776": (0.364706, 0.364706, 0.368627),
    "000000000785": (0.807843, 0.807843, 0.807843),
    "000000000802": (0.443137, 0.443137, 0.443137),
    "000000000872": (0.196078, 0.211765, 0.360784),
}


def test_coco_images_give_the_published_pixels(shared):
    files = [file for file in (shared / "data" / "coco").rglob("*.jpg") if file.stem in PUBLISHED_GREEN]
    assert files
    for file in files:
        values = ours(Preprocessing(), read_image(file))[1]
        np.testing.assert_allclose(values[0, :3, 1], PUBLISHED_GREEN[file.stem], rtol=0, atol=1e-5)
