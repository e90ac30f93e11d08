"""Rewards of movement on clips whose movement is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dollar_jax.rewards import get_reward
from dollar_jax.rewards.builtin import flicker, motion, smoothness


def waves(dy, dx, frames=5, size=32):
    """A smooth pattern that moves by (dy, dx) pixels per frame."""
    t, y, x = np.meshgrid(*map(np.arange, (frames, size, size)), indexing="ij")
    y, x = y - dy * t, x - dx * t
    picture = 0.5 + 0.2 * np.sin(2 * np.pi * y / 16) * np.cos(2 * np.pi * x / 16) + 0.1 * np.sin(x / 5 + y / 7)
    return np.repeat(picture[..., None], 3, -1).astype(np.float32)


@pytest.mark.parametrize(("dy", "dx"), [(0.0, 0.0), (0.5, 0.0), (0.0, -1.0), (0.6, 0.8), (1.0, 1.0)])
def test_motion_is_the_speed_in_pixels_per_frame(dy, dx):
    found = motion(jnp.asarray(waves(dy, dx)[None]))[0]
    # A wave of k radians per pixel that moves by d is seen 2 tan(kd / 2) / (d sin k) times too fast: 1.075
    # for the finest wave here along the diagonal.
    np.testing.assert_allclose(found, np.hypot(dy, dx), rtol=0.08, atol=1e-3)


def test_a_plain_clip_does_not_move_and_noise_does():
    plain = np.full((1, 3, 16, 16, 3), 0.5, np.float32)
    noise = np.random.default_rng(0).uniform(size=(1, 3, 16, 16, 3)).astype(np.float32)
    still, moving = motion(jnp.asarray(np.concatenate([plain, noise])))
    assert still < 1e-3 and moving > 0.2  # the way in which this reward is hacked


def test_flicker_is_vbenchs():
    clips = np.random.default_rng(0).uniform(size=(3, 4, 8, 6, 3)).astype(np.float32)
    expected = [1 - np.mean([np.abs(b - a).mean() for a, b in zip(clip, clip[1:], strict=False)]) for clip in clips]
    np.testing.assert_allclose(flicker(jnp.asarray(clips)), expected, rtol=1e-5)


def test_smoothness_is_one_on_a_straight_fade_and_less_on_a_flash():
    fade = np.linspace(0, 1, 5).reshape(1, 5, 1, 1, 1) * np.ones((1, 5, 4, 4, 3))
    flash = fade.copy()
    flash[:, 2] += 0.3
    both = smoothness(jnp.asarray(np.concatenate([fade, flash]), dtype=jnp.float32))
    np.testing.assert_allclose(both, [1.0, 1 - (0.15 + 0.3 + 0.15) / 3], rtol=1e-5)


@pytest.mark.parametrize("name", ["motion", "flicker", "smoothness"])
def test_gradients_are_finite_even_of_still_clips(name):
    reward = get_reward(name)
    for clip in (np.zeros((1, 4, 8, 8, 3)), waves(0.5, 0.5, 4, 16)[None]):
        gradient = jax.grad(lambda x: reward.function((), x, None).sum())(jnp.asarray(clip, jnp.float32))
        assert np.isfinite(gradient).all()


def test_bad_clips_without_movement_are_refused():
    with pytest.raises(ValueError, match="at least 3 frames, not 2"):
        smoothness(jnp.zeros((1, 2, 4, 4, 3)))
