"""From an NNX module to pure functions: the only door between `models` and the rest."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import PRNGKeyArray, PyTree


@dataclasses.dataclass(frozen=True)
class Network:
    """A module as pure functions over a nested dict of arrays; `apply` calls the module, or its `method`."""

    graphdef: nnx.GraphDef
    build: Callable[[nnx.Rngs], nnx.Module]
    shapes: PyTree

    def init(self, key: PRNGKeyArray) -> PyTree:
        return _split(self.build(nnx.Rngs(params=key)))[1]

    def apply(self, params: PyTree, *args: Any, method: str | None = None, **kwargs: Any) -> Any:
        module = nnx.merge(self.graphdef, _rename(params, lambda k: int(k) if k.isdigit() else k))
        return (getattr(module, method) if method else module)(*args, **kwargs)


def make_network(build: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """Splits the module that `build` makes, once and without allocating it."""
    graphdef, shapes = _split(nnx.eval_shape(lambda: build(nnx.Rngs(params=0))))
    return Network(graphdef, build, shapes)


def _split(module: nnx.Module) -> tuple[nnx.GraphDef, PyTree]:
    graphdef, state = nnx.split(module, nnx.Param)
    return graphdef, _rename(nnx.to_pure_dict(state), str)


def _rename(tree: PyTree, name: Callable[[Any], Any]) -> PyTree:
    """The tree with every key replaced: NNX numbers a list's modules, files and we name them."""
    return {name(key): _rename(value, name) for key, value in tree.items()} if isinstance(tree, dict) else tree
