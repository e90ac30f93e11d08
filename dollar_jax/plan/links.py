"""What the links between chips let a collective have, and so the bounds of a program's time."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dollar_jax.hlo import Cost, groups
from dollar_jax.plan.chips import Chip

INSIDE = 6  # links' worth between the halves of a tpu7x: https://docs.cloud.google.com/tpu/docs/tpu7x


class Links:
    """The torus that devices, in the order of a program's mesh, lie in. As https://jax-ml.github.io/scaling-book/tpus
    says, the axes of a slice of whole cubes are rings, those of others lines; on v5e and v6e axes of 16 are rings."""

    def __init__(self, devices: Sequence[Any], chip: Chip):
        places = [(getattr(d, "core_on_chip", 0), *getattr(d, "coords", (d.id, 0, 0))) for d in devices]
        self.places = np.array(places) - np.min(places, 0)  # which half of a chip, x, y, z
        self.sizes = [int(n) for n in self.places.max(0) + 1]
        cubes = all(n % 4 == 0 for n in self.sizes[1:])
        self.rings = [cubes if chip.cubes else n == 16 for n in self.sizes]
        self.link = chip.link_gbps * 1e9

    def rate(self, kind: str, text: str) -> float:
        """Bytes per second that each device sends in a collective, all groups of HLO's `text` at once. In a gathering,
        scattering or sum the ends of a line have one link, in a ring two, of each axis; others take the shortest way,
        axis by axis, and wait for the busiest link."""
        members = groups(text, len(self.places))
        if kind not in ("all-to-all", "collective-permute"):
            return self.link * float(min(self._usable(self.places[group]) for group in members))
        pairs = (pair for group in members for pair in itertools.permutations(group, 2))
        return self.link * (members.shape[1] - 1) / self._busiest(pairs if kind == "all-to-all" else members)

    def _usable(self, places: np.ndarray) -> float:
        """Links of a group's worst placed device that its group has for itself."""
        total = 0.0
        for axis in (1, 2, 3):
            at = np.unique(places[:, axis])
            if len(at) > 1:
                apart = (at[-1] - at[0]) / (len(at) - 1)  # so many groups lie between each other, and share the links
                total += (1 + (self.rings[axis] and len(at) * apart == self.sizes[axis])) / apart
        return total * len(np.unique(places[:, 0])) / self.sizes[0] or INSIDE

    def _busiest(self, pairs: Iterable[Sequence[int]]) -> float:
        """Messages that the busiest link carries one way where each pair's first sends one to its second."""
        loads: Counter[tuple[int, ...]] = Counter()
        for source, target in pairs:
            here = [int(n) for n in self.places[source]]
            for axis, size in enumerate(self.sizes[1:], 1):
                way = int(self.places[target][axis]) - here[axis]
                if self.rings[axis]:  # the shorter way; of those to the other side every second one each way
                    way = way % size - size * (2 * (way % size) + sum(here) % 2 > size)
                step = 1 if way > 0 else -1
                for _ in range(abs(way)):
                    loads[*here[1:], axis, step] += 1
                    here[axis] = (here[axis] + step) % size
        return max(loads.values(), default=1 / INSIDE)


def bounds(used: Cost, devices: Sequence[Any], chip: Chip, model_tflops: float) -> dict[str, Any]:
    """Fields of a `planner.Plan`: seconds by part; in all where the slowest part hides the rest, where one instruction
    follows another but for collectives that the HLO makes asynchronous, and where these too are waited for; and the
    model FLOPs utilisation of each."""
    links, sums = Links(devices, chip), {True: 0.0, False: 0.0}
    for (kind, where, asynchronous), sent in used.sent.items():
        sums[asynchronous] += sent / links.rate(kind, where)
    peaks = chip.tflops * 1e12, chip.memory_gbps * 1e9
    products, memory, work = used.flops / peaks[0], used.memory_bytes / peaks[1], used.seconds(*peaks)
    slowest = {"matrix products": products, "memory": memory, "collectives": sum(sums.values())}
    bound = max(slowest, key=lambda part: slowest[part])
    seconds = {"all hidden": slowest[bound], "as scheduled": max(work, sums[True]) + sums[False]}
    seconds["nothing hidden"] = work + sum(sums.values())
    parts = {"matrix products": products, "memory": memory}
    parts |= {"asynchronous collectives": sums[True], "other collectives": sums[False]}
    mfu = {name: model_tflops / chip.tflops / value if value else 0.0 for name, value in seconds.items()}
    return {"bound": bound, "parts_seconds": parts, "seconds": seconds, "mfu": mfu}
