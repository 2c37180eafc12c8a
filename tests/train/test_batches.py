import json
import logging
import multiprocessing
import shutil
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax.data import DataError, Sample, SyntheticDataset, open_dataset
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.sharding import data_mesh
from train import batches as pipeline
from train.augmentation import NO_AUGMENTATION, Augmentation
from train.batches import LoadedBatch, TrainingBatches, evaluation_batches
from train.loading import EvaluationSource, HostBatch, TrainingSource, epoch_order, target_slots
from train.show_batch import show_batch

SIZE = (64, 96)
IMAGES = 22
SCENES = SyntheticDataset(IMAGES, sizes=((80, 120), (120, 80)))
SOURCE = TrainingSource(
    dataset=SCENES,
    augmentation=Augmentation().stopping_at(2),
    size=SIZE,
    batch_size=4,
    epochs=3,
    seed=7,
    slots=16,
)
EXPECTED_ORDER = [21, 1, 10, 4, 9, 3, 18, 2]


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return data_mesh(jax.devices()[:1])


class Pictures:
    """A data set of files, some of which may be damaged."""

    class_names = ("thing",)
    category_ids = (0,)

    def __init__(self, folder: Path, *, count: int, damaged: tuple[int, ...] = (), objects: int = 2):
        self.count, self.folder, self.objects = count, folder, objects
        for index in range(count):
            path = self.path(index)
            if index in damaged:
                path.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
            else:
                Image.new("RGB", (50, 40), (index, 0, 0)).save(path)

    def path(self, index: int) -> Path:
        return self.folder / f"picture_{index}.png"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index, /) -> Sample:
        corners = np.arange(self.objects, dtype=np.float32)[:, None] % 10
        return Sample(
            image=self.path(index),
            image_id=f"p{index}",
            size=(40, 50),
            boxes_xyxy_pixels=np.concatenate([corners, corners, corners + 30, corners + 20], axis=1),
            labels=np.arange(self.objects, dtype=np.int32),
            areas=np.full(self.objects, 600, np.float32),
            crowd_boxes_xyxy_pixels=np.zeros((0, 4), np.float32),
            crowd_labels=np.zeros(0, np.int32),
        )


def source_of(dataset, **changes) -> TrainingSource:
    return replace(SOURCE, dataset=dataset, augmentation=NO_AUGMENTATION, batch_size=3, **changes)


def loaded(source: TrainingSource, mesh, **options) -> list[LoadedBatch]:
    with TrainingBatches(source, mesh=mesh, **options) as given:
        return list(given)


