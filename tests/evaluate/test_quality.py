import numpy as np
import pytest

from dollar_jax.evaluate.quality import temporal_flicker


def test_a_frozen_video_scores_one_and_full_flicker_zero():
    frozen = np.full((4, 2, 2, 3), 77, np.uint8)
    flicker = np.zeros_like(frozen)
    flicker[1::2] = 255
    np.testing.assert_allclose(temporal_flicker(np.stack([frozen, flicker])), [1, 0], atol=1e-7)


def test_equals_the_formula_on_eight_bit_frames():
    video = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), np.uint8)
    differences = [np.abs(a.astype(int) - b).mean() for a, b in zip(video[1:], video, strict=False)]
    expected = (255 - np.mean(differences)) / 255
    assert temporal_flicker(video) == pytest.approx(expected)
    assert temporal_flicker(video / 255) == pytest.approx(expected)


def test_leading_axes_are_kept():
    assert temporal_flicker(np.zeros((2, 3, 4, 5, 5, 3))).shape == (2, 3)


def test_one_frame_is_refused():
    with pytest.raises(ValueError, match="t >= 2"):
        temporal_flicker(np.zeros((1, 4, 4, 3)))


def test_integers_other_than_eight_bit_are_refused():
    with pytest.raises(ValueError, match="int64"):
        temporal_flicker(np.zeros((2, 4, 4, 3), np.int64))
