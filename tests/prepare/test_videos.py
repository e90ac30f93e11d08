"""Real H.264 files, written here with FFmpeg's libraries, against what was drawn into them."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from dollar_jax.prepare.videos import ClipSettings, Unusable, array_frames, clips_of, read_clips, resample
from dollar_jax.video import encode_mp4

RED, GREEN, BLUE, GREY = (220, 30, 30), (30, 200, 40), (40, 60, 210), (128, 128, 128)


def quarters(height, width, count=8):
    """A still video with a colour in each corner: red, green / blue, grey."""
    frame = np.empty((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2], frame[: height // 2, width // 2 :] = RED, GREEN
    frame[height // 2 :, : width // 2], frame[height // 2 :, width // 2 :] = BLUE, GREY
    return np.broadcast_to(frame, (count, *frame.shape)).copy()


def counting(count, height=48, width=64):
    """Frame i is grey level 8 i + 10."""
    levels = np.arange(count)[:, None, None, None] * 8 + 10
    return np.broadcast_to(levels, (count, height, width, 3)).astype(np.uint8)


def levels(clip):
    """The numbers of the frames of a clip of `counting`."""
    return np.round((clip.mean((1, 2, 3)) - 10) / 8).astype(int).tolist()


def encode(frames, times=None, pix_fmt="yuv420p", turn=None, aspect=None, kind="mp4"):
    """H.264 frames at 25 per second, or at `times` in milliseconds."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "8"})
        stream.pix_fmt, stream.height, stream.width = pix_fmt, *frames.shape[1:3]
        stream.codec_context.time_base = Fraction(1, 1000)
        if turn:
            stream.set_display_rotation(turn[0], hflip=turn[1], vflip=turn[2])
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = (40 * i if times is None else times[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return io.BytesIO(buffer.getvalue())


def settings(frames=4, buckets=((32, 32),), fps=None, crop="centre", clips=1):
    return ClipSettings(frames, buckets, fps, crop, clips)


def read(file, **changes):
    return read_clips(file, settings(**changes), np.random.default_rng(0))


def corners(clip):
    """The colours in the middles of the four quarters."""
    _, h, w, _ = clip.shape
    return [clip[0, y, x].astype(int) for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)]


def assert_corners(clip, wanted, tolerance=6):
    for ours, colour in zip(corners(clip), wanted, strict=True):
        assert np.abs(ours - colour).max() <= tolerance, (ours, colour)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le", "yuv422p10le"])
def test_colours_survive_8_and_10_bits(pix_fmt):
    (clip,) = read(encode(quarters(48, 48), pix_fmt=pix_fmt))
    assert clip.shape == (4, 32, 32, 3) and clip.dtype == np.uint8
    assert_corners(clip, [RED, GREEN, BLUE, GREY])


def test_colours_survive_bt709():
    assert_corners(read(io.BytesIO(encode_mp4(quarters(48, 48))))[0], [RED, GREEN, BLUE, GREY])


@pytest.mark.parametrize("size", [(37, 53), (101, 67), (33, 32)])
def test_odd_sizes(size):
    (clip,) = read(encode(quarters(*size), pix_fmt="yuv444p"))
    assert clip.shape == (4, 32, 32, 3)
    assert_corners(clip, [RED, GREEN, BLUE, GREY])


# Where the quarters are in what the ffmpeg program (9.0.2) makes of (degrees, mirrored, upside down).
TURNS = {
    (0, True, False): "1032",
    (0, False, True): "2301",
    (90, False, False): "1302",
    (-90, False, False): "2031",
    (180, False, False): "3210",
    (90, True, False): "3120",
    (-90, True, False): "0213",
}


@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_rotation_and_mirroring_are_undone(turn):
    (clip,) = read(encode(quarters(48, 64), turn=turn), buckets=((32, 24), (24, 32)))
    assert clip.shape[1:3] == ((32, 24) if abs(turn[0]) == 90 else (24, 32))
    colours = [RED, GREEN, BLUE, GREY]
    assert_corners(clip, [colours[int(i)] for i in TURNS[turn]])


def test_pixels_that_are_not_square():
    """48 × 48 pixels, each twice as wide as high, are a picture of 2 to 1."""
    (clip,) = read(encode(quarters(48, 48), aspect=Fraction(2)), buckets=((16, 32), (32, 32), (32, 16)))
    assert clip.shape[1:3] == (16, 32)
    assert_corners(clip, [RED, GREEN, BLUE, GREY])


def test_scaling_agrees_with_pillow():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8))
    picture = coarse.resize((128, 96), Image.Resampling.BICUBIC)
    (clip,) = clips_of(array_frames(np.asarray(picture)[None]), settings(1, ((24, 32),)), rng)
    wanted = np.asarray(picture.resize((32, 24), Image.Resampling.BICUBIC), int)
    assert np.abs(clip[0] - wanted).max() <= 3


