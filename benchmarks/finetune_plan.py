"""One step of plain fine-tuning of Wan 14B at 720 × 1280 × 81, planned where MaxDiffusion has published a time.

    pip install -e '.[plan]'
    python benchmarks/finetune_plan.py

MaxDiffusion reports 36.0 s a step and 135.9 TFLOP/s a chip for one video over the four chips of a v5p-8. The
step here is this package's transformer, forward and backward with Adam, at that setting: its denoising loss and
optimiser, compiled by the TPU's own compiler. No TPU runs; what is read off are memory, operations and the
three bounds of `dollar plan`, and with `--own_effort` what the compiler's own estimates of cycles add up to, beside
collectives and the attention kernels, of which it estimates nothing: both as in the last bound. The time that is
extrapolated takes the same share of the chips' peak as MaxDiffusion reaches (its model operations over its time) for
the operations of this program."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

from dollar_jax import sharding
from dollar_jax.config import MeshConfig
from dollar_jax.flops import count_flops
from dollar_jax.hlo import cost
from dollar_jax.plan.chips import Chip, chips
from dollar_jax.plan.links import bounds
from dollar_jax.plan.planner import GIB, LOW, OWN
from dollar_jax.program import Program
from dollar_jax.weights.families import PUBLISHED

TOPOLOGY, VIDEO, TEXT = "v5p:2x2x1", (81, 720, 1280), 512
PUBLISHED_SECONDS, PUBLISHED_TFLOPS = 36.0, 135.9  # of a step, of a chip
CLOCK = 1.75e9  # https://jax-ml.github.io/scaling-book/tpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remat", nargs="+", default=["full", "attention"])
    parser.add_argument("--own_effort", action="store_true", help="compile as a run does: adds up the cycles")
    parser.add_argument("--out", type=Path, help="where to write the table too")
    args = parser.parse_args()
    devices, chip = chips(TOPOLOGY)
    columns = (
        "remat",
        "argument, GiB",
        "temp, GiB",
        "of",
        "model, TFLOP",
        "compiled, TFLOP",
        "all hidden, s",
        "as scheduled, s",
        "nothing hidden, s",
        "MFU of these, %",
        "bound by",
        "at MaxDiffusion's share of the peak, s",
        "compiled in, s",
        *["by the compiler's cycles, s"] * args.own_effort,
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    print("\n".join(lines), flush=True)
    for remat in args.remat:
        lines.append(row(remat, devices, chip, args.own_effort))
        print(lines[-1], flush=True)
        if args.out is not None:
            args.out.write_text("\n".join(lines) + "\n")


def row(remat: str, devices: Sequence, chip: Chip, own_effort: bool = False) -> str:
    architecture = PUBLISHED["wan_14b"]
    config = dataclasses.replace(
        architecture.transformer,
        dtype="bfloat16",
        param_dtype="float32",
        remat=remat,
        scan_layers=True,
        attention="splash",
    )
    network = architecture.family.transformer.network(config)
    mesh = sharding.make_mesh(MeshConfig(1, 1, len(devices), 1), devices)
    optimiser = optax.adam(1e-5)

    def step(params, state, latent, noise, time, text):
        def loss(params):
            t = time[:, None, None, None, None] / 1000
            predicted = network.apply(params, (1 - t) * latent + t * noise, time, text)
            return jnp.mean(jnp.square(predicted - (noise - latent)))

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = jax.eval_shape(optimiser.init, network.shapes)
    latent = jax.ShapeDtypeStruct((1, *architecture.vae.latent_shape(*VIDEO)), jnp.float32)
    text = jax.ShapeDtypeStruct((1, TEXT, architecture.text_encoder.d_model), jnp.float32)
    arguments = (network.shapes, state, latent, latent, jax.ShapeDtypeStruct((1,), jnp.float32), text)
    whole = sharding.replicated(mesh)
    places = (sharding.shard(mesh, network.shapes), sharding.shard(mesh, state), whole, whole, whole, whole)
    program = Program("step", step, arguments, mesh, places, (*places[:2], whole), donate=(0, 1))
    begun = time.perf_counter()
    effort = {"exec_time_optimization_effort": OWN if own_effort else LOW}
    compiled = program.trace().lower().compile(compiler_options=effort)
    compiled_in = time.perf_counter() - begun
    memory, used = compiled.memory_analysis(), cost(compiled.as_text())
    # Once and unsharded, nothing computed twice.
    plain = dataclasses.replace(config, remat="none", attention="xla")
    network = architecture.family.transformer.network(plain)
    model = count_flops(jax.make_jaxpr(step)(*arguments).jaxpr) / len(devices)
    found = bounds(used, list(mesh.devices.flat), chip, model / 1e12)
    peaks = chip.tflops * 1e12, chip.memory_gbps * 1e9
    by_cycles = found["seconds"]["nothing hidden"] - used.seconds(*peaks) + used.seconds(*peaks, CLOCK)
    cells = (
        remat,
        f"{memory.argument_size_in_bytes / GIB:.1f}",
        f"{memory.temp_size_in_bytes / GIB:.1f}",
        f"{chip.hbm_gib:.1f}",
        f"{model / 1e12:.0f}",
        f"{used.flops / 1e12:.0f}",
        *(f"{seconds:.1f}" for seconds in found["seconds"].values()),
        "/".join(f"{100 * mfu:.0f}" for mfu in found["mfu"].values()),
        found["bound"],
        f"{model / 1e12 / PUBLISHED_TFLOPS:.1f}",
        f"{compiled_in:.0f}",
        *[f"{by_cycles:.1f}"] * own_effort,
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
