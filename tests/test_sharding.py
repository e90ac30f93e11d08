import dataclasses
import itertools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dollar_jax import sharding
from dollar_jax.config import MeshConfig
from dollar_jax.models.cogvideox import CogVideoXConfig
from dollar_jax.schedule import Schedule
from dollar_jax.state import to_items
from dollar_jax.weights.cogvideox import COGVIDEOX_TRANSFORMER
from dollar_jax.weights.families import PUBLISHED
from dollar_jax.weights.umt5 import UMT5
from dollar_jax.weights.wan import WAN_TRANSFORMER

WAN_1_3B = PUBLISHED["wan_1_3b"].transformer
LATENT, TEXT = (21, 60, 104, 16), (512, 4096)
WIDE_AND_NARROW = {"a": (16, 12), "b": (4, 24)}


def mesh(data=1, fsdp=1, context=1, tensor=1):
    return sharding.make_mesh(MeshConfig(data, fsdp, context, tensor))


def leaves(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


@pytest.fixture(scope="module")
def program(make_config, network_programs):
    """Shapes and shardings of distilling Wan 2.1 1.3B over fsdp=4, tensor=2; nothing is allocated."""
    config = make_config({"mesh.fsdp": 4, "mesh.tensor": 2, "reward.head.use_text": True})
    schedule = Schedule("rf", "velocity", shift=3.0)
    return network_programs(config, WAN_TRANSFORMER.network(WAN_1_3B), schedule, LATENT, TEXT)


def test_every_kernel_and_its_optimiser_state_is_split_by_fsdp(program):
    shapes, shardings = leaves(program.state_shapes), leaves(program.state_sharding)
    assert shapes.keys() == shardings.keys()
    split = 0
    for name, leaf in shapes.items():
        here = math.prod(shardings[name].shard_shape(leaf.shape))
        if "reward" in name or not name.endswith("/kernel"):
            assert here >= leaf.size / 2 and leaf.size < 5e7, name
            continue
        assert here == leaf.size // 8, name  # fsdp and tensor both
        split += leaf.size
    # Student, average, fake score and two Adam moments of student and fake score: 7 copies of the weights.
    assert split > 0.99 * 7 * 1.41e9
    whole = sum(math.prod(leaf.shape) for name, leaf in shapes.items() if name.startswith("student/"))
    assert 1.40e9 < whole < 1.43e9


@pytest.mark.parametrize(
    ("torus", "sizes", "block"),
    [
        ((8, 8, 1), (1, 16, 4, 1), (2, 2, 1)),
        ((8, 8, 1), (1, 8, 4, 2), (4, 2, 1)),
        ((16, 16, 1), (1, 16, 16, 1), (4, 4, 1)),
        ((4, 4, 4), (1, 8, 8, 1), (2, 2, 2)),
        ((2, 4, 1), (2, 1, 4, 1), (2, 2, 1)),
        # One device to a video, a share that is no block, and a chip's halves at one place: as JAX has them.
        ((4, 4, 1), (1, 16, 1, 1), None),
        ((3, 2, 1), (1, 2, 3, 1), None),
        ((2, 2, 1, 2), (1, 2, 4, 1), None),
    ],
)
def test_the_chips_of_a_video_are_a_block(monkeypatch, torus, sizes, block):
    places = list(itertools.product(*map(range, torus)))
    devices = [types.SimpleNamespace(id=i, coords=list(place[:3])) for i, place in enumerate(places)]
    made = []

    def as_jax(shape, devices, **_):
        made.append(np.array(devices).reshape(shape))
        return made[0]

    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", as_jax)
    found = sharding._in_blocks(sizes, devices)
    assert found.shape == sizes and {device.id for device in found.flat} == set(range(len(places)))
    if block is None:
        assert found is made[0]
        return
    for group in found.reshape(-1, sizes[2] * sizes[3]):
        at = np.array([device.coords for device in group])
        assert tuple(at.max(0) - at.min(0) + 1) == block and not any(at.min(0) % block)


T5 = dataclasses.replace(PUBLISHED["cogvideox_2b"].text_encoder, num_layers=2, shared_position_bias=False)
ROTARY = CogVideoXConfig(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)


@pytest.mark.parametrize(
    "network",
    [
        lambda: COGVIDEOX_TRANSFORMER.network(CogVideoXConfig()),
        lambda: COGVIDEOX_TRANSFORMER.network(ROTARY),
        lambda: UMT5.network(T5),
        lambda: UMT5.network(dataclasses.replace(T5, shared_position_bias=True)),
    ],
    ids=["cogvideox-2b", "cogvideox-5b", "umt5", "t5"],
)
def test_every_large_network_is_split_over_all_devices(network):
    """No parameter lacks a rule, and a device of eight holds hardly more than an eighth."""
    shapes = network().shapes
    for m in (mesh(fsdp=4, tensor=2), mesh(fsdp=2, context=4)):
        placed = leaves(sharding.shard(m, shapes))
        sizes = {name: leaf.size for name, leaf in leaves(shapes).items()}
        here = sum(math.prod(placed[name].shard_shape(leaf.shape)) for name, leaf in leaves(shapes).items())
        assert here < 1.02 * sum(sizes.values()) / 8


def test_the_teacher_lies_as_the_student_does(program):
    teacher, student = leaves(program.frozen_sharding.teacher), leaves(program.state_sharding.student)
    assert {k: v.spec for k, v in teacher.items()} == {k: v.spec for k, v in student.items()}


def test_checkpoint_items_are_sharded_as_the_state(program):
    items = jax.eval_shape(to_items, program.state_shapes)
    placed = leaves(sharding.shard(program.mesh, items))
    for name, where in leaves(program.state_sharding.student_optimiser).items():
        assert placed[f"optimisers/student_optimiser/{name}"].spec == where.spec


def test_rows_are_split_over_data_and_fsdp_together():
    m = mesh(data=2, fsdp=4)
    assert sharding.batch_sharding(m).shard_shape((8, 3)) == (1, 3)
    assert sharding.batch_sharding(m, leading=1).shard_shape((2, 8, 3)) == (2, 1, 3)


def test_a_kernel_is_shared_by_rows_or_where_they_do_not_divide_by_columns():
    """And what is tensor's is a half of the rows either way."""
    kernels = {f"{name}/blocks/ffn/proj_out/kernel": jnp.zeros((2, *shape)) for name, shape in WIDE_AND_NARROW.items()}
    found = sharding.shard(mesh(fsdp=4, tensor=2), kernels)
    assert [found[name].shard_shape(kernels[name].shape) for name in kernels] == [(2, 2, 12), (2, 2, 6)]


def test_blocks_do_not_trade_their_modulations():
    """Without a word XLA shares them over a video's devices, and every block collects them again."""
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 64, "text_dim": 32}
    network = WAN_TRANSFORMER.network(dataclasses.replace(WAN_1_3B, **sizes, context_parallel="ulysses"))
    m = mesh(fsdp=2, context=4)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 3, 8, 16, 16), (2,), (2, 8, 32))]
    placed = sharding.shard(m, network.shapes), *[sharding.batch_sharding(m)] * 3
    compiled = jax.jit(sharding.with_mesh(m, network.apply), in_shardings=placed).lower(network.shapes, *args).compile()
    moved = re.findall(r" (?:all-to-all|all-gather)\(.*op_name=\"([^\"]*)\"", compiled.as_text() or "")
    assert {name.rpartition("/")[2] for name in moved if "while/body" in name} == {"dot_general", "all_to_all", "mul"}


