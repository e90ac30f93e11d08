"""Training that is killed, starved and damaged, again and again, against one that is left alone.

    python benchmarks/soak.py --workdir=runs/soak --minutes=60 [--processes=2]

A small run of the default domain is trained once in peace. Then, for the minutes given, others of the same settings
are started, and each start meets one accident drawn at random: SIGKILL after a random time, or in the middle of a
save, of one process of several; no room for a checkpoint; a newest checkpoint that is truncated, has a bit flipped,
or lacks an item; a second run on the same folder. Their host reward raises on every third call. Every run must end
with the arrays of the quiet one, bit for bit. In between `dollar export` is killed until it has ended, and must
leave the files of the quiet one.

Prints what happened, how often, and what the host's memory did in the quiet run, as JSON.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dollar_jax.files import CHECKSUMS

SETTINGS = {
    "batch_size": 8,
    "checkpoint_every": 5,
    "keep_checkpoints": 2,
    "log_every": 5,
    "data.train_videos": 16,
    "student.timesteps": (1000.0, 700.0, 400.0, 200.0),
    "reward.samples": 2,
    "reward.replay": 16,
    "reward.batch_size": 8,
    "reward.updates": 1,
    "reward.start_step": 0,
    "visibility.samples_every": 0,
}
CONFIG = """
    from dollar_jax.experiment import experiment

    def get_config(losses="vsd+cd+lrm"):
        return experiment("demo", losses, {settings!r} | {{"reward.rewards": ({{"name": {reward!r}}},)}})
"""
REWARD = """
    import itertools, os
    calls = itertools.count(1)

    def reward(frames, prompts):
        "brightness, by a scorer that often fails"
        if os.environ.get("SOAK_FLAKY") and next(calls) % 3 == 0:
            raise ConnectionError("flaky")
        return frames.mean((1, 2, 3, 4))
