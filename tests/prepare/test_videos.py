"""Real video files, written here with FFmpeg's libraries, against what was drawn into them."""

import io
import struct
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from av.error import InvalidDataError
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorPrimaries, ColorTrc
from PIL import Image, ImageSequence

from dollar_jax.prepare.colour import to_bt709
from dollar_jax.prepare.filters import filtered
from dollar_jax.prepare.videos import (
    ClipSettings,
    Unusable,
    array_frames,
    check_showable,
    clips_of,
    hard_cut,
    read_clips,
    resample,
    shown_stream,
)
from dollar_jax.video import encode_mp4

CASES = Path(__file__).parent / "cases"
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


def settings(frames=4, buckets=((32, 32),), fps=None, crop: Any = "centre", clips=1):
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


# --- what is shown -------------------------------------------------------------------------------


def record(codec, frames, pix_fmt, kind="matroska", options=None, metadata=None, **tags):
    """Frames uint8 [t, h, w, 3 or 4] at 25 per second, tagged with colour properties by FFmpeg's numbers."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.pix_fmt, stream.height, stream.width = pix_fmt, *frames.shape[1:3]
        stream.metadata.update(metadata or {})
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24" if image.shape[-1] == 3 else "rgba")
            frame = frame.reformat(format=pix_fmt, dst_color_range=tags.get("color_range"))
            for name, value in tags.items():
                setattr(frame, name, value)
                setattr(stream.codec_context, name, value)
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return io.BytesIO(buffer.getvalue())


def flat(colour, count=4):
    return np.broadcast_to(np.array(colour, np.uint8), (count, 48, 64, len(colour))).copy()


def boxes(data, path, extra):
    """An MP4 file with `extra` at the end of the box at `path`."""
    out, at = b"", 0
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + size]
        if kind == path[0]:
            head = {b"stsd": 8, b"avc1": 78}.get(kind, 0)
            body = body[:head] + boxes(body[head:], path[1:], extra) if path[1:] else body + extra
        out, at = out + struct.pack(">I4s", 8 + len(body), kind) + body, at + size
    return out


def box(kind, *parts):
    return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)


def sample_entry(video, extra):
    return io.BytesIO(boxes(video.getvalue(), [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"], extra))


def combing(clip):
    grey = clip.astype(float).mean(-1)
    return np.abs(grey[:, 0::2] - grey[:, 1::2]).mean()


@pytest.mark.parametrize(
    "name, low, high",
    [("hlg_white", 235, 254), ("pq_white", 235, 254), ("pq_grey18", 124, 126), ("pq_sky1000nit", 255, 255)],
)
def test_hdr_is_toned_down(name, low, high):
    (clip,) = read(str(CASES / f"hdr_{name}.mp4"))
    assert low <= clip.min() <= clip.max() <= high


CHROMATICITIES = {  # red, green, blue; white is D65 (BT.2020, table 3; SMPTE EG 432-1; BT.709)
    ColorPrimaries.BT709: [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)],
    ColorPrimaries.BT2020: [(0.708, 0.292), (0.170, 0.797), (0.131, 0.046)],
    ColorPrimaries.SMPTE432: [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)],
}


def to_xyz(primaries):
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in CHROMATICITIES[primaries]]).T
    return columns * np.linalg.solve(columns, (0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290))


def pq(light):
    """BT.2100's inverse EOTF, of cd/m²."""
    power = (np.asarray(light) / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(light):
    """BT.2100's inverse OOTF and OETF, of cd/m² [..., 3] on a screen of 1000."""
    display = np.asarray(light) / 1000
    luminance = display @ np.array([0.2627, 0.6780, 0.0593])
    scene = display * luminance[..., None] ** (1 / 1.2 - 1)
    log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)


