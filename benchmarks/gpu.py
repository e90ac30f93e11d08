"""Wan 1.3B on one GPU beside PyTorch: seconds, TFLOP/s and share of the peak, in under ten minutes.

    pip install -e '.[test]' 'jax[cuda12]'
    python benchmarks/gpu.py --json=gpu.json
    python benchmarks/gpu.py --size=tiny --rivals eager

Made for one H100 with 80 GB, and for whoever has one. One video of 81 frames of 480 × 832 with made-up weights:
a forward pass; a student's update (denoising loss, backward, AdamW); a whole distillation step (VSD + CD, five
fake-score updates); the teacher's 50 steps with guidance, the student's 4, 2 and 1; the VAE's decoder. PyTorch is
diffusers' transformer with its SDPA flash attention, eager and under torch.compile, each block computed again in
the backward pass as ours is. TFLOP are the model's own, of products that are not computed twice. Each implementation
has a process of its own. What no longer fits into --minutes, or is not installed, is named and left out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

RIVALS = ("eager", "compiled")
COLUMNS = ("what", "by", "seconds", "TFLOP", "TFLOP/s", "of the peak, %", "first call, s")
# Frames, height and width of the clip, tokens of text, and what is smaller than in Wan 1.3B.
SIZES: dict[str, tuple[tuple[int, int, int], int, dict[str, Any], dict[str, Any]]] = {
    "wan_1_3b": ((81, 480, 832), 512, {}, {}),
    "tiny": (
        (5, 32, 32),
        8,
        {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 2, "text_dim": 32},
        {"base_dim": 4, "dim_mult": (1, 1, 1, 1), "num_res_blocks": 1},
    ),
}


def architecture_of(size: str) -> Any:
    from dollar_jax.weights.families import PUBLISHED

    found, (_, _, transformer, vae) = PUBLISHED["wan_1_3b"], SIZES[size]
    text = {"d_model": transformer["text_dim"]} if transformer else {}
    return dataclasses.replace(
        found,
        transformer=dataclasses.replace(found.transformer, **transformer),
        vae=dataclasses.replace(found.vae, **vae),
        text_encoder=dataclasses.replace(found.text_encoder, **text),
    )


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of `repeats` calls after a first one, and the first one's; of the first alone without any."""
    seconds = []
    for _ in range(1 + repeats):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:] or seconds), seconds[0]


