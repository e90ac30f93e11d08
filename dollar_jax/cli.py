"""The command line: `dollar <command> [--flags]`."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

FLAGS = flags.FlagValues()


# Errors whose message says all.
EXPECTED = (flags.Error, ValueError, OSError, SyntaxError, FloatingPointError)


class Command(NamedTuple):
    """`define` declares the flags of a list of arguments, `run` does the work once they are parsed.

    `run` gets the arguments that are no flags; `takes` says what they are, and is empty where none are.
    """

    summary: str
    define: Callable[[list[str]], None]
    run: Callable[..., None]
    takes: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0 when it did its work, 2 when it was asked for something impossible."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"dollar: there is no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    for flag in list(FLAGS):
        delattr(FLAGS, flag)
    command.define(rest)
    if any(argument in ("-h", "--help", "-help") for argument in rest):
        usage = f"dollar {name} {command.takes}".rstrip()
        print(f"{usage}: {command.summary}\n\n{FLAGS.get_help()}")
        return 0
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        try:
            extra = FLAGS([f"dollar {name}", *rest])[1:]
        except (AttributeError, KeyError) as error:
            raise ValueError(f"the configuration has no field {error.args[0]}") from error
        if extra and not command.takes:
            raise ValueError(f"unexpected argument {extra[0]!r}; dollar {name} --help lists its flags")
        command.run(*extra)
    except (*EXPECTED, KeyboardInterrupt) as error:
        if os.environ.get("DOLLAR_TRACEBACK") and not isinstance(error, KeyboardInterrupt):
            raise
        return _report(name, error)
    return 0


def _report(name: str, error: BaseException) -> int:
    """Shows what ended a command, in a sentence where it was to be expected; the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print(f"\ndollar {name}: {str(error) or 'interrupted; run it again to go on'}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    if isinstance(error, EXPECTED):
        print(f"dollar {name}: {_sentence(error)}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1


def _sentence(error: Exception) -> str:
    """The error in one line: absl lists every missing flag, and reports a config's error by its traceback."""
    text = str(error)
    if missing := re.findall(r"^flag (--\w+)=None: Flag ", text, re.MULTILINE):
        return f"{' and '.join(missing)} must be given"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "Traceback (most recent call last)" in text or text.startswith("Configuration is not available"):
        lines = [re.sub(r"^\w+Error: ", "", lines[-1])]
        lines[0] = lines[0].rpartition("earlier failure to load: ")[2]
    text = re.sub(r"\[Errno \d+\] ", "", " ".join(lines))
    text = re.sub(r"invalid literal for int\(\) with base 10: .*", "it must be a whole number", text)
    return text or type(error).__name__


def _overview() -> str:
    lines = ["dollar: few-step text-to-video distillation by VSD, consistency and latent reward", ""]
    lines += [f"  dollar {name:<12} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "dollar <command> --help lists a command's flags."])


# --- flags ----------------------------------------------------------------------------------------


def _define_workdir(default: str | None = None) -> None:
    flags.DEFINE_string("workdir", default, "Folder of the run.", flag_values=FLAGS)
    if default is None:
        flags.mark_flag_as_required("workdir", FLAGS)


def _define_config(arguments: list[str]) -> None:
    from ml_collections import config_flags

    config_flags.DEFINE_config_file(
        "config",
        None,
        "Experiment, such as configs/demo.py or configs/demo.py:vsd; single settings "
        "change with --config.student.optimiser.learning_rate=1e-4.",
        flag_values=FLAGS,
        sys_argv=arguments,
    )
    flags.mark_flag_as_required("config", FLAGS)


def _define_demo(_: list[str]) -> None:
    _define_workdir("runs/demo")
    flags.DEFINE_integer("seed", 0, "Seed of everything.", flag_values=FLAGS)
    flags.DEFINE_bool("quick", False, "A short run that only shows the way.", flag_values=FLAGS)


def _define_train(arguments: list[str]) -> None:
    _define_pretrain(arguments)
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of process 0, the same for every process; not needed on Cloud "
        "TPU, GKE and SLURM, where the environment says it.",
        flag_values=FLAGS,
    )
    flags.DEFINE_integer("num_processes", None, "Processes of the run.", 1, flag_values=FLAGS)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", 0, flag_values=FLAGS)


def _define_pretrain(arguments: list[str]) -> None:
    _define_config(arguments)
    _define_workdir()


def _define_plan(arguments: list[str]) -> None:
    _define_config(arguments)
    flags.DEFINE_string("topology", None, "Chips, such as v5p:2x2x2 or v6e:8x8.", flag_values=FLAGS)
    flags.mark_flag_as_required("topology", FLAGS)
    flags.DEFINE_string("mesh", None, "Such as fsdp=16,context=4; config.mesh unless given.", flag_values=FLAGS)
    flags.DEFINE_string("video", None, "HEIGHTxWIDTHxFRAMES; the data's own unless given.", flag_values=FLAGS)
    programs = ["train", "sample", "decode", "text", "import"]
    flags.DEFINE_enum("what", "train", programs, "The program.", flag_values=FLAGS)
    flags.DEFINE_bool("search", False, "Try meshes and remat policies, and rank them.", flag_values=FLAGS)
    flags.DEFINE_string("json", None, "File for the figures as JSON.", flag_values=FLAGS)


def _define_distillation(arguments: list[str]) -> None:
    _define_train(arguments)
    flags.DEFINE_bool("profile", False, "Leave an XProf trace of three steps in WORKDIR/profile.", flag_values=FLAGS)


def _define_sample(_: list[str]) -> None:
    _define_workdir()
    flags.DEFINE_multi_string("prompt", [], "What to show; may be given more than once.", flag_values=FLAGS)
    flags.DEFINE_string("prompts_file", None, "A text file with a prompt per line.", flag_values=FLAGS)
    flags.DEFINE_integer("steps", 4, "Sampling steps.", 1, flag_values=FLAGS)
    flags.DEFINE_multi_integer(
        "seed", [0], "Seed of the noise, which all prompts share; may be given more than once.", flag_values=FLAGS
    )
    flags.DEFINE_integer("num", 4, "Videos per prompt and seed.", 1, flag_values=FLAGS)
    flags.DEFINE_integer("batch_size", 16, "Videos drawn at a time.", 1, flag_values=FLAGS)
    flags.DEFINE_bool(
        "teacher", False, "Sample the teacher, in its own number of steps unless --steps is given.", flag_values=FLAGS
    )
    flags.DEFINE_bool(
        "beside_teacher", False, "Put the teacher's video from the same noise to the left of each.", flag_values=FLAGS
    )
    flags.DEFINE_bool("ema", True, "The student's moving average rather than its raw weights.", flag_values=FLAGS)
    for name, what in (("frames", "Frames of a video"), ("height", "Height"), ("width", "Width")):
        flags.DEFINE_integer(name, None, f"{what}, instead of the run's own.", 1, flag_values=FLAGS)
    flags.DEFINE_float("fps", 8, "Frames per second of the files.", 0.1, flag_values=FLAGS)
    flags.DEFINE_integer("scale", 8, "Enlargement of every pixel.", 1, flag_values=FLAGS)
    flags.DEFINE_string(
        "out",
        "samples.mp4",
        "The .mp4 or .gif, a row per prompt; or a folder, for a file per video.",
        flag_values=FLAGS,
    )


def _define_evaluate(_: list[str]) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run whose student is measured.", flag_values=FLAGS)
    flags.DEFINE_string(
        "videos", None, "Measure this folder of {prompt}-{index}.mp4 instead of drawing any.", flag_values=FLAGS
    )
    flags.DEFINE_string("reference", None, "With --videos: a folder of real videos.", flag_values=FLAGS)
    flags.DEFINE_string(
        "reward", None, "With --videos: a reward by its name; clip is the fit to the prompts.", flag_values=FLAGS
    )
    flags.DEFINE_string("reward_folder", None, "The weights of a reward that has some.", flag_values=FLAGS)
    flags.DEFINE_string(
        "features",
        None,
        "Folder with AlexNet's weights (safetensors, torchvision's names; LPIPS's heads lin0 "
        "to lin4 if you have them) for diversity and Fréchet distance; by default the VAE of the run's teacher.",
        flag_values=FLAGS,
    )
    flags.DEFINE_string(
        "out", None, "The JSON of measures; metrics.json in the workdir or the folder by default.", flag_values=FLAGS
    )
    flags.DEFINE_bool("quick", False, "Fewer videos.", flag_values=FLAGS)
    flags.DEFINE_string(
        "vbench", None, "Write the videos VBench asks for into this folder, and measure nothing.", flag_values=FLAGS
    )
    flags.DEFINE_string(
        "prompts_file",
        None,
        "With --vbench: its VBench_full_info.json, or a text file with a prompt per line.",
        flag_values=FLAGS,
    )
    flags.DEFINE_integer("num", 5, "With --vbench: videos per prompt.", 1, flag_values=FLAGS)
    flags.DEFINE_integer("steps", 4, "With --vbench: sampling steps.", 1, flag_values=FLAGS)
    flags.DEFINE_integer("seed", 0, "With --vbench: seed of the noise.", flag_values=FLAGS)
    flags.DEFINE_integer("batch_size", 16, "With --vbench: videos drawn at a time.", 1, flag_values=FLAGS)
    flags.DEFINE_bool("teacher", False, "With --vbench: the teacher's videos.", flag_values=FLAGS)


def _define_reproduce(_: list[str]) -> None:
    _define_workdir()
    flags.DEFINE_bool("quick", False, "Two seeds, a fifth of the steps, fewer videos.", flag_values=FLAGS)
    flags.DEFINE_integer("seeds", None, "Seeds per method, instead of 3.", 1, flag_values=FLAGS)
    flags.DEFINE_integer("steps", None, "Training steps, instead of the demo's.", 1, flag_values=FLAGS)


def _define_vbench_score(_: list[str]) -> None:
    flags.DEFINE_string("json", None, "Where to write the scores too.", flag_values=FLAGS)
    flags.DEFINE_bool(
        "allow_missing", False, "Average over the dimensions given, though not all are.", flag_values=FLAGS
    )


def _define_import(_: list[str]) -> None:
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16"],
        "Of the weights of transformer and text encoder on disk; the VAE's stay float32.",
        flag_values=FLAGS,
    )


def _define_export(_: list[str]) -> None:
    _define_workdir()
    flags.DEFINE_bool("ema", True, "The student's moving average rather than its raw weights.", flag_values=FLAGS)
    flags.DEFINE_enum("dtype", "float32", ["float32", "float16", "bfloat16"], "Of the student.", flag_values=FLAGS)
    flags.DEFINE_bool(
        "adapter", False, "Only the adapters of a run with config.lora, for load_lora_weights.", flag_values=FLAGS
    )
    flags.DEFINE_string("shard_size", "5GB", "The most that a weight file holds.", flag_values=FLAGS)


def _define_prepare(_: list[str]) -> None:
    def define(kind: str, name: str, default: Any, *rest: Any) -> None:
        getattr(flags, f"DEFINE_{kind}")(name, default, *rest, flag_values=FLAGS)

    define(
        "string",
        "source",
        None,
        "Videos with captions: a folder (each caption in a .txt beside its video, or a metadata.csv or .jsonl), a "
        ".csv or .jsonl manifest with video and caption, WebDataset .tar files or a folder of them, or tfds:NAME.",
    )
    define("string", "prompts", None, "Prompts without videos instead: a .txt, one a line, a .csv or a .jsonl.")
    define("string", "out", None, "Folder of the data set.")
    flags.mark_flag_as_required("out", FLAGS)
    define("string", "teacher", "moving_shapes", "The pipeline whose VAE and text encoder encode.")
    define("integer", "frames", None, "Frames of a clip; the shipped teacher's are known.", 1)
    define("integer", "height", None, "Height of a clip in pixels.", 1)
    define("integer", "width", None, "Width of a clip in pixels.", 1)
    define(
        "list",
        "buckets",
        None,
        "Several sizes instead, such as 480x832,832x480: each video goes to the one nearest to its shape.",
    )
    define("float", "fps", None, "Frames per second of a clip; without it every frame of a video counts.", 1e-3)
    define("enum", "crop", "centre", ["centre", "random"], "Where a clip is cut out of a video of another shape.")
    define("integer", "clips", 1, "At most so many clips of a video, one after another from its start.", 1)
    define("bool", "sample", False, "Keep a sample of the VAE's posterior, not its mean and deviation.")
    define("enum", "dtype", "float16", ["float16", "float32"], "Of latents and text states on disk.")
    define("integer", "max_text_length", None, "Tokens of a caption; 512 but for the shipped teacher.", 1)
    define("integer", "seed", 0, "Seed of random crops and samples.")
    define("integer", "shard_size", 256, "Videos to a shard; a killed job loses at most the shard it was at.", 1)
    define("integer", "batch_size", 1, "Clips encoded at once by each device.", 1)
    define("integer", "workers", os.cpu_count() or 1, "Videos decoded side by side.", 1)
    define("string", "split", "train", "Split of a tfds: source.")
    define("integer", "process_index", None, "Which of the hosts this is, by default as jax counts them.", 0)
    define("integer", "process_count", None, "How many hosts share the work, all writing to --out.", 1)
    define(
        "string",
        "beam",
        None,
        "Share the work through Apache Beam (pip install -e '.[beam]'), with these options of its pipeline, such "
        "as '--runner=FlinkRunner --parallelism=64', or '' for this machine. All workers must see --source, "
        "--teacher and --out under the same paths.",
    )


# --- commands -------------------------------------------------------------------------------------


def _distill_config(config: Any) -> Any:
    from dollar_jax.config import distill_config

    return distill_config(config)


def _prepare_jax() -> None:
    """The compile cache, so that a second run starts at once."""
    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "dollar_jax"))
    jax.config.update("jax_compilation_cache_dir", cache)