@pytest.mark.parametrize("transfer, encode_light", [(ColorTrc.SMPTE2084, pq), (ColorTrc.ARIB_STD_B67, hlg)])
def test_hdr_below_the_knee_is_what_an_sdr_screen_shows(transfer, encode_light):
    """Colours of BT.709, up to 0.7 of 203 cd/m², through BT.2020 and back."""
    wanted = np.random.default_rng(0).uniform(0.001, 0.7, (8, 8, 3))  # linear light, 1 is white
    wide = wanted @ (np.linalg.inv(to_xyz(ColorPrimaries.BT2020)) @ to_xyz(ColorPrimaries.BT709)).T
    codes = np.round(encode_light(203 * wide) * 65280).astype(np.uint16)
    ours = to_bt709(codes, transfer, ColorPrimaries.BT2020)
    assert np.abs(ours - 255 * wanted ** (1 / 2.4)).max() <= 1


def test_hdr_highlights_keep_their_order_and_hue():
    light = np.linspace(0, 1000, 400)
    grey = to_bt709(np.round(pq(light)[:, None, None] * 65280 * np.ones(3)).astype(np.uint16), ColorTrc.SMPTE2084, 1)
    assert (np.diff(grey[:, 0, 0].astype(int)) >= 0).all() and grey[0].max() == 0 and grey[-1].min() == 255
    assert len(np.unique(grey[light > 203])) >= 15  # clouds are no white patch
    orange = np.round(pq(np.array([[[800.0, 400, 100]]])) * 65280).astype(np.uint16)
    shown = (to_bt709(orange, ColorTrc.SMPTE2084, ColorPrimaries.BT709)[0, 0] / 255) ** 2.4
    np.testing.assert_allclose(shown / shown[0], [1, 0.5, 0.125], atol=0.01)


@pytest.mark.parametrize("primaries", [ColorPrimaries.BT2020, ColorPrimaries.SMPTE432])
def test_wide_gamut_sdr_is_converted(primaries):
    wanted = np.array([0.6, 0.3, 0.1])  # linear light of BT.709
    wide = np.linalg.inv(to_xyz(primaries)) @ to_xyz(ColorPrimaries.BT709) @ wanted
    colour = np.round(255 * wide ** (1 / 2.4))
    video = record("libx264", flat(colour), "yuv444p", options={"crf": "1"}, color_primaries=int(primaries))
    assert_corners(read(video)[0], [255 * wanted ** (1 / 2.4)] * 4, tolerance=3)


def test_interlaced_video_is_deinterlaced():
    (clip,) = read(str(CASES / "interlaced.mpg"), frames=24, buckets=((240, 320),))
    assert combing(clip) < 0.01
    assert np.abs(np.diff(clip.mean((1, 3)), axis=0)).max() > 5  # the bar still moves


def bars(step, count):
    """A bar that moves by `step` pixels a picture."""
    video = np.full((count, 48, 128, 3), 40, np.uint8)
    for i, image in enumerate(video):
        image[:, step * i : step * i + 16] = 210
    return video


def woven(first, second):
    """Pictures with the even rows of one and the odd rows of the other."""
    return np.where((np.arange(first.shape[1]) % 2 == 0)[:, None, None], first, second)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p10le"])
@pytest.mark.parametrize("order", ["tff", "bff"])
def test_both_field_orders_and_depths(order, pix_fmt):
    fields = bars(4, 16)
    video = woven(*((fields[0::2], fields[1::2])[:: 1 if order == "tff" else -1]))
    options = {"crf": "1", "x264-params": f"{order}=1"}
    (clip,) = read(record("libx264", video, pix_fmt, options=options), frames=8, buckets=((48, 128),))
    assert combing(video) > 8 and combing(clip) < 1


def test_film_in_fields_becomes_film_again():
    """Progressive frames flagged as interlaced, and 3:2 pull-down: none is blurred, none is combed."""
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 40), np.uint8))
    texture = np.asarray(coarse.resize((160, 64), Image.Resampling.BICUBIC))[..., None].repeat(3, -1)
    film = np.stack([np.roll(texture, (i, 3 * i), (0, 1))[:48, :128] for i in range(8)])
    pulled = [[a, b, *woven(np.stack([b, c]), np.stack([c, d])), d] for a, b, c, d in (film[:4], film[4:])]
    for video in (film, np.concatenate(pulled)):
        options = {"crf": "1", "x264-params": "tff=1"}
        (clip,) = read(record("libx264", video, "yuv444p", options=options), frames=8, buckets=((48, 128),))
        of_film = np.abs(clip[:, None].astype(int) - film[None]).mean((2, 3, 4))
        assert of_film.min(1).max() < 1


