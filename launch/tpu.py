#!/usr/bin/env python3
"""Cloud TPU VMs from zero to a run that survives preemption; needs only Python and gcloud.

    python launch/tpu.py run --name=wan --zone=us-east5-a --type=v5p-16 --spot --watch --env=HF_TOKEN -- \\
        dollar train --config=configs/mine.py --workdir=/bucket/runs/wan

Every command may be given again: it does what is still missing. `run` makes the slice, installs the
committed tree on every worker, starts the command on all of them and follows worker 0; after a
preemption the same line makes the slice anew, and the run goes on from its newest checkpoint.
Arguments may stand in a file, one a line: python launch/tpu.py run @wan.flags -- …"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).resolve().with_name("worker.sh")
# The images that come without a framework: https://docs.cloud.google.com/tpu/docs/runtimes, and for tpu7x, which
# projects get as VMs on request only, https://github.com/AI-Hypercomputer/accelerator-microbenchmarks.
RUNTIMES = {
    "tpu7x": "v2-alpha-tpu7-ubuntu2404",
    "v6e": "v2-alpha-tpuv6e",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v4": "tpu-ubuntu2204-base",
}
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
GONE = ("FAILED", "SUSPENDED")
# Exit codes of worker.sh: the command is gone without an exit code; it ended with one; nothing runs; the command
# ended because SIGTERM came, the notice that the machine is taken away; `stop` ended it; the command refused its input.
KILLED, FAILED, IDLE, TERMINATED, STOPPED, REFUSED = 4, 5, 6, 7, 8, 9
# What is returned when the machine or the connection, not the command, is at fault.
LOST = (1, 255, KILLED, TERMINATED)
# So often in a row `run --watch` may fail to reach the slice and to start the command on it.
ATTEMPTS = 10


class LaunchError(Exception):
    """One sentence for the user."""


class Pod:
    """One queued resource: `slices` TPU slices that run one program."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.name, self.dry_run = args, args.name, args.dry_run

    # --- gcloud -----------------------------------------------------------------------------------

    def _gcloud(self, *words: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
        place = [f"--zone={self.args.zone}"]
        if self.args.project:
            place.append(f"--project={self.args.project}")
        command = ["gcloud", "compute", "tpus", "queued-resources", *words, *place]
        if self.dry_run:
            print(shlex.join(command))
            return subprocess.CompletedProcess(command, 0, "", "")
        try:
            if quiet:
                return subprocess.run(command, text=True, capture_output=True)
            return subprocess.run(command, text=True)
        except FileNotFoundError:
            raise LaunchError("gcloud is not installed; see https://cloud.google.com/sdk/docs/install") from None

    def _must(self, *words: str) -> None:
        if code := self._gcloud(*words).returncode:
            raise LaunchError(f"gcloud … {words[0]} {self.name} failed with code {code}; its message is above")

    def state(self) -> str | None:
        """The queued resource's state, or None where there is none of this name."""
        found = self._gcloud("describe", self.name, "--format=value(state.state)", quiet=True)
        if found.returncode == 0:
            return found.stdout.strip() or None
        if "NOT_FOUND" in found.stderr:
            return None
        raise LaunchError(" ".join(found.stderr.split()) or f"gcloud cannot describe {self.name}")

    def ssh(self, words: Sequence[str], everywhere: bool = True, extra: Sequence[str] = ()) -> int:
        """Runs worker.sh with these words on all workers, or on worker 0; returns the exit code."""
        where = "all" if everywhere else "0"
        command = shlex.join(["bash", "worker.sh", *words])
        return self._gcloud(
            "ssh", self.name, f"--node={where}", f"--worker={where}", f"--command={command}", *extra
        ).returncode

    def _ssh_or_fail(self, *words: str) -> None:
        if code := self.ssh(words):
            raise LaunchError(f"worker.sh {words[0]} failed on a worker of {self.name} with exit code {code}")

    # --- the steps --------------------------------------------------------------------------------

    def create(self) -> None:
        """Asks for the slice unless it is there, clears away what was preempted, waits until it is active."""
        seen = ""
        while (state := self.state()) != "ACTIVE":
            if state and state != seen:
                print(f"{self.name}: {state}", flush=True)
            seen = state or ""
            if state is None or state in GONE:
                if state in GONE:
                    self._delete()
                self._request()
                if self.dry_run or self.args.no_wait:
                    return
            elif state not in WAITING and state not in ("SUSPENDING", "DELETING"):
                raise LaunchError(f"{self.name} is in the state {state}, which this tool does not know")
            time.sleep(self.args.poll)

    def _request(self) -> None:
        a = self.args
        if not a.type:
            raise LaunchError("--type is missing: the slice to ask for, such as v5p-16 or v6e-64")
        runtime = a.runtime or RUNTIMES.get(a.type.split("-")[0])
        if runtime is None:
            raise LaunchError(
                f"--type={a.type} is of no known generation ({', '.join(RUNTIMES)}): name its image with --runtime"
            )
        nodes = [f"--node-id={a.name}"]
        if a.slices > 1:
            nodes = [f"--node-count={a.slices}", f"--node-prefix={a.name}"]
        options = [f"--{o}" for o in ("spot", "reserved") if getattr(a, o)]
        if a.valid_until_duration:
            options.append(f"--valid-until-duration={a.valid_until_duration}")
        if a.service_account:
            options.append(f"--service-account={a.service_account}")
        self._must("create", a.name, *nodes, f"--accelerator-type={a.type}", f"--runtime-version={runtime}", *options)

    def install(self) -> None:
        """The committed tree and its packages on every worker; at once where that commit is already there."""
        if code := self._install():
            raise LaunchError(f"installing failed on a worker of {self.name} with exit code {code}")

    def _install(self) -> int:
        commit = _git("rev-parse", "HEAD")
        with tempfile.TemporaryDirectory() as folder:
            archive = f"{folder}/dollar.tar.gz"
            if self.dry_run:
                print(shlex.join(["git", "archive", f"--output={archive}", commit]))
            else:
                _git("archive", f"--output={archive}", commit)
            files = [archive, str(WORKER), f"{self.name}:"]
            if code := self._gcloud("scp", *files, "--node=all", "--worker=all").returncode:
                return code
        return self.ssh(["install", commit, *([self.args.bucket] if self.args.bucket else [])])

    def run(self) -> None:
        """Creates, installs, starts and follows; with --watch again after every preemption, until it ends well."""
        if not self.args.command:
            raise LaunchError("what shall run? give it after --, such as: -- dollar train --config=…")
        if self.args.watch and self.args.detach:
            raise LaunchError("--watch follows the run and --detach leaves it: give one of them")
        self._name_uncommitted()
        unstarted, ever = 0, False
        while True:
            try:
                self.create()
                started, code = self._run_once()
            except LaunchError as error:
                if not (self.args.watch and ever):
                    raise
                print(error, file=sys.stderr)  # the network may be away for a while; the run goes on
                started, code = False, 1
            ever |= started
            if self.dry_run or code == 0:
                return
            if not (code in LOST or (code == FAILED and self._is_gone())):
                raise LaunchError(self._ending(code))
            unstarted = 0 if started else unstarted + 1
            if unstarted == ATTEMPTS:
                raise LaunchError(
                    f"{self.name} could not be set up or reached {ATTEMPTS} times in a row; the messages are above"
                )
            if not self.args.watch:
                raise LaunchError(
                    f"{self.name} or the way to it was lost; the same command again goes on where the run was"
                )
            print(f"{self.name} or the way to it was lost; looking again", flush=True)
            time.sleep(self.args.poll)

    def _run_once(self) -> tuple[bool, int]:
        """Installs, starts unless it runs, and follows; whether it started, and the failed step's exit code, or 0."""
        if code := self._install():
            return False, code
        code = self.ssh(["running", *self.args.command], everywhere=False)
        if code == IDLE or self.dry_run:
            # A worker may not have noticed yet that the others are gone.
            code = self.ssh(["stop"]) or self._send_environment() or self.ssh(["start", *self.args.command])
        if code or self.args.detach:
            return False, code
        return True, self.ssh(["follow"], everywhere=False)

    def _ending(self, code: int) -> str:
        if code == STOPPED:
            return f"{self.name} was told to stop; the same command again goes on where the run was"
        if code == REFUSED:
            return "the command refused its input; its message is above"
        return "the run failed; its message is above, more of it in python launch/tpu.py logs"

    def _is_gone(self) -> bool:
        """Whether the slice is taken away: worker 0 then fails because another worker went first."""
        time.sleep(self.args.poll)  # the state lags behind
        return self.state() != "ACTIVE"

    def _send_environment(self) -> int:
        """--env's variables as a file that only its owner reads, and that `start` deletes: no command line has them."""
        if not self.args.env:
            return 0
        with tempfile.TemporaryDirectory() as folder:  # of mode 700
            path = Path(folder, "dollar.env")
            path.touch(mode=0o600)
            path.write_text("".join(f"export {key}={shlex.quote(value)}\n" for key, value in self.args.env))
            return self._gcloud("scp", str(path), f"{self.name}:", "--node=all", "--worker=all").returncode

    def _name_uncommitted(self) -> None:
        """Says what the workers will not have; raises LaunchError when the command needs it."""
        new = _git("ls-files", "--others", "--exclude-standard", "-z").split("\0")
        changed = _git("diff", "--name-only", "-z", "HEAD").split("\0")
        files = [file for file in (*changed, *new) if file]
        named = {word.rpartition("=")[2].partition(":")[0] for word in self.args.command}  # --config=FILE:ARGUMENT
        if needed := [file for file in files if file in named]:
            raise LaunchError(f"{needed[0]} is not committed, so the workers would not have it: commit it first")
        if files:
            rest = f" and {len(files) - 8} more" if len(files) > 8 else ""
            print(f"note: not committed, so not installed: {', '.join(files[:8])}{rest}", file=sys.stderr)

    def attach(self) -> None:
        if code := self.ssh(["follow"], everywhere=False):
            lost = f"{self.name} or the way to it was lost; `run` goes on where the run was"
            raise LaunchError(lost if code in LOST else self._ending(code))

    def status(self) -> None:
        state = self.state()
        print(f"{self.name}: {state or 'does not exist'}")
        if state == "ACTIVE":
            self._ssh_or_fail("status")

    def stop(self) -> None:
        """Stops the command; the slice stays, and costs."""
        self._ssh_or_fail("stop")

    def logs(self) -> None:
        """Each worker's whole log as a file in --out."""
        if not self.dry_run:
            Path(self.args.out).mkdir(parents=True, exist_ok=True)
        if self.ssh(["log"], extra=[f"--output-directory={self.args.out}"]):
            raise LaunchError(f"the logs of {self.name} could not be fetched")
        print(f"the logs are in {self.args.out}")

    def profile(self) -> None:
        """Has every process trace its next steps into WORKDIR/profile, for XProf or TensorBoard."""
        self._ssh_or_fail("profile")

    def delete(self) -> None:
        if self.state() is None and not self.dry_run:
            print(f"{self.name} does not exist: nothing to delete")
            return
        self._delete()

    def _delete(self) -> None:
        self._must("delete", self.name, "--force", "--quiet")


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], text=True, capture_output=True)
    if done.returncode:
        raise LaunchError(f"git {words[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def variable(entry: str) -> tuple[str, str]:
    """Name and value of an environment variable: KEY=VALUE, or KEY for the value it has here."""
    key, given, value = entry.partition("=")
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key):
        raise argparse.ArgumentTypeError(f"{key!r} is no variable's name: give KEY or KEY=VALUE")
    if not given and key not in os.environ:
        raise argparse.ArgumentTypeError(f"{key} is not set here: set it, or give {key}=VALUE")
    return key, value if given else os.environ[key]


