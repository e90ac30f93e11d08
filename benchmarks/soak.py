"""Runs that are killed, starved and damaged, again and again, against those that are left alone.

    python benchmarks/soak.py --workdir=runs/soak --minutes=60 --processes 1 1 2

For each number of processes a small run of the default domain is trained once in peace. Then, for the minutes given,
others of the same settings are started, and each start meets one accident drawn at random: SIGKILL at its start, in
its steps or in the middle of a save, of one process where there are several; no room for a checkpoint; a newest
checkpoint that is truncated, has a bit flipped, or lacks an item; a second run on the same folder. Their host reward
raises on every third call. After each kill the newest checkpoint must be whole, and none that was there may be gone;
every run must end with the arrays of the quiet one, bit for bit. Between two runs a command that makes a folder,
`dollar export`, `import`, `prepare` or `pretrain`, is killed until it has ended, and must leave the files of the quiet
one.

WORKDIR/soak.json says what happened, how often, and what the host's memory did in the quiet runs. A loss ends the soak.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
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

from dollar_jax.data import shapes
from dollar_jax.files import XXH128, checksums, find_damage
from dollar_jax.video import write_video

SETTINGS = {
    "batch_size": 8,
    "checkpoint_every": 3,
    "keep_checkpoints": 2,
    "log_every": 3,
    "data.train_videos": 16,
    "student.timesteps": (1000.0, 700.0, 400.0, 200.0),
    "reward.samples": 2,
    "reward.replay": 16,
    "reward.batch_size": 8,
    "reward.updates": 1,
    "reward.start_step": 0,
    "visibility.samples_every": 0,
    "pretrain.checkpoint_every": 4,
    "pretrain.vae_videos": 16,
    "pretrain.vae_phases": [
        {"frames": 1, "batch_size": 4, "steps": 12, "learning_rate": 5e-3, "adam_learning_rate": 3e-3}
    ],
    "pretrain.teacher.videos": 16,
    "pretrain.teacher.batch_size": 4,
    "pretrain.teacher.steps": 12,
    "pretrain.num_steps": 1,
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
CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # of small programs too: starts are many
ENDED = {1, 6, 7, -6, -9}  # of a process whose fellow was killed
Group = list[subprocess.Popen[str]]


class Soak:
    def __init__(self, folder: Path, steps: int, seed: int):
        self.folder, self.steps, self.rng = folder, steps, random.Random(seed)
        self.seen: collections.Counter[str] = collections.Counter()
        self.report: dict[str, Any] = {"steps": steps, "lost": 0}
        self.processes, self.seconds, self.begun = 1, {}, time.monotonic()
        folder.mkdir(parents=True)
        (folder / "reward.py").write_text(textwrap.dedent(REWARD))
        settings = {**SETTINGS, "steps": steps}
        (folder / "config.py").write_text(
            textwrap.dedent(CONFIG.format(settings=settings, reward=f"{folder}/reward.py:reward"))
        )
        for i in range(24):
            video, caption = shapes.example(0, "train", i)
            (folder / "videos").mkdir(exist_ok=True)
            write_video(folder / "videos" / f"{i}.mp4", video)
            (folder / "videos" / f"{i}.txt").write_text(str(caption))

    def start(self, *arguments: Any, flaky: bool = True, processes: int = 1, limit: int = 0) -> Group:
        """Starts a command in so many processes, none of which may write a file of more than `limit` bytes."""
        starved = ["sh", "-c", f'ulimit -f {limit // 512}; exec "$@"', "sh"] if limit else []
        with socket.socket() as s:
            s.bind(("localhost", 0))
            address = f"localhost:{s.getsockname()[1]}"
        group = []
        for i in range(processes):
            place = [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={i}"]
            with (self.folder / f"{'starved' if limit else 'log'}{i}.txt").open("w" if limit else "a") as log:
                log.write(f"\n{time.strftime('%X')} {' '.join(map(str, arguments))}\n")
                log.flush()
                group.append(
                    subprocess.Popen(
                        [*starved, sys.executable, "-m", "dollar_jax", *map(str, arguments), *place * (processes > 1)],
                        env={**os.environ, "SOAK_FLAKY": "1" if flaky else "", **CACHE},
                        stdout=log,
                        stderr=log,
                        text=True,
                    )
                )
        return group

    def train(self, name: str, **options: Any) -> Group:
        command = ["train", f"--config={self.folder / 'config.py'}", f"--workdir={self.folder / name}"]
        return self.start(*command, processes=self.processes, **options)

    def note(self, what: str, count: int = 1) -> None:
        """Counts something, and leaves the report up to here."""
        self.seen[what] += count
        kills = sum(count for name, count in self.seen.items() if name.startswith("killed"))
        passed = round((time.monotonic() - self.begun) / 60, 1)
        self.report |= {"minutes so far": passed, "kills": kills, "accidents": dict(sorted(self.seen.items()))}
        (self.folder / "soak.json").write_text(json.dumps(self.report, indent=2) + "\n")

    def lose(self, what: str) -> None:
        self.report["lost"] += 1
        self.note(f"lost: {what}")
        raise AssertionError(f"{what}: {self.folder}/log*.txt")

    @functools.cache  # noqa: B019 (there is one soak)
    def quiet(self, processes: int) -> str:
        """The digest of the undisturbed run; notes its time, and the most memory of its first process in each quarter
        of its steps."""
        name, self.processes = f"quiet{processes}", processes
        (first, *_) = group = self.train(name, flaky=False)
        begun, memory = time.monotonic(), []
        while first.poll() is None:
            if newest(self.folder / name):
                with contextlib.suppress(OSError, StopIteration):
                    lines = Path(f"/proc/{first.pid}/status").read_text().splitlines()
                    memory.append(next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")))
            else:
                self.seconds[self.processes] = time.monotonic() - begun
            time.sleep(0.1)
        self.expect(group, {0})
        self.report[name] = {
            "seconds to the first checkpoint": round(self.seconds[self.processes], 1),
            "seconds": round(time.monotonic() - begun, 1),
            "memory_mib by quarter": [round(float(part.max())) for part in np.array_split(memory, 4)],
        }
        return digest(self.folder / name)

    @functools.cache  # noqa: B019
    def quiet_files(self, command: str) -> dict[str, str]:
        """Checksums of what a command makes when it is left alone."""
        self.quiet(1)
        arguments, folder = self.commands("quiet")[command]
        self.expect(self.start(command, *arguments), {0})
        return contents(folder)

    def expect(self, group: Group, codes: set[int]) -> None:
        found = {process.wait(timeout=1800) for process in group}
        if not found <= codes:
            self.lose(f"exit codes {found}, not {codes}")

    def disturbed(self, name: str, processes: int, end: float) -> None:
        """A run through accidents until its last step or the end of time, and then in peace to its last step."""
        expected, self.processes = self.quiet(processes), processes
        workdir, step = self.folder / name, 0
        accidents: list[Callable[[Path], None]] = [*[self.kill] * 8, self.starve, self.second, self.damage]
        while time.monotonic() < end and step < self.steps:
            accident = self.rng.choice(accidents)
            accident(workdir)
            step = newest(workdir)
        self.expect(self.train(name), {0})
        if digest(workdir) != expected:
            self.lose(f"{workdir} has other arrays than the quiet run")
        self.note(f"runs of {self.processes} processes that ended bit-identical")
        shutil.rmtree(workdir)

    def wait(self, group: Group, seconds: float, until: Callable[[], Any] = lambda: None) -> None:
        """Returns when a process has ended, the time is up, or something has come true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and all(p.poll() is None for p in group) and not until():
            time.sleep(0.005)

    def kill(self, workdir: Path) -> None:
        moment = self.rng.choice(("at the start", "between saves", "in a save", "in a save"))
        group, seconds = self.train(workdir.name), self.seconds[self.processes]
        if moment == "at the start":
            self.wait(group, self.rng.uniform(0, seconds))
        else:
            for _ in range(self.rng.choice((1, 1, 2))):
                self.wait(group, 600, functools.partial(newer, workdir, newest(workdir)))
            if moment == "in a save":
                self.wait(group, 60, lambda: list(workdir.glob("checkpoints/*tmp*")))
                self.wait(group, self.rng.uniform(0, 0.5))
            else:
                self.wait(group, self.rng.uniform(0, 4))
        self.end(group, workdir, moment)

    def end(self, group: Group, workdir: Path, moment: str) -> None:
        """Kills one process; the others must end by themselves, and leave the newest checkpoint whole."""
        before, chosen = newest(workdir), self.rng.randrange(len(group))
        alive = all(process.poll() is None for process in group)
        group[chosen].kill()
        codes = [process.wait(timeout=600) for process in group]
        if alive and codes[chosen] == -9:
            what = f"killed {moment}" if len(group) == 1 else f"killed {moment}, process {chosen} of {len(group)}"
            self.note(what)
            others = codes[:chosen] + codes[chosen + 1 :]
            if not set(others) <= ENDED | {0}:
                self.lose(f"after {what} the others ended with {others}")
        else:
            self.expect(group, {0})
        if newest(workdir) < before:
            self.lose(f"step {before} of {workdir} is gone")
        if step := newest(workdir):
            fault = find_damage(workdir / "checkpoints" / str(step), (), f"checkpoint of step {step}", sums=XXH128)
            if fault:
                self.lose(f"step {step} of {workdir} {fault}")

    def starve(self, workdir: Path) -> None:
        """No file may exceed 200 kB: events and history can be written, arrays cannot."""
        group = self.train(workdir.name, limit=200_000)
        codes = sorted(process.wait(timeout=1800) for process in group)
        self.note(f"no room: exit codes {codes}")
        if 0 in codes and newest(workdir) < self.steps:
            self.lose("without room for a checkpoint the run ended with exit code 0")

    def second(self, workdir: Path) -> None:
        first = self.train(workdir.name)
        self.wait(first, 600, functools.partial(owns, workdir, first[0].pid))
        if first[0].poll() is None:
            other = self.train(workdir.name)
            self.wait([other[0]], 120)
            if first[0].poll() is None and other[0].poll() is not None:
                self.expect(other[:1], {5})
                self.note("second run refused")
            for process in other:
                process.kill()
                process.wait()
        self.end(first, workdir, "beside a second run")

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
        self.note(f"damage: {kind}")
        group = self.train(workdir.name)
        self.wait(group, 600, lambda: list(workdir.glob(f"checkpoints/{steps[-1].name}.damaged*")))
        if not list(workdir.glob(f"checkpoints/{steps[-1].name}.damaged*")):
            self.lose(f"the damage of {path} went unnoticed")
        self.end(group, workdir, "after damage")

    def killed_until_done(self, command: str, name: str) -> None:
        """A command that makes a folder: killed at random times, each later, until it ends; then the same files."""
        quiet, (arguments, folder) = self.quiet_files(command), self.commands(name)[command]
        wait = 2.0
        while True:
            there = folder.exists()
            (process,) = group = self.start(command, *arguments)
            self.wait(group, wait * self.rng.uniform(0.5, 1.5))
            if process.poll() is None:
                process.kill()
                process.wait()
                self.note(f"killed in {command}")
                wait *= 1.25
            elif process.returncode == 0 or (there and process.returncode == 2):
                break  # done, or done before it was killed
            else:
                self.lose(f"{command} ended with {process.returncode}")
        if contents(folder) != quiet:
            self.lose(f"{folder} has other files than the quiet one")
        self.note(f"{command}s that ended with the same files")

    def commands(self, name: str) -> dict[str, tuple[list[Any], Path]]:
        """Arguments of the commands that make folders, and what they make, in a place of that name."""
        place, teacher = self.folder / name, "dollar_jax/assets/moving_shapes"
        return {
            "export": ([f"--workdir={self.folder / 'quiet1'}", place / "exported"], place / "exported"),
            "import": ([Path(__file__).parents[1] / teacher, place / "imported"], place / "imported"),
            "prepare": (
                [f"--source={self.folder / 'videos'}", f"--out={place / 'prepared'}", "--shard_size=4"],
                place / "prepared",
            ),
            "pretrain": (
                [f"--config={self.folder / 'config.py'}", f"--workdir={place / 'pretrained'}"],
                place / "pretrained" / "teacher",
            ),
        }