class Rows:
    """Results of one implementation, written as they come, as long as there is time."""

    def __init__(self, by: str, peak: float | None, out: Path, end: float):
        self.by, self.peak, self.out, self.end, self.rows = by, peak, out, end, []

    def add(self, what: str, tflop: float, make: Callable[[], Callable[[], Any]], repeats: int = 3) -> None:
        row: dict[str, Any] = {"what": what, "by": self.by, "tflop": tflop}
        if time.time() > self.end:
            row["skipped"] = "no time left"
        else:
            try:
                seconds, first = timed(make(), repeats)
                row |= {"seconds": seconds, "first_call": first, "tflops_per_second": tflop / seconds}
                row["mfu"] = tflop / seconds / self.peak if self.peak else None
            except Exception as error:  # such as memory that does not suffice: the next row may still go
                row["skipped"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self.rows.append(row)
        self.out.write_text(json.dumps(self.rows))


def ours(size: str, out: Path, end: float) -> None:
    import jax
    import jax.numpy as jnp
    import optax

    from dollar_jax import sharding
    from dollar_jax.config import changed
    from dollar_jax.experiment import load
    from dollar_jax.flops import PEAK_TFLOPS, count_flops
    from dollar_jax.plan.teachers import weightless_generator
    from dollar_jax.programs import step_flops, teacher_programs

    clip, tokens = SIZES[size][:2]
    architecture = architecture_of(size)
    fields = {"batch_size": 1, "data.max_text_length": tokens, "mesh.fsdp": 1, "steps": 10}
    config = changed(load("wan_1_3b", "vsd+cd"), fields)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    generator = weightless_generator(config, architecture, clip, mesh)
    network = generator.pipeline.transformer.network
    plain = architecture.family.transformer.network(dataclasses.replace(architecture.transformer, attention="xla"))
    shapes = generator.latent_shape, (), generator.text_shape
    inputs = [jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in shapes]
    forward = count_flops(jax.make_jaxpr(plain.apply)(plain.shapes, *inputs).jaxpr) / 1e12
    rows = Rows("JAX", PEAK_TFLOPS.get(jax.devices()[0].device_kind), out, end)

    def made(tree: Any) -> Any:
        """Small numbers for floating point, zeros for integers, a random key for keys."""

        def leaf(x: Any) -> Any:
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                return jax.random.split(jax.random.key(0), x.shape) if x.shape else jax.random.key(0)
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return jnp.zeros(x.shape, x.dtype)
            return 0.02 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)

        return jax.tree.map(leaf, tree)

    def call(program: Any, *arguments: Any) -> Callable[[], Any]:
        compiled, arguments = program.compile(), program.place(*(arguments or made(program.arguments)))
        return lambda: jax.block_until_ready(compiled(*arguments))

    def one_forward() -> Callable[[], Any]:
        compiled = jax.jit(network.apply).lower(network.shapes, *inputs).compile()
        arguments = made((network.shapes, *inputs))
        return lambda: jax.block_until_ready(compiled(*arguments))

    def update() -> Callable[[], Any]:
        optimiser = optax.adamw(1e-5)
        held = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), network.shapes)

        def step(params: Any, state: Any, x: Any, t: Any, text: Any) -> Any:
            gradient = jax.grad(lambda p: jnp.mean(jnp.square(network.apply(p, x, t, text) - x)))(params)
            updates, state = optimiser.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        given = made((held, jax.eval_shape(optimiser.init, held), *inputs))
        given = (given[0], optimiser.init(given[0]), *given[2:])
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile()

        def run() -> None:
            nonlocal given
            given = (*jax.block_until_ready(compiled(*given)), *given[2:])

        return run

    def whole_step() -> Callable[[], Any]:
        programs = teacher_programs(config, generator, None, jax.devices()[:1])
        frozen, batch = made(programs.step.arguments[1:])
        state = programs.init(jax.random.key(0), frozen.teacher)
        compiled = programs.step.compile()

        def run() -> None:
            nonlocal state
            state = jax.block_until_ready(compiled(state, frozen, batch))[0]

        return run

    rows.add("forward", forward, one_forward)
    rows.add("student's update", 3 * forward, update)
    for count in (4, 2, 1):
        sampler = generator.student_sampler(config.student.timesteps[:count])
        rows.add(f"student, {count} step{'s' * (count > 1)}", count * forward, lambda s=sampler: call(s.program(1)), 1)
    decode = generator.decode_program((1, *generator.latent_shape), mesh)
    rows.add("decode", count_flops(decode.trace().jaxpr.jaxpr) / 1e12, lambda: call(decode), 1)
    sampler = generator.teacher_sampler(50, config.sampling.guidance_weight)
    # Compiled ahead: the first call is no slower than the next ones.
    rows.add("teacher, 50 steps", 100 * forward, lambda: call(sampler.program(1)), 0)
    rows.add("whole step", step_flops(config, generator, None) / 1e12, whole_step, 1)


