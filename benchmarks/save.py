"""What checksums add to a save: the same state saved with XXH3 (as a run does), with SHA-256, and without, in turns.

python benchmarks/save.py --gib=1 --rounds=3 --folder=runs/save
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np

from dollar_jax import checkpoint, files


def save(items: dict[str, dict[str, jnp.ndarray]], folder: Path, sums: str) -> dict[str, float]:
    """Seconds, and processor seconds, of one save, of its call, and of its hashing (in threads, their sum)."""
    spent = {"hashing": 0.0}

    def hash_file(path: Path, _: str) -> str:
        begun = time.thread_time()
        value = real(path, sums) if sums else "0" * 32
        spent["hashing"] += time.thread_time() - begun
        return value

    real = files.hash_file
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    with mock.patch.object(files, "hash_file", hash_file), checkpoint.Checkpoints(folder, keep=1) as checkpoints:
        begun, processor = time.perf_counter(), time.process_time()
        checkpoints.save(1, items)
        spent["call"] = time.perf_counter() - begun
        checkpoints.close()
    return spent | {"save": time.perf_counter() - begun, "processor": time.process_time() - processor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    rng, size = np.random.default_rng(0), int(flags.gib * 2**30 / 4 / 16)
    items = {
        name: {f"w{i}": jnp.asarray(rng.standard_normal(size, np.float32)) for i in range(4)}
        for name in ("student", "ema", "fake_score", "optimisers")
    }
    found: dict[str, list[dict[str, float]]] = {}
    save(items, flags.folder, "")
    for _ in range(flags.rounds):
        for name, sums in {"XXH3": files.XXH128, "SHA-256": files.SHA256, "none": ""}.items():
            found.setdefault(name, []).append(save(items, flags.folder, sums))
    shutil.rmtree(flags.folder)
    print(f"{flags.gib:g} GiB, medians of {flags.rounds} saves")
    print("| checksums | the call, s | the save, s | processor, s | hashing, s | of the processor, % |")
    print("|---|---|---|---|---|---|")
    for name, rounds in found.items():
        call, whole, processor, hashing = (
            float(np.median([one[key] for one in rounds])) for key in ("call", "save", "processor", "hashing")
        )
        share = 100 * hashing / processor
        print(f"| {name} | {call:.2f} | {whole:.2f} | {processor:.2f} | {hashing:.3f} | {share:.1f} |")


if __name__ == "__main__":
    main()
