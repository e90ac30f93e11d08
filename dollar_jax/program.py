"""A function declared for the devices of a mesh, to be listed and compiled: the one place that calls `jax.jit`."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from dollar_jax import sharding

_recordings: "list[list[Program]]" = []


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A pure function, and the shapes (trees of `jax.ShapeDtypeStruct`) and places of its arguments. A call with other
    shapes compiles anew. `in_shardings`, one per argument, and `out_shardings` may be prefixes of trees. The arguments
    that `donate` numbers are gone after a call. Without a mesh it is compiled for wherever its arguments lie.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    mesh: Mesh | None = None
    in_shardings: tuple[Any, ...] = ()
    out_shardings: Any = None
    donate: tuple[int, ...] = ()

    @functools.cached_property
    def jitted(self) -> Any:
        """The function under `jax.jit`, with the program's name in profiles."""

        def named(*arguments: Any) -> Any:
            return function(*arguments)

        function = self.function if self.mesh is None else sharding.with_mesh(self.mesh, self.function)
        named.__name__ = named.__qualname__ = self.name
        places = {"in_shardings": self.in_shardings or None, "out_shardings": self.out_shardings}
        given = {name: value for name, value in places.items() if value is not None}
        return jax.jit(named, donate_argnums=self.donate, **given)

    def __call__(self, *arguments: Any) -> Any:
        if _recordings:
            called = dataclasses.replace(self, arguments=jax.eval_shape(lambda *a: a, *arguments))
            for recording in _recordings:
                recording.append(called)
        return self.jitted(*arguments)

    def place(self, *arguments: Any) -> tuple[Any, ...]:
        """The arguments where they belong; what is there already stays."""
        return sharding.put(arguments, self.in_shardings) if self.in_shardings else arguments

    def trace(self) -> Any:
        """`jax.stages.Traced` for the declared arguments: their jaxpr, to be lowered and compiled from there."""
        return self.jitted.trace(*self.arguments)


@contextlib.contextmanager
def recorded() -> Iterator[list[Program]]:
    """Gives a list of the programs called before the context ends, each with the shapes it was called with."""
    recording: list[Program] = []
    _recordings.append(recording)
    try:
        yield recording
    finally:
        _recordings.remove(recording)
