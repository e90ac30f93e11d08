"""`dollar serve`."""

import contextlib
import functools
import signal
import tempfile
from http.server import ThreadingHTTPServer
from pathlib import Path

from dollar_jax.cli.base import FLAGS, define, define_vae, define_workdir, prepare_jax


def define_flags(_: list[str]) -> None:
    define_workdir()
    define_vae()
    define("string", "host", "127.0.0.1", "Where to listen; 0.0.0.0 is open to whoever reaches this machine.")
    define("integer", "port", 8000, "0 takes a free one.", 0, 65535)
    define("integer", "queue", 8, "The most requests that wait for their turn.", 0)
    define("integer", "longest_prompt", 1000, "In characters.", 1)


def run() -> None:
    prepare_jax()
    from dollar_jax.serve import Handler, Studio

    try:
        server = ThreadingHTTPServer((FLAGS.host, FLAGS.port), Handler)
    except OSError as error:
        raise OSError(f"--host={FLAGS.host} --port={FLAGS.port}: {error}; --port=0 takes a free one") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves no folder behind
    with server, tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        studio = Studio(Path(FLAGS.workdir), Path(folder), FLAGS.queue, FLAGS.longest_prompt, FLAGS.vae)
        print("compiling", flush=True)
        studio.sample(studio.example)
        server.RequestHandlerClass = functools.partial(Handler, studio)
        print(f"The student answers at http://{FLAGS.host}:{server.server_port}/ until Ctrl-C.", flush=True)
        server.serve_forever()
