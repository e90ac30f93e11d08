"""What the commands share: their flags, the configuration, and how what ends them is reported."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import io
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from dollar_jax.cli import HELP

if TYPE_CHECKING:
    from dollar_jax.config import DistillConfig

FLAGS = flags.FlagValues()
# Errors whose message says all.
EXPECTED = (flags.Error, ValueError, OSError, SyntaxError, FloatingPointError)


def define(kind: str, name: str, default: Any, *rest: Any, required: bool = False) -> None:
    """A flag of an absl kind: `rest` is its help, and for numbers the least value, for an enum its values before."""
    getattr(flags, f"DEFINE_{kind}")(name, default, *rest, flag_values=FLAGS, required=required)


def check_flags(arguments: Sequence[str] = ()) -> None:
    """Raises ValueError for a path in a bucket, which would pass for a folder's, and for a flag whose value is empty or
    no number that makes sense: --config's check themselves."""
    for text in [*arguments, *(f"--{name}={FLAGS[name].value}" for name in FLAGS if name != "prompt")]:
        if found := re.match(r"(?:--[^=]+=)?[a-z0-9]+://([^/]*)", text):
            mend = f"mount it, as in gcsfuse {found[1]} /mnt/bucket, and give its path there"
            raise ValueError(f"{text} is in a bucket, and only folders are read and written: {mend}")
    for name in FLAGS:
        value, most = FLAGS[name].value, 2**32 - 1 if name == "seed" else 10**6
        if name == "workdir" and value and os.path.isfile(value):
            raise ValueError(f"--workdir={value} is a file, where a folder was expected")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int | float) and not name.startswith("config") and not 0 <= one <= most:
                raise ValueError(f"--{name}={one} must be from 0 to {most}")
            if one == "" and name != "prompt":
                raise ValueError(f"--{name} is empty: give it a value, or leave it out")


class Unbreakable:
    """A stream whose reader may be gone, as with `| head -1`, or whose disk is full: neither must end a run."""

    def __init__(self, stream: Any):
        self._stream = io.StringIO() if stream is None else stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._tolerant():
            self._stream.write(text)
        return len(text)

    def flush(self, last: bool = False) -> None:
        """After the `last` one Python's own, at exit, makes no exit code of what could not be written."""
        with self._tolerant(last):
            self._stream.flush()

    @contextlib.contextmanager
    def _tolerant(self, last: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not last and not isinstance(error, BrokenPipeError):
                return  # there may be room again later
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


def define_workdir(default: str | None = None) -> None:
    define("string", "workdir", default, "Folder of the run.", required=default is None)


def define_vae() -> None:
    define("string", "vae", None, "Folder of a VAE with a smaller decoder, by dollar pretrain --decoder, to draw with.")


def define_config(arguments: list[str]) -> None:
    """--config=NAME, which is read at once and taken out of the arguments, and a flag for each of its settings."""
    early = flags.FlagValues()
    early.set_gnu_getopt(True)  # --config may come after other arguments
    flags.DEFINE_string("config", None, "", flag_values=early)
    rest = early(["", *arguments], known_only=True)[1:]
    if (name := early.config) is None or any(argument in HELP for argument in arguments):
        about = "Experiment: a name such as wan_1_3b, or a file such as configs/demo.py, with :vsd, :cd or :vsd+cd for "
        about += "a part of its losses, or :vsd+cd+lrm,hpsv2=FOLDER to name its rewards. Settings change with "
        about += "--config.student.optimiser.learning_rate=1e-4; dollar config --config=NAME lists them all."
        arguments[:] = [argument for argument in arguments if not argument.startswith("--config.")]
        define("string", "config", None, about, required=True)
        return
    from ml_collections import config_flags

    from dollar_jax.config import DistillConfig
    from dollar_jax.experiment import as_config_dict, load
    from dollar_jax.fields import check_path

    arguments[:] = rest
    path, colon, losses = name.partition(":")
    config = as_config_dict(load(path, *([losses] if colon else [])))
    for argument in rest:
        if override := re.match(r"--?(no)?config\.([^=]+)", argument):
            check_path(DistillConfig, override[2])
            if config.pretrain is None and override[2].startswith("pretrain"):
                raise ValueError(f"config.pretrain is None in {path}: there is no config.{override[2]} to set")
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=FLAGS, sys_argv=arguments)
    except (LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"a --config. flag sets what is not there: {error}") from error


def given_config() -> DistillConfig:
    """The configuration that the command line asks for."""
    from dollar_jax.config import distill_config

    return distill_config(FLAGS.config)


def prepare_jax(one_heap: bool = False) -> None:
    """The compile cache, so that a second run starts at once. Without an accelerator glibc keeps what is freed, whose
    pages need not be cleared again; of threads only up to 64 MiB at once, unless they share `one_heap`: a third off
    networks with larger buffers, but where small ones run every request then looks for room in what compilers left."""
    import jax

    from dollar_jax.distributed import share_cpu

    if not any(map(glob.glob, ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*"))):
        with contextlib.suppress(OSError, AttributeError):  # M_MMAP_MAX, M_TRIM_THRESHOLD and M_ARENA_MAX of malloc.h
            for option in [(-4, 0), (-1, 2**31 - 1), (-8, 1)][: 2 + one_heap]:
                ctypes.CDLL("libc.so.6").mallopt(*option)
    devices: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if devices > 1:
        share_cpu(devices)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "dollar_jax"))
    jax.config.update("jax_compilation_cache_dir", cache)


def report_error(name: str, error: BaseException) -> int:
    """Shows what ended a command, in a sentence where it was to be expected; the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print(f"\ndollar {name}: {str(error) or 'interrupted; run it again to go on'}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    if isinstance(error, EXPECTED):
        print(f"dollar {name}: {_sentence(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 6 if isinstance(error, FloatingPointError) else 2)
    traceback.print_exception(error)
    return 1


def _sentence(error: Exception) -> str:
    """The error in one line: absl names every missing flag on a line of its own."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.errno in (errno.ENOENT, errno.EACCES, errno.EROFS):
        return f"{error.filename} cannot be used ({error.strerror}): check the path, and whether it may be written to"
    if missing := re.findall(r"^flag (--\w+)=None: Flag ", text, re.MULTILINE):
        return f"{' and '.join(missing)} must be given"
    text = " ".join(line.strip() for line in text.splitlines() if line.strip())
    text = re.sub(r"\[Errno \d+\] ", "", text)
    text = re.sub(r"invalid literal for int\(\) with base 10: .*", "it must be a whole number", text)
    return text or type(error).__name__