def test_progressive_frames_before_and_after_interlaced_ones_stay():
    def frame(i, flag):
        out = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * i + 10, np.uint8), format="rgb24")
        out = out.reformat(format="yuv444p")
        graph = Graph()
        graph.link_nodes(
            graph.add_buffer(width=64, height=48, format=out.format, time_base=Fraction(1, 25)),
            graph.add("setfield", "tff" if flag else "prog"),
            graph.add("buffersink"),
        ).configure()
        out.pts, out.time_base = i, Fraction(1, 25)
        graph.push(out)
        return Fraction(i, 25), Fraction(1, 25), graph.vpull()

    def damaged():
        yield from (frame(i, 3 <= i < 6) for i in range(9))
        raise InvalidDataError(1, "damaged")

    shown = filtered(damaged(), (0, 0, 0, 0))
    frames = [next(shown) for _ in range(9)]  # those that the filter held back too
    assert [time for time, _, _ in frames] == [Fraction(i, 25) for i in range(9)]
    grey = np.stack([f.to_ndarray(format="rgb24") for _, _, f in frames])
    assert levels(grey) == list(range(9))
    with pytest.raises(InvalidDataError):
        next(shown)


def test_the_default_stream_is_shown():
    (clip,) = read(str(CASES / "two_videos.mkv"), buckets=((48, 64), (120, 320)))
    assert clip.shape[1:3] == (120, 320)


@pytest.mark.parametrize("flags, wanted", [((0, 0), 1), ((1, 1), 1), ((1, 0), 0), ((0, 1024), 0), ((1024, 0), 1)])
def test_which_stream_is_shown(flags, wanted):
    """Default before large, and never an attached picture (1024)."""
    context = SimpleNamespace()
    streams = [
        SimpleNamespace(disposition=flag, width=64 * (i + 1), height=48, codec_context=context)
        for i, flag in enumerate(flags)
    ]
    assert shown_stream(streams) is streams[wanted]