def torchs(rival: str, size: str, out: Path, end: float) -> None:
    import jax
    import jax.numpy as jnp
    import torch
    from diffusers import WanTransformer3DModel

    from dollar_jax.flops import PEAK_TFLOPS, count_flops
    from dollar_jax.weights.kind import OURS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak = PEAK_TFLOPS.get(torch.cuda.get_device_name()) if device == "cuda" else None
    clip, tokens = SIZES[size][:2]
    architecture = architecture_of(size)
    config = architecture.transformer
    plain = architecture.family.transformer.network(dataclasses.replace(config, attention="xla"))
    frames, height, width, channels = architecture.vae.latent_shape(*clip)
    shapes = (frames, height, width, channels), (), (tokens, config.text_dim)
    arguments = [jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in shapes]
    forward = count_flops(jax.make_jaxpr(plain.apply)(plain.shapes, *arguments).jaxpr) / 1e12
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in OURS}
    model = WanTransformer3DModel(**fields).to(device)
    mine = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(plain.shapes))
    assert sum(p.numel() for p in model.parameters()) == mine, "diffusers' network is another one"
    network = torch.compile(model) if rival == "compiled" else model
    x = 0.02 * torch.randn(1, channels, frames, height, width, device=device)
    text, t = torch.randn(1, tokens, config.text_dim, device=device), torch.full((1,), 500.0, device=device)
    rows = Rows(f"PyTorch, {rival}", peak, out, end)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def predicted() -> Any:
        with torch.autocast(device, torch.bfloat16):
            return network(x, t, text, return_dict=False)[0]

    def one_forward() -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                predicted()
            wait()

        return run

    def update() -> Callable[[], Any]:
        model.enable_gradient_checkpointing()
        optimiser = torch.optim.AdamW(model.parameters(), 1e-5, fused=device == "cuda")

        def run() -> None:
            torch.mean(torch.square(predicted().float() - x)).backward()
            optimiser.step()
            optimiser.zero_grad()
            wait()

        return run

    rows.add("forward", forward, one_forward)
    rows.add("student's update", 3 * forward, update)


def why_not(rival: str, size: str) -> str | None:
    """A reason to leave PyTorch out."""
    try:
        import diffusers  # noqa: F401
        import torch
    except ImportError as error:
        return f"{error.name} is not installed"
    return None if torch.cuda.is_available() or size == "tiny" else "PyTorch sees no GPU"


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, and what was left out."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        if "seconds" in row:
            mfu = "–" if row["mfu"] is None else f"{100 * row['mfu']:.0f}"
            numbers = (row["seconds"], row["tflop"], row["tflops_per_second"])
            cells = (row["what"], row["by"], *(f"{n:.3g}" for n in numbers), mfu, f"{row['first_call']:.3g}")
            lines.append(f"| {' | '.join(cells)} |")
    left = [f"{row['by']}, {row['what']}: left out, {row['skipped']}" for row in rows if "skipped" in row]
    return "\n".join([*lines, *left])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="wan_1_3b")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS, help="PyTorch's ways; none: JAX alone")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which nothing new begins")
    parser.add_argument("--json", type=Path, help="where to write the figures, the machine and the versions")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "") if args.worker == "JAX" else "cpu"
        run = ours if args.worker == "JAX" else lambda *rest: torchs(args.worker, *rest)
        return run(args.size, args.json, args.end)
    end, rows = time.time() + 60 * args.minutes, []
    for worker in (*args.rivals, "JAX"):
        if reason := why_not(worker, args.size) if worker != "JAX" else None:
            rows.append({"what": "all", "by": f"PyTorch, {worker}", "skipped": reason})
            continue
        # A quarter of the time each for PyTorch, the rest for us.
        until = end if worker == "JAX" else min(end, time.time() + 15 * args.minutes)
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder, "rows.json")
            command = [sys.executable, __file__, f"--size={args.size}", f"--worker={worker}", f"--json={found}"]
            done = subprocess.run([*command, f"--end={until}"])
            rows += json.loads(found.read_text()) if found.is_file() else []
            if done.returncode:
                rows.append({"what": "the rest", "by": worker, "skipped": f"exit code {done.returncode}"})
    print(table(rows))
    if args.json:
        import importlib.metadata

        wanted = ("jax", "jaxlib", "torch", "diffusers")
        have = {
            d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"] in wanted
        }
        args.json.write_text(json.dumps({"size": args.size, "versions": have, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
