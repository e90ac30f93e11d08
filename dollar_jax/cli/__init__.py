"""The command line, `dollar <command> [--flags]`. Commands import what they need when they run: help comes at once."""

import contextlib
import importlib
import keyword
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from dollar_jax import __version__

# What other libraries say of themselves is not about a user's run.
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "2", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
HELP = ("-h", "--help", "-help")


class Command(NamedTuple):
    """`takes` names the arguments besides flags, if any. The command's file has `define_flags`, which declares the
    flags of a list of arguments and may take some out, and `run`, which gets the arguments that are no flags."""

    summary: str
    takes: str = ""


COMMANDS = {
    "demo": Command("distil the default teacher, sample, measure, report"),
    "train": Command("distil a teacher; resumes what it finds in the workdir"),
    "config": Command("every setting of an experiment: value, meaning, default, range"),
    "prepare": Command("videos and captions to a data set of latents"),
    "sample": Command("draw videos from a run's student, or from its teacher"),
    "serve": Command("a page and an API to try a run's student"),
    "evaluate": Command("sample and measure a run again"),
    "import": Command("a diffusers pipeline to a teacher folder that shards", "SRC DST"),
    "import-reward": Command("published weights of a reward on CLIP to the folder that is trained on", "SRC DST"),
    "export": Command("a run's student to a folder that diffusers loads", "DST"),
    "plan": Command("compile for TPU chips that need not be there: memory, operations, time"),
    "pretrain": Command("train the default domain's teacher from nothing"),
    "reproduce": Command("the paper's ablation on the default domain, as one page"),
    "vbench-score": Command("VBench's result files to its Quality, Semantic and Total", "FILE…"),
}

EXIT_CODES = {
    0: "the work was done",
    1: "a defect of this program, with a traceback",
    2: "refused: a flag, a setting or a file, named in one sentence",
    3: "a checkpoint could not be saved",
    4: "there are checkpoints, but none is whole",
    5: "another run is using the workdir",
    6: "training stopped by itself before its last step",
    7: "another process of the run died",
    130: "Ctrl-C, in training after the step under way was saved",
    143: "SIGTERM, in training after the step under way was saved",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns one of EXIT_CODES."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in ("", "help", *HELP):
        print(_overview())
        return 0 if name else 2
    if name == "--version":
        print(f"dollar {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"dollar: there is no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # Only now what takes time to import.
    from dollar_jax.cli.base import EXPECTED, FLAGS, Unbreakable, check_flags, report_error

    command = COMMANDS[name]
    module = importlib.import_module(f"dollar_jax.cli.{name.replace('-', '_')}{'_' * keyword.iskeyword(name)}")
    for flag in list(FLAGS):
        delattr(FLAGS, flag)
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    out, err = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.define_flags(rest)
            if any(argument in HELP for argument in rest):
                usage = f"dollar {name} {command.takes}".rstrip()
                print(f"{usage}: {command.summary}\n\n{FLAGS.get_help()}")
                return 0
            if (extra := FLAGS([f"dollar {name}", *rest])[1:]) and not command.takes:
                raise ValueError(f"unexpected argument {extra[0]!r}; dollar {name} --help lists its flags")
            check_flags(extra)
            module.run(*extra)
        except (*EXPECTED, KeyboardInterrupt) as error:
            if os.environ.get("DOLLAR_TRACEBACK") and not isinstance(error, KeyboardInterrupt):
                raise
            return report_error(name, error)
        finally:
            out.flush(last=True)
            err.flush(last=True)
    return 0


def _overview() -> str:
    lines = ["dollar: few-step text-to-video distillation by VSD, consistency and latent reward", ""]
    lines += [f"  dollar {name:<13} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "Exit codes:", *(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items())]
    return "\n".join([*lines, "", "dollar <command> --help lists a command's flags, dollar --version the version."])
