"""A declared program: compiled as declared, told apart by its name, and known to have run."""

import dataclasses
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dollar_jax import program as module
from dollar_jax import sharding
from dollar_jax.config import MeshConfig
from dollar_jax.program import Program


@pytest.fixture
def program():
    """Adds a number to every row, and says on how many devices of the mesh it was traced."""
    mesh = sharding.make_mesh(MeshConfig(2, 4, 1, 1))
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    shapes = jax.ShapeDtypeStruct((8, 3), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)

    def add(x, y):
        return x + y, jax.sharding.get_abstract_mesh().size

    return Program("add", add, shapes, mesh, (rows, whole), (rows, whole), donate=(0,))


def test_arguments_and_results_lie_where_they_are_declared_to(program):
    x, y = program.place(np.ones((8, 3), np.float32), np.float32(2))
    assert x.sharding.spec == P(("data", "fsdp")) and y.sharding.spec == P()
    total, size = program(x, y)
    np.testing.assert_array_equal(total, np.full((8, 3), 3.0))
    assert total.sharding == x.sharding and size == 8
    assert x.is_deleted() and not y.is_deleted()


def test_the_compiled_module_is_what_is_called_and_bears_its_name(program):
    lowered = program.trace().lower()
    assert "module @jit_add" in lowered.as_text()
    assert lowered.compile().input_shardings[0][0].spec == P(("data", "fsdp"))


def test_a_program_is_compiled_once_and_two_at_the_same_time(program):
    """Each waits for the other to be traced, as only two threads can; who asks while it is compiled waits for it."""
    traced, met = [], threading.Barrier(2, timeout=60)

    def function(x, y):
        traced.append(x)
        met.wait()
        return x + y

    one, other = (dataclasses.replace(program, function=function, out_shardings=None, donate=()) for _ in range(2))
    with ThreadPoolExecutor(4) as pool:
        first, again, _, _ = pool.map(Program.compile, [one, one, other, other])
    assert first is again and len(traced) == 2
    one(*one.place(np.ones((8, 3), np.float32), np.float32(2)))
    assert len(traced) == 2


@pytest.mark.parametrize("whole", [False, True])
def test_on_cpus_llvm_does_what_pays(program, monkeypatch, whole):
    """At its first level a program is as fast and compiled in two thirds of the time; without any it is slow."""
    monkeypatch.setattr(jax.config, "read", lambda _: not whole)
    monkeypatch.setattr(jax, "jit", lambda function, **options: options.get("compiler_options"))
    assert program.jitted == ({"xla_backend_optimization_level": 1} if whole else None)


def test_without_a_mesh_any_arguments_are_taken_from_where_they_are():
    double = Program("double", lambda x: 2 * x)
    there = jax.device_put(np.arange(3), jax.devices()[5])
    assert double(there).devices() == {jax.devices()[5]}
    assert double(np.arange(4)).tolist() == [0, 2, 4, 6]


def test_what_lies_beside_others_keeps_to_its_share_of_a_tpus_memory(program, monkeypatch):
    given = []
    monkeypatch.setattr(module.jax, "jit", lambda function, **options: given.append(options))
    monkeypatch.setitem(module.HBM_GIB, jax.devices()[0].device_kind, 2.0)
    _ = program.jitted, dataclasses.replace(program, share=0.75).jitted
    assert [options.get("compiler_options", {}).get("xla_tpu_max_hbm_size_mib") for options in given] == [None, 1536]


def test_a_tpu_is_asked_for_collectives_beside_other_work(program, monkeypatch):
    """And no other platform, which would not know the options."""
    given = []
    monkeypatch.setattr(module.jax, "jit", lambda function, **options: given.append(options))
    for platform in ("tpu", "cpu", "cuda"):
        monkeypatch.setattr(
            module.jax, "devices", lambda name=platform: [types.SimpleNamespace(platform=name, device_kind="")]
        )
        _ = dataclasses.replace(program, mesh=None, in_shardings=()).jitted
    asked = [options.get("compiler_options", {}) for options in given]
    assert [options.get("xla_tpu_enable_async_collective_fusion_fuse_all_gather") for options in asked] == [
        True,
        None,
        None,
    ]
    assert not any(name.startswith("xla_tpu") for options in asked[1:] for name in options)
