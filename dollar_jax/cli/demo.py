"""`dollar demo`."""

from pathlib import Path

from dollar_jax.cli.base import FLAGS, define, define_workdir, prepare_jax
from dollar_jax.cli.evaluate import print_table


def define_flags(_: list[str]) -> None:
    define_workdir("runs/demo")
    define("integer", "seed", 0, "Seed of everything.")
    define("bool", "quick", False, "A short run that only shows the way.")


def run() -> None:
    workdir = Path(FLAGS.workdir)
    print(f"Distilling the teacher that ships with the package; what comes out is in {workdir}.", flush=True)
    from dollar_jax.config import changed
    from dollar_jax.demo import demo
    from dollar_jax.experiment import load

    prepare_jax()
    config = changed(load("demo"), {"seed": FLAGS.seed})
    if FLAGS.quick:
        config = changed(config, {"steps": 20, "data.train_videos": 128})
    page = demo(config, workdir, FLAGS.quick)
    print_table(workdir / "metrics.json")
    print(f"\nLook at {page} in a browser; the videos are in {workdir / 'videos'}.")
