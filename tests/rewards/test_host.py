"""A host reward that raises, hangs, or answers nonsense costs its samples and nothing else."""

import os
import threading
import time

import numpy as np
import pytest

from dollar_jax.rewards import JaxReward, Reward
from dollar_jax.rewards import host as host_module
from dollar_jax.rewards.host import HostScorer

FRAMES = np.linspace(0, 1, 3, dtype=np.float32).reshape(3, 1, 1, 1, 1) * np.ones((3, 2, 4, 4, 3), np.float32)
PROMPTS = ["a", "b", "c"]


def brightness(frames, prompts):
    return frames.mean((1, 2, 3, 4))


def scorer(function, timeout=0.2, retries=1):
    return HostScorer("mine", Reward(function, ""), timeout, retries)


def score(host, frames=FRAMES):
    host.submit(frames, PROMPTS)
    return host.collect()


def test_a_good_reward_runs_beside_the_caller():
    started, release, where = threading.Event(), threading.Event(), []

    def reward(frames, prompts):
        where.append(threading.current_thread())
        started.set()
        assert release.wait(10)
        frames[...] = 9  # its own copy
        return [len(prompts), 1, 2]

    host = scorer(reward, timeout=10)
    host.submit(FRAMES, PROMPTS)
    assert started.wait(10)  # and the caller goes on
    release.set()
    np.testing.assert_array_equal(host.collect(), np.float32([3, 1, 2]))
    assert where[0] is not threading.main_thread() and where[0].daemon
    assert FRAMES.max() == 1 and not host.faults


def test_a_jax_reward_may_be_used_as_a_host_one():
    host = HostScorer("red", JaxReward(lambda p, f, t: f[..., 0].mean((1, 2, 3)), ""), 60, 0)
    np.testing.assert_allclose(score(host), [0, 0.5, 1])


def test_a_reward_that_ends_the_process_has_failed(monkeypatch):
    host = scorer(lambda frames, prompts: os._exit(0))
    with pytest.warns(RuntimeWarning, match="raised SystemExit: 0"):
        assert np.isnan(score(host)).all()
    ended = []
    monkeypatch.setattr(host_module, "_exit", ended.append)
    os._exit(7)  # anybody else still may
    assert ended == [7]


def test_what_raises_once_is_tried_again():
    calls = []

    def reward(frames, prompts):
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("no route")
        return brightness(frames, prompts)

    host = scorer(reward)
    with pytest.warns(RuntimeWarning, match="the reward 'mine' raised ConnectionError: no route"):
        np.testing.assert_allclose(score(host), [0, 0.5, 1])
    assert host.faults == {"raised": 1} and len(calls) == 2


@pytest.mark.parametrize(
    ("function", "kind", "message", "count"),
    [
        (lambda f, p: 1 / 0, "raised", "raised ZeroDivisionError", 4),
        (lambda f, p: np.zeros((3, 2)), "wrong shape", r"gave shape \(3, 2\) for 3 videos", 4),
        (lambda f, p: "many", "raised", "raised ValueError", 4),
        (lambda f, p: exit(), "raised", "raised SystemExit", 4),
    ],
)
def test_what_fails_is_skipped_counted_and_reported_once(function, kind, message, count):
    host = scorer(function)
    with pytest.warns(RuntimeWarning, match=message) as said:
        first, second = score(host), score(host)
    assert np.isnan(first).all() and np.isnan(second).all()
    assert len(said) == 1 and host.faults == {kind: count}  # two calls, each tried twice


def test_rows_that_are_not_finite_are_left_out_alone():
    host = scorer(lambda f, p: [np.inf, 2.0, np.nan])
    with pytest.warns(RuntimeWarning, match="not finite"):
        np.testing.assert_array_equal(score(host), [np.nan, 2.0, np.nan])
    assert host.faults == {"not finite": 2}


def test_what_hangs_costs_its_timeout_and_then_less_and_less():
    forever, calls = threading.Event(), []

    def reward(frames, prompts):
        calls.append(1)
        forever.wait(60)
        return brightness(frames, prompts)

    host = scorer(reward, timeout=0.05)
    start = time.monotonic()
    with pytest.warns(RuntimeWarning) as said:
        rounds = [np.isnan(score(host)).all() for _ in range(16)]
    assert all(rounds) and time.monotonic() - start < 10
    # Rounds 0, 2, 5 and 10 try, twice each; between them 1, 2, 4 and 8 are skipped at once.
    assert len(calls) == 8 and host.faults == {"timed out": 8, "skipped": 12}
    assert len(said) == 2
    forever.set()
    while np.isnan(score(host)).all():  # the rest of its pause
        pass
    np.testing.assert_allclose(score(host), [0, 0.5, 1])


def test_frames_that_cannot_be_had_are_a_fault_too():
    class Lost:
        def __array__(self, *_, **__):
            raise RuntimeError("device lost")

    host = scorer(brightness)
    with pytest.warns(RuntimeWarning, match="device lost"):
        assert np.isnan(score(host, Lost())).all()