def _demo() -> None:
    from dollar_jax.config import changed
    from dollar_jax.demo import demo
    from dollar_jax.experiment import load

    _prepare_jax()
    config = changed(load("demo"), {"seed": FLAGS.seed})
    if FLAGS.quick:
        config = changed(config, {"steps": 20, "data.train_videos": 128})
    workdir = Path(FLAGS.workdir)
    page = demo(config, workdir, FLAGS.quick)
    print_table(workdir / "metrics.json")
    print(f"\nLook at {page} in a browser; the videos are in {workdir / 'videos'}.")


def _train() -> None:
    import jax

    from dollar_jax import distributed
    from dollar_jax.data.latents import load_data
    from dollar_jax.generate import make_generator
    from dollar_jax.sharding import make_mesh
    from dollar_jax.train import train

    _prepare_jax()
    config, workdir = _distill_config(FLAGS.config), Path(FLAGS.workdir)
    if FLAGS.profile:
        visibility = dataclasses.replace(config.visibility, profile_steps=3)
        config = dataclasses.replace(config, visibility=visibility)
    with distributed.joined(
        FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id, lambda error: _report("train", error)
    ):
        generator = make_generator(config, mesh=make_mesh(config.mesh))
        train(config, workdir, generator, load_data(config, generator, workdir))
        if jax.process_index() == 0:
            print(f"The student is in {workdir}; sample it with dollar sample --workdir={workdir} --prompt=…")