def test_a_centre_crop_is_in_the_middle_and_a_random_one_anywhere():
    """A picture 3 times as wide as its clip, whose column x is grey level x."""
    video = np.broadcast_to(np.arange(96)[:, None] * 2, (4, 32, 96, 3)).astype(np.uint8)
    left = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        clips = clips_of(array_frames(video), settings(2, crop="random", clips=2), rng)
        starts = {int(clip[i, 0, 0, 0]) // 2 for clip in clips for i in range(2)}
        assert len(starts) == 1  # one place for the whole video
        left += starts
    assert len(set(left)) > 6 and min(left) >= 0 and max(left) <= 64
    (clip,) = clips_of(array_frames(video), settings(), np.random.default_rng(0))
    assert clip[0, 0, 0, 0] // 2 == 32


def test_the_bucket_is_the_nearest_shape():
    buckets = ((16, 32), (24, 24), (32, 16))
    for size, wanted in (((40, 100), (16, 32)), ((50, 46), (24, 24)), ((90, 40), (32, 16))):
        (clip,) = clips_of(array_frames(quarters(*size)), settings(buckets=buckets), np.random.default_rng(0))
        assert clip.shape[1:3] == wanted


# --- time -----------------------------------------------------------------------------------------


def nearest(times, duration, fps, count):
    """Closed form: which frame is nearest to each tick; the earlier one of two."""
    ticks = times[0] + np.arange(count) * 1000 / fps
    assert ticks[-1] < times[-1] + duration
    return [int(np.argmin(np.abs(np.array(times) - tick))) for tick in ticks]


@pytest.mark.parametrize("fps", [4, 7.5, 12, 30])
def test_variable_frame_rates_are_resampled_to_the_nearest_frame(fps):
    times = [0, 20, 60, 200, 210, 240, 500, 540, 580, 900, 930, 1000]
    for kind in ("mp4", "matroska"):
        (clip,) = read(encode(counting(12), times, kind=kind), frames=4, fps=fps)
        assert levels(clip) == nearest(times, 40, fps, 4)


def test_a_constant_rate_is_kept_whatever_the_container_rounds():
    """24 per second in milliseconds is 0, 42, 83, 125: no frame may be doubled or lost."""
    times = [round(i * 1000 / 24) for i in range(24)]
    (clip,) = read(encode(counting(24), times, kind="matroska"), frames=24, fps=24)
    assert levels(clip) == list(range(24))


def test_the_last_frame_stays_for_its_own_time():
    frames = [(Fraction(i, 10), Fraction(1, 10), i) for i in range(5)]
    assert list(resample(frames, 20)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]  # type: ignore[arg-type]
    assert list(resample(frames, None)) == [0, 1, 2, 3, 4]  # type: ignore[arg-type]


def test_clips_follow_each_other():
    first, second = read(encode(counting(11)), clips=5)
    assert levels(first) + levels(second) == list(range(8))
    assert len(read(encode(counting(11)))) == 1


# --- what cannot be used --------------------------------------------------------------------------


def test_too_short():
    with pytest.raises(Unusable, match="is too short: 3 frames, a clip has 4"):
        read(encode(counting(3)))
    with pytest.raises(Unusable, match="is too short: 2 frames at 5 frames per second"):
        read(encode(counting(10)), fps=5)


def test_no_video():
    with pytest.raises(Unusable, match="cannot be read as a video"):
        read(io.BytesIO(b"a text that is no video" * 100))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(Unusable, match="holds no video"):
        read(io.BytesIO(buffer.getvalue()))


def test_truncated():
    whole = encode(np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8)).getvalue()
    with pytest.raises(Unusable, match="cannot be read as a video"):  # an .mp4 has its index at the end
        read(io.BytesIO(whole[: len(whole) // 2]))
    noise = encode(np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8), kind="matroska")
    half = io.BytesIO(noise.getvalue()[: len(noise.getvalue()) // 2])
    with pytest.raises(Unusable, match="is damaged after|is too short"):
        read(half, frames=20)
    half.seek(0)
    assert len(read(half, frames=4, clips=9)) in (1, 2)  # what came before the damage
