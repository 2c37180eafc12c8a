"""A mesh over all devices, and batches spread over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdetrv2_jax.sharding import (
    ShardingError,
    check_batch_size,
    connect_processes,
    data_mesh,
    put_global_batch,
    replicate,
)


def test_a_mesh_has_all_devices_or_those_given():
    assert data_mesh().size == len(jax.devices())
    assert data_mesh(jax.devices()[:2]).size == 2


def test_a_batch_lies_along_the_devices_and_computes_as_one():
    batch = {"images": np.arange(16 * 3, dtype=np.float32).reshape(16, 3), "ids": np.arange(16, dtype=np.int32)}
    placed = put_global_batch(data_mesh(), batch)
    assert {shard.data.shape[0] for shard in placed["images"].addressable_shards} == {2}
    np.testing.assert_array_equal(placed["images"], batch["images"])
    assert float(jax.jit(jnp.sum)(placed["images"])) == batch["images"].sum()


def test_what_is_replicated_is_whole_on_every_device():
    whole = replicate(data_mesh(), jnp.arange(5))
    assert len(whole.addressable_shards) == len(jax.devices())
    assert all(shard.data.shape == (5,) for shard in whole.addressable_shards)


def test_giving_up_a_replicated_copy_leaves_the_original():
    original = jnp.arange(5.0)
    copy = replicate(data_mesh(jax.devices()[:1]), original)
    jax.jit(lambda x: x + 1, donate_argnums=0)(copy)
    np.testing.assert_array_equal(original, np.arange(5.0))


def test_a_batch_that_does_not_divide_says_what_would():
    check_batch_size(data_mesh(), 16, parts=2)
    with pytest.raises(ShardingError, match="multiple of 8, for instance 16"):
        check_batch_size(data_mesh(), 14)
    with pytest.raises(ShardingError, match="8 devices and 2 parts"):
        check_batch_size(data_mesh(), 24, parts=2)


def test_a_program_alone_connects_to_nobody(monkeypatch):
    for name in ("TPU_WORKER_HOSTNAMES", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    connect_processes()


def test_half_an_address_is_refused():
    with pytest.raises(ShardingError, match="give processes, index too"):
        connect_processes("somewhere:1234")
