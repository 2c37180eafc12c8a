"""Many devices, one program: a mesh with a data axis, batches spread over it, everything else on every device."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"
"""The mesh's one axis: images of a batch lie along it."""

Result = TypeVar("Result")
Tree = TypeVar("Tree")


class ShardingError(ValueError):
    """A batch that the devices cannot share out, or processes that cannot find each other."""


def connect_processes(address: str | None = None, *, processes: int | None = None, index: int | None = None) -> None:
    """Joins the processes of a run into one, so that `jax.devices()` are those of all. To be called before all of JAX.

    On a TPU pod, under Slurm and under Open MPI nothing needs to be given, and a program that runs alone is left
    alone. Elsewhere (GPU machines) every process is given the same `address` (host:port, of the first one), how many
    `processes` there are, and its own `index`.

    Raises:
        ShardingError: Some of the three are given, and not all.
    """
    given = {"address": address, "processes": processes, "index": index}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        jax.distributed.initialize(coordinator_address=address, num_processes=processes, process_id=index)
    elif len(missing) < len(given):
        raise ShardingError(f"processes that meet at an address need {', '.join(given)}: give {', '.join(missing)} too")
    elif _launched_together():
        jax.distributed.initialize()


def _launched_together() -> bool:
    """Whether the environment says that this process is one of several that JAX can find by itself."""
    hosts = [host for host in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    tasks = os.environ.get("SLURM_NTASKS", "1") if "SLURM_STEP_NODELIST" in os.environ else "1"
    ranks = os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    return max(len(hosts), int(tasks), int(ranks)) > 1


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices, those of other processes included, along the data axis; or only `devices`."""
    chosen = np.array(jax.devices() if devices is None else devices)
    return Mesh(chosen, (DATA,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def along_data(mesh: Mesh) -> NamedSharding:
    """The first axis of an array shared out over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def traced_for(mesh: Mesh, function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, to be jitted for the mesh: it is in use while the function is traced, for `each_share` to see."""

    def traced(*arguments: Any) -> Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def each_share(function: Callable[..., Result], *arrays: jax.Array, axis: int = 0) -> Result:
    """The function of each device's share of some arrays along an axis, results put together again.

    For what XLA cannot share out by itself: a kernel of Pallas, or a loop that each device may leave when its own share
    is done. The devices are those of the mesh in use while the program is traced: that of `traced_for`, or of
    `jax.set_mesh`. Where there is none, or none with a data axis, or where a `jax.shard_map` has told the devices apart
    already, this is a plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if DATA not in mesh.axis_names or mesh.manual_axes:
        return function(*arrays)
    even = arrays[0].shape[axis] % mesh.shape[DATA] == 0
    spec = PartitionSpec(*[None] * axis, DATA) if even else PartitionSpec()
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Copies of a tree's arrays on every device. Every process gives the same numbers."""
    whole = replicated(mesh)
    if whole.is_fully_addressable:
        return jax.device_put(tree, whole, may_alias=False)

    def one(array: Any) -> jax.Array:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(array)), impl=jax.random.key_impl(array))
        local = np.array(array)  # `device_put` would compare all processes' numbers, an exchange for each array
        return jax.make_array_from_callback(local.shape, whole, lambda index: local[index])

    return jax.tree.map(one, tree)


def check_batch_size(mesh: Mesh, size: int, *, parts: int = 1) -> None:
    """Raises `ShardingError` unless a batch, taken in `parts` one after another, gives all devices as many images."""
    if size % (mesh.size * parts):
        share = mesh.size * parts
        near = max(share, round(size / share) * share)
        said = f"{mesh.size} devices" + (f" and {parts} parts" if parts > 1 else "")
        raise ShardingError(
            f"a batch of {size} images cannot be shared out evenly over {said}: make it a multiple of {share}, for "
            f"instance {near}, or use fewer devices (CUDA_VISIBLE_DEVICES, JAX_NUM_CPU_DEVICES)"
        )


def put_global_batch(mesh: Mesh, batch: Tree) -> Tree:
    """A batch on the devices, images along the data axis, out of each process's own share of it (NumPy arrays).

    The share of a process is its images alone: `jax.process_count()` of them, in order of the processes, make the
    batch. Returns at once, while the copying goes on.
    """
    sharding = along_data(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, np.asarray(array)), batch)