def bucket(name: str) -> str:
    """The bucket's name, which may be given as gs://NAME."""
    name = name.removeprefix("gs://").rstrip("/")
    if not re.fullmatch("[a-z0-9][a-z0-9._-]+[a-z0-9]", name):
        raise argparse.ArgumentTypeError(f"{name!r} is no bucket's name, such as my-bucket or gs://my-bucket")
    return name


class Parser(argparse.ArgumentParser):
    """Whose refusals are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; --help lists the arguments\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; what follows `--` is the command to run."""
    argv = list(argv)
    command: list[str] = []
    if "--" in argv:
        cut = argv.index("--")
        argv, command = argv[:cut], argv[cut + 1 :]
    common = Parser(add_help=False)
    common.add_argument("--name", required=True, help="of the queued resource and its TPU VMs")
    common.add_argument("--zone", required=True)
    common.add_argument("--project", help="gcloud's own unless given")
    common.add_argument("--dry-run", action="store_true", help="print each command instead of running it")
    slice_ = Parser(add_help=False)
    slice_.add_argument("--type", help="such as v5p-16 (8 chips: v4, v5p, tpu7x count cores) or v6e-64 (64 chips)")
    slice_.add_argument("--slices", type=int, default=1, help="more than one: joined by the data-centre network")
    capacity = slice_.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="cheaper, and may be taken away")
    capacity.add_argument("--reserved", action="store_true", help="from a reservation of the project's")
    slice_.add_argument("--runtime", help="software version of the VMs; known for " + ", ".join(RUNTIMES))
    slice_.add_argument("--service-account", help="that the VMs act as; it must be able to use the bucket")
    slice_.add_argument("--valid-until-duration", help="give up when not served by then, such as 6h")
    slice_.add_argument("--poll", type=float, default=30.0, help="seconds between two looks at the state")
    install = Parser(add_help=False)
    install.add_argument("--bucket", type=bucket, help="Cloud Storage bucket to mount at /bucket on every worker")

    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    commands = parser.add_subparsers(dest="do", required=True, metavar="COMMAND")

    def add(name: str, about: str, *parents: Parser) -> Parser:
        return commands.add_parser(
            name, help=about, description=about, parents=[common, *parents], fromfile_prefix_chars="@"
        )

    add("create", "ask for the slice and wait until it is there", slice_).add_argument(
        "--no-wait", action="store_true", help="only ask"
    )
    add("install", "put the committed tree and its packages on every worker", install)
    run = add("run", "create, install, start and follow; again: resume", slice_, install)
    run.add_argument("--watch", action="store_true", help="make the slice anew whenever it is taken away")
    run.add_argument(
        "--env",
        type=variable,
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="environment variable of the command; KEY alone takes the value it has here, which is never printed",
    )
    run.add_argument("--detach", action="store_true", help="do not follow the log")
    run.set_defaults(no_wait=False)
    add("attach", "follow worker 0's log to the end of the command; Ctrl-C leaves it running")
    add("status", "the slice's state, and what runs on each worker")
    add("logs", "fetch every worker's log").add_argument("--out", default="logs", help="folder")
    add("profile", "trace the next steps of the running training into WORKDIR/profile")
    add("stop", "stop the command on every worker; the slice stays, and costs")
    add("delete", "give the slice back")
    args = parser.parse_args(argv)
    if command and args.do != "run":
        parser.error(f"{args.do} takes no command after --")
    args.command = command
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        getattr(Pod(args), args.do)()
    except LaunchError as error:
        print(f"tpu.py {args.do}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nleft; what runs on the TPU goes on, and the same command again picks it up", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
