"""The command line: `dollar <command> [--flags]`."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

FLAGS = flags.FlagValues()
DEMO_CONFIG = Path(__file__).parent.parent / "configs" / "demo.py"


# Errors whose message says all.
EXPECTED = (flags.Error, ValueError, OSError, SyntaxError, FloatingPointError)


class Command(NamedTuple):
    """`define` declares the flags of a list of arguments, `run` does the work once they are parsed."""

    summary: str
    define: Callable[[list[str]], None]
    run: Callable[[], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0 when it did its work, 2 when it was asked for something impossible."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(
            f"dollar: there is no command {name!r}; there are {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    command = COMMANDS[name]
    for flag in list(FLAGS):
        delattr(FLAGS, flag)
    command.define(rest)
    if any(argument in ("-h", "--help", "-help") for argument in rest):
        print(f"dollar {name}: {command.summary}\n\n{FLAGS.get_help()}")
        return 0
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        try:
            extra = FLAGS([f"dollar {name}", *rest])[1:]
        except (AttributeError, KeyError) as error:
            raise ValueError(f"the configuration has no field {error.args[0]}") from error
        if extra:
            raise ValueError(f"unexpected argument {extra[0]!r}; dollar {name} --help lists its flags")
        command.run()
    except (*EXPECTED, KeyboardInterrupt) as error:
        if os.environ.get("DOLLAR_TRACEBACK") and not isinstance(error, KeyboardInterrupt):
            raise
        return _report(name, error)
    return 0


def _report(name: str, error: BaseException) -> int:
    """Shows what ended a command, in a sentence where it was to be expected; the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print(f"\ndollar {name}: interrupted; run it again to go on", file=sys.stderr)
        return 130
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
    lines = [
        "dollar: few-step text-to-video distillation by VSD, consistency and latent reward",
        "",
    ]
    lines += [f"  dollar {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "dollar <command> --help lists a command's flags."])


# --- flags ----------------------------------------------------------------------------------------


def _define_workdir(default: str | None = None) -> None:
    flags.DEFINE_string("workdir", default, "Folder of the run.", flag_values=FLAGS)
    if default is None:
        flags.mark_flag_as_required("workdir", FLAGS)


def _define_config(arguments: list[str]) -> None:
    from ml_collections import config_flags

    config_flags.DEFINE_config_file(
        "config", None, "Experiment, such as configs/demo.py or configs/demo.py:vsd; single settings "
        "change with --config.student.optimiser.learning_rate=1e-4.", flag_values=FLAGS,
        sys_argv=arguments,
    )  # fmt: skip
    flags.mark_flag_as_required("config", FLAGS)


def _define_demo(_: list[str]) -> None:
    _define_workdir("runs/demo")
    flags.DEFINE_integer("seed", 0, "Seed of everything.", flag_values=FLAGS)
    flags.DEFINE_bool("quick", False, "A short run that only shows the way.", flag_values=FLAGS)


def _define_train(arguments: list[str]) -> None:
    _define_config(arguments)
    _define_workdir()
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, the same for every process; not needed on Cloud "
        "TPU, GKE and SLURM, where the environment says it.", flag_values=FLAGS,
    )  # fmt: skip
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
    flags.DEFINE_enum("what", "train", ["train", "sample", "decode", "text"], "The program.", flag_values=FLAGS)
    flags.DEFINE_bool("search", False, "Try meshes and remat policies, and rank them.", flag_values=FLAGS)
    flags.DEFINE_string("json", None, "File for the figures as JSON.", flag_values=FLAGS)


def _define_sample(_: list[str]) -> None:
    _define_workdir()
    flags.DEFINE_multi_string("prompt", None, "What to show; may be given more than once.", flag_values=FLAGS)
    flags.mark_flag_as_required("prompt", FLAGS)
    flags.DEFINE_integer("steps", 4, "Sampling steps.", 1, flag_values=FLAGS)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", flag_values=FLAGS)
    flags.DEFINE_integer("num", 4, "Videos per prompt.", 1, flag_values=FLAGS)
    flags.DEFINE_bool(
        "teacher", False, "Sample the teacher, in its own number of steps unless --steps is given.",
        flag_values=FLAGS,
    )  # fmt: skip
    flags.DEFINE_bool("ema", True, "The student's moving average rather than its raw weights.", flag_values=FLAGS)
    flags.DEFINE_integer("scale", 8, "Enlargement of every pixel.", 1, flag_values=FLAGS)
    flags.DEFINE_string("out", "samples.mp4", "The .mp4 or .gif: a row per prompt.", flag_values=FLAGS)


