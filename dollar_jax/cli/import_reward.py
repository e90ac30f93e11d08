"""`dollar import-reward`."""

from pathlib import Path

from dollar_jax.cli.base import FLAGS, define


def define_flags(_: list[str]) -> None:
    define("string", "clip", None, "A CLIP's folder, for what SRC lacks: config.json, tokenizer, image tower.")


def run(*names: str) -> None:
    from dollar_jax.weights.clip import import_reward

    if len(names) != 2:
        raise ValueError("give two names: the published file or folder, and the new folder")
    import_reward(*map(Path, names), clip=FLAGS.clip and Path(FLAGS.clip))
    print(f"The reward is in {names[1]}; train with --config=NAME:vsd+cd+lrm,REWARD={names[1]}")
