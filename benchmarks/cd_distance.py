"""What share of the student's gradient is consistency distillation's, by its distance, while a student learns.

    python benchmarks/cd_distance.py --workdir=runs/cd_distance

The default domain is distilled by VSD + CD, once with each distance of TRAINED. At some of its steps the norms of the
gradients in the student's parameters are taken of L_VSD and, for each distance of DISTANCES, of β_CD L_CD on the same
rows: once with the demo's own settings of CD, once with those of the real teachers (five steps of a grid of 50). The
table, WORKDIR/cd_distance.md, has ‖β_CD ∇L_CD‖ / ‖∇L_VSD‖ and the root mean square of f_θ - f_θ⁻."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dollar_jax import objectives
from dollar_jax.config import changed
from dollar_jax.data.latents import load_data
from dollar_jax.distillation import Batch, Distillation, Frozen, References
from dollar_jax.experiment import load
from dollar_jax.generate import make_generator
from dollar_jax.programs import teacher_programs
from dollar_jax.reproduce import WITH_ADAM

TRAINED = {"pseudo_huber": 1e-3, "mse": 1.0}
DISTANCES = {
    "mse": lambda d: 2 * d,
    "pseudo-Huber, c = 0.001": lambda d: d / jnp.sqrt(d**2 + 1e-6),
    "pseudo-Huber, c = 0.1": lambda d: d / jnp.sqrt(d**2 + 0.01),
    "pseudo-Huber, c = 1": lambda d: d / jnp.sqrt(d**2 + 1.0),
    "pseudo-Huber, c = rms": lambda d: d / jnp.sqrt(d**2 + jnp.mean(d**2)),
}
REAL = {"consistency.times": "grid", "consistency.skip": 5, "consistency.num_steps": 50, "consistency.boundary": "lcm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--at", type=int, nargs="+", default=[0, 5, 20, 60])
    args = parser.parse_args()
    rows = [
        "| trained with | CD as in | step | rms | " + " | ".join(DISTANCES) + " |",
        "|---" * (4 + len(DISTANCES)) + "|",
    ]
    args.workdir.mkdir(parents=True, exist_ok=True)
    for distance, c in TRAINED.items():
        changes = {"consistency.distance": distance, "consistency.huber_c": c, "batch_size": args.batch}
        changes |= {"vsd.guidance_weight": 1.0, "data.train_videos": 256, "visibility.samples_every": 0}
        config = changed(load("demo", "vsd+cd"), WITH_ADAM | changes)
        generator = make_generator(config)
        programs = teacher_programs(config, generator, None)
        frozen = Frozen(generator.pipeline.transformer.params, jnp.asarray(generator.null_text))
        state = programs.init(jax.random.key(0), frozen.teacher)
        data = load_data(config, generator, args.workdir)
        data = data() if callable(data) else data
        batches = data.batches(config, np.arange(args.batch), vars(programs.batch_sharding))
        kinds = {"the demo": programs.distillation}
        real = Distillation(changed(config, REAL), programs.distillation.networks, programs.distillation.schedule)
        kinds["the real teachers'"] = real
        look = {name: jax.jit(lambda *given, d=d: shares(d, *given)) for name, d in kinds.items()}
        for step in range(max(args.at) + 1):
            on_device = next(batches)["on_device"]
            batch = Batch(on_device["latent"], on_device["text"])
            for name in kinds if step in args.at else ():
                rms, ratios = look[name](state, frozen, batch, jax.random.key(step))
                cells = " | ".join(f"{x:.2f}" for x in ratios.tolist())
                rows.append(f"| {distance} | {name} | {step} | {float(rms):.3f} | {cells} |")
                print(rows[-1], flush=True)
            if step < max(args.at):
                state, _, _ = programs.step(state, frozen, batch)
        (args.workdir / "cd_distance.md").write_text("\n".join(rows) + "\n")


def shares(d: Distillation, state, frozen: Frozen, batch: Batch, key) -> tuple[jax.Array, jax.Array]:
    """The root mean square of f_θ - f_θ⁻, and the ratio of the gradients' norms for each of DISTANCES."""
    keys, c = jax.random.split(key, 3), d.config
    kept = state.ema, state.fake_score, state.latent_reward, state.reward_statistics
    references = References(*kept, frozen, state.step)

    def back_from(x_t, t):
        return jax.vjp(lambda p: d.denoiser(p, batch.text).x0(x_t, t), state.student)

    x_t, t, _ = objectives.student_input(d, state.student, batch, keys[0])
    generated, back = back_from(x_t, t)
    slope = jax.grad(lambda x: objectives.vsd(d, references, x, t, batch.text, keys[1]).mean())(generated)
    vsd = optax.tree.norm(back(slope)[0])
    x_t, times = objectives.consistency_input(d, batch.latent, keys[2])
    prediction, back = back_from(x_t, times[0])
    plain = Distillation(changed(c, {"consistency.distance": "mse"}), d.networks, d.schedule)
    squares = jax.grad(lambda x: objectives.consistency(plain, references, x, x_t, times, batch.text).mean())(
        prediction
    )
    error = squares * squares.size / 2  # f is x̂0 to 1e-6 at these times, whatever the boundary scalings
    slopes = jnp.stack([g(error) / error.size for g in DISTANCES.values()])
    norms = jax.lax.map(lambda g: optax.tree.norm(back(g)[0]), slopes)
    return jnp.sqrt(jnp.mean(error**2)), c.consistency.weight * norms / (c.vsd.weight * vsd)


if __name__ == "__main__":
    main()