def test_what_is_there_already_is_not_moved():
    where = sharding.replicated(mesh(fsdp=8))
    there = sharding.put({"a": np.ones(3), "key": jax.random.key(0)}, where)
    again = sharding.put(there, sharding.replicated(mesh(fsdp=8)))
    assert all(again[name] is there[name] for name in there)
    elsewhere = sharding.put(there, sharding.replicated(mesh(context=8)))
    assert elsewhere["a"] is not there["a"]


def test_bad_trees_are_refused_by_path():
    m = mesh(fsdp=8)
    with pytest.raises(ValueError, match=r"no sharding rule matches 'student/mystery/weights' .*\(8, 8\)"):
        sharding.shard(m, {"student": {"mystery": {"weights": jnp.zeros((8, 8))}}})
    with pytest.raises(ValueError, match=r"'ema/linear_1/kernel' of shape \(8, 12\).*fsdp × context × tensor = 8"):
        sharding.shard(m, {"ema": {"linear_1": {"kernel": jnp.zeros((8, 12))}}})


@pytest.mark.parametrize("sizes", [(3, 1, 1, 1), (16, 1, 1, 1), (-1, 3, 1, 1), (-1, -1, 1, 1), (0, 8, 1, 1)])
def test_bad_mesh_is_one_sentence(sizes):
    with pytest.raises(ValueError, match=r"the mesh data=.*there are 8.*config\.mesh"):
        sharding.make_mesh(MeshConfig(*sizes))


