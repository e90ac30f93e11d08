"""`dollar vbench-score`."""

import json
from pathlib import Path
from typing import Any

from dollar_jax.cli.base import FLAGS, define
from dollar_jax.files import read_json, write_json


def define_flags(_: list[str]) -> None:
    define("string", "json", None, "Where to write the scores too.")
    define("bool", "allow_missing", False, "Average over the dimensions given, though not all are.")
    define("string", "metrics", None, "The JSON of dollar evaluate --videos, whose Vendi score goes beside the total.")
    define("string", "manifest", None, "The videos' manifest, kept with the scores; the one beside the first file.")
    define("bool", "compare", False, "Two results side by side, whose manifests must say that they compare.")


def run(*files: str) -> None:
    from dollar_jax.evaluate.manifest import check_alike

    if not files:
        raise ValueError("give VBench's result files: dollar vbench-score FILE…")
    paths = [Path(file) for file in files]
    if FLAGS.compare:
        if len(paths) != 2:
            raise ValueError("give two results: dollar vbench-score --compare A B")
        if FLAGS.metrics or FLAGS.manifest:
            raise ValueError("--compare takes the manifests beside A and B: leave out --metrics and --manifest")
        different = check_alike(*paths)
        a, b = (_score(path) for path in paths)
        names = [name for name in ("quality", "semantic", "total") if None not in (a[name], b[name])]
        result: dict[str, Any] = {"a": a, "b": b, "b_minus_a": {name: b[name] - a[name] for name in names}}
        result["made_with"] = different
    else:
        result = _score(*paths)
    if FLAGS.json:
        write_json(FLAGS.json, result)
    print(json.dumps(result, indent=2))


def _score(*paths: Path) -> dict[str, Any]:
    from dollar_jax.evaluate.manifest import NAME, find_manifest
    from dollar_jax.evaluate.vbench import aggregate, read_intervals, read_results

    if len(paths) == 1 and paths[0].is_dir():
        found = [path for path in sorted(paths[0].glob("*.json")) if not path.name.startswith(".")]
        # VBench leaves its list of videos beside its results.
        if not (files := [path for path in found if not path.name.endswith((NAME, "_full_info.json"))]):
            raise FileNotFoundError(f"{paths[0]} holds no result file of VBench's")
    else:
        files = list(paths)
    result = aggregate(read_results(files), FLAGS.allow_missing)._asdict()
    result["intervals"] = read_intervals(files)
    result["dynamic_degree"] = result["dimensions"].get("dynamic_degree")
    if FLAGS.metrics:
        try:
            result["vendi"] = float(read_json(FLAGS.metrics)["vendi"])
        except (TypeError, KeyError) as error:
            raise ValueError(f"{FLAGS.metrics} holds no Vendi score; dollar evaluate --videos writes it") from error
    manifest = read_json(FLAGS.manifest) if FLAGS.manifest else find_manifest(paths[0])
    if manifest is not None:
        result["manifest"] = manifest
    return result
