"""Two processes with a host reward: whether the devices have their next step before the one under way is done.

    python benchmarks/scorer_overlap.py [--reward_seconds=0.2] [--host_seconds=0.5] [--work=60]

Prints JSON: median seconds of a step alone, and of a round of step, scores and `host_seconds` of other work on the
host; `running` is the share of rounds in which the step was still under way when the scores of the one before were
taken in. Where taking them in waits for it, that is 0, and a round takes the sum of both."""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

LATENT, TEXT, ROWS = (1, 4, 4, 2), (2, 4), 4


def one_process(index: int, address: str, reward_seconds: float, host_seconds: float, work: int) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.distributed.initialize(address, 2, index)
    from dollar_jax import sharding
    from dollar_jax.config import MeshConfig, changed
    from dollar_jax.distillation import RewardSamples
    from dollar_jax.experiment import load
    from dollar_jax.rewards import Reward
    from dollar_jax.rewards.scorer import Scorer

    mesh = sharding.make_mesh(MeshConfig(1, -1, 1, 1))
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    config = changed(
        load("demo"),
        {
            "batch_size": ROWS,
            "reward.samples": ROWS,
            "reward.rewards": [{"name": "slow", "weight": 1.0, "folder": None}],
        },
    )

    def slow(frames: Any, prompts: Any) -> np.ndarray:
        time.sleep(reward_seconds)
        return np.asarray(frames).mean((1, 2, 3, 4))

    decoder = sharding.put(np.float32(1), whole)
    scorer = Scorer(config, [Reward(slow, "")], None, lambda p, x: p * x, decoder, [LATENT], TEXT)

    def step(x: jax.Array) -> tuple[jax.Array, RewardSamples]:
        y = jax.lax.fori_loop(0, work, lambda _, y: jnp.tanh(y @ y / 30), x)
        latent = jnp.broadcast_to(y.mean(), (ROWS, 1, *LATENT))
        none = jnp.full((ROWS, 1), jnp.nan)
        return y, RewardSamples(latent, none[..., None], none, jnp.ones((ROWS, 1)))

    jitted = jax.jit(step, in_shardings=(rows,), out_shardings=(rows, rows))
    x = sharding.put(np.random.default_rng(0).normal(size=(2, 700, 700)).astype(np.float32), rows)
    here = sharding.local_rows(rows, ROWS)
    batch = {"latent": np.zeros((len(here), *LATENT), np.float32), "text": np.zeros((len(here), *TEXT), np.float32)}
    alone, running, rounds = [], [], []
    for _ in range(4):
        begun = time.perf_counter()
        jax.block_until_ready(jitted(x))
        alone.append(time.perf_counter() - begun)
    for _ in range(9):
        begun = time.perf_counter()
        x, samples = jitted(x)
        scorer.collect()
        running.append(not x.is_ready())
        scorer.submit(samples, batch, ["a"] * len(here))
        time.sleep(host_seconds)
        rounds.append(time.perf_counter() - begun)
    scorer.collect()
    seconds = {"step_seconds": statistics.median(alone[1:]), "round_seconds": statistics.median(rounds[2:])}
    return {**seconds, "running": statistics.mean(running[2:])}


def measure(reward_seconds: float, host_seconds: float, work: int) -> dict[str, float]:
    """What process 0 of two has measured."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    words = [sys.executable, __file__, f"--address={address}", f"--work={work}"]
    words += [f"--reward_seconds={reward_seconds}", f"--host_seconds={host_seconds}"]
    group = [subprocess.Popen([*words, f"--index={i}"], env=env, stdout=subprocess.PIPE, text=True) for i in range(2)]
    shown = [process.communicate(timeout=600)[0] for process in group]
    if any(process.returncode for process in group):
        raise RuntimeError("a process failed; its message is above")
    return json.loads(shown[0].splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward_seconds", type=float, default=0.2)
    parser.add_argument("--host_seconds", type=float, default=0.5)
    parser.add_argument("--work", type=int, default=60)
    parser.add_argument("--index", type=int)
    parser.add_argument("--address")
    args = parser.parse_args()
    if args.index is None:
        print(json.dumps(measure(args.reward_seconds, args.host_seconds, args.work)))
    else:
        print(
            json.dumps(one_process(args.index, args.address, args.reward_seconds, args.host_seconds, args.work)),
            flush=True,
        )