def test_a_stream_without_a_decoder_is_named():
    video = encode(counting(4)).getvalue().replace(b"avc1", b"zzzz")
    with pytest.raises(Unusable, match="cannot decode"):
        read(io.BytesIO(video))


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p10le"])
@pytest.mark.parametrize("color_range", [1, 2])
@pytest.mark.parametrize("colorspace", [1, 5, 6, 9])
def test_tagged_range_and_matrix(pix_fmt, color_range, colorspace):
    """Y'CbCr of a colour by the definition (BT.709, BT.601, BT.2020)."""
    kr, kb = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}.get(colorspace, (0.299, 0.114))
    r, g, b = np.array((200, 90, 40)) / 255
    y = kr * r + (1 - kr - kb) * g + kb * b
    chroma = np.array([(b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)])
    bits = 10 if "10" in pix_fmt else 8
    unit, peak, width = 2 ** (bits - 8), 2**bits - 1, (bits + 7) // 8
    if color_range == 1:
        planes = [16 * unit + 219 * unit * y, *(128 * unit + 224 * unit * chroma)]
    else:
        planes = [peak * y, *(128 * unit + peak * chroma)]
    frame = av.VideoFrame(64, 48, pix_fmt)
    for plane, value in zip(frame.planes, planes, strict=True):
        plane.update(np.full(plane.buffer_size // width, round(value), f"u{width}").tobytes())
    frame.color_range, frame.colorspace = color_range, colorspace
    (clip,) = clips_of([(Fraction(0), Fraction(1), frame)], settings(1), np.random.default_rng(0))
    assert np.abs(clip.reshape(-1, 3).astype(int) - (200, 90, 40)).max() <= 2


@pytest.mark.parametrize("color_range, wanted", [(1, (0, 128, 255)), (2, (16, 126, 235)), (0, (16, 126, 235))])
def test_grey_pictures(color_range, wanted):
    for level, shown in zip((16, 126, 235), wanted, strict=True):
        frame = av.VideoFrame.from_ndarray(np.full((48, 64), level, np.uint8), format="gray")
        frame.color_range = color_range
        (clip,) = clips_of([(Fraction(0), Fraction(1), frame)], settings(1), np.random.default_rng(0))
        assert np.abs(clip.astype(int) - shown).max() <= 1


TRANSPARENT = [
    ("libvpx-vp9", "yuva420p", "webm", {"auto-alt-ref": "0"}),
    ("libvpx", "yuva420p", "webm", {"auto-alt-ref": "0"}),
    ("prores_ks", "yuva444p10le", "mov", {"profile": "4444"}),
    ("qtrle", "argb", "mov", {}),
    ("png", "rgba", "mov", {}),
]


@pytest.mark.parametrize("codec, pix_fmt, kind, options", TRANSPARENT, ids=[t[0] for t in TRANSPARENT])
def test_transparent_pictures_are_on_black(codec, pix_fmt, kind, options):
    video = flat((200, 150, 100, 255))
    video[:, :24, :32, 3], video[:, :24, 32:, 3] = 0, 128
    metadata = {"alpha_mode": "1"} if kind == "webm" else None
    (clip,) = read(record(codec, video, pix_fmt, kind, options, metadata), buckets=((48, 64),))
    assert_corners(clip, [(0, 0, 0), (100, 75, 50), (200, 150, 100), (200, 150, 100)], tolerance=4)


@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
def test_gif_disposal(disposal):
    """Against Pillow."""
    images = []
    for i in range(5):
        image = Image.new("P", (32, 32), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.paste(1, (4 * i, 8, 4 * i + 8, 20))
        images.append(image)
    gif = io.BytesIO()
    more = dict(append_images=images[1:], duration=100, transparency=0, disposal=disposal)
    images[0].save(gif, format="GIF", save_all=True, **more)
    gif.seek(0)
    (clip,) = read(gif, frames=5)
    for ours, image in zip(clip, ImageSequence.Iterator(Image.open(gif)), strict=True):
        rgba = np.asarray(image.convert("RGBA"))
        np.testing.assert_array_equal(ours, rgba[..., :3] * (rgba[..., 3:] // 255))


def test_an_edit_list_cuts_the_beginning():
    video = bytearray(encode(counting(12)).getvalue())
    scale = struct.unpack_from(">I", video, video.find(b"mdhd") + 16)[0]
    start = video.find(b"elst") + 16  # version, count, duration, then the media's time
    struct.pack_into(">i", video, start, struct.unpack_from(">i", video, start)[0] + 3 * scale // 25)
    assert levels(read(io.BytesIO(bytes(video)))[0]) == [3, 4, 5, 6]


def with_pixel_crop(data, crop):
    """A Matroska file whose video has PixelCrop elements: left, top, right, bottom."""
    out, at = b"", 0
    while at < len(data):
        name_length, rest = 9 - data[at].bit_length(), at + 9 - data[at].bit_length()
        length = 9 - data[rest].bit_length()
        size = int.from_bytes(data[rest : rest + length], "big") - (1 << 7 * length)
        body = data[rest + length : rest + length + size]
        name = data[at : at + name_length]
        if name in (b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae"):
            body = with_pixel_crop(body, crop)
        elif name == b"\xe0":
            ids = (b"\x54\xcc", b"\x54\xbb", b"\x54\xdd", b"\x54\xaa")
            body += b"".join(i + b"\x81" + bytes([pixels]) for i, pixels in zip(ids, crop, strict=True))
        out, at = out + name + (len(body) | 1 << 56).to_bytes(8, "big") + body, rest + length + size
    return out


def test_matroska_pixel_crop():
    video = with_pixel_crop(encode(quarters(48, 64), pix_fmt="yuv444p", kind="matroska").getvalue(), (16, 12, 16, 0))
    (clip,) = read(io.BytesIO(video), buckets=((36, 32), (48, 64)))
    assert clip.shape[1:3] == (36, 32)
    wanted = quarters(48, 64)[:4, 12:, 16:48].astype(int)
    assert np.abs(clip - wanted).mean() < 3


def test_another_size_is_scaled_and_another_shape_ends_the_clips():
    frames = [*array_frames(quarters(48, 64, 4)), *array_frames(quarters(96, 128, 4))]
    (clip,) = clips_of(frames, settings(8), np.random.default_rng(0))
    assert_corners(clip[4:], [RED, GREEN, BLUE, GREY])
    frames += array_frames(quarters(96, 64, 4))
    assert len(clips_of(frames, settings(clips=9), np.random.default_rng(0))) == 2
    with pytest.raises(Unusable, match="after 8 good frames: its picture becomes one of 64 × 96"):
        clips_of(frames, settings(9), np.random.default_rng(0))


def test_codec_crop():
    """H.264 codes 52 rows as 64 and says which ones to show."""
    (clip,) = read(encode(quarters(52, 64)), buckets=((52, 64), (64, 64)))
    assert clip.shape[1:3] == (52, 64)
    assert_corners(clip, [RED, GREEN, BLUE, GREY])


# --- kinds of pictures that are rejected by name -------------------------------------------------


def test_stereo_is_rejected():
    for video in (
        record("libx264", flat(RED), "yuv420p", options={"x264-params": "frame-packing=3"}),
        record("libx264", flat(RED), "yuv420p", metadata={"stereo_mode": "left_right"}),
        sample_entry(encode(flat(RED)), box(b"st3d", b"\0\0\0\0\2")),
    ):
        with pytest.raises(Unusable, match="is stereo 3D"):
            read(video)


def test_360_degrees_are_rejected():
    projection = box(b"proj", box(b"prhd", bytes(16)), box(b"equi", bytes(20)))
    video = sample_entry(encode(flat(RED)), box(b"sv3d", box(b"svhd", b"\0\0\0\0x\0"), projection))
    with pytest.raises(Unusable, match=r"is a 360° video \(equirectangular\)"):
        read(video)


@pytest.mark.parametrize(
    "tags, reason",
    [
        ({"colorspace": 8}, "^has a colour matrix that is not supported: number 8"),
        ({"colorspace": 14}, "colour matrix that is not supported: number 14"),
        ({"color_trc": 8}, "linear transfer"),
        ({"color_trc": 9}, "logarithmic transfer"),
        *(({"color_primaries": n}, f"^has colour primaries that are not supported: number {n}") for n in (8, 10, 11)),
    ],
)
def test_colours_that_cannot_be_shown(tags, reason):
    with pytest.raises(Unusable, match=reason):
        read(record("libx264", flat(RED), "yuv444p", **tags))


@pytest.mark.parametrize("height, width, shape", [(2, 400, 200), (400, 2, 0.005)])
def test_a_sliver_is_rejected(height, width, shape):
    """Scaled to cover a clip it would take more memory than there is."""
    with pytest.raises(Unusable, match=f"^is {shape} times as wide as high"):
        clips_of(array_frames(quarters(height, width)), settings(), np.random.default_rng(0))


def test_dolby_vision_needs_a_base_layer():
    """Profile 5 leaves its colours untagged; profile 8 has a base in BT.2020. A stand-in: FFmpeg writes no metadata."""

    class Metadata(bytes):
        type = Type.DOVI_RPU_BUFFER

    for colorspace in (2, 15):
        frame: Any = SimpleNamespace(side_data=[Metadata(8)], colorspace=colorspace, color_trc=2)
        with pytest.raises(Unusable, match="Dolby Vision without a base layer"):
            check_showable(frame)
    base: Any = SimpleNamespace(side_data=[Metadata(8)], colorspace=9, color_trc=16, color_primaries=9)
    check_showable(base)


def test_a_hard_cut_is_told_from_motion_and_from_a_flash():
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 256, (1, 96, 80, 3)).repeat(9, 0).astype(np.uint8) for _ in range(2))
    assert hard_cut(np.concatenate([one[:4], other])) == 4
    assert hard_cut(one) is None and hard_cut(one[:1]) is None
    flash = one.copy()
    flash[4] = 255
    assert hard_cut(flash) is None
    moving = np.stack([np.roll(one[0], 5 * i, 1) for i in range(9)])
    assert hard_cut(moving) is None and np.abs(np.diff(moving.astype(int), axis=0)).mean() > 50
    mild = np.concatenate([one[:4], np.clip(one[:4].astype(int) + 10, 0, 255).astype(np.uint8)])
    assert hard_cut(mild) is None  # exposure adapts
