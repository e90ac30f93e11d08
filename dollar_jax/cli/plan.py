"""`dollar plan`."""

import dataclasses
import os
from pathlib import Path

from dollar_jax.cli.base import FLAGS, define, define_config, given_config

COMMANDS = ("run", "prepare", "teacher-samples", "sample-command", "evaluate")


def define_flags(arguments: list[str]) -> None:
    define_config(arguments)
    define("string", "topology", None, "Chips, such as v5p:2x2x2 or v6e:8x8.", required=True)
    define("string", "mesh", None, "Such as fsdp=16,context=4; config.mesh unless given.")
    define("string", "video", None, "HEIGHTxWIDTHxFRAMES; the data's own unless given.")
    about = "The program; or all of a run, prepare, prepare --teacher_samples (teacher-samples), sample "
    about += "(sample-command) or evaluate: exit 2 if one fails."
    define("enum", "what", "train", ["train", "sample", "decode", "text", "import", *COMMANDS], about)
    define("bool", "search", False, "Rank meshes, keys by gather or Ulysses, micro-batches, remat, a whole teacher.")
    define("bool", "own_effort", False, "Compile as a run does: ten times slower, collectives beside other work.")
    define("string", "json", None, "File for the figures as JSON.")


def run() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tqdm import tqdm

    from dollar_jax.files import check_writable, write_json
    from dollar_jax.plan import planner
    from dollar_jax.plan.chips import parse_mesh
    from dollar_jax.plan.training import training_cost

    config = given_config()
    if FLAGS.json:
        check_writable(Path(FLAGS.json))  # before hours of compilation
    if FLAGS.mesh:
        config = dataclasses.replace(config, mesh=parse_mesh(FLAGS.mesh))
    rest = (FLAGS.topology, FLAGS.what, planner.parse_video(FLAGS.video) if FLAGS.video else None)
    whole = FLAGS.what in COMMANDS
    if FLAGS.search and whole:
        raise ValueError(f"--search ranks meshes for one program: leave it out with --what={FLAGS.what}")
    make, effort = planner.search if FLAGS.search else planner.plans, planner.OWN if FLAGS.own_effort else planner.LOW
    found = list(tqdm(make(config, *rest, effort), "compiling", unit="program"))
    if not found:
        raise ValueError("no mesh divides this batch over these chips: change config.batch_size")
    if FLAGS.search:
        found = planner.rank(found)
    elif found[0].error and not whole:
        raise ValueError(f"no plan of {found[0].program}: {found[0].error}")
    print(planner.table(found))
    if FLAGS.search:
        print(planner.why(found))
    fields = [dataclasses.asdict(p) for p in found]
    if FLAGS.what == "train":
        cost, words = training_cost(config, FLAGS.topology, rest[2])
        print(words)
        fields = [f | {"training": cost} for f in fields]
    if FLAGS.json:
        write_json(FLAGS.json, fields if FLAGS.search or whole else fields[0])
    if whole:
        if bad := [p.program for p in found if p.error or not p.fits]:
            raise ValueError(f"{len(bad)} of {len(found)} programs do not compile or fit: {', '.join(bad)}")
        print(f"All {len(found)} programs compile and fit.")
