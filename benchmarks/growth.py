"""How a step grows: seconds and GiB of a chip, by the TPU's own compiler, with frames, resolution, videos and chips.

python benchmarks/growth.py --config=wan_1_3b:vsd+cd --out=runs/growth.jsonl --picture=docs/growth.png

One row for each plan, and a plan that is in the file is not made again. Everything but the named axis stays as in BASE:
Wan 1.3B at 480 × 832 × 81 on 64 v6e, a video a chip."""

from __future__ import annotations

import argparse
import json
import math
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from dollar_jax.config import changed
from dollar_jax.experiment import load
from dollar_jax.plan import planner

BASE: dict[str, Any] = {"frames": 81, "height": 480, "width": 832, "videos": 64, "topology": "8x8"}


def tokens(row: dict[str, Any]) -> float:
    """Of one video, in thousands."""
    return ((row["frames"] - 1) // 4 + 1) * (row["height"] // 16) * (row["width"] // 16) / 1000


FRAMES, VIDEOS = operator.itemgetter("frames"), operator.itemgetter("videos")
SIZES, SLICES = (
    ((352, 608), (480, 832), (608, 1056), (720, 1280)),
    (("4x4", 16), ("4x8", 32), ("8x8", 64), ("16x16", 256)),
)
# What a column of the picture varies: its label, the place of a row on it, and its points.
AXES: dict[str, tuple[Callable[[dict[str, Any]], float], list[dict[str, Any]]]] = {
    "frames": (FRAMES, [{"frames": n} for n in (33, 57, 81, 121)]),
    "thousand tokens of a video": (tokens, [{"height": h, "width": w} for h, w in SIZES]),
    "videos of a step": (VIDEOS, [{"videos": n} for n in (64, 128, 256)]),
    "chips, a video each": (VIDEOS, [{"topology": t, "videos": n} for t, n in SLICES]),
}


def plan(config: str, point: dict[str, Any]) -> dict[str, Any]:
    """One step of `videos` videos, as many micro-batches as leave one for each chip."""
    chips = math.prod(map(int, point["topology"].split("x")))
    changes = {
        "batch_size": point["videos"],
        "accumulation": point["videos"] // chips,
        "mesh.fsdp": chips,
        "mesh.data": 1,
    }
    settings = changed(load(*config.split(":", 1)), changes)
    video = (point["height"], point["width"], point["frames"])
    (found,) = planner.plans(settings, f"v6e:{point['topology']}", "train", video)
    return point | {
        "seconds": found.seconds.get("nothing hidden"),
        "mfu": found.mfu.get("nothing hidden"),
        "gib": None if found.temp_gib is None else found.argument_gib + found.temp_gib,
        "of": found.hbm_gib,
        "fits": found.fits,
    }


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    import matplotlib.pyplot as plt  # of the extra `docs`

    figure, plots = plt.subplots(2, len(AXES), figsize=(13, 5.5), sharex="col", sharey="row")
    for column, (label, (place, points)) in enumerate(AXES.items()):
        found = [next((r for r in rows if matches(r, BASE | p)), None) for p in points]
        known = [r for r in found if r is not None]
        x = [place(r) for r in known]
        for row, name in enumerate(("seconds", "gib")):
            plot = plots[row, column]
            plot.plot(x, [r[name] or float("nan") for r in known], "o-")
            plot.grid(alpha=0.3)
        plots[1, column].axhline(known[0]["of"], color="tab:red", linestyle=":")
        plots[1, column].set_xlabel(label)
    plots[0, 0].set_ylabel("seconds of a step,\nnothing hidden")
    plots[1, 0].set_ylabel("GiB of a chip\n(dotted: all it has)")
    for plot in plots.flat:
        plot.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def matches(row: dict[str, Any], point: dict[str, Any]) -> bool:
    return all(row[name] == value for name, value in point.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="wan_1_3b:vsd+cd")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for point in (BASE | point for _, points in AXES.values() for point in points):
        if not any(matches(row, point) for row in rows):
            rows.append(plan(args.config, point))
            with args.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
    if args.picture is not None:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