def _plan() -> None:
    import json

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tqdm import tqdm

    from dollar_jax import plan

    config = _distill_config(FLAGS.config)
    if FLAGS.mesh:
        config = dataclasses.replace(config, mesh=plan.parse_mesh(FLAGS.mesh))
    rest = (FLAGS.topology, FLAGS.what, plan.parse_video(FLAGS.video) if FLAGS.video else None)
    if FLAGS.search:
        found = plan.rank(list(tqdm(plan.search(config, *rest), "compiling", unit="plan")))
    else:
        found = [plan.plan(config, *rest)]
    if not found:
        raise ValueError("no mesh divides this batch over these chips: change config.batch_size")
    print(plan.table(found))
    if FLAGS.json:
        fields = [dataclasses.asdict(p) for p in found]
        Path(FLAGS.json).write_text(json.dumps(fields if FLAGS.search else fields[0], indent=2) + "\n")


def _pretrain() -> None:
    from dollar_jax.pretrain import pretrain

    _prepare_jax()
    config = _distill_config(FLAGS.config).pretrain
    if config is None:
        raise ValueError("this configuration has no pretrain settings; configs/demo.py has")
    print(f"The teacher is in {pretrain(config, Path(FLAGS.workdir))}.")


def _prepare() -> None:
    import jax

    from dollar_jax.data import shapes
    from dollar_jax.generate import SHIPPED_TEACHERS
    from dollar_jax.prepare.clips import Loader
    from dollar_jax.prepare.job import prepare
    from dollar_jax.prepare.settings import PrepareSettings
    from dollar_jax.prepare.shards import load_generator

    _prepare_jax()
    sizes = {"frames": shapes.FRAMES, "height": shapes.SIZE, "width": shapes.SIZE, "max_text_length": 12}
    if FLAGS.teacher not in SHIPPED_TEACHERS:
        sizes = {"frames": None, "height": None, "width": None, "max_text_length": 512}
    sizes = {name: FLAGS[name].value or value for name, value in sizes.items()}
    if FLAGS.buckets:
        if FLAGS.height or FLAGS.width:
            raise ValueError("give either --height and --width or --buckets")
        sizes["height"] = sizes["width"] = 0
    for name, value in sizes.items():
        if value is None:
            raise ValueError(f"--{name} must be given for a teacher of your own")
    settings = PrepareSettings(
        source=FLAGS.source,
        split=FLAGS.split,
        prompts=FLAGS.prompts,
        teacher=FLAGS.teacher,
        frames=sizes["frames"],
        buckets=tuple(map(_size, FLAGS.buckets)) if FLAGS.buckets else ((sizes["height"], sizes["width"]),),
        fps=FLAGS.fps,
        crop=FLAGS.crop,
        clips=FLAGS.clips,
        sample=FLAGS.sample,
        dtype=FLAGS.dtype,
        max_text_length=sizes["max_text_length"],
        seed=FLAGS.seed,
        shard_size=FLAGS.shard_size,
        batch_size=FLAGS.batch_size,
    )
    Loader(settings).items()  # what cannot be read is refused before the teacher is loaded
    index = jax.process_index() if FLAGS.process_index is None else FLAGS.process_index
    count = jax.process_count() if FLAGS.process_count is None else FLAGS.process_count
    if index >= count:
        raise ValueError(f"--process_index={index} must be below --process_count={count}")
    out, hand_out = Path(FLAGS.out), None
    if FLAGS.beam is not None:
        from dollar_jax.prepare.beam import hand_out_with_beam

        if count > 1:
            raise ValueError("with --beam the work is shared by its runner: start dollar prepare on one host only")
        hand_out = functools.partial(hand_out_with_beam, settings, out, shlex.split(FLAGS.beam))
    generator = load_generator(settings)
    summary = prepare(settings, generator, out, index, count, FLAGS.workers, hand_out)
    what = "clips" if settings.prompts is None else "prompts"
    rejected = f"{summary.rejected} rejected, see {out / 'rejected.jsonl'}" if summary.rejected else "0 rejected"
    print(f"{summary.clips} {what} of {summary.videos} in the list; {rejected}")
    if summary.waiting:
        print(f"{summary.waiting} shards are still with other hosts; host 0 finishes {out}.")
    else:
        print(f"Train on them with dollar train --config=… --config.data.name={out}")


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if not found:
        raise ValueError(f"--buckets must be sizes such as 480x832,832x480, not {text!r}")
    return int(found[1]), int(found[2])


