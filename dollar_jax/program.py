"""A function declared for the devices of a mesh, to be listed and compiled: the one place that calls `jax.jit`."""

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from dollar_jax import sharding
from dollar_jax.flops import HBM_GIB

BESIDE = 0.85  # share of a device's memory for what decodes beside the state of a run
# What takes time is in libraries: the demo's step is as fast as at level 3, and compiled in two thirds of the time.
_ON_CPU = {"xla_backend_optimization_level": 1}
# Collectives go on beside other work (at the compiler's own effort), and small kernels are gathered, where it would sum
# copies filled up with zeros; as MaxText asks for.
_FUSION = "xla_tpu_enable_async_collective_fusion"
_ON_TPU: dict[str, Any] = dict.fromkeys([_FUSION, f"{_FUSION}_fuse_all_gather", f"{_FUSION}_multiple_steps"], True)
_ON_TPU |= {"xla_tpu_overlap_compute_collective_tc": True, "xla_tpu_prefer_async_allgather_to_allreduce": True}
_ON_TPU |= {"xla_enable_async_all_gather": True, "xla_enable_async_collective_permute": True}
# No kernel is multiplied piece by piece as it arrives: all of the output would go through memory with each.
_ON_TPU["xla_jf_spmd_threshold_for_windowed_einsum_mib"] = 1_000_000


class _Once:
    """What is made once, while who asks for it waits. (Python 3.11's `cached_property` has one lock for all.)"""

    def __init__(self) -> None:
        self.lock, self.value = threading.Lock(), None

    def get(self, make: Callable[[], Any]) -> Any:
        with self.lock:
            self.value = make() if self.value is None else self.value
            return self.value


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A pure function, and the shapes (trees of `jax.ShapeDtypeStruct`) and places of its arguments. A call with other
    shapes compiles anew. `in_shardings`, one per argument, and `out_shardings` may be prefixes of trees. The arguments
    that `donate` numbers are gone after a call. Without a mesh it is compiled for wherever its arguments lie. On a TPU
    the compiler keeps to that `share` of a device's memory, where others lie beside it."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    mesh: Mesh | None = None
    in_shardings: tuple[Any, ...] = ()
    out_shardings: Any = None
    donate: tuple[int, ...] = ()
    share: float = 1.0
    _traced: _Once = dataclasses.field(default_factory=_Once, init=False)
    _compiled: _Once = dataclasses.field(default_factory=_Once, init=False)

    @functools.cached_property
    def jitted(self) -> Any:
        """The function under `jax.jit`, with the program's name in profiles."""

        def named(*arguments: Any) -> Any:
            return function(*arguments)

        function = self.function if self.mesh is None else sharding.with_mesh(self.mesh, self.function)
        named.__name__ = named.__qualname__ = self.name
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        options: dict[str, Any] = dict(_ON_TPU) if device.platform == "tpu" else {}
        if device.platform == "cpu" and not jax.config.read("jax_disable_most_optimizations"):
            options |= _ON_CPU
        if self.share < 1 and device.device_kind in HBM_GIB:
            options["xla_tpu_max_hbm_size_mib"] = int(1024 * self.share * HBM_GIB[device.device_kind])
        given = {"in_shardings": self.in_shardings, "out_shardings": self.out_shardings, "compiler_options": options}
        return jax.jit(named, donate_argnums=self.donate, **{k: v for k, v in given.items() if v})

    def __call__(self, *arguments: Any) -> Any:
        with self._compiled.lock:  # what another thread compiles is waited for, and not compiled twice
            jitted = self.jitted
        return jitted(*arguments)

    def place(self, *arguments: Any) -> tuple[Any, ...]:
        """The arguments where they belong; what is there already stays."""
        return sharding.put(arguments, self.in_shardings) if self.in_shardings else arguments

    def trace(self) -> Any:
        """`jax.stages.Traced` for the declared arguments in their places, made once; a call takes what it makes."""

        def made() -> Any:
            arguments = self.arguments
            if self.in_shardings:
                where = jax.tree.broadcast(self.in_shardings, arguments)
                arguments = jax.tree.map(lambda x, place: x.update(sharding=place), arguments, where)
            return self.jitted.trace(*arguments)

        return self._traced.get(made)

    def compile(self) -> Any:
        """`jax.stages.Compiled` for the declared arguments, made once."""
        return self._compiled.get(lambda: self.trace().lower().compile())
