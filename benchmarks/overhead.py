"""What a run does beside its steps: reading, logging, checkpoints; and what that is of a step of Wan 1.3B as planned.

    python benchmarks/overhead.py                                   # a minute on two cores
    python benchmarks/overhead.py --step=16.6 --state=0.733 --chips=4 --videos=4   # of one host, from docs/plans.md

The demo's student is trained for so many --steps, and the calls of its loop that are no step are timed. Records of a
real teacher's size (latent 21×60×104×16 with its deviations, 512 tokens of 4,096 numbers, as `dollar prepare` writes
them) are then read in random order, padded and sampled as a run does, with two threads. Nothing on a TPU is measured:
a save's copy from chip to host is bounded, by the bandwidth at which it would take 2 % of the time between two
saves."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from dollar_jax import train as training
from dollar_jax.checkpoint import Checkpoints
from dollar_jax.cli.base import prepare_jax
from dollar_jax.config import DistillConfig, changed
from dollar_jax.data.latents import load_data
from dollar_jax.data.prepared import Damaged, PreparedVideos, Records, _endless
from dollar_jax.experiment import load
from dollar_jax.generate import make_generator
from dollar_jax.monitoring import Log
from dollar_jax.prepare.shards import latents_features
from dollar_jax.rewards.scorer import Scorer

LATENT, TEXT = (21, 60, 104, 16), (512, 4096)
# What is timed: its owner, the method, and the clock. A thread that logs waits for the devices, which costs them
# nothing: its own processor time is what counts.
TIMED = {
    "logging": (Log, "_write", time.thread_time),
    "rewards": (Scorer, "submit", time.perf_counter),
    "a save": (Checkpoints, "save", time.perf_counter),
}


def beside_steps(steps: int, folder: Path) -> dict[str, float]:
    """Milliseconds a step, or a call, of what the training loop does beside it, and a step's own."""
    config = changed(load("demo"), {"steps": steps, "checkpoint_every": steps // 4, "visibility.samples_every": 0})
    spent: dict[str, list[float]] = {name: [] for name in TIMED}

    def timed(call: Any, clock: Any, times: list[float]) -> Any:
        @functools.wraps(call)
        def wrapped(*args: Any, **more: Any) -> Any:
            begun = clock()
            try:
                return call(*args, **more)
            finally:
                times.append(clock() - begun)

        return wrapped

    generator = make_generator(config)
    data = functools.partial(load_data, config, generator, folder)
    with contextlib.ExitStack() as patches:
        for what, (owner, name, clock) in TIMED.items():
            call = timed(getattr(owner, name), clock, spent[what])
            patches.enter_context(mock.patch.object(owner, name, call))
        training.train(config, folder, generator, data)
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()][2:]
    found = {"step": float(np.median([line["seconds_per_step"] for line in history]))}
    found["waiting for data"] = float(np.mean([line["data_wait"] for line in history])) * found["step"]
    # Medians, for the last save is waited for; and some calls to log have nothing to write.
    spent["logging"] = [seconds for seconds in spent["logging"] if seconds > 1e-4]
    found |= {name: float(np.median(times)) for name, times in spent.items()}
    return {name: 1e3 * seconds for name, seconds in found.items()}


def reading(clips: int, batches: int, folder: Path) -> tuple[float, float]:
    """Seconds in which one video of real size becomes a batch's row, and the MiB of its record."""
    settings: Any = SimpleNamespace(dtype="float16", buckets=((480, 832),), sample=False, has_latents=True)
    features = latents_features(settings, LATENT[-1], TEXT[-1], LATENT[0], 8)
    serializer, rng, path = ExampleSerializer(features.get_serialized_info()), np.random.default_rng(0), folder / "a"
    writer, size = ArrayRecordWriter(str(path), "group_size:1"), 0
    for i in range(clips):
        one = {"name": str(i), "caption": "a caption", "text": rng.standard_normal(TEXT).astype(settings.dtype)}
        one |= {name: rng.standard_normal(LATENT).astype(settings.dtype) for name in ("latent", "latent_std")}
        record = serializer.serialize_example(features.encode_example(one))
        writer.write(record)
        size += len(record)
    writer.close()
    shard = SimpleNamespace(filename=str(path), skip=0, take=clips, examples_in_shard=clips)
    config: DistillConfig = changed(load("wan_1_3b"), {"batch_size": 4, "data.max_text_length": TEXT[0]})
    videos: Any = SimpleNamespace(has_latents=True, config=config.data, _image=lambda record: None)
    row = functools.partial(PreparedVideos._row, videos, shape=LATENT)
    records = Records(SimpleNamespace(features=features), [shard], Damaged(0))
    found = iter(_endless(records, config, 0, np.arange(4), row))
    for _ in range(4):  # what is read ahead
        next(found)
    begun = time.perf_counter()
    for _ in range(batches):
        next(found)
    return (time.perf_counter() - begun) / batches / 4, size / clips / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--clips", type=int, default=64, help="of real size, that are written and read")
    parser.add_argument("--batches", type=int, default=24, help="of four of them")
    parser.add_argument("--step", type=float, default=16.6, help="planned seconds of a real step")
    parser.add_argument("--state", type=float, default=0.733, help="planned GiB of a chip's state")
    parser.add_argument("--chips", type=int, default=4, help="of a host")
    parser.add_argument("--videos", type=int, default=4, help="of a host's share of a batch")
    args = parser.parse_args()
    prepare_jax()
    with tempfile.TemporaryDirectory() as name:
        beside = beside_steps(args.steps, Path(name) / "run")
        video, size = reading(args.clips, args.batches, Path(name))
    own, real = beside.pop("step"), 1e3 * args.step
    real_config = load("wan_1_3b")
    often = {"a save": real_config.checkpoint_every, "logging": real_config.log_every}
    print("| | ms | of the demo's step, % | of the planned step, % |\n|---|---:|---:|---:|")
    for what, spent in beside.items():
        shown = "" if what in often else f"{100 * spent / own:.2f}"
        name = f"{what}, every {often[what]} steps" if what in often else what
        print(f"| {name} | {spent:.2f} | {shown} | {100 * spent / often.get(what, 1) / real:.4f} |")
    host = 1e3 * video * args.videos
    print(f"| {args.videos} videos of {size:.1f} MiB, read ahead | {host:.0f} | | {100 * host / real:.2f} |")
    state, every = args.state * args.chips, often["a save"]
    least = 1024 * state / (0.02 * every * args.step)
    print(
        f"\nThe demo's step: {own:.0f} ms. Saves every {every} planned steps take 2 % of the time when a host's", end=""
    )
    print(f" {state:.1f} GiB leave its chips at {least:.0f} MiB/s, and less when faster.")


if __name__ == "__main__":
    main()
