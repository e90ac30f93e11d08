"""`dollar demo`: distils the default teacher, samples, measures, and leaves a page to look at."""

import time
from pathlib import Path

from dollar_jax.config import DistillConfig
from dollar_jax.data.latents import load_data
from dollar_jax.evaluate.run import evaluate
from dollar_jax.generate import make_generator
from dollar_jax.sharding import make_mesh
from dollar_jax.train import train


def demo(config: DistillConfig, workdir: Path, quick: bool = False) -> Path:
    """Runs the whole; returns the page. Again in the same workdir it resumes, or only measures again."""
    start = time.perf_counter()
    timings = {}

    def lap(name: str) -> None:
        timings[name] = time.perf_counter() - start - sum(timings.values())

    generator = make_generator(config, mesh=make_mesh(config.mesh))
    data = load_data(config, generator, workdir)
    lap("load and encode data")
    train(config, workdir, generator, data)
    lap("distil")
    evaluate(workdir, generator, workdir / "metrics.json", quick, timings)
    return workdir / "report.html"
