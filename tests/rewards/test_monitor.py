import numpy as np
import pytest

from dollar_jax.config import RewardGuard
from dollar_jax.rewards.monitor import Monitor


def guard(correlation=None, fall=None, window=50):
    return RewardGuard(window, correlation, fall)


def draw(n, seed=0):
    return np.random.default_rng(seed).normal(size=n)


def test_correlation_is_of_the_last_window_and_stops_only_when_that_is_full():
    monitor, x = Monitor(50, []), draw(80)
    monitor.add(x[:40], -x[:40], np.empty((40, 0)))
    np.testing.assert_allclose(monitor.summary()["reward_fresh_correlation"], -1)
    assert monitor.hacked(guard(0.5)) is None  # 40 pairs are no verdict
    monitor.add(x[40:50], -x[40:50], np.empty((10, 0)))
    assert "correlate by -1.000 on fresh samples, less than config.reward.guard" in monitor.hacked(guard(0.5))
    assert monitor.hacked(guard()) is None
    y = x + draw(80, 1)
    monitor.add(x[30:], y[30:], np.empty((50, 0)))
    found = monitor.summary()["reward_fresh_correlation"]
    np.testing.assert_allclose(found, np.corrcoef(x[30:], y[30:])[0, 1])
    assert monitor.hacked(guard(0.5)) is None


def test_samples_that_were_not_scored_do_not_count():
    monitor, x = Monitor(10, ["kept"]), draw(20)
    y = np.where(np.arange(20) % 2, np.nan, 2 * x)
    monitor.add(x, y, np.full((20, 1), np.nan))
    assert list(monitor.summary()) == ["reward_fresh_correlation"]
    np.testing.assert_allclose(monitor.summary()["reward_fresh_correlation"], 1)


def test_a_held_out_reward_is_measured_from_its_peak():
    monitor = Monitor(50, ["kept", "other"])
    nothing = np.full(50, np.nan)

    def add(mean):
        held = np.stack([mean + 2 * draw(50), np.zeros(50)], 1)
        monitor.add(nothing, nothing, held)
        return held[:, 0].mean()

    add(0.0)
    peak = add(5.0)
    assert monitor.summary()["reward_kept_fall"] == 0
    assert monitor.hacked(guard(fall=1.0)) is None
    low = add(1.0)
    expected = (peak - low) / (2 * draw(50).std())
    np.testing.assert_allclose(monitor.summary()["reward_kept_fall"], expected)
    assert monitor.hacked(guard(fall=expected + 0.01)) is None
    assert "the held-out reward 'kept' has fallen by" in monitor.hacked(guard(fall=expected - 0.01))
    assert monitor.summary()["reward_other_fall"] == 0


def test_no_peak_before_a_full_window():
    monitor = Monitor(50, ["kept"])
    monitor.add(np.full(49, np.nan), np.full(49, np.nan), draw(49)[:, None])
    assert monitor.summary() == {}
    assert monitor.hacked(guard(fall=0.1)) is None


def test_its_state_is_all_it_knows():
    one, other = Monitor(5, ["kept"]), Monitor(5, ["kept"])
    for i in range(3):
        one.add(draw(4, i), draw(4, i + 9), draw(4, i + 99)[:, None])
    other.state = {name: np.array(value) for name, value in one.state.items()}
    for monitor in (one, other):
        monitor.add(draw(4, 7), draw(4, 8), draw(4, 9)[:, None])
    assert one.summary() == pytest.approx(other.summary()) and len(one.summary()) == 2
