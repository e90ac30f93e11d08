"""A reward that is hacked, with the guard off and on: the failure that DOLLAR itself shows with motion.

    python benchmarks/rewards.py --workdir=runs/rewards     # distils the student that this goes on from
    python benchmarks/hacking.py --workdir=runs/rewards

The latent reward model is given a large weight on `motion`, the length of the optical flow, which noise raises
as well as movement does; `smoothness` is held out. Once the run goes on whatever happens, once
config.reward.guard stops it when the held-out reward has fallen by `--max-fall` of its deviations. The table,
WORKDIR/hacking.md, has the reward of four-step samples, their net change, what the verifier reads in them, and
the step reached; WORKDIR/hacking.png has their frames."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from rewards import make_config

from dollar_jax.config import RewardTerm
from dollar_jax.data.latents import load_data
from dollar_jax.evaluate.measure import BoundSampler, default_plan, measure
from dollar_jax.generate import make_generator, subset
from dollar_jax.rewards import load_rewards, weighted_sum
from dollar_jax.run import read_history, restore_student
from dollar_jax.train import train

COLUMNS = ("steps", "reward", "net_change", "flicker", "alignment", "vendi")
TRAINED = RewardTerm("motion", 1.0, None)
HELD_OUT = RewardTerm("smoothness", 0.0, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--base-steps", type=int, default=200, help="as of benchmarks/rewards.py")
    parser.add_argument("--videos", type=int, default=1024, help="as of benchmarks/rewards.py")
    parser.add_argument("--weight", type=float, default=3.0, help="of the reward, in standard deviations")
    parser.add_argument("--max-fall", type=float, default=1.0, help="of the held-out reward, in deviations")
    parser.add_argument("--quick", action="store_true", help="measure on fewer videos")
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str((args.workdir / "compiled").absolute()))

    base_dir = args.workdir / "base"
    base = make_config(args.videos, args.base_steps)
    generator = make_generator(base)
    train(base, base_dir, generator, load_data(base, generator, base_dir))
    plan = default_plan(base.seed, args.quick)
    reward = weighted_sum([TRAINED], load_rewards([TRAINED]))
    draw = generator.student_sampler(subset(base.student.timesteps, 4))
    rows: dict[str, dict[str, Any]] = {}
    strips: list[np.ndarray] = []

    def look(name: str, folder: Path, steps: int) -> None:
        drawn = {name: BoundSampler(draw, restore_student(folder, generator), 4)}
        table, videos = measure(generator, drawn, plan, reward)
        rows[name] = {**table[name], "steps": steps}
        strips.append(np.concatenate([np.concatenate(list(v[::4]), 1) for v in videos[name][:3]], 1))

    look("before", base_dir, 0)
    for name, fall in (("guard off", None), ("guard on", args.max_fall)):
        guard = dataclasses.replace(base.reward.guard, max_fall=fall)
        settings = dataclasses.replace(
            base.reward,
            rewards=(TRAINED, HELD_OUT),
            weight=args.weight,
            start_step=0,
            guard=guard,
            samples=16,
            replay=4096,
            batch_size=64,
            updates=4,
            # One latent frame says little of motion: see docs/rewards.md.
            head=dataclasses.replace(base.reward.head, temporal_kernel=3),
        )
        config = dataclasses.replace(base, init=str(base_dir), steps=args.steps, reward=settings)
        folder = args.workdir / f"hacking_{name.replace(' ', '_')}"
        train(config, folder, generator, load_data(config, generator, base_dir))
        look(name, folder, int(read_history(folder)[-1]["step"]))
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[c]:.3g}' for c in COLUMNS)} |" for name, row in rows.items()]
    (args.workdir / "hacking.md").write_text("\n".join(lines) + "\n")
    image = np.concatenate(strips).repeat(3, 0).repeat(3, 1)
    Image.fromarray(image).save(args.workdir / "hacking.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
