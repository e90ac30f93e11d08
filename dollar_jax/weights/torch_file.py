"""Reads the tensors of a file of `torch.save` without torch, and without unpickling: the opcodes of its pickle are read
as data, none is run, and what no dictionary of tensors needs is refused by name. The format: torch/serialization.py."""

import math
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from dollar_jax.files import open_regular

_MOST = 2**24  # bytes of a pickle that names tensors


class _Stored(NamedTuple):
    """A tensor: the tuple that names its storage, and its place in that, in elements."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any

    def read(self, archive: zipfile.ZipFile, root: str) -> np.ndarray:
        _, dtype, key, _, count = self.storage
        data = archive.read(f"{root}data/{key}")
        size = dtype.itemsize if isinstance(dtype, np.dtype) else 0
        if len(data) != size * count or math.prod(map(int, self.shape)) > count:
            raise ValueError(f"its record {key} has {len(data)} bytes, and not {count} elements, or not {self.shape}")
        strides: Any = [size * stride for stride in self.strides]
        return np.ndarray(self.shape, dtype, data, size * self.offset, strides)


_TYPES = {"Float": "f4", "Half": "f2", "Double": "f8", "BFloat16": ml_dtypes.bfloat16, "Long": "i8", "Int": "i4"}
_GLOBALS: dict[str, Any] = {f"torch {name}Storage": np.dtype(code) for name, code in _TYPES.items()}
_GLOBALS |= {"collections OrderedDict": dict, "torch._utils _rebuild_tensor_v2": _Stored}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_PLAIN = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
# How many values an opcode takes from the stack; None is those above the mark.
_TAKES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2, "SETITEMS": None}
_TAKES |= {"REDUCE": 2, "BUILD": 1, "APPEND": 1, "APPENDS": None}


def read_torch(path: Path | IO[bytes]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of each tensor of a state dict, or of that under "state_dict" or "model"; of a tensor alone its
    name is "". ValueError naming the file when it is damaged or holds anything else."""
    try:
        with open_regular(path) if isinstance(path, Path) else path as file, zipfile.ZipFile(file) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("it is compressed")
            (pickle,) = (record for record in archive.infolist() if record.filename.endswith("/data.pkl"))
            if pickle.file_size > _MOST:
                raise ValueError(f"its pickle has more than {_MOST} bytes")
            read = _root(archive.read(pickle))
            found: dict[str, Any] = {"": read} if isinstance(read, _Stored) else read
            for name, stored in found.get("state_dict", found.get("model", found)).items():
                if isinstance(stored, _Stored):
                    yield name, stored.read(archive, pickle.filename.removesuffix("data.pkl"))
    except Exception as error:  # whatever a damaged file leads to
        name = path if isinstance(path, Path) else "it"
        raise ValueError(f"{name} is no whole file of torch.save with tensors alone: {error}") from error


def _root(pickle: bytes) -> Any:
    """What the pickle describes: dictionaries of what has a name, and `_Stored`."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(pickle):
        name, taken = opcode.name, []
        if name in _TAKES:
            start = marks.pop() if _TAKES[name] is None else len(stack) - _TAKES[name]
            taken = stack[start:]
            del stack[start:]
        if name == "GLOBAL":
            if argument not in _GLOBALS:
                raise ValueError(f"its pickle names {argument!r}, which no tensor needs")
            stack.append(_GLOBALS[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name.startswith("TUPLE"):
            stack.append(tuple(taken))
        elif name.startswith("SETITEM"):
            pairs = zip(taken[::2], taken[1::2], strict=True)
            stack[-1].update({key: value for key, value in pairs if isinstance(key, str)})
        elif name == "REDUCE" and (taken[0] is dict or taken[0] is _Stored):
            stack.append({} if taken[0] is dict else _Stored(*taken[1][:4]))
        elif name in _PLAIN or name in _EMPTY:
            stack.append(_EMPTY[name]() if name in _EMPTY else argument)
        elif name not in ("BUILD", "APPEND", "APPENDS", "PROTO", "STOP", "BINPERSID"):
            raise ValueError(f"its pickle has the opcode {name}, which no tensor needs")
    return stack.pop()
