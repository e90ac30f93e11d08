"""`dollar demo`: distils the default teacher, samples, measures, and leaves a page to look at."""

import time
from pathlib import Path

from dollar_jax.cli.base import FLAGS, define, define_workdir, prepare_jax
from dollar_jax.cli.evaluate import print_table


def define_flags(_: list[str]) -> None:
    define_workdir("runs/demo")
    define("integer", "seed", 0, "Seed of everything.")
    define("bool", "quick", False, "A short run that only shows the way.")
    define("bool", "image", False, "From a first frame and text: the teacher learns that before it is distilled.")


def run() -> None:
    workdir = Path(FLAGS.workdir)
    print(f"Distilling the teacher that ships with the package; what comes out is in {workdir}.", flush=True)
    from dollar_jax.config import changed
    from dollar_jax.data.latents import load_data
    from dollar_jax.evaluate.run import Evaluation
    from dollar_jax.experiment import load
    from dollar_jax.generate import make_generator
    from dollar_jax.sharding import make_mesh
    from dollar_jax.train import train

    start, timings = time.perf_counter(), {}
    prepare_jax()
    config = changed(load("demo_i2v" if FLAGS.image else "demo"), {"seed": FLAGS.seed})
    if FLAGS.quick:
        config = changed(config, {"steps": 20, "data.train_videos": 128, "pretrain.teacher.steps": 20})
    if FLAGS.image and config.pretrain:
        from dollar_jax.lock import owned
        from dollar_jax.pretrain import pretrain

        with owned(workdir):
            config = changed(config, {"teacher": str(pretrain(config.pretrain, workdir))})
        timings["teach the teacher images"] = time.perf_counter() - start
        start = time.perf_counter()
    generator = make_generator(config, mesh=make_mesh(config.mesh), hold_vae=True)
    train(config, workdir, generator, lambda: load_data(config, generator, workdir))  # beside the step's compilation
    timings["encode data, distil"] = time.perf_counter() - start
    Evaluation(workdir, generator, workdir / "metrics.json").of_captions(FLAGS.quick, timings)
    print_table(workdir / "metrics.json")
    print(f"\nLook at {workdir / 'report.html'} in a browser; the videos are in {workdir / 'videos'}.")
