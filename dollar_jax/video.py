"""Video files, many videos in one picture, and the ranges of pixels. Files are of frames uint8 [t, h, w, 3]."""

import io
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO

import av
import jax
import jax.numpy as jnp
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from einops import rearrange
from PIL import Image, ImageOps

from dollar_jax.files import write_file

SUFFIXES = (".mp4", ".gif")
_BT709 = 1  # FFmpeg's number for it among colour spaces, primaries and transfer curves alike
_LIMITED = 1  # luma in [16, 235]


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames in [0, 1], clipped, rounded to 0 ... 255."""
    return np.round(255 * np.clip(frames, 0, 1)).astype(np.uint8)


def signed_range(frames: np.ndarray | jax.Array) -> jax.Array:
    """uint8 frames as float32 in [-1, 1], the range of the VAEs."""
    return jnp.asarray(frames, jnp.float32) / 127.5 - 1


def unit_range(videos: np.ndarray) -> np.ndarray:
    """Videos as floating point in [0, 1]: uint8 is divided by 255, floating point is passed on."""
    videos = np.asarray(videos)
    if videos.dtype == np.uint8:
        return videos.astype(np.float32) / 255
    if not np.issubdtype(videos.dtype, np.floating):
        raise ValueError(f"videos must be uint8 or floating point in [0, 1], not {videos.dtype}")
    return videos


def write_video(path: str | os.PathLike[str], frames: np.ndarray, fps: float = 8, scale: int = 1) -> None:
    """Writes frames uint8 [t, h, w, 3] to `path`: H.264 for .mp4, an endless loop for .gif. `scale` is how many pixels
    wide and high each pixel becomes (nearest neighbour). H.264 keeps colour at half the resolution: use at least 2 for
    small videos, or their colours bleed. A .gif rounds the time of a frame to 10 ms. Raises ValueError for others."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write {str(path)!r}: a video's name must end in {' or '.join(SUFFIXES)}")
    if scale < 1:
        raise ValueError(f"scale must be a whole number of at least 1, not {scale}")
    frames = _checked(frames).repeat(scale, 1).repeat(scale, 2)
    mp4 = path.suffix.lower() == ".mp4"
    write_file(path, encode_mp4(frames, fps) if mp4 else _encode_images(frames, fps, "GIF", optimize=False))


def encode_mp4(frames: np.ndarray, fps: float = 8, crf: int = 18) -> bytes:
    """frames uint8 [t, h, w, 3] as an H.264 .mp4, yuv420p and BT.709, which every player knows. Odd sizes are padded by
    repeating the last row or column. `crf` is x264's quality: 18 looks lossless, 51 is worst."""
    frames = _checked(frames)
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.pix_fmt = "yuv420p"
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        # Untagged, players guess the colours by the size of the picture.
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            colours = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
            container.mux(stream.encode(picture.reformat(format="yuv420p", **colours)))
        container.mux(stream.encode())
    return buffer.getvalue()


def read_video(path: str | os.PathLike[str]) -> np.ndarray:
    """The frames of a video file, uint8 [t, h, w, 3]; ValueError naming the file if it cannot be read."""
    try:
        with av.open(f"file:{path}") as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is no video that can be read: {error}") from error
    if not frames:
        raise ValueError(f"{path} holds no frame")
    return np.stack(frames)


def read_image(path: str | os.PathLike[str] | IO[bytes], height: int, width: int) -> np.ndarray:
    """An image file scaled to cover a size and cropped to it about the centre, uint8 [h, w, 3]; raises OSError."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS))


def encode_webp(frames: np.ndarray, fps: float = 8) -> bytes:
    """frames uint8 [t, h, w, 3] as a looping, lossless WebP."""
    return _encode_images(frames, fps, "WEBP", lossless=True, quality=80, method=4)


def _encode_images(frames: np.ndarray, fps: float, kind: str, **options: object) -> bytes:
    first, *rest = (Image.fromarray(frame) for frame in _checked(frames))
    buffer = io.BytesIO()
    first.save(buffer, kind, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, **options)
    return buffer.getvalue()


def grid(videos: np.ndarray, columns: int, gap: int = 2, background: int = 255) -> np.ndarray:
    """Videos uint8 [n, t, h, w, 3] as one, [t, H, W, 3], row by row, `gap` pixels of grey `background` between them."""
    videos = np.asarray(videos)
    if videos.ndim != 5 or not len(videos) or columns < 1:
        raise ValueError(f"a grid needs videos [n, t, h, w, 3] and columns >= 1, not {videos.shape}, {columns}")
    edges = (0, -len(videos) % columns), (0, 0), (0, gap), (0, gap), (0, 0)
    padded = np.pad(videos, edges, constant_values=background)
    out = rearrange(padded, "(rows columns) t h w c -> t (rows h) (columns w) c", columns=columns)
    return out[:, : out.shape[1] - gap, : out.shape[2] - gap]


def side_by_side(videos: Sequence[np.ndarray]) -> np.ndarray:
    """Videos uint8 [t, h, w, 3] of one shape in a row, [t, h, W, 3]."""
    if len({np.shape(video) for video in videos}) != 1:
        shapes = ", ".join(str(np.shape(video)) for video in videos)
        raise ValueError(f"videos side by side must have one shape, not {shapes or 'none at all'}")
    return grid(np.stack(videos), len(videos))


def _checked(frames: np.ndarray) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"a video must be uint8 [t, h, w, 3], not {frames.dtype} of shape {frames.shape}")
    return frames