"""


class Soak:
    def __init__(self, folder: Path, steps: int, processes: int, seed: int):
        self.folder, self.processes, self.rng = folder, processes, random.Random(seed)
        self.seen: collections.Counter[str] = collections.Counter()
        folder.mkdir(parents=True)
        (folder / "reward.py").write_text(textwrap.dedent(REWARD))
        settings = {**SETTINGS, "steps": steps}
        (folder / "config.py").write_text(
            textwrap.dedent(CONFIG.format(settings=settings, reward=f"{folder}/reward.py:reward"))
        )

    def start(
        self, *arguments: Any, flaky: bool = True, processes: int = 1, limit: int = 0
    ) -> list[subprocess.Popen[str]]:
        """Starts a command in so many processes, none of which may write a file of more than `limit` bytes."""

        def starve() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        with socket.socket() as s:
            s.bind(("localhost", 0))
            address = f"localhost:{s.getsockname()[1]}"
        group = []
        for i in range(processes):
            place = [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={i}"]
            with (self.folder / f"log{i}.txt").open("a") as log:
                group.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "dollar_jax", *map(str, arguments), *(place if processes > 1 else [])],
                        env={**os.environ, "SOAK_FLAKY": "1" if flaky else ""},
                        stdout=log,
                        stderr=log,
                        text=True,
                        preexec_fn=starve if limit else None,
                    )
                )
        return group

    def train(self, name: str, **options: Any) -> list[subprocess.Popen[str]]:
        command = ["train", f"--config={self.folder / 'config.py'}", f"--workdir={self.folder / name}"]
        return self.start(*command, processes=self.processes, **options)

    def quiet(self) -> dict[str, Any]:
        """The undisturbed run: its digest, and the most memory of its first process in the second and last quarter."""
        (first, *_) = group = self.train("quiet", flaky=False)
        begun, memory = time.monotonic(), []
        while first.poll() is None:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{first.pid}/status").read_text().splitlines()
                memory.append(next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")))
            time.sleep(0.2)
        self.expect(group, {0})
        self.seconds = time.monotonic() - begun
        quarter = len(memory) // 4
        return {
            "seconds": round(self.seconds, 1),
            "memory_mib_third_quarter": round(max(memory[2 * quarter : 3 * quarter])),
            "memory_mib_last_quarter": round(max(memory[3 * quarter :])),
        }

    def expect(self, group: list[subprocess.Popen[str]], codes: set[int]) -> None:
        found = {process.wait(timeout=1800) for process in group}
        if not found <= codes:
            raise AssertionError(f"exit codes {found}, not {codes}: {self.folder}/log*.txt")

    def disturbed(self, name: str, end: float) -> None:
        """One run, through accidents until it is done or the time is up; then it is left in peace to its end."""
        workdir = self.folder / name
        accidents: list[Callable[[Path], None]] = [
            self.kill,
            self.kill,
            self.kill_in_save,
            self.starve,
            self.second,
            self.damage,
        ]
        while time.monotonic() < end:
            accident = self.rng.choice(accidents)
            accident(workdir)
            self.seen[accident.__name__] += 1
        self.expect(self.train(name), {0})

    def kill(self, workdir: Path) -> None:
        group = self.train(workdir.name)
        time.sleep(self.rng.uniform(0.2, 1.0) * self.seconds)
        self.end(group)

    def kill_in_save(self, workdir: Path) -> None:
        group = self.train(workdir.name)
        while all(p.poll() is None for p in group) and not list(workdir.glob("checkpoints/*tmp*")):
            time.sleep(0.01)
        time.sleep(self.rng.uniform(0, 0.3))
        self.end(group)

    def end(self, group: list[subprocess.Popen[str]]) -> None:
        """Kills one process; the others must end by themselves."""
        self.rng.choice(group).kill()
        for process in group:
            process.wait(timeout=600)

    def starve(self, workdir: Path) -> None:
        """No file may exceed 200 kB: events and history can be written, arrays cannot."""
        self.expect(self.train(workdir.name, limit=200_000), {0, 1, 3, -9, -6})

    def second(self, workdir: Path) -> None:
        first = self.train(workdir.name)
        while all(p.poll() is None for p in first) and not (workdir / ".lock").exists():
            time.sleep(0.1)
        if first[0].poll() is None:
            other = self.train(workdir.name)
            time.sleep(0.3 * self.seconds)
            if first[0].poll() is None and other[0].poll() is not None:
                self.expect(other[:1], {5})
                self.seen["second refused"] += 1
            self.end(other)
        self.end(first)

    def damage(self, workdir: Path) -> None:
        """Of the newest checkpoint; the one before must be there, or the run could only say that nothing is whole."""
        steps = sorted((p for p in workdir.glob("checkpoints/*") if p.name.isdigit()), key=lambda p: int(p.name))
        if len(steps) < 2:
            return
        files = [p for p in steps[-1].rglob("*") if p.is_file() and p.stat().st_size]
        path = self.rng.choice(files)
        kind = self.rng.choice(("flip", "cut", "delete item"))
        data = bytearray(path.read_bytes())
        if kind == "flip":
            bit = self.rng.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
        elif kind == "cut":
            path.write_bytes(data[: len(data) // 2])
        else:
            shutil.rmtree(steps[-1] / "ema")
        self.seen[f"damage: {kind}"] += 1

    def killed_until_done(self, arguments: list[str], folder: Path, quiet: Path) -> None:
        """A command that makes a folder: killed at random times, each later, until it ends; then the same files."""
        wait = 2.0
        while not folder.exists():
            (process,) = self.start(*arguments, folder)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=wait * self.rng.uniform(0.5, 1.5))
            if process.poll() is None:
                process.kill()
                process.wait()
                self.seen[f"{arguments[0]} killed"] += 1
            wait *= 1.5
        if (folder / CHECKSUMS).read_text() != (quiet / CHECKSUMS).read_text():
            raise AssertionError(f"{folder} and {quiet} differ")


def digest(workdir: Path) -> str:
    """Of all arrays of the newest checkpoint."""
    step = max((p for p in workdir.glob("checkpoints/*") if p.name.isdigit()), key=lambda p: int(p.name))
    total = hashlib.sha256()
    for item in sorted(p for p in step.iterdir() if p.is_dir() and p.name != "data"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(ocp.StandardCheckpointer().restore(item)):
            array = np.asarray(leaf)
            total.update(f"{step.name} {item.name} {path} {array.dtype} {array.shape}".encode())
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    soak = Soak(flags.workdir.absolute(), flags.steps, flags.processes, flags.seed)
    report = {"minutes": flags.minutes, "steps": flags.steps, "processes": flags.processes, "quiet run": soak.quiet()}
    expected, runs = digest(soak.folder / "quiet"), 0
    quiet = ["export", f"--workdir={soak.folder / 'quiet'}"]
    exported = soak.folder / "exported"
    soak.expect(soak.start(*quiet, exported), {0})
    end = time.monotonic() + 60 * flags.minutes
    while not runs or time.monotonic() < end:
        name = f"run{runs}"
        soak.disturbed(name, end)
        if digest(soak.folder / name) != expected:
            raise AssertionError(f"{soak.folder / name} has other arrays than the quiet run")
        runs += 1
        if time.monotonic() < end:
            soak.killed_until_done(quiet, soak.folder / f"exported{runs}", exported)
    print(json.dumps({**report, "runs, all bit-identical": runs, "accidents": soak.seen}, indent=2))


if __name__ == "__main__":
    main()