def _sample() -> None:
    from dollar_jax.data.clip import clip_size
    from dollar_jax.evaluate.files import check_output, read_prompts, write_samples
    from dollar_jax.generate import make_generator, sample_prompts
    from dollar_jax.run import read_config

    _prepare_jax()
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
        rows.append(_teacher(generator, FLAGS.steps if given else config.sampling.num_steps))
    if not FLAGS.teacher:
        rows.append(_student(generator, workdir, config, FLAGS.steps, FLAGS.ema))
    videos = [
        sample_prompts(generator, draw, params, prompts, FLAGS.seed, FLAGS.num, FLAGS.batch_size, config.mesh)
        for draw, params in rows
    ]
    write_samples(out, prompts, videos, FLAGS.fps, FLAGS.scale)
    print(out)


def _teacher(generator: Any, steps: int) -> tuple[Any, Any]:
    """A sampler and its parameters, as is `_student`'s."""
    draw = generator.teacher_sampler(steps, generator.sampling.guidance_weight)
    return draw, generator.pipeline.transformer.params


def _student(generator: Any, workdir: Path, config: Any, steps: int, ema: bool = True) -> tuple[Any, Any]:
    from dollar_jax.generate import subset
    from dollar_jax.run import restore_student

    draw = generator.student_sampler(subset(config.student.timesteps, steps))
    return draw, restore_student(workdir, generator, ema)


