"""`dollar sample`."""

import sys
from pathlib import Path

from dollar_jax.cli.base import FLAGS, define, define_vae, define_workdir, prepare_jax

# Of a picture of many videos: more pixels, or a longer side, than players take.
_MOST_PIXELS, _LONGEST_SIDE = 2**24, 8192


def define_flags(_: list[str]) -> None:
    define_workdir()
    define_vae()
    define("string", "low", None, "The low-noise expert's run, where the teacher has two and --workdir is the other's.")
    define("multi_string", "prompt", [], "What to show; may be given more than once.")
    define("string", "prompts_file", None, "A text file with a prompt per line.")
    define("string", "image", None, "The first frame, of a run or a teacher that continues one: a file.")
    define("integer", "steps", 4, "Sampling steps.", 1, 1000)
    define("multi_integer", "seed", [0], "Seed of the noise, which all prompts share; may be given more than once.")
    define("integer", "num", 4, "Videos per prompt and seed.", 1)
    define("integer", "batch_size", None, "Videos drawn at a time; by default as many as their size allows.", 1)
    define("bool", "teacher", False, "Sample the teacher, in its own number of steps unless --steps is given.")
    define("bool", "beside_teacher", False, "Put the teacher's video from the same noise to the left of each.")
    define("bool", "ema", True, "The student's moving average rather than its raw weights.")
    for name, what in (("frames", "Frames of a video"), ("height", "Height"), ("width", "Width")):
        define("integer", name, None, f"{what}, instead of the run's own.", 1)
    define("float", "fps", None, "Frames per second of the files; those of the run's data by default.", 0.1)
    define("integer", "scale", None, "Enlargement of every pixel; by default what makes small videos 256 wide.", 1)
    about = "The .mp4 or .gif, a row per prompt; or a folder, for a file per video, of which a second start draws the "
    about += "missing. How they were made is left beside it in NAME.manifest.json."
    define("string", "out", "samples.mp4", about)


def run() -> None:
    import jax.numpy as jnp
    import numpy as np

    from dollar_jax.config import changed
    from dollar_jax.data.clip import clip_fps, clip_size
    from dollar_jax.evaluate import manifest
    from dollar_jax.evaluate.files import check_output, draw_missing, file_name, is_folder, read_prompts
    from dollar_jax.files import hash_file
    from dollar_jax.generate import draw_beside, make_generator, teacher_folder, video_keys
    from dollar_jax.run import choose_student, choose_teacher, drawing_config
    from dollar_jax.video import grid, write_video
    from dollar_jax.weights.pipeline import read_family, unknown_words

    prepare_jax()
    workdir, out = Path(FLAGS.workdir), Path(FLAGS.out)
    given = [*FLAGS.prompt, *(read_prompts(Path(FLAGS.prompts_file)) if FLAGS.prompts_file else [])]
    if not (prompts := list(dict.fromkeys(given))):
        raise ValueError("--prompt or --prompts_file must be given")
    if FLAGS.teacher and FLAGS.beside_teacher:
        raise ValueError("--teacher beside --beside_teacher: leave one of them out")
    check_output(out)
    low = Path(FLAGS.low) if FLAGS.low else None
    config = drawing_config(workdir, low, FLAGS.teacher, FLAGS.vae)
    image, told = FLAGS.image is not None, read_family(teacher_folder(config.teacher)).conditioned
    if FLAGS.teacher and not told:  # TI2V can do both
        config = changed(config, {"data.given_frames": int(image), "visibility.prompts": ()})
    elif bool(told or config.data.given_frames) != image:
        told = "start from text alone: leave out" if image else "continue an image: give"
        raise ValueError(f"the student of {workdir} was distilled to {told} --image")
    frames, height, width = clip_size(config.data)
    clip = FLAGS.frames or frames, FLAGS.height or height, FLAGS.width or width
    scale = FLAGS.scale or max(1, 256 // max(clip[1:]))
    columns = len(FLAGS.seed) * FLAGS.num
    if not is_folder(out):
        high, wide = scale * len(prompts) * clip[1], scale * columns * (1 + FLAGS.beside_teacher) * clip[2]
        if high * wide > _MOST_PIXELS or max(high, wide) > _LONGEST_SIDE:
            mend = "give a folder, for a file per video, or lower --num or --scale"
            raise ValueError(f"--out={out} would be a picture of {wide} × {high}, more than players show: {mend}")
    generator = make_generator(config, clip, hold_vae=True)
    _ = generator.latent_shape  # a size that does not fit is an error before the student is read
    if FLAGS.image:
        generator.continue_from(dict.fromkeys(prompts, Path(FLAGS.image)))
    if unknown := unknown_words(generator.pipeline.tokenizer, prompts):
        print(f"warning: the teacher does not know the words {', '.join(unknown)}", file=sys.stderr)
    samplers = []
    if FLAGS.teacher or FLAGS.beside_teacher:
        steps = FLAGS.steps if FLAGS.teacher and FLAGS["steps"].present else None
        samplers.append(choose_teacher(generator, config, steps))
    if not FLAGS.teacher:
        if FLAGS.steps > (known := len(config.student.timesteps)):
            print(f"warning: the student was distilled to {known} steps, not {FLAGS.steps}", file=sys.stderr)
        samplers.append(choose_student(generator, workdir, config, FLAGS.steps, FLAGS.ema, low))
    fps = FLAGS.fps or clip_fps(config.data, generator.pipeline.family.fps)
    rows = [(file_name(prompt, i), prompt, i) for prompt in prompts for i in range(columns)]
    # A folder may get more prompts later.
    files = manifest.files_of(out) | {name: prompt for name, prompt, _ in rows} if is_folder(out) else {}
    made = {"scale": scale, **manifest.made_of(sorted({*files.values()} or prompts), FLAGS.seed, FLAGS.num, files)}
    made |= {"image_sha256": hash_file(Path(FLAGS.image))} if FLAGS.image else {}
    made |= manifest.describe(config, generator, fps, samplers)
    manifest.write_manifest(out, made, free=("versions", "files", "prompts_sha256"))

    def keys():
        return jnp.concatenate([video_keys(seed, FLAGS.num) for seed in FLAGS.seed])

    drawers = [(sampler.draw, sampler.params) for sampler in samplers]
    if is_folder(out):
        drawn = draw_missing(out, rows, keys, generator, drawers, FLAGS.batch_size, fps, scale)
        print(f"{out}: {drawn} videos drawn, {len(rows) - drawn} were there")
        return
    _, each, index = zip(*rows, strict=True)
    clips = draw_beside(generator, drawers, each, lambda: keys()[np.array(index)], FLAGS.batch_size)
    write_video(out, grid(np.stack(list(clips)), columns, gap=6 if len(samplers) > 1 else 2), fps, scale)
    print(out)