def assert_same(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_batch_is(found: LoadedBatch, expected: HostBatch) -> None:
    targets = found.batch.targets
    fields = (found.batch.images, targets.labels, targets.boxes, targets.mask, *found.batch[2:], found.bad_images)
    assert_same(HostBatch(*fields), expected)


def test_every_epoch_has_every_image_once_but_for_the_rest():
    for epoch in range(3):
        steps = range(epoch * 5, epoch * 5 + 5)
        seen = [index for step in steps for index in SOURCE.indices(step)]
        assert len(set(seen)) == len(seen) == 20
        assert {SOURCE.epoch_of(step) for step in steps} == {epoch}
    assert len(SOURCE) == 15


def test_the_order_is_the_same_for_ever_and_another_in_each_epoch_and_seed():
    assert epoch_order(IMAGES, seed=7, epoch=0)[:8].tolist() == EXPECTED_ORDER
    orders = [epoch_order(IMAGES, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(IMAGES)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 9


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_shares_of_all_hosts_in_a_row_are_the_batch_of_one(hosts: int):
    shares = [replace(SOURCE, process_index=host, process_count=hosts) for host in range(hosts)]
    for step in (0, 7):
        parts = [share[step]._replace(bad_images=()) for share in shares]
        whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        assert_same(whole, SOURCE[step])


def test_a_batch_is_padded_and_keeps_what_it_does_not_change():
    host = SOURCE[3]
    assert host.images.shape == (4, *SIZE, 3)
    assert host.images.dtype == np.uint8
    assert host.boxes.shape == (4, 16, 4)
    assert not host.boxes[~host.mask].any()
    assert not host.labels[~host.mask].any()
    assert (host.boxes[host.mask][:, 2:] > 0).all()
    assert host.image_ids.tolist() == SOURCE.indices(3)


def test_colours_rest_with_the_last_epochs():
    assert [bool(SOURCE[step].distort_colours.all()) for step in (0, 9, 10, 14)] == [True, True, False, False]
    assert not replace(SOURCE, augmentation=NO_AUGMENTATION)[0].distort_colours.any()


def test_threads_give_the_batches_of_the_source_in_order(mesh):
    given = loaded(SOURCE, mesh)
    assert [(batch.step, batch.epoch) for batch in given] == [(step, step // 5) for step in range(15)]
    for step, batch in enumerate(given):
        assert_batch_is(batch, SOURCE[step])


def test_processes_give_the_same_batches_resume_to_the_bit_and_end(mesh):
    with TrainingBatches(SOURCE, mesh=mesh) as begun:
        for _ in range(8):
            next(begun)
        state = json.loads(json.dumps(begun.state()))
    assert state["step"] == 8
    resumed = loaded(SOURCE, mesh, state=state, workers=2)
    assert [batch.step for batch in resumed] == list(range(8, 15))
    for batch in resumed:
        assert_batch_is(batch, SOURCE[batch.step])
    assert not multiprocessing.active_children()
    assert not loaded(SOURCE, mesh, state=state | {"step": 15})


def test_other_data_do_not_go_on_with_a_run(mesh):
    state = {"step": 3, "images": 21, "batch_size": 4, "seed": 7}
    with pytest.raises(DataError, match="images was 21, is 22"):
        TrainingBatches(SOURCE, mesh=mesh, state=state)


def test_a_batch_lies_along_the_devices():
    mesh = data_mesh()
    with TrainingBatches(replace(SOURCE, batch_size=8), mesh=mesh) as given:
        batch = next(given).batch
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(batch))
    assert {shard.data.shape for shard in batch.images.addressable_shards} == {(1, *SIZE, 3)}
    assert_batch_is(LoadedBatch(0, 0, batch, 0.0, ()), replace(SOURCE, batch_size=8)[0])


def test_the_wait_for_a_batch_is_measured(mesh, monkeypatch):
    class Slow(TrainingSource):
        def __getitem__(self, step):
            time.sleep(0.2)
            return super().__getitem__(step)

    with TrainingBatches(Slow(**vars(SOURCE)), mesh=mesh) as given:
        assert next(given).wait_seconds > 0.15
        time.sleep(0.6)
        assert next(given).wait_seconds < 0.1


def test_too_little_data_and_uneven_hosts_are_refused():
    with pytest.raises(DataError, match="22 images, not enough for one batch of 23"):
        replace(SOURCE, batch_size=23)
    with pytest.raises(DataError, match="3 hosts cannot share a batch of 4"):
        replace(SOURCE, process_count=3)


def test_an_unreadable_image_is_replaced_the_same_way_every_time_and_told(tmp_path, mesh, caplog):
    pictures = Pictures(tmp_path, count=6, damaged=(1, 4))
    source = source_of(pictures)
    with caplog.at_level(logging.WARNING):
        given = loaded(source, mesh)
    bad = [image for batch in given for image in batch.bad_images]
    assert {image.position for image in bad} == {1, 4}
    assert len(bad) >= 2 * source.epochs
    assert all("picture_" in image.reason for image in bad)
    assert "picture_1.png" in caplog.text
    for step, batch in enumerate(given):
        shown = np.asarray(batch.batch.images)[:, 0, 0, 0]
        assert shown.tolist() == np.asarray(batch.batch.image_ids).tolist()
        assert not {1, 4} & set(shown.tolist())
        assert_batch_is(batch, source[step])


def test_an_unreadable_image_stops_a_strict_run(tmp_path, mesh):
    source = source_of(Pictures(tmp_path, count=6, damaged=(1,)), on_bad_data="refuse")
    with pytest.raises(DataError, match=r"picture_1\.png.*--on-bad-data skip"):
        loaded(source, mesh)


def test_data_of_which_nothing_can_be_read_are_given_up(tmp_path):
    with pytest.raises(DataError, match="20 images one after another"):
        source_of(Pictures(tmp_path, count=3, damaged=(0, 1, 2)))[0]


def test_slots_are_the_largest_count_rounded_up(tmp_path):
    counts = {0: 16, 3: 16, 17: 32, 100: 128, 129: 300, 1000: 300}
    assert {count: target_slots(Pictures(tmp_path, count=1, objects=count), most=300) for count in counts} == counts
    assert target_slots(SCENES, most=300) == 16
    assert target_slots(SCENES, most=10) == 10


def test_slots_of_files_do_not_count_crowds(shared: Path):
    dataset = open_dataset(shared / "data" / "coco")
    largest = max(len(dataset[index].labels) for index in range(len(dataset)))
    assert target_slots(dataset, most=300) == next(slots for slots in (16, 32, 64, 128) if slots >= largest)


def test_of_too_many_objects_each_epoch_keeps_others(tmp_path):
    source = source_of(Pictures(tmp_path, count=3, objects=40), slots=10)
    kept = [set(source[epoch].labels[source[epoch].image_ids == 0][0].tolist()) for epoch in range(3)]
    assert all(len(labels) == 10 for labels in kept)
    assert len(set.union(*kept)) > 15
    assert_same(source[0], source[0])


def test_an_evaluation_has_every_image_once_in_order_as_at_inference(mesh):
    preprocessing = Preprocessing(size=SIZE)
    source = EvaluationSource(dataset=SCENES, preprocessing=preprocessing, batch_size=4)
    given = list(evaluation_batches(source, mesh=mesh))
    mask = np.concatenate([batch.mask for batch in given])
    assert mask.tolist() == [True] * IMAGES + [False] * 2
    assert np.concatenate([batch.image_ids for batch in given])[mask].tolist() == list(range(IMAGES))
    images, sizes = (np.concatenate([batch[field] for batch in given])[mask] for field in (0, 1))
    for index in range(IMAGES):
        prepared = preprocessing.prepare(SCENES[index].read())
        np.testing.assert_array_equal(images[index], prepared.pixels)
        assert tuple(sizes[index]) == prepared.scale_size
    hosts = [replace(source, process_index=host, process_count=2) for host in range(2)]
    shares = [np.concatenate([host[step].image_ids for host in hosts]).tolist() for step in range(len(source))]
    assert shares == [batch.image_ids.tolist() for batch in given]


def test_an_unreadable_image_is_masked_in_evaluation_or_refused(tmp_path, mesh):
    pictures = Pictures(tmp_path, count=5, damaged=(2,))
    source = EvaluationSource(dataset=pictures, preprocessing=Preprocessing(size=SIZE), batch_size=2)
    given = list(evaluation_batches(source, mesh=mesh))
    assert np.concatenate([batch.mask for batch in given]).tolist() == [True, True, False, True, True, False]
    assert [image.position for batch in given for image in batch.bad_images] == [2]
    with pytest.raises(DataError, match=r"picture_2\.png"):
        list(evaluation_batches(replace(source, on_bad_data="refuse"), mesh=mesh))


def test_images_of_different_sizes_are_not_batched():
    with pytest.raises(DataError, match="stretch"):
        EvaluationSource(
            dataset=SCENES, preprocessing=Preprocessing(resize="shortest_edge", pad="multiple"), batch_size=2
        )


def test_too_little_shared_memory_is_not_used(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(pipeline, "SHARED_MEMORY", tmp_path)
    assert pipeline._least_shared(SOURCE, workers=2) == pipeline.LEAST_SHARED
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**26, 2**26, 0))
    assert pipeline._least_shared(SOURCE, workers=2) > 2**40
    assert "--shm-size" in caplog.text


def test_a_picture_shows_the_batch(tmp_path, mesh):
    source = replace(SOURCE, batch_size=5)
    with TrainingBatches(source, mesh=mesh) as given:
        batch = next(given).batch
    options = {"key": jax.random.key(0), "augmentation": source.augmentation, "dataset": SCENES}
    show_batch(tmp_path / "batch.png", batch, size=(96, 96), **options)
    show_batch(tmp_path / "again.png", batch, size=(96, 96), **options)
    with Image.open(tmp_path / "batch.png") as picture:
        assert picture.width > 3 * 96
        assert picture.height > 2 * 96
        assert len(picture.convert("RGB").getcolors(2**20) or ()) > 100
    assert (tmp_path / "batch.png").read_bytes() == (tmp_path / "again.png").read_bytes()
