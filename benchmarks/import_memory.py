"""Peak memory and time of `dollar import` for a teacher of real size with made-up weights.

    python benchmarks/import_memory.py --teacher=wan_1_3b --workdir=runs/import

Writes the teacher as diffusers would (bf16 shards of 5 GB with an index, real sizes throughout; a text encoder
of toy size with --small-text) and imports it in a process of its own. With --check the transformer is read back,
which takes its size in memory, compared with what was written bit by bit, and run once on a short clip. The
folder holds twice the teacher's size on the disk and is deleted at the end."""

from __future__ import annotations

import argparse
import dataclasses
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dollar_jax.data import shapes as domain
from dollar_jax.data.vocabulary import build_tokenizer
from dollar_jax.files import write_json
from dollar_jax.weights import safetensors_io as files
from dollar_jax.weights.families import COMPONENTS, PUBLISHED
from dollar_jax.weights.pipeline import load_component, read_parts
from dollar_jax.weights.scheduler import scheduler_json
from dollar_jax.weights.table import export_stream

BLOCK = (0.02 * np.random.default_rng(0).normal(size=2**20 + 7)).astype(jnp.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=sorted(PUBLISHED), default="wan_1_3b")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--small-text", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    source, out = args.workdir / "source", args.workdir / "imported"
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    write_source(args.teacher, source, args.small_text)
    size = sum(path.stat().st_size for path in source.rglob("*.safetensors")) / 1e9

    start = time.perf_counter()
    command = [sys.executable, "-m", "dollar_jax", "import", str(source), str(out), "--dtype=bfloat16"]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print("\n| teacher | source, GB | peak memory, GB | seconds |\n|---|---|---|---|")
    print(f"| {args.teacher} | {size:.1f} | {peak:.1f} | {seconds:.0f} |")
    if args.check:
        check(out)
    shutil.rmtree(args.workdir)


def write_source(name: str, folder: Path, small_text: bool) -> None:
    """A pipeline folder as diffusers saves it."""
    teacher = PUBLISHED[name]
    if small_text:
        small = dataclasses.replace(teacher.text_encoder, vocab_size=64, d_ff=64, num_layers=1)
        teacher = dataclasses.replace(teacher, text_encoder=small)
    family = teacher.family
    index: dict[str, Any] = {"_class_name": family.pipeline}
    for part in COMPONENTS:
        kind, config = getattr(family, part), getattr(teacher, part)
        network = kind.network(config)
        table = kind.table(config, network.shapes)
        file = files.TRANSFORMERS_FILE if kind.library == "transformers" else files.DIFFUSERS_FILE
        dtype = "float32" if part == "vae" else "bfloat16"
        pairs = tensors(network.shapes, table)
        files.write_component(
            folder / part, kind.write(config), pairs, file_name=file, dtype=dtype, shard_size=5 * 10**9
        )
        index[part] = [kind.library, kind.class_name]
    tokenizer = build_tokenizer(domain.VOCABULARY)
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = scheduler_json(teacher.schedule, family.path)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    index["tokenizer"] = ["transformers", type(tokenizer).__name__]
    write_json(folder / "model_index.json", index)


def made_up(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """bf16 values of their own for each path: a long list of normal ones, turned by the path's checksum."""
    return np.resize(np.roll(BLOCK, zlib.crc32(path.encode())), shape)


def tensors(shapes: Any, table: Any) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in flatten_dict(shapes, sep="/").items():
        yield from export_stream(table, unflatten_dict({path: made_up(path, leaf.shape)}, sep="/"))


def check(folder: Path) -> None:
    """Every parameter of the transformer is what was written, and it computes something finite."""
    transformer = load_component(
        folder / "transformer", read_parts(folder, "bfloat16", dtype="bfloat16")["transformer"]
    )
    flat = flatten_dict(transformer.params, sep="/")
    for path, value in flat.items():
        np.testing.assert_array_equal(np.asarray(value), made_up(path, value.shape), err_msg=path)
    print(f"{len(flat)} parameters, {sum(x.size for x in flat.values()) / 1e9:.2f} billion values: as written")
    config = transformer.config
    latent = jnp.ones((1, 2, 16, 16, config.in_channels))  # 5 frames of 128 × 128
    text = jnp.ones((1, 4, getattr(config, "text_dim", None) or config.text_embed_dim))
    start = time.perf_counter()
    out = jax.jit(transformer.network.apply)(transformer.params, latent, jnp.ones(1), text)
    assert bool(jnp.isfinite(out).all())
    print(f"one forward of {latent.shape}: finite, {time.perf_counter() - start:.0f} s with its compilation")


if __name__ == "__main__":
    main()
