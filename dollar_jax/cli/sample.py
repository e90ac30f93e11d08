"""`dollar sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dollar_jax.cli.base import FLAGS, Command, define, define_workdir, prepare_jax


def define_flags(_: list[str]) -> None:
    define_workdir()
    define("multi_string", "prompt", [], "What to show; may be given more than once.")
    define("string", "prompts_file", None, "A text file with a prompt per line.")
    define("integer", "steps", 4, "Sampling steps.", 1)
    define("multi_integer", "seed", [0], "Seed of the noise, which all prompts share; may be given more than once.")
    define("integer", "num", 4, "Videos per prompt and seed.", 1)
    define("integer", "batch_size", 16, "Videos drawn at a time.", 1)
    define("bool", "teacher", False, "Sample the teacher, in its own number of steps unless --steps is given.")
    define("bool", "beside_teacher", False, "Put the teacher's video from the same noise to the left of each.")
    define("bool", "ema", True, "The student's moving average rather than its raw weights.")
    for name, what in (("frames", "Frames of a video"), ("height", "Height"), ("width", "Width")):
        define("integer", name, None, f"{what}, instead of the run's own.", 1)
    define("float", "fps", 8, "Frames per second of the files.", 0.1)
    define("integer", "scale", 8, "Enlargement of every pixel.", 1)
    define("string", "out", "samples.mp4", "The .mp4 or .gif, a row per prompt; or a folder, for a file per video.")


def run() -> None:
    from dollar_jax.data.clip import clip_size
    from dollar_jax.evaluate.files import check_output, read_prompts, write_samples
    from dollar_jax.generate import make_generator, sample_prompts
    from dollar_jax.run import read_config

    prepare_jax()
    workdir, out = Path(FLAGS.workdir), Path(FLAGS.out)
    prompts = [*FLAGS.prompt, *(read_prompts(Path(FLAGS.prompts_file)) if FLAGS.prompts_file else [])]
    if not prompts:
        raise ValueError("--prompt or --prompts_file must be given")
    if FLAGS.teacher and FLAGS.beside_teacher:
        raise ValueError("--teacher beside --beside_teacher: leave one of them out")
    check_output(out)
    config = read_config(workdir)
    frames, height, width = clip_size(config.data)
    generator = make_generator(config, (FLAGS.frames or frames, FLAGS.height or height, FLAGS.width or width))
    _ = generator.latent_shape  # a size that does not fit is an error before the weights are read
    rows: list[tuple[Any, Any]] = []
    if FLAGS.teacher or FLAGS.beside_teacher:
        given = FLAGS.teacher and FLAGS["steps"].present
        rows.append(teacher_sampler(generator, FLAGS.steps if given else config.sampling.num_steps))
    if not FLAGS.teacher:
        rows.append(student_sampler(generator, workdir, config, FLAGS.steps, FLAGS.ema))
    videos = [
        sample_prompts(generator, draw, params, prompts, FLAGS.seed, FLAGS.num, FLAGS.batch_size)
        for draw, params in rows
    ]
    write_samples(out, prompts, videos, FLAGS.fps, FLAGS.scale)
    print(out)


def teacher_sampler(generator: Any, steps: int) -> tuple[Any, Any]:
    """A sampler and its parameters, as is `student_sampler`'s."""
    draw = generator.teacher_sampler(steps, generator.sampling.guidance_weight)
    return draw, generator.pipeline.transformer.params


def student_sampler(generator: Any, workdir: Path, config: Any, steps: int, ema: bool = True) -> tuple[Any, Any]:
    from dollar_jax.generate import subset
    from dollar_jax.run import restore_student

    draw = generator.student_sampler(subset(config.student.timesteps, steps))
    return draw, restore_student(workdir, generator, ema)


COMMAND = Command("draw videos from a run's student, or from its teacher", define_flags, run)
