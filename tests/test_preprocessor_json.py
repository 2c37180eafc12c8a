import json

import pytest

from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.preprocessing import Preprocessing

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
EVERY_FORM = [
    Preprocessing(),
    Preprocessing(size=(480, 640), resample="bicubic"),
    Preprocessing(resize="shortest_edge", size=(480, 640), pad="multiple"),
    Preprocessing(resize="fit_inside", size=(320, 640), pad="size", pad_size=(320, 640), resample="lanczos"),
    Preprocessing(resize="none", pad="multiple", rescale_factor=None),
    Preprocessing(resize="none", pad="size", pad_size=(1312, 1344), size=(64, 32), **IMAGENET),
    Preprocessing(rescale_factor=1 / 127.5, mean=(1.0, 1.0, 1.0), std=(0.5, 1.0, 2.0)),
    *(Preprocessing(resample=name) for name in ("nearest", "box", "hamming")),
]


@pytest.mark.parametrize("this", EVERY_FORM)
def test_every_preprocessing_survives_its_file(tmp_path, this):
    fields = json.loads(json.dumps(this.to_hugging_face()))
    assert Preprocessing.from_hugging_face(fields) == this
    assert Preprocessing.from_hugging_face(fields).to_hugging_face() == fields
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    assert Preprocessing.from_folder(tmp_path) == this


def test_the_defaults_are_what_is_published():
    text = json.dumps(Preprocessing().to_hugging_face(), indent=2, sort_keys=True) + "\n"
    assert len(text) == 444  # bytes of the published file
    assert Preprocessing().input_size == (640, 640)
    assert Preprocessing.from_hugging_face({}) == Preprocessing()
    assert Preprocessing.from_hugging_face(dict.fromkeys(json.loads(text))) == Preprocessing()


def test_a_folder_without_the_file_means_the_published_defaults(tmp_path):
    assert Preprocessing.from_folder(tmp_path) == Preprocessing.from_folder(str(tmp_path)) == Preprocessing()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Preprocessing.from_folder(tmp_path / "gone")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"{", "Expecting property name"),
        (b"[1]", "expected a JSON object, got list"),
        (b"\xff\xfe", "codec can't decode"),
        (b'{"size": 640}', "size: expected whole numbers"),
    ],
)
def test_a_file_that_cannot_be_respected_is_named(tmp_path, content, cause):
    (tmp_path / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"(?s)preprocessor_config\.json: .*{cause}"):
        Preprocessing.from_folder(tmp_path)


def test_a_field_left_out_null_or_without_bearing_on_pixels_means_the_default():
    fields = {
        "do_normalize": False,
        "image_mean": [0.5, 0.5, 0.5],
        "do_pad": None,
        "pad_size": {"height": 7, "width": 7},
        "do_convert_rgb": True,
        "image_processor_type": "RTDetrImageProcessorFast",
        "processor_class": None,
        "do_reduce_labels": False,
        "return_segmentation_masks": None,
    }
    assert Preprocessing.from_hugging_face(fields) == Preprocessing()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"size": [320, 640]}, {"size": (320, 640)}),
        ({"do_pad": True, "pad_size": 640}, {"pad": "size", "pad_size": (640, 640)}),
        ({"do_resize": False, "size": {"shortest_edge": 9, "longest_edge": 9}}, {"resize": "none"}),
        ({"do_normalize": True, "image_mean": 0.5, "image_std": 1}, {"mean": (0.5,) * 3, "std": (1.0,) * 3}),
    ],
)
def test_the_short_forms_of_the_format_are_understood(fields, expected):
    assert Preprocessing.from_hugging_face(fields) == Preprocessing(**expected)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"size": 640}, "size: expected whole numbers as one of {height, width}; .*got 640"),
        ({"size": {"shortest_edge": 640}}, "size: .*got {'shortest_edge': 640}"),
        ({"size": {"height": 640.0, "width": 640}}, "size: expected whole numbers"),
        ({"size": {"height": -32, "width": 640}}, "size: expected two positive numbers"),
        ({"size": {"height": 650, "width": 640}}, r"multiples of 32, got \(650, 640\). Set \(640, 640\)"),
        (
            {"size": {"shortest_edge": 481, "longest_edge": 641}},
            r"\(481, 641\) brings no side to a multiple of 32.*Set do_pad",
        ),
        ({"do_pad": True, "pad_size": {"height": 650, "width": 640}}, r"pad_size: .*got \(650, 640\)"),
        ({"do_pad": True, "pad_size": {"height": 320, "width": 640}}, "pad_size: .*does not hold"),
        (
            {"do_pad": True, "pad_size": {"shortest_edge": 32, "longest_edge": 32}},
            "pad_size: expected height and width",
        ),
        ({"do_resize": "yes"}, "do_resize: expected true or false, got 'yes'"),
        ({"resample": 6}, "resample: .*0 to 5 .*got 6"),
        ({"resample": True}, "resample: .*got True"),
        ({"rescale_factor": "1/255"}, "rescale_factor: expected a number"),
        ({"rescale_factor": -1}, "rescale_factor: expected a positive number"),
        ({"do_normalize": True, "image_mean": [0.5, 0.5]}, "image_mean: expected a number or three"),
        ({"do_normalize": True, "image_std": [0.5, 0, 0.5]}, "std: expected three positive numbers"),
        ({"do_center_crop": True}, "do_center_crop: .*Set it to false"),
        ({"image_processor_type": "DetrImageProcessor"}, "image_processor_type: .*got 'DetrImageProcessor'"),
        ({"do_normalise": True}, "do_normalise: unknown. Did you mean do_normalize"),
    ],
)
def test_what_cannot_be_respected_is_an_error_that_names_the_field(fields, cause):
    with pytest.raises(ConfigError, match=cause):
        Preprocessing.from_hugging_face(fields)


def test_all_faults_of_a_file_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        Preprocessing.from_hugging_face({"size": 1, "resample": 9, "do_pad": 1, "do_normalise": False})
    assert len(str(caught.value).splitlines()) == 5
