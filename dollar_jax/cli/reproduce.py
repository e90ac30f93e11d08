"""`dollar reproduce`."""

from pathlib import Path

from dollar_jax.cli.base import FLAGS, define, define_workdir, prepare_jax


def define_flags(_: list[str]) -> None:
    define_workdir()
    define("bool", "quick", False, "Two seeds, a fifth of the steps, fewer videos.")
    define("integer", "seeds", None, "Seeds per method, instead of 3.", 1)
    define("integer", "steps", None, "Training steps, instead of 200.", 1)


def run() -> None:
    from dollar_jax.config import DistillConfig, changed
    from dollar_jax.experiment import load
    from dollar_jax.reproduce import WITH_ADAM, reproduce

    def experiment(losses: str) -> DistillConfig:
        """As docs/reproduction.md tells of."""
        return changed(load("demo", losses), WITH_ADAM | ({"reward.weight": 0.03} if "lrm" in losses else {}))

    prepare_jax()
    page = reproduce(experiment, Path(FLAGS.workdir), FLAGS.quick, FLAGS.seeds, FLAGS.steps)
    print(page.with_suffix(".md").read_text())
    print(f"Look at {page} in a browser; {page.with_suffix('.csv')} holds every cell.")
