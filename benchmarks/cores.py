"""What more cores of a CPU gain a network: all of a batch as one program, and parts of it beside each other.

    python benchmarks/cores.py                                # the shipped teacher on 24 clips, forward and gradient
    JAX_NUM_CPU_DEVICES=2 python benchmarks/cores.py          # parts as a virtual device's each, gradients summed

XLA shares every product and loop of a program among the cores and waits for each. Parts in threads of their own have
programs of their own, whose gradients are not summed here. Medians of calls in turns, in milliseconds."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from dollar_jax.cli.base import prepare_jax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24, help="clips, a multiple of the cores")
    parser.add_argument("--seconds", type=float, default=10, help="for each of forward and gradient")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    prepare_jax()
    import jax
    import jax.numpy as jnp

    from dollar_jax import sharding
    from dollar_jax.config import MeshConfig
    from dollar_jax.experiment import load
    from dollar_jax.generate import beside, make_generator
    from dollar_jax.program import Program

    cores = sharding.cores(jax.devices()[:1])
    if args.rows % cores:
        parser.error(f"--rows={args.rows} is no multiple of {cores} cores")
    mesh = sharding.make_mesh(MeshConfig(-1, 1, 1, 1), jax.devices())
    whole, rows = sharding.replicated(mesh), sharding.row_sharding(mesh, args.rows)
    generator = make_generator(load("demo"), mesh=mesh)
    network = generator.pipeline.transformer.network
    params = sharding.put(generator.pipeline.transformer.params, whole)
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (args.rows, *generator.latent_shape))
    text = jax.random.normal(keys[1], (args.rows, *generator.text_shape))
    inputs = sharding.put((x, jnp.full((args.rows,), 500.0), text), rows)
    parts = list(zip(*(jnp.split(value, cores) for value in inputs), strict=True))

    def loss(params: Any, *inputs: Any) -> Any:
        return jnp.square(network.apply(params, *inputs)).mean()

    for name, function in {"forward": network.apply, "gradient": jax.grad(loss)}.items():
        program = Program(name, function, mesh=mesh, in_shardings=(whole, rows, rows, rows))

        def run(inputs: Any, program: Program = program) -> Any:
            return jax.block_until_ready(program(params, *inputs))

        runs: dict[str, Callable[[], Any]] = {"all": lambda run=run: run(inputs)}
        if mesh.size == 1 < cores:
            runs[f"{cores} parts beside each other"] = lambda run=run: list(beside.map(run, parts))
        for call in runs.values():
            call()  # compiles
        taken: dict[str, list[float]] = {way: [] for way in runs}
        end = time.perf_counter() + args.seconds
        while time.perf_counter() < end or len(taken["all"]) < 3:
            for way, call in runs.items():
                begun = time.perf_counter()
                call()
                taken[way].append(time.perf_counter() - begun)
        found = ", ".join(f"{way} {1e3 * statistics.median(each):.1f} ms" for way, each in taken.items())
        print(f"{name} of {args.rows} clips, {cores} cores, devices: {mesh.size}: {found}")


if __name__ == "__main__":
    main()
