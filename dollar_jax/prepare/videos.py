"""Clips from video files: decoded, turned upright, resampled in time, scaled to cover a size and cropped to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import Colorspace, Interpolation

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif")
_UNSPECIFIED = 2  # FFmpeg's number for a colour space that nobody wrote down
_QUALITY = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class Unusable(ValueError):
    """Why a video cannot be used."""


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """What is cut out of a video.

    `buckets` are the (height, width) a clip may have; a video goes to the one nearest to its own shape, is
    scaled to cover it and cropped to it. With `fps` the frame nearest to each tick of that rate is taken, with
    None every frame. Up to `clips` clips of `frames` frames follow each other from the video's start.
    """

    frames: int
    buckets: tuple[tuple[int, int], ...]
    fps: float | None
    crop: Literal["centre", "random"]
    clips: int


Timed = tuple[Fraction, Fraction, av.VideoFrame]  # start and duration in seconds


def read_clips(file: Any, settings: ClipSettings, rng: np.random.Generator) -> list[np.ndarray]:
    """The clips, uint8 [t, h, w, 3], of a path or an open binary file; `rng` places a random crop.

    Raises Unusable when there is no whole clip in it. Clips before damage count, and nothing after the last clip
    wanted is read.
    """
    try:
        with av.open(file) as container:
            stream = next((s for s in container.streams.video if not _is_cover(s)), None)
            if stream is None:
                raise Unusable("holds no video")
            # Videos are decoded side by side; a decoder's own threads make damaged frames come out by chance.
            stream.codec_context.thread_count = 1
            aspect = stream.sample_aspect_ratio or Fraction(1)
            return clips_of(_decode(container, stream), settings, rng, aspect)
    except (FFmpegError, UnicodeDecodeError) as error:
        raise Unusable(f"cannot be read as a video: {getattr(error, 'strerror', error)}") from error


def clips_of(
    frames: Iterable[Timed], settings: ClipSettings, rng: np.random.Generator, aspect: Fraction = Fraction(1)
) -> list[np.ndarray]:
    """`read_clips` of decoded frames with their times; `aspect` is a pixel's width to its height."""
    view, clips, clip = None, [], []
    before: tuple[av.VideoFrame, np.ndarray] | None = None
    try:
        for frame in resample(frames, settings.fps):
            if view is None:
                view = View.of(frame, aspect, settings, rng)
            if before is None or before[0] is not frame:  # a frame held over several ticks is scaled once
                before = frame, view(frame)
            clip.append(before[1])
            if len(clip) == settings.frames:
                clips.append(np.stack(clip))
                clip = []
                if len(clips) == settings.clips:
                    break
    except (Unusable, FFmpegError) as error:
        if not clips:
            reason = getattr(error, "strerror", error)
            raise Unusable(f"is damaged after {len(clip)} good frames: {reason}") from error
    if not clips:
        rate = "" if settings.fps is None else f" at {settings.fps:g} frames per second"
        raise Unusable(f"is too short: {len(clip)} frames{rate}, a clip has {settings.frames}")
    return clips


def array_frames(video: np.ndarray) -> Iterator[Timed]:
    """A decoded video uint8 [t, h, w, 3] as frames, one second each for want of times."""
    for i, image in enumerate(video):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        yield Fraction(i), Fraction(1), frame


def resample(frames: Iterable[Timed], fps: float | None) -> Iterator[av.VideoFrame]:
    """The frame nearest in time to each tick of `fps` from the first frame on; with None, every frame.

    The last frame stays for its own duration. Of two equally near frames the earlier one is taken.
    """
    if fps is None:
        yield from (frame for _, _, frame in frames)
        return
    tick = 1 / Fraction(fps).limit_denominator(1001)
    due = held = None
    for time, duration, frame in frames:
        if held is None or due is None:
            due = time
        else:
            while due <= (held[0] + time) / 2:
                yield held[2]
                due += tick
        held = time, duration, frame
    if held is not None and due is not None:
        while due < held[0] + held[1]:
            yield held[2]
            due += tick


@dataclasses.dataclass(frozen=True)
class View:
    """How a video's frames become its clip's: stored (height, width), crop, and the display matrix's turns."""

    stored: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    turn: tuple[bool, bool, bool]  # transposed, then flipped up-down, then left-right
    colorspace: int | None

    @staticmethod
    def of(frame: av.VideoFrame, aspect: Fraction, settings: ClipSettings, rng: np.random.Generator) -> View:
        """The view of a video by its first frame."""
        turn = _turn(frame)
        height, width = Fraction(frame.height), frame.width * aspect
        if turn[0]:
            height, width = width, height
        wanted = math.log(width / height)
        size = min(settings.buckets, key=lambda s: abs(math.log(s[1] / s[0]) - wanted))
        scale = max(size[0] / height, size[1] / width)
        # Never less than the size, whatever the rounding.
        covering = tuple(max(round(a * scale), b) for a, b in zip((height, width), size, strict=True))
        spare = [a - b for a, b in zip(covering, size, strict=True)]
        random = settings.crop == "random"
        corner = tuple(int(rng.integers(s + 1)) if random else s // 2 for s in spare)
        # Players take untagged large pictures for BT.709 and small ones for BT.601.
        large = frame.width >= 1280 or frame.height > 576
        guess = Colorspace.ITU709 if frame.colorspace == _UNSPECIFIED and large else None
        stored = covering[::-1] if turn[0] else covering
        return View(stored, (corner[0], corner[1]), size, turn, guess)  # type: ignore[arg-type]

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [h, w, 3]; raises Unusable when the frame is damaged."""
        if frame.is_corrupt:
            raise Unusable("a frame cannot be decoded whole")
        scaled = frame.reformat(
            width=self.stored[1],
            height=self.stored[0],
            format="rgb24",
            src_colorspace=self.colorspace,
            interpolation=_QUALITY,
        )
        image = scaled.to_ndarray()
        transposed, up_down, left_right = self.turn
        if transposed:
            image = image.swapaxes(0, 1)
        image = image[:: -1 if up_down else 1, :: -1 if left_right else 1]
        (y, x), (height, width) = self.corner, self.size
        return np.ascontiguousarray(image[y : y + height, x : x + width])


def _decode(container: Any, stream: Any) -> Iterator[Timed]:
    """Frames in the order they are shown."""
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    last = None
    for frame in container.decode(stream):
        duration = frame.duration * frame.time_base if frame.duration else 1 / rate
        if frame.pts is None:
            time = Fraction(0) if last is None else last + 1 / rate
        else:
            time = frame.pts * frame.time_base
        if last is None or time > last:  # a time that runs backwards is a muxer's error
            yield time, duration, frame
            last = time


def _is_cover(stream: Any) -> bool:
    """Whether it is the cover picture of a piece of music."""
    return bool(stream.disposition & Disposition.attached_pic)


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Transposed, then flipped up-down, then left-right: the display matrix, to the nearest quarter turn."""
    entry = frame.side_data.get("DISPLAYMATRIX")
    if entry is None:
        return False, False, False
    # x' = a x + c y, y' = b x + d y, rows (a, b, u), (c, d, v), (x, y, w) in FFmpeg's libavutil/display.h.
    a, b, _, c, d = np.frombuffer(bytes(entry), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, d < 0, a < 0
    return True, b < 0, c < 0