def _define_evaluate(_: list[str]) -> None:
    _define_workdir()
    flags.DEFINE_string("out", None, "The JSON of measures; WORKDIR/metrics.json by default.", flag_values=FLAGS)
    flags.DEFINE_bool("quick", False, "Fewer videos.", flag_values=FLAGS)


# --- commands -------------------------------------------------------------------------------------


def _load_demo_config() -> Any:
    if not DEMO_CONFIG.is_file():
        raise FileNotFoundError(f"{DEMO_CONFIG} is missing: install from a checkout with pip install -e .")
    return runpy.run_path(str(DEMO_CONFIG))["get_config"]()


def _distill_config(config: Any) -> Any:
    from dollar_jax.config import DistillConfig, from_config

    return from_config(DistillConfig, config)


def _prepare_jax() -> None:
    """The compile cache, so that a second run starts at once."""
    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "dollar_jax"))
    jax.config.update("jax_compilation_cache_dir", cache)


def _demo() -> None:
    from dollar_jax.demo import demo

    _prepare_jax()
    config = dataclasses.replace(_distill_config(_load_demo_config()), seed=FLAGS.seed)
    if FLAGS.quick:
        config = dataclasses.replace(config, steps=20, data=dataclasses.replace(config.data, train_videos=128))
    workdir = Path(FLAGS.workdir)
    page = demo(config, workdir, FLAGS.quick)
    print_table(workdir / "metrics.json")
    print(f"\nLook at {page} in a browser; the videos are in {workdir / 'videos'}.")


def _train() -> None:
    import jax

    from dollar_jax import distributed
    from dollar_jax.data.latents import load_data
    from dollar_jax.demo import make_generator
    from dollar_jax.train import train

    _prepare_jax()
    config, workdir = _distill_config(FLAGS.config), Path(FLAGS.workdir)
    with distributed.joined(
        FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id, lambda error: _report("train", error)
    ):
        generator = make_generator(config)
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


def _sample() -> None:
    from dollar_jax.demo import make_generator
    from dollar_jax.evaluate.video import grid, write_video
    from dollar_jax.frames import to_uint8
    from dollar_jax.generate import subset, video_keys
    from dollar_jax.train import read_config, restore_student

    _prepare_jax()
    workdir = Path(FLAGS.workdir)
    config = read_config(workdir)
    out = Path(FLAGS.out)
    if out.suffix not in (".mp4", ".gif"):
        raise ValueError(f"--out={out} must end in .mp4 or .gif")
    if not FLAGS.teacher:
        timesteps = subset(config.student.timesteps, FLAGS.steps)
    generator = make_generator(config)
    if FLAGS.teacher:
        steps = FLAGS.steps if FLAGS["steps"].present else config.sampling.num_steps
        draw = generator.teacher_sampler(steps, config.sampling.guidance_weight)
        params = generator.pipeline.transformer.params
    else:
        draw = generator.student_sampler(timesteps)
        params = restore_student(workdir, generator, FLAGS.ema)
    prompts = [prompt for prompt in FLAGS.prompt for _ in range(FLAGS.num)]
    latent = draw(params, video_keys(FLAGS.seed, len(prompts)), generator.text(prompts))
    frames = to_uint8(generator.decode(latent))
    write_video(out, grid(frames, columns=FLAGS.num), scale=FLAGS.scale)
    print(out)


def _evaluate() -> None:
    from dollar_jax.demo import evaluate, make_generator
    from dollar_jax.train import read_config

    _prepare_jax()
    workdir = Path(FLAGS.workdir)
    out = Path(FLAGS.out or workdir / "metrics.json")
    evaluate(workdir, make_generator(read_config(workdir)), out, FLAGS.quick)
    print_table(out)


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
    "train": Command("distil a teacher; resumes what it finds in the workdir", _define_train, _train),
    "sample": Command("draw videos from a run's student, or from its teacher", _define_sample, _sample),
    "evaluate": Command("sample and measure a run again", _define_evaluate, _evaluate),
    "plan": Command("compile for TPU chips that need not be there: memory, operations, time", _define_plan, _plan),
    "pretrain": Command("train the default domain's teacher from nothing", _define_pretrain, _pretrain),
}
