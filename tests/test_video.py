import os

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from dollar_jax import video
from dollar_jax.data import shapes


@pytest.fixture(scope="module")
def clip():
    return shapes.example(0, "train", 0)[0]


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), stream


def test_mp4_round_trip(tmp_path, clip):
    video.write_video(tmp_path / "new" / "a.mp4", clip, fps=12, scale=4)
    frames, stream = decode(tmp_path / "new" / "a.mp4")
    assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
    assert stream.average_rate == 12
    assert frames.shape == (17, 128, 128, 3)
    expected = clip.repeat(4, 1).repeat(4, 2).astype(int)
    assert np.abs(frames - expected).mean() < 2.5
    assert os.listdir(tmp_path / "new") == ["a.mp4"]


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40)])
def test_mp4_keeps_and_declares_colours(tmp_path, colour):
    video.write_video(tmp_path / "a.mp4", np.full((3, 32, 32, 3), colour, np.uint8))
    frames, stream = decode(tmp_path / "a.mp4")
    assert np.abs(frames - np.array(colour)).max() <= 3
    codec = stream.codec_context
    assert codec.colorspace == codec.color_primaries == codec.color_trc == 1  # BT.709
    assert codec.color_range == 1  # limited


def test_mp4_of_odd_size_fractional_rate_and_one_frame(tmp_path, clip):
    video.write_video(tmp_path / "a.mp4", clip[:1, :31, :29], fps=23.976)
    frames, stream = decode(tmp_path / "a.mp4")
    assert frames.shape == (1, 32, 30, 3)
    assert float(stream.average_rate or 0) == pytest.approx(23.976, abs=1e-3)


def test_gif_round_trip(tmp_path, clip):
    video.write_video(tmp_path / "a.GIF", clip, fps=10, scale=2)
    with Image.open(tmp_path / "a.GIF") as image:
        assert image.info["loop"] == 0 and image.info["duration"] == 100
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    expected = clip.repeat(2, 1).repeat(2, 2).astype(int)
    assert np.shape(frames) == expected.shape
    assert np.abs(np.stack(frames) - expected).mean() < 3


def test_webp_is_lossless(tmp_path, clip):
    (tmp_path / "a.webp").write_bytes(video.encode_webp(clip))
    with Image.open(tmp_path / "a.webp") as image:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    np.testing.assert_array_equal(np.stack(frames), clip)


def test_unknown_suffix_is_named_and_leaves_nothing(tmp_path, clip):
    with pytest.raises(ValueError, match=r"a\.avi.*must end in \.mp4 or \.gif"):
        video.write_video(tmp_path / "a.avi", clip)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("frames", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8)])
def test_frames_of_another_kind_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match=r"uint8 \[t, h, w, 3\]"):
        video.write_video(tmp_path / "a.mp4", frames)


def numbered(n, t=2, h=2, w=3):
    return np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None, None] * np.ones((t, h, w, 3), np.uint8)


def test_grid_fills_row_by_row():
    out = video.grid(numbered(3), columns=2, gap=1, background=0)
    assert out.shape == (2, 5, 7, 3)
    expected = [
        [1, 1, 1, 0, 2, 2, 2],
        [1, 1, 1, 0, 2, 2, 2],
        [0, 0, 0, 0, 0, 0, 0],
        [3, 3, 3, 0, 0, 0, 0],
        [3, 3, 3, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(out[1, ..., 2], expected)


def test_side_by_side():
    a, b = numbered(2)
    out = video.side_by_side([a, b])
    np.testing.assert_array_equal(out[0, 0, :, 0], [1, 1, 1, 255, 255, 2, 2, 2])
    with pytest.raises(ValueError, match="one shape"):
        video.side_by_side([a, b[:1]])


def test_ranges_of_pixels():
    levels = np.array([0, 51, 255], np.uint8)
    np.testing.assert_allclose(video.unit_range(levels), [0, 0.2, 1], atol=1e-7)
    np.testing.assert_allclose(video.signed_range(levels), [-1, -0.6, 1], atol=1e-7)
    np.testing.assert_array_equal(video.to_uint8(np.array([-0.1, 0.2, 0.4999, 1.5])), [0, 51, 127, 255])
