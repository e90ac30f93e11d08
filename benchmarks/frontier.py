"""What a saving costs: the quality of the demo's student by what its training took, and what saturates its colours.

    python benchmarks/frontier.py --out=runs/frontier.jsonl --seeds 0 1 2
    python benchmarks/frontier.py --out=runs/frontier.jsonl --seeds 0 --only teacher demo half

Each of SETTINGS and each seed trains the student of configs/demo.py without a reward, whose colours would show it, on
batches of 8, and draws the demo's 120 videos in 4 steps and in 1; the teacher draws them in 50. A line of --out is what
came of one; what has its line is not run again. F are forwards of the transformer per video and update, as `dollar
plan` counts them. The table is printed at the end, mean ± deviation over the seeds; `vivid` is the share of coloured
pixels that are bright and saturated. Students whose `student.layers` is given are drawn in turns with the teacher:
`speed` is the ratio of its diffusion to their one step's, with `taskset -c 0` that of one thread."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dollar_jax.cli.base import prepare_jax
from dollar_jax.config import DistillConfig, changed
from dollar_jax.data.latents import load_data
from dollar_jax.evaluate.features import vae_features
from dollar_jax.evaluate.measure import default_plan, draw_in_turns, measure, real_features, samplers, speedups
from dollar_jax.experiment import load
from dollar_jax.generate import BoundSampler, Generator, make_generator
from dollar_jax.models.layers import keep_blocks
from dollar_jax.plan.training import forwards
from dollar_jax.reproduce import WITH_ADAM
from dollar_jax.rewards import load_rewards, weighted_sum
from dollar_jax.train import train

DEMO, BACKWARD = {"batch_size": 32}, {"student.input": "backward"}
OWN = DEMO | {"vsd.guidance_weight": 0.3}
GROUP, ROLLOUT = {"student.timestep_per": "micro_batch"}, {"fake_score.samples": "rollout"}
EVERY = {"consistency.every": 2}
GRID = {"consistency.times": "grid", "consistency.skip": 5, "consistency.boundary": "lcm"}
FASTGEN = {"fake_score.updates": 4, "student.sampler": "ode", "gan.weight": 0.03}
FASTVIDEO = BACKWARD | {"fake_score.updates": 5, "student.ema_start": 50}
RCM = BACKWARD | GRID | {"consistency.skip": 1, "consistency.weight": 1.0, "vsd.weight": 0.01, "fake_score.updates": 4}
FAST = {"student.optimiser.learning_rate": 1.2e-3, "fake_score.optimiser.learning_rate": 2.4e-3}
MUON = {"student.optimiser.name": "muon"}
SHORT = {"steps": 120, "fake_score.samples": "student", "student.optimiser.learning_rate": 7e-4}
LONG = {"student.layers": 2, "batch_size": 16, "student.optimiser.learning_rate": 2e-3}
# Name: the losses, what is changed of the demo, and what the table calls it.
SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "demo": ("vsd+cd", {}, "forward input, all new, as the demo"),
    "unguided": ("vsd+cd", {"vsd.guidance_weight": 0.0}, "`vsd.guidance_weight=0`"),
    "updates_5": ("vsd+cd", {"fake_score.updates": 5}, "`fake_score.updates=5`"),
    "half": ("vsd+cd", {"steps": 100}, "half the updates"),
    "cd": ("cd", {}, "CD alone"),
    "vsd": ("vsd", {}, "VSD alone"),
    "cheap": ("vsd+cd", BACKWARD | GROUP | ROLLOUT | EVERY, "backward, all three savings"),
    "backward": ("vsd+cd", BACKWARD, "backward input, all new"),
    "noisier": ("vsd+cd", {"vsd.guidance_time": "noisier"}, "`vsd.guidance_time=noisier`"),
    "half_guided": ("vsd+cd", {"vsd.guidance_weight": 0.5}, "`vsd.guidance_weight=0.5`"),
    "fastgen": ("vsd", FASTGEN, "like FastGen's DMD2: VSD and GAN, forward, 4 fake updates, ODE"),
    "fastvideo": ("vsd", FASTVIDEO, "like FastVideo's DMD: VSD, backward, 5 fake updates, late average"),
    "rcm": ("vsd+cd", RCM, "like rCM: CD between neighbours of 50 steps, 0.01 VSD, backward, 4 fake updates"),
    "real": ("vsd+cd", BACKWARD | GROUP | ROLLOUT | EVERY | GRID | {"fake_score.updates": 5}, "as the real teachers"),
    "own": ("vsd+cd", {"fake_score.samples": "student"}, "forward, `fake_score.samples=student`"),
    "group": ("vsd+cd", BACKWARD | GROUP, "backward, `student.timestep_per=micro_batch`"),
    "rollout": ("vsd+cd", BACKWARD | ROLLOUT, "backward, `fake_score.samples=rollout`"),
    "both": ("vsd+cd", BACKWARD | GROUP | ROLLOUT, "backward, both"),
    "every_2": ("vsd+cd", EVERY, "forward, `consistency.every=2`"),
    "batch_32": ("vsd+cd", DEMO, "the first, on the demo's batches of 32"),
    "batch_32_half": ("vsd+cd", DEMO | {"vsd.guidance_weight": 0.5}, "the same, `vsd.guidance_weight=0.5`"),
    "batch_32_own": ("vsd+cd", OWN, "the same, `vsd.guidance_weight=0.3`"),
    "batch_32_short": (
        "vsd+cd",
        OWN | {"steps": 160, "fake_score.samples": "student"},
        "the same, and 160 updates, `fake_score.samples=student`",
    ),
    "batch_32_muon": ("vsd+cd", OWN | MUON | SHORT, "the same, 120 updates by Muon"),
    "batch_32_one": (
        "vsd+cd",
        OWN | MUON | SHORT | {"fake_score.updates": 1},
        "the same, one fake-score update for two: the demo's own",
    ),
    "batch_32_quarter": ("vsd+cd", DEMO | {"vsd.guidance_weight": 0.25}, "the same, `vsd.guidance_weight=0.25`"),
    "layers_4": ("vsd+cd", OWN | {"student.layers": 4}, "200 updates of 32 by Adam, `student.layers=4`"),
    "layers_3": ("vsd+cd", OWN | {"student.layers": 3}, "200 updates of 32 by Adam, `student.layers=3`"),
    "layers_2": ("vsd+cd", OWN | {"student.layers": 2}, "200 updates of 32 by Adam, `student.layers=2`"),
    "layers_2_fast": ("vsd+cd", OWN | {"student.layers": 2} | FAST, "2 layers, four times the learning rates"),
    "layers_2_cd": ("cd", LONG | {"steps": 600}, "2 layers, CD alone, 600 updates of 16"),
    "layers_2_long": (
        "cd",
        LONG | {"steps": 2000, "consistency.skip": 1},
        "the same, 2,000 updates, `consistency.skip=1`",
    ),
    "layers_2_muon": (
        "cd",
        LONG | MUON | {"steps": 2000, "consistency.skip": 1, "student.optimiser.learning_rate": 3e-3},
        "the same by Muon, rate 3e-3",
    ),
    "layers_2_muon_long": (
        "cd",
        LONG | MUON | {"steps": 4000, "consistency.skip": 1, "student.optimiser.learning_rate": 4e-3},
        "the same, 4,000 updates, rate 4e-3",
    ),
}


def settings(name: str, seed: int, quick: bool) -> DistillConfig:
    losses, changes, _ = SETTINGS.get(name, ("vsd+cd", {}, ""))
    common = WITH_ADAM | {"seed": seed, "batch_size": 8, "vsd.guidance_weight": 1.0, "visibility.samples_every": 0}
    config = changed(load("demo", losses), common | changes)
    return changed(config, {"steps": 2, "batch_size": 8, "data.train_videos": 32}) if quick else config


class Lab:
    """What all runs share: the teacher, the encoded data, the features of real clips."""

    def __init__(self, folder: Path, quick: bool):
        demo = load("demo")
        self.folder, self.quick, self.generator = folder, quick, make_generator(demo, hold_vae=True)
        self.vivid = weighted_sum(demo.reward.rewards, load_rewards(demo.reward.rewards))
        self.features = vae_features(self.generator)
        self.reference = functools.cache(functools.partial(real_features, self.features, quick))

    def run(self, name: str, config: DistillConfig) -> dict[str, Any]:
        """What the teacher, or a student just trained, draws: per sampler its measures, `reward` the vivid share."""
        generator = dataclasses.replace(self.generator, student=config.student)
        begun, student, cost = time.perf_counter(), None, {}
        if name != "teacher":
            with tempfile.TemporaryDirectory() as run:
                state = train(config, Path(run), generator, load_data(config, generator, self.folder))
            blocks = generator.pipeline.transformer.config.num_layers
            cost = {"videos": config.steps * config.batch_size, "forwards": forwards(config, blocks)}
            student = state.ema
            cost["seconds"] = time.perf_counter() - begun
        rows = samplers(generator, student, config.student.timesteps)
        wanted = ["teacher_50"] * (student is None or config.student.layers is not None)
        wanted += [] if student is None else ["student_4", "student_1"]
        rows = {key: rows[key] for key in wanted}
        plan = default_plan(config.seed, self.quick)
        table, _ = measure(generator, rows, plan, self.vivid, self.features, self.reference())
        return cost | table


def speed(generator: Generator, rounds: int) -> str:
    """How many times the teacher's diffusion takes one step's of a student of so many of its blocks, drawn in turns."""
    rows = {"teacher_50": samplers(generator, None, ())["teacher_50"]}
    for count in (4, 3, 2, 1):
        params = keep_blocks(generator.pipeline.params, count)
        # Of so many blocks, so that it is compiled before it is timed.
        own = dataclasses.replace(generator, student=dataclasses.replace(generator.student, layers=count))
        rows[f"student_{count}"] = BoundSampler(own.student_sampler((1000.0,)), params, 1)
    _, seconds = draw_in_turns(generator, rows, default_plan(0).prompts[:24], 24, 0, rounds)
    medians = {name: {"diffusion_seconds": np.median(times["diffusion"])} for name, times in seconds.items()}
    found = speedups(medians, "teacher_50")
    return "\n".join(f"{name.removeprefix('speedup_')} blocks, one step: ×{ratio:.0f}" for name, ratio in found.items())


def table(lines: list[dict[str, Any]]) -> str:
    """Of the finished runs, as Markdown."""
    steps = {"4": ("alignment", "vendi", "frechet", "reward"), "1": ("alignment", "vendi", "frechet")}
    names = {"frechet": "Fréchet", "reward": "vivid", "vendi": "Vendi"}
    heads = [f"{names.get(what, what)}, {n}" for n, measures in steps.items() for what in measures]
    rows = [f"| setting | F | F, total | {' | '.join(heads)} | speed, 1 | seeds |", "|---" * (len(heads) + 5) + "|"]
    for name in ("teacher", *SETTINGS):
        found = [line for line in lines if line["setting"] == name]
        if not found:
            continue
        f = sum(found[0].get("forwards", {}).values())
        cells = [SETTINGS[name][2], f"{f:.4g}", f"{f * found[0]['videos']:,.0f}"] if f else ["the teacher", "", ""]
        for n, measures in steps.items():
            key = "teacher_50" if name == "teacher" and n == "4" else f"student_{n}"
            for what in measures:
                values = [line[key][what] for line in found if key in line]
                spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.3f}{spread}" if values else "")
        speeds = [
            speedups(line, "teacher_50")["speedup_1"] for line in found if {"teacher_50", "student_1"} <= line.keys()
        ]
        cells.append(f"×{np.mean(speeds):.0f}" if speeds else "")
        rows.append(f"| {' | '.join(cells)} | {len(found)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each finished run; is gone on with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=["teacher", *SETTINGS], default=["teacher", *SETTINGS])
    parser.add_argument("--quick", action="store_true", help="two steps each, to see that it runs")
    parser.add_argument("--speed", type=int, help="so many rounds of one step's speed by the student's blocks alone")
    args = parser.parse_args()
    prepare_jax()
    if args.speed:
        print(speed(make_generator(load("demo"), hold_vae=True), args.speed))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    lab = Lab(args.out.parent, args.quick)
    for name, seed in [(name, seed) for seed in args.seeds for name in args.only]:
        config = settings(name, seed, args.quick)
        made = {"setting": name, "seed": seed, "config": json.loads(json.dumps(dataclasses.asdict(config)))}
        if any(line.items() >= made.items() for line in lines):
            continue
        lines.append(made | lab.run(name, config))
        with args.out.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
