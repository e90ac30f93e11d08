"""Where every array of the step lives: a mesh, and one ordered table of (regex, PartitionSpec) for parameters and
optimiser state alike. The first row for a whole path wins, of it the first spec that divides; no row is an error."""

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dollar_jax.config import MeshConfig

AXES = ("data", "fsdp", "context", "tensor")
BATCH = P(("data", "fsdp"))

# Parameters are shared over all devices that would otherwise hold copies, and gathered layer by layer.
FSDP = ("fsdp", "context")
# In the mesh's own order: with "tensor" first the partitioner of jaxlib 0.10.2 swaps rows of a batch
# between devices where it moves such a kernel's product inside a scan (test_step finds it).
ALL = ("fsdp", "context", "tensor")

RULES: tuple[tuple[str, *tuple[P, ...]], ...] = (
    # The latent reward model, in checkpoints the reward head, and the discriminator's head are small.
    (r"(.*/)?(latent_reward|reward_head|gan_head).*", P()),
    (r"reward_statistics/.*", P()),
    # Low-rank adapters: [layer, in, rank] and [layer, rank, out].
    (r"(.*/)?blocks/.*/adapter/down", P(None, FSDP, None)),
    (r"(.*/)?blocks/.*/adapter/up", P(None, None, FSDP)),
    (r"(.*/)?adapter/(down|up)", P()),
    # Stacked blocks: [layer, in, out]. Wan's and CogVideoX' names, then UMT5's.
    (r"(.*/)?blocks/.*/(to_q|to_k|to_v|add_._proj|proj_in)/kernel", P(None, FSDP, "tensor")),
    # Wan's by rows: columns are moved after they were gathered. With CogVideoX' so the TPU's compiler fuses less.
    (r"(.*/)?blocks/ffn/proj_out/kernel", P(None, ("tensor", *FSDP), None), P(None, "tensor", FSDP)),
    (r"(.*/)?blocks/.*/(to_out|proj_out)/kernel", P(None, "tensor", FSDP)),
    (r"(.*/)?blocks/.*/(to_q|to_k|to_v|add_._proj|proj_in)/bias", P(None, "tensor")),
    (r"(.*/)?blocks/(.*/)?(q|k|v|wi_0|wi_1)/kernel", P(None, FSDP, "tensor")),
    (r"(.*/)?blocks/(.*/)?(o|wo)/kernel", P(None, "tensor", FSDP)),
    # A modulation is read whole by every token.
    (r"(.*/)?blocks/.*/linear/kernel", P(None, None, ALL)),
    (r"(.*/)?blocks/.*(bias|scale|scale_shift_table|relative_attention_bias/embedding)", P()),
    # The rest of the transformer: [in, out]. One of the two may be a patch, too few to share.
    (r"(.*/)?(patch_embedding|proj_in|linear_1|time_proj|text_proj|linear)/kernel", P(None, ALL)),
    (r"(.*/)?(proj_out|linear_2)/kernel", P(ALL, None)),
    (r"(.*/)?shared/embedding", P(None, ALL)),
    # Counters, keys, and the coefficients of Muon, too.
    (r"(.*/)?(bias|scale|scale_shift_table|relative_attention_bias/embedding|step|key|count|ns_coeffs)", P()),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over AXES, `data` over the network between slices; ValueError when the devices do not fill it."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // max(math.prod(size for size in sizes if size != -1), 1)
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        mend = "set config.mesh so that the product of its axes is the number of devices"
        raise ValueError(f"the mesh {named} needs {math.prod(sizes)} devices, but there are {len(devices)}: {mend}")
    if len(slices := {getattr(device, "slice_index", 0) for device in devices}) > 1:
        if sizes[0] % len(slices):
            wrong = f"must be a multiple of that, not {sizes[0]}: only data goes over the network between them"
            raise ValueError(f"the devices are {len(slices)} slices, so config.mesh.data {wrong}")
        inside, across = (sizes[0] // len(slices), *sizes[1:]), (len(slices), 1, 1, 1)
        array = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        array = _in_blocks(sizes, devices)
    return Mesh(array, AXES, (AxisType.Auto,) * len(AXES))


def _in_blocks(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as JAX arranges them, but those of a video (context × tensor), where that is a part of a torus, as
    near to a square or cube as they lie: along a line every exchange waits for its middle."""
    array = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    places = np.array([getattr(device, "coords", ()) for device in devices])
    torus, inner = [int(n) + 1 for n in places.max(0, initial=0)], math.prod(sizes[2:])
    block = [1] * len(torus)
    while math.prod(block) < inner:
        free = [axis for axis, size in enumerate(torus) if size % (2 * block[axis]) == 0]
        if not free:
            break
        block[min(free, key=lambda axis: block[axis])] *= 2
    if inner == 1 or math.prod(torus) != len(devices) or math.prod(block) != inner:
        return array
    whole = np.empty(torus, object)
    for device in devices:
        whole[tuple(device.coords)] = device
    split = whole.reshape([part for size, n in zip(torus, block, strict=True) for part in (size // n, n)])
    return split.transpose(*range(0, split.ndim, 2), *range(1, split.ndim, 2)).reshape(sizes)


def host_mesh(devices: Iterable[Any]) -> Mesh:
    """The mesh of this host's devices among these, which share rows and parameters."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    return make_mesh(MeshConfig(1, -1, 1, 1), here)


def host_count(mesh: Mesh) -> int:
    """How many machines, with a process each, the mesh's devices belong to; none of them need be there."""
    return len({device.process_index for device in mesh.devices.flat})


def check_batch(mesh: Mesh, name: str, size: int) -> None:
    """Raises ValueError unless `size` rows divide over the data and fsdp axes."""
    if size % (shards := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ValueError(f"{name} is {size}, which does not divide over data × fsdp = {shards} shards of the mesh")


def shard(mesh: Mesh, tree: Any, strict: bool = True) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or shapes, by RULES. Raises ValueError naming a path that no
    rule matches, or whose shape its spec does not divide; unless `strict` the latter is replicated."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name, undivided = jax.tree_util.keystr(path, simple=True, separator="/"), []
        if (specs := next((specs for rule, *specs in RULES if re.fullmatch(rule, name)), None)) is None:
            raise ValueError(f"no sharding rule matches {name!r} of shape {leaf.shape}")
        for spec in specs:
            named = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
            shards = [math.prod(mesh.shape[axis] for axis in axes) for axes in named]
            parts = zip(leaf.shape, named, shards, strict=False)
            undivided = [f"{' × '.join(axes)} = {count}" for size, axes, count in parts if size % count]
            if not undivided:
                return NamedSharding(mesh, spec)
        if strict:
            raise ValueError(f"{name!r} of shape {leaf.shape} does not divide by mesh axes {undivided[0]}")
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over data × fsdp, after `leading` axes that are whole everywhere."""
    return NamedSharding(mesh, P(*[None] * leading, *BATCH))


def row_sharding(mesh: Mesh, count: int) -> NamedSharding:
    """`count` rows over data × fsdp where they divide, whole everywhere where they do not."""
    return batch_sharding(mesh) if count % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else replicated(mesh)


def local_rows(where: jax.sharding.Sharding, count: int) -> np.ndarray:
    """The rows, of `count`, that this process's devices hold, in order."""
    parts = where.addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[part] for part in parts]))


def cores(devices: Iterable[Any]) -> int:
    """What can be run beside each other on them: as much as this process has cores of a lone CPU, of which XLA gives a
    convolution one; 1 elsewhere."""
    if [device.platform for device in devices] != ["cpu"]:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def put(tree: Any, where: Any) -> Any:
    """Host arrays, the same on every process, as global arrays, each device getting its part. `where` may be a prefix
    of the tree. What is on devices already, whole here or shared over all, is moved."""

    def place(x: Any, s: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == s:
            return x
        if isinstance(x, jax.Array) and (s.is_fully_addressable or not x.is_fully_addressable):
            return jax.device_put(x, s)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x), s))
        return jax.make_array_from_callback(x.shape, s, lambda index: np.asarray(x[index]))

    return jax.tree.map(place, tree, jax.tree.broadcast(where, tree))


def make_global_rows(value: np.ndarray, rows: np.ndarray, where: NamedSharding, count: int) -> jax.Array:
    """This process's `rows` of `count` as part of one global array."""

    def part(index: Any) -> np.ndarray:
        return value[np.isin(rows, np.arange(*index[0].indices(count)))]

    return jax.make_array_from_callback((count, *value.shape[1:]), where, part)


def with_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function traced for a mesh, whose axes the models then name (`models.activation_sharding`)."""

    def traced(*args: Any, **more: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **more)

    return traced
