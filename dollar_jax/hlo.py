"""What optimised HLO does to one chip: unlike XLA's own cost analysis, all turns of its loops, and Pallas kernels."""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Matrix products of a splash attention kernel, each of 2 · heads · queries · keys · channels operations.
KERNELS = {"fwd": 2, "dkv": 5}
# They name or pass on what others have made.
_FREE = {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
_APART = {"async-start", "call-start"}  # of work that goes on beside other, as on a v7x's SparseCores
_FREE |= {"after-all", "partition-id", "replica-id", "opt-barrier", "copy-start", "slice-start", *_APART}


class Work(NamedTuple):
    """Of one instruction: matrix operations, bytes moved to and from memory, and the compiler's guess at its cycles."""

    flops: float
    bytes: float
    cycles: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one execution on one chip: how often it does which `Work`, and bytes sent by kind of collective, groups as HLO
    writes them (see `groups`) and whether other work may go on meanwhile. Every result is taken to be written once and
    read once, but for those in vector memory; what a loop adds to an array in place, alone."""

    work: Mapping[Work, float]
    sent: dict[tuple[str, str, bool], float]

    @property
    def flops(self) -> float:
        return sum(work.flops * times for work, times in self.work.items())

    @property
    def memory_bytes(self) -> float:
        return sum(work.bytes * times for work, times in self.work.items())

    def seconds(self, flops: float, bytes: float, cycles: float = math.inf) -> float:
        """One instruction after another, at so many of each per second: a kernel or fusion reads and writes while it
        multiplies, and takes the longest of all."""
        return sum(n * max(w.flops / flops, w.bytes / bytes, w.cycles / cycles) for w, n in self.work.items())

    @property
    def collective_bytes(self) -> dict[str, float]:
        """Bytes sent by kind."""
        sums = {kind: sum(sent for key, sent in self.sent.items() if key[0] == kind) for kind in COLLECTIVES}
        return {kind: total for kind, total in sums.items() if total}


def cost(text: str) -> Cost:
    """What the optimised HLO module in `text` does on one chip."""
    module = _Module(text)
    total = module.total(module.entry)
    return Cost(dict(_works(total)), {k: v for k, v in total.items() if not isinstance(k, Work) and v})


def groups(text: str, count: int) -> np.ndarray:
    """[group, member] of the numbers of `count` devices, in the mesh's order, from what HLO writes after
    `replica_groups=` as a list, an iota or axes of a mesh, or [pair, 2] after `source_target_pairs=`."""
    if found := re.match(r"\[(\d+),(\d+)\]<=(.*)", text):
        return _iota(found[3]).reshape(int(found[1]), int(found[2]))
    if found := re.match(r"mesh\[(.*?)\](.*)\{(.*)\}", text):
        shape = []  # of each axis what is before, in and after the part of it that a group spans
        for name, size in re.findall(r"'(.+?)'=(\d+)", found[1]):
            span = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", found[3])
            before, part = (int(span[1] or 1), int(span[2] or size)) if span else (int(size), 1)
            shape += [before, part, int(size) // (before * part)]
        ids = _iota(found[2]) if "([" in found[2] else np.array(_numbers(found[2]) or range(math.prod(shape)))
        parts = range(1, len(shape), 3)
        return np.moveaxis(ids.reshape(shape), parts, range(-len(parts), 0)).reshape(-1, math.prod(shape[1::3]))
    return np.array([_numbers(found) for found in re.findall(r"\{([\d,]+)\}", text)] or [range(count)])


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


class _Module:
    def __init__(self, text: str):
        self.computations: dict[str, list[_Instruction]] = {}
        self.instructions: dict[str, _Instruction] = {}
        here: list[_Instruction] = []
        self.entry = ""
        found = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
        self.count = int(found[1]) if found else 0
        for line in text.splitlines():
            if line and not line[0].isspace():
                if found := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                    here = self.computations[found[2]] = []
                    self.entry = found[2] if found[1] else self.entry
            elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line):
                instruction = _instruction(found[1], found[2])
                if instruction is not None:
                    here.append(instruction)
                    self.instructions[instruction.name] = instruction

    @functools.cache  # noqa: B019 (a module lives as long as its count)
    def total(self, name: str) -> Counter[Any]:
        """The cost of a computation and of all it calls."""
        total: Any = Counter()  # whose values may be fractions, which its type does not say
        for i in self.computations[name]:
            inner: Counter[Any] = Counter()
            if i.opcode == "conditional":
                branches = _called(i, "branch_computations|true_computation|false_computation")
                inner.update(max(map(self.total, branches), key=lambda c: sum(k.bytes * v for k, v in _works(c))))
            elif i.opcode in {"while", "fusion", "call"} | _APART:
                times = self._trips(i) if i.opcode == "while" else 1
                for part in _called(i, "body|condition|calls|to_apply"):
                    inner.update({k: v * times for k, v in self.total(part).items()})
            if i.opcode in _APART:
                inner = Counter({k if isinstance(k, Work) else (*k[:2], True): v for k, v in inner.items()})
            flops = self._flops(i)
            if i.opcode == "fusion":
                flops += sum(k.flops * v for k, v in _works(inner))
                inner = Counter({k: v for k, v in inner.items() if not isinstance(k, Work)})
            total.update(inner)
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES and not _goes_on(i):
                found = re.search(r"(?:replica_groups|source_target_pairs)=(.*?)(?=, (?!device_ids)[a-z_]+=|$)", i.rest)
                where = found[1] if found else ""
                asynchronous = i.opcode != kind or "async_collective_fusion_config" in i.rest
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind  # a kernel of both on a TPU
                total[kind, where, asynchronous] += self._sent(i, kind, groups(where, self.count).shape[1])
            if i.opcode not in _FREE and not i.opcode.endswith("-done"):
                cycles = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
                total[Work(flops, 2 * self._written(i), float(cycles[1]) if cycles else 0.0)] += 1
        return total

    def _written(self, i: _Instruction) -> int:
        """Bytes of a result, of one that is written into a larger array in place those of the slice."""
        if i.opcode == "parameter" or _goes_on(i) or "AllocateBuffer" in i.rest:
            return 0
        if i.opcode == "dynamic-update-slice":
            return sum(_sizes(self.instructions[i.operands[1]].shape))
        if i.opcode == "fusion":
            return self._written(self.computations[_called(i, "calls")[0]][-1])
        if i.opcode in ("bitcast", "tuple"):  # the last of a fusion
            return sum(self._written(self.instructions[o]) for o in i.operands)
        return sum(_sizes(re.sub(r"\w+\[[\d,]*\]\{[^}]*S\(1\)\}", "", i.shape)))

    def _trips(self, i: _Instruction) -> int:
        if found := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', i.rest):
            return int(found[1])
        (condition,), (body,) = (_called(i, part) for part in ("condition", "body"))
        # A counted loop compares with its count; one that XLA has unrolled counts by more than one.
        inside = self.computations[condition]
        constants = [c for c in inside if c.opcode == "constant" and c.shape[0] in "su"]
        count = max((int(c.operands[0]) for c in constants), default=1)
        counters = [c for c in inside if c.opcode == "get-tuple-element" and re.match(r"[su]32\[\]", c.shape)]
        if len(counters) != 1:
            return count
        index = re.search(r"index=(\d+)", counters[0].rest)
        assert index is not None
        return math.ceil(count / self._increment(self.computations[body][-1].operands[int(index[1])]))

    def _increment(self, name: str) -> int:
        """What is added to a loop's counter on the way to this value; 1 where that cannot be seen."""
        total = 0
        while (i := self.instructions.get(name)) is not None and i.opcode in ("add", "copy", "bitcast"):
            constants = [j for o in i.operands if (j := self.instructions.get(o)) and j.opcode == "constant"]
            total += sum(int(c.operands[0]) for c in constants)
            name = next((o for o in i.operands if o not in {c.name for c in constants}), "")
        return total or 1

    def _flops(self, i: _Instruction) -> float:
        out = math.prod(_dims(i.shape))
        if i.opcode == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
            assert axes is not None
            shape = _dims(self.instructions[i.operands[0]].shape)
            return 2.0 * out * math.prod(shape[int(axis)] for axis in axes[1].split(",") if axis)
        if i.opcode == "convolution":
            labels = re.search(r"dim_labels=\w+_(\w+)->", i.rest)
            assert labels is not None
            kernel = _dims(self.instructions[i.operands[1]].shape)
            per_output = math.prod(kernel) / kernel[labels[1].index("o")]
            return 2.0 * out * per_output * _window_share(i.rest)
        if i.opcode == "custom-call" and (found := re.search(r"splash_m[hq]a_(fwd|dq|dkv)", i.name)):
            # XLA names the call after the kernel, whose first operands but for integers are queries and keys.
            shapes = [self.instructions[o].shape for o in i.operands if o in self.instructions]
            q, k = [_dims(shape) for shape in shapes if shape.startswith(("f", "bf"))][:2]
            return 2.0 * KERNELS[found[1]] * math.prod(q) * k[-2]
        return 0.0

    def _sent(self, i: _Instruction, kind: str, group: int) -> float:
        """Bytes that leave a chip in a ring of `group`, or for a permutation at once."""
        size = sum(_sizes(i.shape)) if i.opcode in ("all-reduce", "all-to-all") else max(_sizes(i.shape), default=0)
        share = (group - 1) / group if group else 1.0
        # A reduce-scatter's shape is its result's, the largest part of one in another form its operand's.
        scattered = {"reduce-scatter": group - 1 if i.opcode == kind else share}
        return size * {"all-reduce": 2 * share, "collective-permute": 1.0, **scattered}.get(kind, share)


def _works(total: Counter[Any]) -> list[tuple[Work, float]]:
    return [(k, v) for k, v in total.items() if isinstance(k, Work)]


def _goes_on(i: _Instruction) -> bool:
    """A later part of a collective that fusions share beside their own work; the one that starts it has the flag -1."""
    found = re.search(r'"flag_start":"(-?\d+)"', i.rest)
    return "AsyncCollectiveDone" in i.rest or (found is not None and found[1] != "-1")


def _window_share(attributes: str) -> float:
    """The share of a convolution's window that meets data: of an axis dilated or padded by the whole window one place,
    as where a product with batch axes has become a convolution over them."""
    found = re.search(r"window=\{(.*?)\}", attributes)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    sizes = fields.pop("size", "").split("x")
    share = 1.0
    for i, size in enumerate(int(s) for s in sizes if s):
        at = {name: values.split("x")[i] for name, values in fields.items()}
        dilated = at.pop("lhs_dilate", "1") == str(size)
        padded = at.pop("pad", "0_0").partition("_")[0] == str(size - 1)
        if size > 1 and (dilated or padded):
            share /= size
    return share


def _instruction(name: str, text: str) -> _Instruction | None:
    shape, text = _balanced(text) if text.startswith("(") else (text.partition(" ")[0], text.partition(" ")[2])
    found = re.match(r"\s*([\w\-]+)(?=\()", text)
    if found is None:
        return None
    operands, rest = _balanced(text[found.end() :])
    names = re.findall(r"%([\w.\-]+)", operands)
    if found[1] == "constant":
        names = [operands[1:-1]] if operands[1:-1].isdigit() else ["0"]
    return _Instruction(name, shape, found[1], tuple(names), rest)


def _called(i: _Instruction, attributes: str) -> list[str]:
    """The computations that these attributes name, alone or as lists."""
    found = re.findall(rf"(?:{attributes})=(\{{.*?\}}|%?[\w.\-]+)", i.rest)
    return [name for names in found for name in re.findall(r"[\w.\-]+", names)]


def _balanced(text: str) -> tuple[str, str]:
    """The leading parenthesis, and what follows it."""
    depth = 0
    for end, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[: end + 1], text[end + 1 :]
    return text, ""


def _dims(shape: str) -> tuple[int, ...]:
    found = re.match(r"\(?\w+\[([\d,]*)\]", shape)
    return tuple(_numbers(found[1])) if found else ()


def _iota(text: str) -> np.ndarray:
    """Of "[2,4]T(1,0)" the numbers 0 to 7 as 2 × 4, transposed."""
    shape, order = (_numbers(part) for part in text.partition("T")[::2])
    return np.arange(math.prod(shape)).reshape(shape).transpose(order or range(len(shape)))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _sizes(shape: str) -> list[int]:
    """Bytes of each array."""
    found = re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", shape)
    bits = [8 if kind[:4] == "pred" or kind[:2] == "f8" else int(re.sub(r"\D", "", kind) or 0) for kind, _ in found]
    return [n * math.prod(_numbers(dims)) // 8 for n, (_, dims) in zip(bits, found, strict=True)]