def _evaluate() -> None:
    from dollar_jax.evaluate.features import alexnet_features, vae_features
    from dollar_jax.evaluate.run import evaluate
    from dollar_jax.generate import make_generator
    from dollar_jax.run import read_config

    _prepare_jax()
    if not FLAGS.workdir and not FLAGS.videos:
        raise ValueError("--workdir or --videos must be given")
    if FLAGS.vbench:
        _vbench_videos()
        return
    features = alexnet_features(Path(FLAGS.features)) if FLAGS.features else None
    if FLAGS.workdir:
        generator = make_generator(read_config(Path(FLAGS.workdir)))
        features = features or vae_features(generator)
        if not FLAGS.videos:
            out = Path(FLAGS.out or Path(FLAGS.workdir) / "metrics.json")
            evaluate(Path(FLAGS.workdir), generator, out, FLAGS.quick, features=features)
            print_table(out)
    if FLAGS.videos:
        from dollar_jax.evaluate.folder import measure_folder
        from dollar_jax.evaluate.metrics import write_metrics
        from dollar_jax.rewards import get_reward

        folder = Path(FLAGS.videos)
        reference = Path(FLAGS.reference) if FLAGS.reference else None
        reward = get_reward(FLAGS.reward, FLAGS.reward_folder) if FLAGS.reward else None
        measures = measure_folder(folder, features, reference, reward)
        write_metrics(FLAGS.out or folder / "metrics.json", measures)
        for name, value in measures.items():
            print(f"{name:26}{value:.6g}" if isinstance(value, float) else f"{name:26}{value}")


