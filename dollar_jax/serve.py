"""`dollar serve`: a page and an HTTP API to try a run's student, one drawing at a time. GET /api says what may be asked
for, with defaults; POST some of it as a JSON object, such as {"prompt": "a red circle", "teacher": true}, to get
{"student": {"video": URL, "seconds": S}, "teacher": …}, or {"error": SENTENCE} with status 400; 503 if many wait. What
continues an image takes one as "image", the bytes of a file in base64."""

import base64
import contextlib
import dataclasses
import io
import json
import math
import threading
import time
from http.server import SimpleHTTPRequestHandler
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from dollar_jax.data.clip import clip_fps
from dollar_jax.files import parse_json
from dollar_jax.generate import draw_videos, make_generator, subset, teacher_folder, video_keys
from dollar_jax.run import choose_teacher, drawing_config, restore_student
from dollar_jax.video import write_video
from dollar_jax.weights.pipeline import read_family

_MOST_PIXELS = 4  # times those of the run's own clips
_MOST_BYTES, _MOST_IMAGE_BYTES = 2**16, 2**24  # of a request, and of the image in one
_PIXEL = "R0lGODlhAQABAIAAAMLCwgAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw=="  # a file of one, to warm up with
_KEPT = 64  # videos


class Studio:
    """A run's student, and its teacher, to draw with; `folder` is served as it is."""

    def __init__(self, workdir: Path, folder: Path, most_waiting: int, longest_prompt: int, vae: str | None = None):
        self.config, self.folder = drawing_config(workdir, vae=vae), folder
        self.longest_prompt = longest_prompt
        given = self.config.data.given_frames or read_family(teacher_folder(self.config.teacher)).conditioned
        self.most_bytes = _MOST_BYTES + _MOST_IMAGE_BYTES * bool(given)
        self.generator = self._sized = make_generator(self.config, hold_vae=True)
        self.params = restore_student(workdir, self.generator)
        self._turn, self._places = threading.Lock(), threading.BoundedSemaphore(most_waiting + 1)
        steps = len(self.config.student.timesteps)
        self.defaults = {"prompt": "", "steps": steps, "seed": 0, "teacher": False, "clip": self.generator.clip}
        self.defaults |= {"image": ""} if given else {}
        self.example = {"prompt": "warm up"} | ({"image": _PIXEL} if given else {})
        (folder / "api").write_text(json.dumps(self.defaults))
        (folder / "index.html").write_bytes((resources.files("dollar_jax") / "assets" / "serve.html").read_bytes())

    def sample(self, request: Any) -> dict[str, Any]:
        """Draws when its turn comes; raises ValueError for what cannot be drawn, BlockingIOError if too many wait."""
        if not isinstance(request, dict) or request.keys() - self.defaults.keys():
            raise ValueError(f"the request must be a JSON object with some of {', '.join(self.defaults)}")
        prompt, steps, seed, teacher, clip, *image = ({**self.defaults, **request}).values()
        if not isinstance(prompt, str) or not 0 < len(prompt.strip()) <= self.longest_prompt:
            raise ValueError(f"prompt must be a text of 1 to {self.longest_prompt} characters")
        for name, value, low, high in ("steps", steps, 1, self.config.sampling.num_steps), ("seed", seed, 0, 2**31 - 1):
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}")
        if type(teacher) is not bool:
            raise ValueError("teacher must be true or false")
        own, clip = self.generator.clip, tuple(clip) if isinstance(clip, list | tuple) else ()
        if [type(n) for n in clip] != [int] * 3 or min(clip) < 1 or math.prod(clip) > _MOST_PIXELS * math.prod(own):
            raise ValueError(f"clip must be frames, height and width, at most {_MOST_PIXELS} times the run's {own}")
        _ = dataclasses.replace(self.generator, clip=clip).latent_shape  # raises ValueError if it does not divide
        if not self._places.acquire(blocking=False):
            raise BlockingIOError("too many are waiting already; try again later")
        try:
            with self._turn:
                return self._draw(prompt, steps, seed, teacher, clip, *image)  # pyright: ignore[reportArgumentType]
        finally:
            self._places.release()

    def _draw(
        self, prompt: str, steps: int, seed: int, teacher: bool, clip: tuple[int, int, int], *image: str
    ) -> dict[str, Any]:
        if clip not in (self.generator.clip, self._sized.clip):  # whose programs are kept
            self._sized = dataclasses.replace(self.generator, clip=clip)
        generator = self.generator if clip == self.generator.clip else self._sized
        generator.given.clear()
        try:
            generator.continue_from({prompt: io.BytesIO(base64.b64decode(*image, validate=True))} if image else {})
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError("image must be an image file's bytes in base64, the first frame") from error
        samplers = {"student": (generator.student_sampler(subset(self.config.student.timesteps, steps)), self.params)}
        if teacher:
            samplers["teacher"] = choose_teacher(generator, self.config)[:2]
        drawn = {}
        for name, (draw, params) in samplers.items():
            begun = time.perf_counter()
            (video,) = draw_videos(generator, draw, params, [prompt], video_keys(seed, 1), 1)
            file, seconds = f"{time.time_ns()}.mp4", round(time.perf_counter() - begun, 3)
            fps, scale = clip_fps(self.config.data, generator.pipeline.family.fps), max(1, 256 // max(clip[1:]))
            write_video(self.folder / file, video[0], fps, scale)
            drawn[name] = {"video": f"/{file}", "seconds": seconds}
        for old in sorted(self.folder.glob("*.mp4"))[:-_KEPT]:
            old.unlink()
        return drawn


class Handler(SimpleHTTPRequestHandler):
    """Gives what is in the studio's folder, and draws what is posted."""

    timeout = 60  # seconds that a client may be silent
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, "": "application/json"}  # the file `api`

    def __init__(self, studio: Studio, *given: Any):
        self.studio = studio
        super().__init__(*given, directory=str(studio.folder))

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # browsers go away when they like
            super().handle()

    def do_POST(self) -> None:
        size, answer = self.headers.get("Content-Length", ""), {}
        try:
            if not size.isdecimal() or int(size) > self.studio.most_bytes:
                raise ValueError(f"post at most {self.studio.most_bytes} bytes of JSON")
            status, answer = 200, self.studio.sample(parse_json(self.rfile.read(int(size)).decode(), "the request"))
        except (ValueError, BlockingIOError) as error:
            status, answer = 400 if isinstance(error, ValueError) else 503, {"error": str(error)}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        """Requests are not logged."""
