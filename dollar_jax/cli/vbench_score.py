"""`dollar vbench-score`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from dollar_jax.cli.base import FLAGS, Command, define


def define_flags(_: list[str]) -> None:
    define("string", "json", None, "Where to write the scores too.")
    define("bool", "allow_missing", False, "Average over the dimensions given, though not all are.")


def run(*files: str) -> None:
    from dollar_jax.evaluate.metrics import write_metrics
    from dollar_jax.evaluate.vbench import aggregate, read_results

    if not files:
        raise ValueError("give VBench's result files: dollar vbench-score FILE…")
    result = dataclasses.asdict(aggregate(read_results(map(Path, files)), FLAGS.allow_missing))
    if FLAGS.json:
        write_metrics(FLAGS.json, result)
    print(json.dumps(result, indent=2))


COMMAND = Command("VBench's result files to its Quality, Semantic and Total", define_flags, run, "FILE…")