def _vbench_videos() -> None:
    from dollar_jax.evaluate.vbench import read_vbench_prompts, write_videos
    from dollar_jax.generate import make_generator
    from dollar_jax.run import read_config

    if not FLAGS.workdir or not FLAGS.prompts_file:
        raise ValueError("--vbench needs --workdir and --prompts_file, VBench's own list of prompts")
    workdir, folder = Path(FLAGS.workdir), Path(FLAGS.vbench)
    config = read_config(workdir)
    counts = read_vbench_prompts(Path(FLAGS.prompts_file), FLAGS.num)
    generator = make_generator(config)
    if FLAGS.teacher:
        draw, params = _teacher(generator, config.sampling.num_steps)
    else:
        draw, params = _student(generator, workdir, config, FLAGS.steps)
    drawn = write_videos(folder, counts, generator, draw, params, FLAGS.seed, FLAGS.batch_size, config.mesh)
    print(f"{drawn} videos drawn; {folder} holds all of this process's {sum(counts.values())}")


def _reproduce() -> None:
    from dollar_jax.experiment import load
    from dollar_jax.reproduce import reproduce

    _prepare_jax()
    page = reproduce(functools.partial(load, "demo"), Path(FLAGS.workdir), FLAGS.quick, FLAGS.seeds, FLAGS.steps)
    print(page.with_suffix(".md").read_text())
    print(f"Look at {page} in a browser; {page.with_suffix('.csv')} holds every cell.")