def test_minus_one_takes_what_is_left():
    assert dict(mesh(data=-1, tensor=2).shape) == {"data": 4, "fsdp": 1, "context": 1, "tensor": 2}


def test_bad_heads_are_refused_before_any_compilation(make_config, network_programs):
    """Twelve heads over eight devices, and Ulysses, which shares a tensor part's heads out again."""
    for changes, options, message in [
        ({"mesh.tensor": 8}, {}, "12 heads do not divide over the mesh's tensor axis of 8"),
        (
            {"mesh.tensor": 2, "mesh.context": 4},
            {"context_parallel": "ulysses"},
            "6 heads per device do not divide over the mesh's context axis of 4, as 'ulysses' needs",
        ),
    ]:
        network = WAN_TRANSFORMER.network(dataclasses.replace(WAN_1_3B, num_layers=1, **options))
        with pytest.raises(ValueError, match=message):
            network_programs(make_config(changes), network, Schedule("rf", "velocity"), LATENT, TEXT)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip as jax's mesh functions see it: four slices of 2 × 2 × 1."""

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5p"
    core_on_chip: int = 0

    @property
    def slice_index(self):
        return self.id // 4

    process_index = slice_index

    @property
    def coords(self):
        return (self.id % 2, self.id // 2 % 2, 0)


def test_only_data_goes_over_the_network_between_slices():
    chips = [Chip(i) for i in range(16)]
    array = sharding.make_mesh(MeshConfig(4, 2, 2, 1), chips).devices
    assert array.shape == (4, 2, 2, 1)
    for row in array:
        assert len({chip.slice_index for chip in row.flat}) == 1
    assert {chip.slice_index for chip in array[:, 0, 0, 0]} == {0, 1, 2, 3}
    assert sharding.make_mesh(MeshConfig(8, 1, 2, 1), chips).devices.shape == (8, 1, 2, 1)


def test_bad_mesh_over_slices_is_one_sentence():
    with pytest.raises(ValueError, match="4 slices, so config.mesh.data must be a multiple of that, not 2"):
        sharding.make_mesh(MeshConfig(2, 8, 1, 1), [Chip(i) for i in range(16)])


def test_bad_batch_is_refused_before_any_compilation(make_config, network_programs):
    network = WAN_TRANSFORMER.network(dataclasses.replace(WAN_1_3B, num_layers=1))
    for changes, name in [
        ({"batch_size": 12, "mesh.data": 8}, "batch_size / accumulation is 12"),
        ({"batch_size": 16, "accumulation": 4, "mesh.data": 8}, "batch_size / accumulation is 4"),
        ({"reward.batch_size": 12, "mesh.data": 8}, r"reward\.batch_size is 12"),
    ]:
        with pytest.raises(ValueError, match=name + r".* data × fsdp = 8"):
            network_programs(make_config(changes), network, Schedule("rf", "velocity"), LATENT, TEXT)
