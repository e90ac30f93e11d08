"""The command line, `dollar <command> [--flags]`, with a file for each command.

What a command needs is imported when it runs, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from dollar_jax import __version__
from dollar_jax.cli import (
    config,
    demo,
    evaluate,
    export,
    import_,
    plan,
    prepare,
    pretrain,
    reproduce,
    sample,
    train,
    vbench_score,
)
from dollar_jax.cli.base import EXPECTED, FLAGS, HELP, Unbreakable, check_flags, report_error

COMMANDS = {
    "demo": demo.COMMAND,
    "train": train.COMMAND,
    "config": config.COMMAND,
    "prepare": prepare.COMMAND,
    "sample": sample.COMMAND,
    "evaluate": evaluate.COMMAND,
    "import": import_.COMMAND,
    "export": export.COMMAND,
    "plan": plan.COMMAND,
    "pretrain": pretrain.COMMAND,
    "reproduce": reproduce.COMMAND,
    "vbench-score": vbench_score.COMMAND,
}

EXIT_CODES = {
    0: "the work was done",
    1: "a defect of this program, with a traceback",
    2: "refused: a flag, a setting or a file, named in one sentence",
    3: "a checkpoint could not be saved",
    4: "there are checkpoints, but none is whole",
    5: "another run is using the workdir",
    6: "training stopped by itself before its last step",
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
    command = COMMANDS[name]
    for flag in list(FLAGS):
        delattr(FLAGS, flag)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        command.define(rest)
        if any(argument in HELP for argument in rest):
            usage = f"dollar {name} {command.takes}".rstrip()
            print(f"{usage}: {command.summary}\n\n{FLAGS.get_help()}")
            return 0
        extra = FLAGS([f"dollar {name}", *rest])[1:]
        if extra and not command.takes:
            raise ValueError(f"unexpected argument {extra[0]!r}; dollar {name} --help lists its flags")
        check_flags()
        with contextlib.redirect_stdout(Unbreakable(sys.stdout)), contextlib.redirect_stderr(Unbreakable(sys.stderr)):
            command.run(*extra)
    except (*EXPECTED, KeyboardInterrupt) as error:
        if os.environ.get("DOLLAR_TRACEBACK") and not isinstance(error, KeyboardInterrupt):
            raise
        return report_error(name, error)
    return 0


def _overview() -> str:
    lines = ["dollar: few-step text-to-video distillation by VSD, consistency and latent reward", ""]
    lines += [f"  dollar {name:<12} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "Exit codes:", *(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items())]
    return "\n".join([*lines, "", "dollar <command> --help lists a command's flags, dollar --version the version."])
