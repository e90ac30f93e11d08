"""`dollar pretrain`."""

from pathlib import Path

from dollar_jax.cli.base import FLAGS, define, define_config, define_workdir, given_config, prepare_jax


def define_flags(arguments: list[str]) -> None:
    define_config(arguments)
    define_workdir()
    define("bool", "decoder", False, "Only a smaller decoder of the teacher's VAE, as config.decoder says.")


def run() -> None:
    from dollar_jax.lock import owned
    from dollar_jax.pretrain import pretrain, train_decoder

    prepare_jax()
    config, workdir = given_config(), Path(FLAGS.workdir)
    if config.pretrain is None and not FLAGS.decoder:
        raise ValueError("this configuration has no pretrain settings; configs/demo.py has")
    with owned(workdir):
        if FLAGS.decoder:
            print(f"The VAE is in {train_decoder(config, workdir)}, for --vae of sample, evaluate, serve and export.")
        elif config.pretrain:
            print(f"The teacher is in {pretrain(config.pretrain, workdir)}.")
