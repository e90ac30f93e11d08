"""A newcomer's clock: seconds until a command answers, by the wall's and by the processor's, the best of several tries.

    python benchmarks/first_impressions.py [--tries=3] [--run=RUN]

Prints JSON: `--help`, `vbench-score`, the demo's first line, its first step from an empty compilation cache and from a
full one, and with a run of `dollar demo` a sample of it, all compiled. On a machine that others use too, the
processor's seconds say more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def clock(arguments: list[str], cache: Path, until: str | None = None) -> tuple[float, float]:
    """Seconds until the output holds a text, or the command ends; raises RuntimeError if it never does."""
    command = [sys.executable, "-m", "dollar_jax", *arguments]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    begun, said = time.perf_counter(), b""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)
    assert process.stdout is not None
    while part := os.read(process.stdout.fileno(), 2**16):
        said += part
        if until and until.encode() in said:
            wall, fields = time.perf_counter() - begun, Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1]
            process.kill()
            process.wait()
            return wall, sum(map(int, fields.split()[11:13])) / TICK
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if until or process.returncode:
        raise RuntimeError(f"{' '.join(command)} said no {until!r}: {said.decode()[-500:]}")
    return time.perf_counter() - begun, used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--run", help="the folder of a run of `dollar demo`, to sample from")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "scores.json").write_text('{"subject_consistency": 0.9}')

        def demo(i: int) -> list[str]:
            return ["demo", "--quick", f"--workdir={folder / str(i)}"]

        cases = {
            "help": lambda i: (["--help"], folder),
            "vbench_score": lambda i: (["vbench-score", str(folder / "scores.json"), "--allow_missing"], folder),
            "demo_first_line": lambda i: (demo(i), folder / f"cache{i}", "\n"),
            "demo_first_step": lambda i: (demo(i), folder / f"cache{i}", "step 1: loss"),
            "demo_first_step_warm": lambda i: (demo(given.tries + i), folder / "cache0", "step 1: loss"),
        }
        if given.run:
            prompt, out = "--prompt=a large red circle moving left slowly", f"--out={folder / 'sample.mp4'}"
            sample = ["sample", f"--workdir={given.run}", prompt, out], folder / "warm"
            clock(*sample)
            cases["sample_warm"] = lambda i: sample
        found = {}
        for case, arguments in cases.items():
            tries = [clock(*arguments(i)) for i in range(given.tries)]
            found[case] = dict(
                zip(("wall", "cpu"), (round(min(times), 2) for times in zip(*tries, strict=True)), strict=True)
            )
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
