"""Clips from video files: decoded, turned upright, resampled in time, scaled to cover a size and cropped to it.

A frame becomes what a good player shows on a BT.709 screen; docs/data.md has the table."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from dollar_jax.prepare.colour import HDR, TO_BT709, to_bt709
from dollar_jax.prepare.filters import Crop, Timed, filtered, pixel_crop

SUFFIXES = (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm", ".ogv", ".avi", ".divx", ".dv", ".mpg")
SUFFIXES += (".mpeg", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".mxf", ".gif", ".apng")
_QUALITY = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_NEVER_SHOWN = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent

# What cannot be shown as it was meant, by FFmpeg's numbers.
_UNTAGGED = (0, 2, 3)  # colour spaces: RGB, which has none, unspecified, reserved
_MATRICES = (*_UNTAGGED, 1, 4, 5, 6, 7, 9)  # BT.709, FCC, BT.601 twice, SMPTE 240M, BT.2020
_TRANSFERS = {ColorTrc.LINEAR: "linear", ColorTrc.LOG: "logarithmic", ColorTrc.LOG_SQRT: "logarithmic"}
_TRANSFERS |= {ColorTrc.SMPTE428: "digital cinema (SMPTE 428)"}
_PRIMARIES = (8, 10, 11)  # film, XYZ, digital cinema: their white is not D65
_STEREO = (1, 2, 3, 4, 5, 6, 7)  # AVStereo3DType without 2D, and unspecified: then one eye's view is decoded
_PROJECTIONS = {0: "equirectangular", 1: "cube map", 2: "equirectangular", 3: "half equirectangular", 5: "fisheye"}


_MOST_COVERING = 16  # times the longer side of a clip


class Unusable(ValueError):
    """Why a video cannot be used."""


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """What is cut out of a video. `buckets` are the (height, width) a clip may have; a video goes to the one nearest to
    its own shape, is scaled to cover it and cropped to it. With `fps` the frame nearest to each tick of that rate is
    taken, with None every frame. Up to `clips` clips of `frames` frames follow each other from the video's start."""

    frames: int
    buckets: tuple[tuple[int, int], ...]
    fps: float | None
    crop: Literal["centre", "random"]
    clips: int


def read_clips(file: Any, settings: ClipSettings, rng: np.random.Generator) -> list[np.ndarray]:
    """The clips, uint8 [t, h, w, 3], of a path or an open binary file; `rng` places a random crop. Raises Unusable when
    there is no whole clip in it. Clips before damage count, and nothing after the last clip wanted is read."""
    try:
        with av.open(f"file:{file}" if isinstance(file, str) else file) as container:
            stream = shown_stream(container.streams.video)
            # Videos are decoded side by side; a decoder's own threads make damaged frames come out by chance.
            stream.codec_context.thread_count = 1
            aspect = stream.sample_aspect_ratio or Fraction(1)
            crop = _container_crop(file, stream.index) if "matroska" in container.format.name else (0, 0, 0, 0)
            return clips_of(filtered(_decode(container, stream), crop), settings, rng, aspect)
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
        if view is None and isinstance(error, Unusable):
            raise
        if not clips:
            reason = getattr(error, "strerror", error)
            raise Unusable(f"is damaged after {len(clip)} good frames: {reason}") from error
    if not clips:
        rate = "" if settings.fps is None else f" at {settings.fps:g} frames per second"
        raise Unusable(f"is too short: {len(clip)} frames{rate}, a clip has {settings.frames}")
    return clips


