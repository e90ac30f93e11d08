"""`dollar export`."""

import re
from pathlib import Path

from dollar_jax.cli.base import FLAGS, define, define_vae, define_workdir


def define_flags(_: list[str]) -> None:
    define_workdir()
    define_vae()
    define("string", "low", None, "The low-noise expert's run, where the teacher has two and --workdir is the other's.")
    define("bool", "ema", True, "The student's moving average rather than its raw weights.")
    define("enum", "dtype", "float32", ["float32", "float16", "bfloat16"], "Of the student.")
    define("bool", "adapter", False, "Only the adapters of a run with config.lora, for load_lora_weights.")
    define("string", "push_to_hub", None, "OWNER/NAME on the hub to upload the folder to, as you are logged in there.")
    define("string", "shard_size", "5GB", "The most that a weight file holds.")


def run(*names: str) -> None:
    from huggingface_hub import get_token

    from dollar_jax.export import export_run, push

    if len(names) != 1:
        raise ValueError("give the new folder: dollar export --workdir=RUN FOLDER")
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    if (size := re.fullmatch(r"([1-9]\d*)([KMG]B)", FLAGS.shard_size)) is None:
        raise ValueError(f"--shard_size={FLAGS.shard_size} must be a size such as 500MB or 5GB")
    if FLAGS.push_to_hub and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", FLAGS.push_to_hub):
        raise ValueError(f"--push_to_hub={FLAGS.push_to_hub} must be OWNER/NAME")
    if FLAGS.push_to_hub and not get_token():
        raise ValueError("--push_to_hub needs a token of yours: hf auth login, or HF_TOKEN in the environment")
    options = {"ema": FLAGS.ema, "dtype": FLAGS.dtype, "shard_size": int(size[1]) * units[size[2]]}
    low = Path(FLAGS.low) if FLAGS.low else None
    export_run(Path(FLAGS.workdir), Path(names[0]), low, FLAGS.vae, **options, adapter=FLAGS.adapter)
    print(f"The student is in {names[0]}; its README.md says how diffusers samples it.")
    if FLAGS.push_to_hub:
        print(f"It is at {push(Path(names[0]), FLAGS.push_to_hub)}.")
