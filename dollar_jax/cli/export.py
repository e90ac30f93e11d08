"""`dollar export`."""

from __future__ import annotations

import re
from pathlib import Path

from dollar_jax.cli.base import FLAGS, Command, define, define_workdir


def define_flags(_: list[str]) -> None:
    define_workdir()
    define("bool", "ema", True, "The student's moving average rather than its raw weights.")
    define("enum", "dtype", "float32", ["float32", "float16", "bfloat16"], "Of the student.")
    define("bool", "adapter", False, "Only the adapters of a run with config.lora, for load_lora_weights.")
    define("string", "shard_size", "5GB", "The most that a weight file holds.")


def run(*names: str) -> None:
    from dollar_jax.export import export_run

    if len(names) != 1:
        raise ValueError("give the new folder: dollar export --workdir=RUN FOLDER")
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    size = re.fullmatch(r"([1-9]\d*)([KMG]B)", FLAGS.shard_size)
    if size is None:
        raise ValueError(f"--shard_size={FLAGS.shard_size} must be a size such as 500MB or 5GB")
    export_run(
        Path(FLAGS.workdir),
        Path(names[0]),
        ema=FLAGS.ema,
        dtype=FLAGS.dtype,
        shard_size=int(size[1]) * units[size[2]],
        adapter=FLAGS.adapter,
    )
    print(f"The student is in {names[0]}; its README.md says how diffusers samples it.")


COMMAND = Command("a run's student to a folder that diffusers loads", define_flags, run, "DST")