def newest(workdir: Path) -> int:
    return max((int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()), default=0)


def newer(workdir: Path, step: int) -> bool:
    return newest(workdir) > step


def owns(workdir: Path, process: int) -> bool:
    with contextlib.suppress(OSError):
        return f"process {process}," in (workdir / ".lock").read_text()
    return False


def contents(folder: Path) -> dict[str, str]:
    """Checksums of a folder's files, but of those that say when and how it was made, and of the arrays in Orbax's files
    (whose names are random)."""
    found = {k: v for k, v in checksums(folder).items() if k != "provenance.json" and "/params/" not in k}
    return found | {str(item.relative_to(folder)): arrays(item) for item in folder.glob("*/params/state")}


def arrays(item: Path) -> str:
    """The checksum of a saved tree's names, types, shapes and values."""
    reader, total = ocp.PyTreeCheckpointer(), hashlib.sha256()
    # As numpy: the devices that saved it may have been another number.
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(item).item_metadata.tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(reader.restore(item, restore_args=plain)):
        array = np.asarray(leaf)
        total.update(f"{path} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def digest(workdir: Path) -> str:
    """Of all arrays of the newest checkpoint."""
    step = workdir / "checkpoints" / str(newest(workdir))
    items = sorted(p for p in step.iterdir() if p.is_dir() and p.name != "data")
    return f"{step.name}: {[(item.name, arrays(item)) for item in items]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="of the runs, one after another")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    soak = Soak(flags.workdir.absolute(), flags.steps, flags.seed)
    soak.report |= {"minutes": flags.minutes}
    end, number, commands = time.monotonic() + 60 * flags.minutes, 0, list(soak.commands(""))
    while time.monotonic() < end:
        soak.disturbed(f"run{number}", flags.processes[number % len(flags.processes)], end)
        if time.monotonic() < end:
            soak.killed_until_done(commands[number % len(commands)], f"commands{number}")
        number += 1
    soak.note("ended")
    print((soak.folder / "soak.json").read_text())


if __name__ == "__main__":
    main()
