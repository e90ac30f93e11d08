"""`dollar import`."""

from __future__ import annotations

from dollar_jax.cli.base import FLAGS, Command, define


def define_flags(_: list[str]) -> None:
    define("enum", "dtype", "float32", ["float32", "bfloat16"], "Of transformer and text encoder on disk.")


def run(*names: str) -> None:
    from dollar_jax.weights.importer import import_pipeline

    if len(names) != 2:
        raise ValueError("give two names: the diffusers folder, or OWNER/NAME on the hub, and the new folder")
    source, folder = names
    import_pipeline(source, folder, FLAGS.dtype)
    print(f"The teacher is in {folder}; train with --config.teacher={folder}.")


COMMAND = Command("a diffusers pipeline to a teacher folder that shards", define_flags, run, "SRC DST")