def hard_cut(clip: np.ndarray) -> int | None:
    """The first frame of another shot in a clip uint8 [t, h, w, 3]; None for one shot. PySceneDetect's
    AdaptiveDetector, on RGB: a frame differs from the one before by at least 15 of 255 on average, and by 3 times as
    much as its two neighbours on either side do, unlike motion. After a flash, no cut, the picture before is back."""
    rows, columns = (max(side // 64, 1) for side in clip.shape[1:3])
    small = clip[:, ::rows, ::columns].astype(np.float32)
    change = np.abs(np.diff(small, axis=0)).mean((1, 2, 3))
    for i in np.flatnonzero(change >= 15):
        around = np.concatenate([change[max(i - 2, 0) : i], change[i + 1 : i + 3]])
        apart = (small[max(i - 1, 0)], small[i + 1]), (small[i], small[min(i + 2, len(small) - 1)])
        returns = min(np.abs(before - after).mean() for before, after in apart) < 15
        if len(around) and change[i] >= 3 * around.mean() and not returns:
            return int(i) + 1
    return None


def array_frames(video: np.ndarray) -> Iterator[Timed]:
    """A decoded video uint8 [t, h, w, 3] as frames, one second each for want of times."""
    for i, image in enumerate(video):
        yield Fraction(i), Fraction(1), av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")


def resample(frames: Iterable[Timed], fps: float | None) -> Iterator[av.VideoFrame]:
    """The frame nearest in time to each tick of `fps` from the first frame on; with None, every frame. The last frame
    stays for its own duration. Of two equally near frames the earlier one is taken."""
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
    """How a video's frames become its clip's: stored (height, width), crop, turns and colours."""

    stored: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    turn: tuple[bool, bool, bool]  # transposed, then flipped up-down, then left-right
    colorspace: int | None
    light: tuple[int, int] | None  # transfer characteristic and primaries, where they are not BT.709's
    shape: float  # width to height, in pixels

    @staticmethod
    def of(frame: av.VideoFrame, aspect: Fraction, settings: ClipSettings, rng: np.random.Generator) -> "View":
        """The view of a video by its first frame."""
        check_showable(frame)
        turn = _turn(frame)
        height, width = Fraction(frame.height), frame.width * aspect
        if turn[0]:
            height, width = width, height
        wanted = math.log(width / height)
        size = min(settings.buckets, key=lambda s: abs(math.log(s[1] / s[0]) - wanted))
        scale = max(size[0] / height, size[1] / width)
        # Never less than the size, whatever the rounding.
        covering = tuple(max(round(a * scale), b) for a, b in zip((height, width), size, strict=True))
        if max(covering) > _MOST_COVERING * max(size):
            raise Unusable(f"is {float(width / height):.3g} times as wide as high: a clip of it is next to nothing")
        spare = [a - b for a, b in zip(covering, size, strict=True)]
        corner = tuple(int(rng.integers(s + 1)) if settings.crop == "random" else s // 2 for s in spare)
        transfer, primaries, untagged = frame.color_trc, frame.color_primaries, frame.colorspace in _UNTAGGED
        hdr = transfer in HDR
        if hdr and primaries not in (*TO_BT709, ColorPrimaries.BT709):
            primaries = ColorPrimaries.BT2020
        # Players take untagged large pictures for BT.709 and small ones for BT.601.
        large = frame.width >= 1280 or frame.height > 576
        guess = Colorspace.BT2020 if hdr else Colorspace.ITU709 if large else Colorspace.ITU601
        stored: Any = covering[::-1] if turn[0] else covering
        light = (transfer, primaries) if hdr or primaries in TO_BT709 else None
        space, shape = guess if untagged else None, frame.width / frame.height
        return View(stored, (corner[0], corner[1]), size, turn, space, light, shape)

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [h, w, 3]; raises Unusable when the frame is damaged."""
        if frame.is_corrupt:
            raise Unusable("a frame cannot be decoded whole")
        if abs(frame.width / frame.height / self.shape - 1) > 0.02:  # other sizes of one shape are common
            raise Unusable(f"its picture becomes one of {frame.width} × {frame.height}")
        grey_tv = len(frame.format.components) == 1 and frame.color_range == ColorRange.MPEG
        if any(c.is_alpha for c in frame.format.components) or frame.format.has_palette:
            frame = _over_black(frame, self.colorspace)
        (stored_height, stored_width), kind = self.stored, "rgb48le" if self.light else "rgb24"
        scaled = frame.reformat(stored_width, stored_height, kind, self.colorspace, interpolation=_QUALITY)
        image = scaled.to_ndarray()
        if self.light:
            image = to_bt709(image, *self.light)
        if grey_tv:  # swscale takes every grey picture for full range
            image = np.clip(np.rint((image - 16.0) * (255 / 219)), 0, 255).astype(np.uint8)
        transposed, up_down, left_right = self.turn
        if transposed:
            image = image.swapaxes(0, 1)
        image = image[:: -1 if up_down else 1, :: -1 if left_right else 1]
        (y, x), (height, width) = self.corner, self.size
        return np.ascontiguousarray(image[y : y + height, x : x + width])


def _over_black(frame: av.VideoFrame, colorspace: int | None) -> av.VideoFrame:
    """A picture with transparency, on black; one that is opaque after all, untouched."""
    image = frame.reformat(format="rgba", src_colorspace=colorspace, interpolation=_QUALITY).to_ndarray()
    if image[..., 3].min() == 255:
        return frame
    opaque = np.rint(image[..., :3] * (image[..., 3:] / 255)).astype(np.uint8)
    return av.VideoFrame.from_ndarray(opaque, format="rgb24")


def check_showable(frame: av.VideoFrame) -> None:
    """Raise Unusable for kinds of pictures that would be shown wrongly."""
    try:
        side_data: Any = frame.side_data
        first = {data.type.name: int.from_bytes(bytes(data)[:4], "little") for data in side_data}
    except ValueError:
        raise Unusable("carries picture data that this version of PyAV does not know") from None
    if first.get("STEREO3D") in _STEREO:
        raise Unusable("is stereo 3D: both eyes' views in one picture")
    if first.get("SPHERICAL") in _PROJECTIONS:
        raise Unusable(f"is a 360° video ({_PROJECTIONS[first['SPHERICAL']]})")
    if first.keys() & {"DOVI_RPU_BUFFER", "DOVI_METADATA"} and frame.colorspace not in (1, 9):
        raise Unusable("is Dolby Vision without a base layer in BT.2020 or BT.709")
    if frame.colorspace not in _MATRICES:
        raise Unusable(f"has a colour matrix that is not supported: number {frame.colorspace} of ITU-T H.273")
    if frame.color_primaries in _PRIMARIES:
        raise Unusable(f"has colour primaries that are not supported: number {frame.color_primaries} of ITU-T H.273")
    if frame.color_trc in _TRANSFERS:
        raise Unusable(f"has a {_TRANSFERS[ColorTrc(frame.color_trc)]} transfer characteristic")


def _container_crop(file: Any, index: int) -> Crop:
    """What the container says to cut off stream `index`."""
    with open(file, "rb") if isinstance(file, str) else contextlib.nullcontext(file) as opened:
        position = opened.tell()
        opened.seek(0)
        head = opened.read(1 << 20)  # the tracks are described at the beginning
        opened.seek(position)
    return pixel_crop(head, index)


def _decode(container: Any, stream: Any) -> Iterator[Timed]:
    """Frames in the order they are shown."""
    decoded = container.decode(stream)
    if decoder := _alpha_decoder(stream):
        decoded = (frame for packet in container.demux(stream) for frame in decoder.decode(packet))
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    last = None
    for frame in decoded:
        duration = frame.duration * frame.time_base if frame.duration else 1 / rate
        time = Fraction(0) if last is None else last + 1 / rate
        if frame.pts is not None:
            time = frame.pts * frame.time_base
        if last is None or time > last:  # a time that runs backwards is a muxer's error
            yield time, duration, frame
            last = time


def _alpha_decoder(stream: Any) -> Any:
    """The decoder of VP8's and VP9's transparency, which FFmpeg's own decoders leave out; None for other streams."""
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.codec.canonical_name)
    if name is None or {k.lower(): v for k, v in stream.metadata.items()}.get("alpha_mode") != "1":
        return None
    try:
        decoder = av.CodecContext.create(name, "r")
    except ValueError:
        raise Unusable(f"is transparent, and this FFmpeg lacks {name}") from None
    decoder.thread_count = 1
    return decoder


def shown_stream(streams: Any) -> Any:
    """The video stream a player shows: the default one, of several or none the largest; never a cover or preview."""
    if not (streams := [s for s in streams if not s.disposition & _NEVER_SHOWN]):
        raise Unusable("holds no video")
    if not (streams := [s for s in streams if s.codec_context is not None]):
        raise Unusable("has a codec that this FFmpeg cannot decode")
    return max(streams, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height))


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Transposed, then flipped up-down, then left-right: the display matrix, to the nearest quarter turn."""
    if (entry := frame.side_data.get("DISPLAYMATRIX")) is None:
        return False, False, False
    # x' = a x + c y, y' = b x + d y, rows (a, b, u), (c, d, v), (x, y, w) in FFmpeg's libavutil/display.h.
    a, b, _, c, d = np.frombuffer(bytes(entry), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, d < 0, a < 0
    return True, b < 0, c < 0
