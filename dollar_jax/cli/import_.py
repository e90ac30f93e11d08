"""`dollar import`."""

from dollar_jax.cli.base import FLAGS, define


def define_flags(_: list[str]) -> None:
    define("enum", "dtype", "float32", ["float32", "bfloat16"], "Of transformer and text encoder on disk.")
    define("string", "lora", None, "An adapter to merge: its file or folder, in diffusers', PEFT's or Wan's own names.")


def run(*names: str) -> None:
    from dollar_jax.weights.importer import import_pipeline

    if len(names) != 2:
        raise ValueError("give two names: the diffusers folder, or OWNER/NAME on the hub, and the new folder")
    import_pipeline(*names, FLAGS.dtype, FLAGS.lora)
    print(f"The teacher is in {names[1]}; train with --config.teacher={names[1]}.")
