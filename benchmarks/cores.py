"""What more cores of a CPU gain a network: all of a batch as one program, and parts of it beside each other.

    python benchmarks/cores.py                                # the shipped teacher on 24 clips, forward and gradient
    JAX_NUM_CPU_DEVICES=2 python benchmarks/cores.py          # parts as a virtual device's each, gradients summed

XLA shares every product and loop of a program among the cores and waits for each. Parts in threads of their own have
programs of their own, whose gradients are not summed here. Medians of calls in turns, in milliseconds."""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dollar_jax.cli.base import prepare_jax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24, help="clips, a multiple of the cores")
    parser.add_argument("--seconds", type=float, default=10, help="for each of forward and gradient")
    args = parser.parse_args()
    count = len(os.sched_getaffinity(0))
    if args.rows % count:
        parser.error(f"--rows={args.rows} is no multiple of {count} cores")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    prepare_jax()
    import jax
    import jax.numpy as jnp

    from dollar_jax import sharding
    from dollar_jax.config import MeshConfig
    from dollar_jax.experiment import load
    from dollar_jax.generate import make_generator
    from dollar_jax.program import Program

    mesh = sharding.make_mesh(MeshConfig(-1, 1, 1, 1), jax.devices())
    generator = make_generator(load("demo"), mesh=mesh)
    part = generator.pipeline.transformer
    params = sharding.put(part.params, sharding.replicated(mesh))
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (args.rows, *generator.latent_shape))
    text = jax.random.normal(keys[1], (args.rows, *generator.text_shape))
    inputs = x, jnp.full((args.rows,), 500.0), text

    def loss(params: Any, *inputs: Any) -> Any:
        return jnp.square(part.network.apply(params, *inputs)).mean()

    for name, function in {"forward": part.network.apply, "gradient": jax.grad(loss)}.items():
        rows = sharding.row_sharding(mesh, args.rows)
        whole = Program(name, function, mesh=mesh, in_shardings=(sharding.replicated(mesh), rows, rows, rows))
        placed = whole.place(params, *inputs)
        runs: dict[str, Callable[[], Any]] = {"all": lambda f=whole, a=placed: jax.block_until_ready(f(*a))}
        if mesh.size == 1 and count > 1:
            own = dataclasses.replace(whole, in_shardings=())
            parts = [(placed[0], *each) for each in zip(*(jnp.split(value, count) for value in inputs), strict=True)]
            pool = ThreadPoolExecutor(count)

            def beside(own: Any = own, parts: Any = parts, pool: Any = pool) -> Any:
                return list(pool.map(lambda a: jax.block_until_ready(own(*a)), parts))

            runs[f"{count} parts beside each other"] = beside
        for run in runs.values():
            run()  # compiles
        taken: dict[str, list[float]] = {way: [] for way in runs}
        end = time.perf_counter() + args.seconds
        while time.perf_counter() < end or len(taken["all"]) < 3:
            for way, run in runs.items():
                begun = time.perf_counter()
                run()
                taken[way].append(time.perf_counter() - begun)
        found = ", ".join(f"{way} {1e3 * statistics.median(each):.1f} ms" for way, each in taken.items())
        print(f"{name} of {args.rows} clips, {count} cores, devices: {mesh.size}: {found}")


if __name__ == "__main__":
    main()
