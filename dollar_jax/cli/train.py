"""`dollar train`."""

import functools
from pathlib import Path

from dollar_jax.cli.base import FLAGS, define, define_config, define_workdir, given_config, prepare_jax, report_error


def define_flags(arguments: list[str]) -> None:
    define_config(arguments)
    define_workdir()
    define("string", "coordinator_address", None, "HOST:PORT of process 0; not needed on Cloud TPU, GKE and SLURM.")
    define("integer", "num_processes", None, "Processes of the run.", 1)
    define("integer", "process_id", None, "Which of them this is, from 0.", 0)
    define("string", "replay_batch", None, "The skipped_*.npz of a stopped run: show what is not finite in its step.")
    define("bool", "profile", False, "Leave an XProf trace of three steps in WORKDIR/profile.")


def run() -> None:
    import jax

    from dollar_jax import distributed
    from dollar_jax.config import changed
    from dollar_jax.data.clip import MOVING_SHAPES
    from dollar_jax.data.latents import load_data
    from dollar_jax.files import open_regular
    from dollar_jax.generate import SHIPPED_TEACHERS, make_generator
    from dollar_jax.sharding import make_mesh
    from dollar_jax.train import train

    config, workdir = given_config(), Path(FLAGS.workdir)
    prepare_jax(one_heap=config.teacher not in SHIPPED_TEACHERS)
    if FLAGS.profile:
        config = changed(config, {"visibility.profile_steps": 3})
    replay = None if FLAGS.replay_batch is None else Path(FLAGS.replay_batch)
    if replay is not None:
        open_regular(replay).close()
    processes = FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id
    with distributed.joined(*processes, functools.partial(report_error, "train")):
        if not config.reward.rewards and jax.process_index() == 0:
            print("No reward is named, so none is trained on; to name one: --config=NAME:vsd+cd+lrm,hpsv2=FOLDER")
        generator = make_generator(config, mesh=make_mesh(config.mesh))
        load = functools.partial(load_data, config, generator, workdir)
        state = train(config, workdir, generator, load if config.data.name == MOVING_SHAPES else load(), replay)
        if replay is None and int(state.step) < config.steps:
            raise EndedEarly(f"the run ended at step {int(state.step)} of {config.steps}, which is saved")
        if replay is None and jax.process_index() == 0:
            print(f"The student is in {workdir}; sample it with dollar sample --workdir={workdir} --prompt=…")


class EndedEarly(ValueError):
    """Training has stopped by itself before its last step."""

    exit_code = 6
