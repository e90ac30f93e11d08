"""`dollar prepare`."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from dollar_jax.cli.base import FLAGS, define, prepare_jax

_SECONDS = 16  # of a video, from which clips are taken: further on, its caption may be of something else


def define_flags(_: list[str]) -> None:
    define("string", "source", None, "Videos with captions: a folder, manifest, .tar, .parquet, hf:NAME or tfds:NAME.")
    define("string", "prompts", None, "Prompts without videos instead: a .txt, one a line, a .csv or a .jsonl.")
    drawn = "Configuration such as wan_1_3b by whose `sampling` the teacher draws --clips videos of each of --prompts."
    define("string", "teacher_samples", None, drawn)
    define("string", "out", None, "Folder of the data set.", required=True)
    define("string", "teacher", "moving_shapes", "The pipeline whose VAE and text encoder encode.")
    define("integer", "frames", None, "Frames of a clip; the teacher's by default.", 1)
    define("integer", "height", None, "Height of a clip in pixels; the teacher's by default.", 1)
    define("integer", "width", None, "Width of a clip in pixels; the teacher's by default.", 1)
    define("list", "buckets", None, "Several sizes such as 480x832,832x480: each video goes to the nearest.")
    define("float", "fps", None, "Frames per second of a clip; the teacher's by default, 0 for every frame.", 0)
    define("enum", "caption", "first", ["first", "random"], "Which one of a list of captions.")
    define("string", "language", None, "Which caption of an object of captions by language, such as en.")
    define("bool", "keep_cuts", False, "Keep clips that cross a hard cut.")
    define("enum", "crop", "centre", ["centre", "random"], "Where a clip is cut out of a video of another shape.")
    clips = "At most so many clips of a video, one after another from its start; by default as many as its first "
    clips += f"{_SECONDS} seconds hold at the teacher's rate, such as 3 for Wan; 1 for the shipped teacher."
    define("integer", "clips", None, clips, 1)
    define("bool", "sample", False, "Keep a sample of the VAE's posterior, not its mean and deviation.")
    define("bool", "latents", False, "Use the latents in tar files as rCM's, of the teacher's own VAE and scale.")
    define("enum", "dtype", "float16", ["float16", "float32"], "Of latents and text states on disk.")
    define("integer", "max_text_length", None, "Tokens of a caption; 512 but for the shipped teacher.", 1)
    define("integer", "seed", 0, "Seed of random crops and samples.")
    define("integer", "shard_size", 256, "Videos to a shard; a killed job loses at most the shard it was at.", 1)
    define("integer", "batch_size", 1, "Clips encoded at once by each device.", 1)
    define("integer", "vae_chunk", None, "Latent frames the VAE makes at a time; few but for the shipped teacher.", 1)
    define("integer", "workers", os.cpu_count() or 1, "Videos decoded side by side.", 1)
    define("string", "split", "train", "Split of a tfds: source.")
    define("integer", "process_index", None, "Which of the hosts this is, by default as jax counts them.", 0)
    define("integer", "process_count", None, "How many hosts share the work, all writing to --out.", 1)


def run() -> None:
    import jax

    from dollar_jax.data import shapes
    from dollar_jax.experiment import load
    from dollar_jax.generate import SHIPPED_TEACHERS
    from dollar_jax.prepare.clips import Loader
    from dollar_jax.prepare.job import prepare
    from dollar_jax.prepare.settings import PrepareSettings
    from dollar_jax.prepare.shards import load_generator
    from dollar_jax.prepare.sources import TFDS
    from dollar_jax.weights.pipeline import read_family

    prepare_jax()
    shipped = FLAGS.teacher in SHIPPED_TEACHERS
    if FLAGS.buckets and (FLAGS.height or FLAGS.width):
        raise ValueError("give either --height and --width or --buckets")
    family = None if shipped else read_family(Path(FLAGS.teacher))
    clip = family.clip if family else (shapes.FRAMES, shapes.SIZE, shapes.SIZE)
    sizes = zip(("frames", "height", "width"), clip, strict=True)
    frames, height, width = (FLAGS[name].value or size for name, size in sizes)
    fps, clips, chunk, dtype = FLAGS.fps, FLAGS.clips or 1, FLAGS.vae_chunk, "float32"
    if family:
        chunk, dtype = chunk or family.vae_chunk, "bfloat16"
        clips = FLAGS.clips or max(1, int(_SECONDS * (fps or family.fps) / frames))
        if fps is None and not (FLAGS.source or "").startswith(TFDS):
            fps = family.fps
    names = [field.name for field in dataclasses.fields(PrepareSettings) if field.name in FLAGS]
    given: dict[str, Any] = {name: FLAGS[name].value for name in names}
    if FLAGS.source and os.path.exists(FLAGS.source):  # a path, from wherever the job is resumed
        given["source"] = os.path.abspath(FLAGS.source)
    config = load(FLAGS.teacher_samples) if FLAGS.teacher_samples else None
    if config is not None:
        given["sampling"], clips = config.sampling, FLAGS.clips or 1
    given["sample"] = bool(FLAGS.sample or FLAGS.latents or config)
    given |= {"frames": frames, "fps": fps or None, "clips": clips, "vae_chunk": chunk, "teacher_dtype": dtype}
    given["buckets"] = tuple(map(_size, FLAGS.buckets or ())) or ((height, width),)
    given["max_text_length"] = FLAGS.max_text_length or (12 if shipped else 512)
    settings = PrepareSettings(**given)
    Loader(settings).items()  # what cannot be read is refused before the teacher is loaded
    index = jax.process_index() if FLAGS.process_index is None else FLAGS.process_index
    count = jax.process_count() if FLAGS.process_count is None else FLAGS.process_count
    if index >= count:
        raise ValueError(f"--process_index={index} must be below --process_count={count}")
    out = Path(FLAGS.out)
    summary = prepare(settings, load_generator(settings, config), out, index, count, FLAGS.workers)
    what = "samples" if settings.sampling else "clips" if settings.prompts is None else "prompts"
    rejected = f"{summary.rejected} rejected, see {out / 'rejected.jsonl'}" if summary.rejected else "0 rejected"
    print(f"{summary.clips} {what} of {summary.videos} in the list; {rejected}")
    if summary.waiting:
        print(f"{summary.waiting} shards are still with other hosts; host 0 finishes {out}.")
    else:
        print(f"Train on them with dollar train --config=… --config.data.name={out}")


def _size(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text.strip())):
        raise ValueError(f"--buckets must be sizes such as 480x832,832x480, not {text!r}")
    return int(found[1]), int(found[2])
