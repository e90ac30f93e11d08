"""`dollar pretrain`."""

from pathlib import Path

from dollar_jax.cli.base import FLAGS, define_config, define_workdir, given_config, prepare_jax


def define_flags(arguments: list[str]) -> None:
    define_config(arguments)
    define_workdir()


def run() -> None:
    from dollar_jax.lock import owned
    from dollar_jax.pretrain import pretrain

    prepare_jax()
    if (config := given_config().pretrain) is None:
        raise ValueError("this configuration has no pretrain settings; configs/demo.py has")
    with owned(Path(FLAGS.workdir)):
        print(f"The teacher is in {pretrain(config, Path(FLAGS.workdir))}.")
