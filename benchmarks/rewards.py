"""Three ways for a reward to reach the student, side by side: latent reward model, DDPO, direct gradient.

    python benchmarks/rewards.py --workdir=runs/rewards --seconds=300

One student of the default domain is distilled without a reward. From it each way goes on for the same
wall-clock time, compilation excluded, with one differentiable and two black-box rewards, on the same data and
seed; direct gradient needs the first. The table, WORKDIR/rewards.md, says of each: the true reward and
the alignment of its four-step samples, their Vendi score, the correlation of latent and true reward on
fresh samples, steps, seconds per step, and what the compiled step needs besides its arguments."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
from pathlib import Path
from typing import Any

import jax

from dollar_jax.config import DistillConfig, RewardTerm, changed
from dollar_jax.data.latents import load_data
from dollar_jax.evaluate.measure import BoundSampler, default_plan, measure
from dollar_jax.experiment import load
from dollar_jax.generate import make_generator, subset
from dollar_jax.programs import teacher_programs
from dollar_jax.reproduce import WITH_ADAM
from dollar_jax.rewards import load_rewards, weighted_sum
from dollar_jax.rewards.pixels import pixel_rewards
from dollar_jax.run import read_history, restore_student
from dollar_jax.train import train

REWARDS = {"vividness": "differentiable", "vivid": "black box", "compressibility": "black box"}
METHODS = ("lrm", "ddpo", "direct")
PROBE = 12  # steps from which the time of a step is taken, after the first few
COLUMNS = ("reward", "alignment", "vendi", "correlation", "steps", "s/step", "GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300, help="of training per way")
    parser.add_argument("--base-steps", type=int, default=200, help="of distillation before")
    parser.add_argument("--videos", type=int, default=1024, help="training videos")
    parser.add_argument("--weight", type=float, default=0.03, help="of the reward, in standard deviations")
    parser.add_argument("--quick", action="store_true", help="measure on fewer videos")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args()
    cache = args.workdir / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache.absolute()))

    base_dir = args.workdir / "base"
    base = make_config(args.videos, args.base_steps)
    generator = make_generator(base)
    train(base, base_dir, generator, load_data(base, generator, base_dir))
    rows = [f"| reward | way | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for name, kind in REWARDS.items():
        plan = default_plan(base.seed, args.quick)
        reward = weighted_sum([RewardTerm(name, 1.0, None)], load_rewards([RewardTerm(name, 1.0, None)]))
        draw = generator.student_sampler(subset(base.student.timesteps, 4))
        weight = base.sampling.guidance_weight
        teacher = generator.teacher_sampler(base.sampling.num_steps, weight)
        before = {
            f"teacher, {base.sampling.num_steps} steps": BoundSampler(
                teacher, generator.pipeline.transformer.params, 2 * base.sampling.num_steps
            ),
            "before": BoundSampler(draw, restore_student(base_dir, generator), 4),
        }
        for way, measured in measure(generator, before, plan, reward)[0].items():
            rows.append(row(name, kind, way, measured))
        for method in args.methods:
            if method == "direct" and kind == "black box":
                rows.append(row(name, kind, method, {}))
                continue
            config = with_reward(base, base_dir, name, method, args.weight)
            folder = args.workdir / f"{name}_{method}"
            seconds, gib = probe(config, folder, generator)
            config = dataclasses.replace(config, steps=max(2, round(args.seconds / seconds)))
            train(config, folder, generator, load_data(config, generator, base_dir))
            drawn = {method: BoundSampler(draw, restore_student(folder, generator), 4)}
            measured: dict[str, Any] = dict(measure(generator, drawn, plan, reward)[0][method])
            lines = [line for line in read_history(folder) if "reward_fresh_correlation" in line]
            if lines:
                measured["correlation"] = lines[-1]["reward_fresh_correlation"]
            measured |= {"steps": config.steps, "s/step": seconds, "GiB": gib}
            rows.append(row(name, kind, method, measured))
            (args.workdir / "rewards.md").write_text("\n".join(rows) + "\n")
            gc.collect()
    (args.workdir / "rewards.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


def make_config(videos: int, steps: int) -> DistillConfig:
    """The default experiment without a reward."""
    changes = {"steps": steps, "data.train_videos": videos, "log_every": 1}
    return changed(load("demo", "vsd+cd"), WITH_ADAM | changes)


def with_reward(base: DistillConfig, start: Path, name: str, method: Any, weight: float) -> DistillConfig:
    """The same experiment going on from the distilled student, with a reward from the first step.

    Of one student's samples, which differ little in their reward, the latent reward model has to see
    thousands: see docs/rewards.md."""
    reward = dataclasses.replace(
        base.reward,
        rewards=(RewardTerm(name, 1.0, None),),
        method=method,
        weight=weight,
        start_step=0,
        samples=32,
        replay=8192,
        batch_size=64,
        updates=16,
        head=dataclasses.replace(base.reward.head, second_stride=1),
    )
    return dataclasses.replace(base, init=str(start), reward=reward)


def probe(config: DistillConfig, folder: Path, generator: Any) -> tuple[float, float]:
    """Seconds per step, and GiB of the compiled step's temporaries; kept in a file for when it resumes."""
    kept = folder.with_suffix(".probe.json")
    if not kept.exists():
        scratch = folder.with_name(folder.name + "_probe")
        config = dataclasses.replace(config, steps=PROBE)
        train(config, scratch, generator, load_data(config, generator, Path(config.init or "")))
        times = [line["seconds_per_step"] for line in read_history(scratch)][4:]
        pixels = pixel_rewards(config.reward, load_rewards(config.reward.rewards), generator.frames)
        programs = teacher_programs(config, generator, pixels)
        compiled = programs.step.trace().lower().compile()
        gib = compiled.memory_analysis().temp_size_in_bytes / 2**30
        kept.write_text(json.dumps({"seconds": statistics.median(times), "gib": gib}))
    found = json.loads(kept.read_text())
    return found["seconds"], found["gib"]


def row(name: str, kind: str, way: str, measured: dict[str, Any]) -> str:
    cells = [f"{measured[c]:.3g}" if c in measured else "n/a" for c in COLUMNS]
    return f"| {name} ({kind}) | {way} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