def _vbench_score(*files: str) -> None:
    import json

    from dollar_jax.evaluate.metrics import write_metrics
    from dollar_jax.evaluate.vbench import aggregate, read_results

    if not files:
        raise ValueError("give VBench's result files: dollar vbench-score FILE…")
    result = dataclasses.asdict(aggregate(read_results(map(Path, files)), FLAGS.allow_missing))
    if FLAGS.json:
        write_metrics(FLAGS.json, result)
    print(json.dumps(result, indent=2))


def _import(*names: str) -> None:
    from dollar_jax.weights.importer import import_pipeline

    if len(names) != 2:
        raise ValueError("give two names: the diffusers folder, or OWNER/NAME on the hub, and the new folder")
    source, folder = names
    import_pipeline(source, folder, FLAGS.dtype)
    print(f"The teacher is in {folder}; train with --config.teacher={folder}.")


def _export(*names: str) -> None:
    from dollar_jax.export import export_run

    if len(names) != 1:
        raise ValueError("give the new folder: dollar export --workdir=RUN FOLDER")
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    size = re.fullmatch(r"([1-9]\d*)([KMG]B)", FLAGS.shard_size)
    if size is None:
        raise ValueError(f"--shard_size={FLAGS.shard_size} must be a size such as 500MB or 5GB")
    export_run(
        Path(FLAGS.workdir),
        Path(names[0]),
        ema=FLAGS.ema,
        dtype=FLAGS.dtype,
        shard_size=int(size[1]) * units[size[2]],
        adapter=FLAGS.adapter,
    )
    print(f"The student is in {names[0]}; its README.md says how diffusers samples it.")


def print_table(path: Path) -> None:
    """The rows of a metrics.json on the terminal."""
    import json

    metrics = json.loads(path.read_text())
    columns = ("alignment", "reward", "vendi", "flicker", "nfe", "diffusion_seconds")
    print("\n" + f"{'':16}" + "".join(f"{name:>18}" for name in columns))
    for name, row in metrics.items():
        if isinstance(row, dict) and "alignment" in row:
            cells = (f"{row[c]:>18.4g}" if c in row else f"{'–':>18}" for c in columns)
            print(f"{name:16}" + "".join(cells))
    faster = [f"{k[8:]} steps ×{v:.1f}" for k, v in metrics.items() if k.startswith("speedup_")]
    print(f"faster than the teacher: {', '.join(faster)}; {metrics['seconds']:.0f} s in all")


COMMANDS = {
    "demo": Command("distil the default teacher, sample, measure, report", _define_demo, _demo),
    "train": Command("distil a teacher; resumes what it finds in the workdir", _define_distillation, _train),
    "prepare": Command("videos and captions to a data set of latents", _define_prepare, _prepare),
    "sample": Command("draw videos from a run's student, or from its teacher", _define_sample, _sample),
    "evaluate": Command("sample and measure a run again", _define_evaluate, _evaluate),
    "import": Command("a diffusers pipeline to a teacher folder that shards", _define_import, _import, "SRC DST"),
    "export": Command("a run's student to a folder that diffusers loads", _define_export, _export, "DST"),
    "plan": Command("compile for TPU chips that need not be there: memory, operations, time", _define_plan, _plan),
    "pretrain": Command("train the default domain's teacher from nothing", _define_pretrain, _pretrain),
    "reproduce": Command("the paper's ablation on the default domain, as one page", _define_reproduce, _reproduce),
    "vbench-score": Command(
        "VBench's result files to its Quality, Semantic and Total", _define_vbench_score, _vbench_score, "FILE…"
    ),
}
