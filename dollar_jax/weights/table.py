"""Maps the tensors of a weight file to a nested dict of parameters and back, by a table of rows.

    Row("blocks.{i}.{a}.to_q.weight", "blocks/{a:attn1|attn2}/to_q/kernel", TRANSPOSE)

A field `{name:regex}` of the path is repeated as `{name}` in the source. The field `{i}`, in the source only, is the
position on the parameter's leading axis. The first row whose path matches a parameter is its row."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict[str, Any]
Pairs = Iterable[tuple[str, np.ndarray]]
_FIELD = re.compile(r"\{(\w+):([^{}]+)\}")


class Transform(NamedTuple):
    """From a file's tensor to one unstacked parameter, and the inverse."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x: x, lambda x: x)
# Dense kernels: [out, in] ↔ [in, out].
TRANSPOSE = Transform(np.transpose, np.transpose)
# Convolution kernels of any rank: [out, in, *kernel] ↔ [*kernel, in, out].
CONV = Transform(lambda x: np.moveaxis(x, (0, 1), (-1, -2)), lambda x: np.moveaxis(x, (-1, -2), (0, 1)))
# Tables the file holds with a leading batch axis of 1.
BATCHED = Transform(lambda x: x[0], lambda x: x[None])
DENSE = {"weight": "kernel", "bias": "bias"}  # leaves of a module in the file → in the parameters
NORM = {"weight": "scale", "bias": "bias"}


class Row(NamedTuple):
    """Template of tensor names ↔ template of parameter paths; a path of None skips the tensors."""

    source: str
    path: str | None
    transform: Transform = SAME


def patch_kernel(patch: tuple[int, ...], channels: int) -> Transform:
    """Convolution kernel [dim, c, *patch] ↔ the dense [(*patch c), dim] of `patchify`."""
    shape = (*patch, channels, -1)
    return Transform(lambda x: CONV.forward(x).reshape(-1, len(x)), lambda x: CONV.inverse(x.reshape(shape)))


def module_rows(modules: Iterable[tuple[str, str, Mapping[str, str]]]) -> list[Row]:
    """Rows of whole modules: their templates in the file and among the parameters, and DENSE or NORM."""
    return [
        Row(f"{source}.{theirs}", f"{path}/{ours}", TRANSPOSE if ours == "kernel" else SAME)
        for source, path, leaves in modules
        for theirs, ours in leaves.items()
    ]


class _Place(NamedTuple):
    path: str
    layer: int | None
    transform: Transform

    def of(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return arrays[self.path] if self.layer is None else arrays[self.path][self.layer]


def import_params(table: Sequence[Row], tensors: Mapping[str, np.ndarray] | Pairs, shapes: Params) -> Params:
    """Parameters as numpy arrays like `shapes` (see `Network.shapes`). Raises ValueError naming a tensor."""
    pairs = list(cast(Pairs, tensors.items() if isinstance(tensors, Mapping) else tensors))
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"tensor {next(name for name in names if names.count(name) > 1)!r} comes twice")
    sizes = {name: tensor.shape for name, tensor in found.items()}
    return unflatten_dict(dict(stream_params(table, sizes, found.__getitem__, shapes)), sep="/")


def stream_params(
    table: Sequence[Row], tensors: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], shapes: Params
) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of one parameter after another, of which only one is held. The names and shapes of all `tensors`
    are checked as in `import_params` before the first is `read`."""
    expected: dict[str, Any] = flatten_dict(shapes, sep="/")
    places = _places(table, expected)
    skips = [re.escape(row.source).replace(r"\{i\}", r"\d+") for row in table if row.path is None]
    sources: dict[str, list[tuple[str, _Place]]] = {path: [] for path in expected}
    for key, shape in tensors.items():
        if (place := places.get(key)) is None:
            if any(re.fullmatch(skip, key) for skip in skips):
                continue
            raise ValueError(f"tensor {key!r} of shape {shape} has no place in this model")
        # Of the right shape, and of no size in memory.
        like = {place.path: np.broadcast_to(np.float32(0), expected[place.path].shape)}
        if tuple(shape) != (needed := place.transform.inverse(place.of(like)).shape):
            wanted = f"this model's {place.path!r} needs {needed}"
            raise ValueError(f"tensor {key!r} has shape {tuple(shape)}, but {wanted}")
        sources[place.path].append((key, place))
    if missing := [key for key in places if key not in tensors]:
        rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"the weights lack {', '.join(map(repr, missing[:5]))}{rest}")

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for path, wanted in expected.items():
            array = _aligned(wanted.shape, wanted.dtype)
            for key, place in sources[path]:
                place.of({path: array})[...] = place.transform.forward(read(key))
            yield path, array
            del array  # before the next one takes its memory

    return arrays()


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that JAX can take on the CPU without a copy: it wants 64-byte boundaries."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def export_stream(table: Sequence[Row], params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """A weight file's tensors one at a time, contiguous, in the parameters' dtypes: undoes `import_params`."""
    arrays = {path: np.asarray(value) for path, value in flatten_dict(params, sep="/").items()}
    for key, place in _places(table, arrays).items():
        yield key, np.asarray(place.transform.inverse(place.of(arrays)), order="C")


def _places(table: Sequence[Row], arrays: Mapping[str, Any]) -> dict[str, _Place]:
    """Where each tensor goes, for parameters with these paths and shapes."""
    rows = [(re.compile(_FIELD.sub(r"(?P<\1>\2)", row.path)), row) for row in table if row.path]
    places: dict[str, _Place] = {}
    for path, array in arrays.items():
        found = ((pattern.fullmatch(path), row) for pattern, row in rows)
        match, row = next(((m, row) for m, row in found if m), (None, None))
        if match is None or row is None:
            raise ValueError(f"parameter {path!r} of shape {array.shape} has no row in the table")
        for i in range(array.shape[0]) if "{i}" in row.source else (None,):
            if (key := row.source.format(**match.groupdict(), i=i)) in places:
                raise ValueError(f"parameters {path!r} and {places[key].path!r} are both {key!r}")
            places[key] = _Place(path, i, row.transform)
    return places
