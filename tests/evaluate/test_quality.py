import numpy as np
import pytest

from dollar_jax.evaluate.quality import diversity, net_change, temporal_flicker


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


def test_net_change_sees_what_moves_and_not_what_flickers():
    frozen = np.full((16, 8, 16, 3), 0.4)
    noise = np.random.default_rng(0).uniform(size=(16, 64, 64, 3))
    moving = np.zeros((16, 8, 16, 1))
    for t in range(16):
        moving[t, :, t] = 1  # a bar, one column per frame: 2 of 16 columns differ from any other frame
    wide = np.zeros((16, 8, 32, 1))
    for t in range(16):
        wide[t, :, t : t + 8] = 1  # next frame 2 of 32 columns differ, 8 frames later 16
    assert net_change(frozen) == 0
    assert abs(net_change(noise)) < 2e-3
    assert net_change(moving) == pytest.approx(0)
    assert net_change(wide) == pytest.approx(16 / 32 - 2 / 32)
    assert net_change((255 * wide).astype(np.uint8)) == pytest.approx(14 / 32)
    assert net_change(np.stack([wide, 0 * wide])).tolist() == pytest.approx([14 / 32, 0])


def test_diversity_is_the_mean_distance_of_pairs():
    levels = np.array([0.0, 0.2, 0.6])
    videos = np.broadcast_to(levels[:, None, None, None, None], (3, 2, 4, 4, 3))
    assert diversity(videos) == pytest.approx((0.2 + 0.6 + 0.4) / 3)
    assert diversity(np.repeat(videos[1:2], 4, 0)) == 0


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match="t >= 3"):
        net_change(np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="n >= 2"):
        diversity(np.zeros((1, 3, 4, 4, 3)))
