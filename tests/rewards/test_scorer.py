"""The host's side of rewards, driven step by step without any training: scorer, replay and monitor together."""

import threading

import jax
import numpy as np
import pytest

from dollar_jax import sharding
from dollar_jax.distillation import RewardSamples
from dollar_jax.program import Program
from dollar_jax.rewards import JaxReward, Reward
from dollar_jax.rewards.pixels import pixel_rewards
from dollar_jax.rewards.scorer import Scorer

LATENT, TEXT, ROWS, SAMPLES = (2, 2, 2, 3), (2, 4), 12, 3
# Two that are trained on, a host reward and a JAX one, and a held-out host reward between them.
TERMS = (("host", 2.0), ("kept", 0.0), ("traced", -1.0))
TRAINED, HELD_OUT = [0, 2], 1
CONFIG = {
    "seed": 11,
    "batch_size": ROWS,
    "accumulation": 2,
    "student.timesteps": (1000.0, 750.0, 500.0, 250.0),
    "reward.rewards": tuple({"name": name, "weight": weight, "folder": None} for name, weight in TERMS),
    "reward.samples": SAMPLES,
    "reward.replay": 18,
    "reward.batch_size": 5,
    "reward.updates": 2,
    "reward.guard.window": 6,
}
# Of the second micro-batch, rows 1, 3, 5, …: every second one.
SCORED = [1, 5, 9]


# --- the package's scorer ---------------------------------------------------------------------------


def decode(params, latent):
    return params * latent


def make_scorer(config, host, kept):
    """A scorer with the host rewards `host` and `kept`, functions (frames, prompts) → [b]."""
    traced = JaxReward(
        lambda p, f, t: f.mean((1, 2, 3, 4)), "", (), lambda prompts: np.array([[len(p)] for p in prompts])
    )
    rewards = [Reward(host, ""), Reward(kept, ""), traced]
    pixels = pixel_rewards(config.reward, rewards, decode)
    return Scorer(config, rewards, pixels, decode, np.float32(0.5), [LATENT], TEXT)


def submit(scorer, scored, batch, captions):
    """What a step says is to be scored: `latent` [n g t h w c], `reward` [n g r], `predicted` [n g], `scale` [n k]."""
    scorer.submit(RewardSamples(**jax.tree.map(jax.numpy.float32, scored)), batch, captions)


def inputs(scorer, step, captions):
    """What the step is given: (the replay's rows or the rollout, by name; tokens of the captions)."""
    tokens, kept = scorer.inputs(step, captions, LATENT)
    return vars(kept), tokens["traced"]


# --- steps ------------------------------------------------------------------------------------------


class Steps:
    """Steps of a training that is not there. Every latent holds one number, which says where it came from."""

    def __init__(self, config, kinds):
        self.seen, self.kinds = {"host": [], "kept": []}, kinds
        self.scorer = make_scorer(config, self.reward("host", 10.0), self.reward("kept", -1.0))

    def reward(self, name, factor):
        def function(frames, prompts):
            self.seen[name].append((frames.mean((1, 2, 3, 4)), list(prompts)))
            return factor * frames.mean((1, 2, 3, 4)) + np.array([int(p.split()[1]) for p in prompts])

        return function

    def captions(self, step):
        return [f"{'x' * (1 + row)} {100 * step + row}" for row in range(ROWS)]

    def submit(self, step, **changes):
        """Generated latents 1, 2, 3 more than ten times the step; real ones are their negative."""
        value = 10 * step + np.arange(1.0, 1 + SAMPLES)
        values = np.stack([value, -value][: self.kinds], 1)
        batch = {
            "latent": np.zeros((ROWS, *LATENT), np.float32),
            "text": np.arange(ROWS, dtype=np.float32).reshape(-1, 1, 1) + np.full(TEXT, 100 * step, np.float32),
        }
        scored = {
            "latent": values[..., None, None, None, None] * np.ones(LATENT),
            "reward": np.stack([np.full_like(values, np.nan), np.full_like(values, np.nan), 0.5 * values], -1),
            "predicted": 7.0 + values,
            "scale": np.tile([3.0, -4.0], (SAMPLES, 1)),
        }
        if self.kinds == 1:
            scored["states"] = np.arange(3).reshape(-1, 1, 1, 1, 1) + values[..., None, None, None, None] * np.ones(
                (3, *LATENT)
            )
        submit(self.scorer, scored | changes, batch, self.captions(step))
        return values, self.expected(step, values)

    def expected(self, step, values):
        """[n g k], the trained rewards: a frame is half a latent, the host's rewards read their caption."""
        number = (100 * step + np.array(SCORED))[:, None]
        return np.stack([5.0 * values + number, 0.5 * values], -1)


@pytest.fixture
def steps(make_config):
    def make(method="lrm", **changes):
        return Steps(make_config({**CONFIG, "reward.method": method, **changes}), 1 if method == "ddpo" else 2)

    return make


@pytest.mark.parametrize("cores", [1, 2])
def test_captions_and_text_are_those_of_the_rows_that_were_scored(steps, monkeypatch, cores):
    """The last of two micro-batches takes every second row, of which every second one is scored; where cores are spare,
    they are decoded in another thread, for the next step not to wait."""
    monkeypatch.setattr(sharding, "cores", lambda devices: cores)
    run, threads, call = steps(), [], Program.__call__
    monkeypatch.setattr(Program, "__call__", lambda p, *x: threads.append(threading.current_thread()) or call(p, *x))
    values, expected = run.submit(4)
    run.scorer.collect()
    assert [thread is threading.main_thread() for thread in threads] == [cores == 1]  # once, for both rewards
    for name in ("host", "kept"):
        ((frames, prompts),) = run.seen[name]
        np.testing.assert_allclose(frames, 0.5 * values.ravel())
        assert prompts == [run.captions(4)[row] for row in (1, 1, 5, 5, 9, 9)]
    rows, tokens = inputs(run.scorer, 5, run.captions(5))
    np.testing.assert_array_equal(tokens, [[len(caption)] for caption in run.captions(5)])
    by_latent = dict(zip(values.ravel(), zip(np.repeat(SCORED, 2), expected.reshape(-1, 2), strict=True), strict=True))
    assert rows["latent"].shape == (2, 5, *LATENT) and (rows["weight"] == 1).all()
    for latent, text, reward in zip(*(rows[k].reshape(10, -1) for k in ("latent", "text", "reward")), strict=True):
        row, rewards = by_latent[latent[0]]
        assert (latent == latent[0]).all() and (text == 400 + row).all()
        np.testing.assert_allclose(reward, rewards)


def test_rewards_of_a_step_come_with_the_next_and_pile_up(steps):
    run, known = steps(), set()
    for step in range(4):
        rows, _ = inputs(run.scorer, step, run.captions(step))
        assert (rows["weight"] == (step > 0)).all()
        assert step == 0 or set(rows["latent"].ravel()) <= known
        values, _ = run.submit(step)
        run.scorer.collect()
        known |= set(values.ravel())
    known -= {-3, -2, -1, 1, 2, 3}  # the ring holds 18, and the first step's six were the oldest
    drawn = {v for s in range(40) for v in inputs(run.scorer, s, run.captions(0))[0]["latent"].ravel()}
    assert drawn == known and len(drawn) == 18


def test_every_step_draws_other_rows_and_every_run_the_same(steps):
    one, other, elsewhere = steps(), steps(), steps(seed=12)
    for run in (one, other, elsewhere):
        for step in range(3):
            run.submit(step)
            run.scorer.collect()
    drawn = {s: inputs(one.scorer, s, one.captions(0))[0]["latent"] for s in range(3, 9)}
    for s, latent in drawn.items():
        np.testing.assert_array_equal(latent, inputs(other.scorer, s, one.captions(0))[0]["latent"])
        assert (latent != inputs(elsewhere.scorer, s, one.captions(0))[0]["latent"]).any()
        assert (latent[0] != latent[1]).any()  # nor does every update
    assert len({latent.tobytes() for latent in drawn.values()}) == len(drawn)


def test_means_are_logged_for_the_last_step_alone(steps):
    run = steps()
    for step in range(2):
        values, expected = run.submit(step)
        run.scorer.collect()
    generated, real = expected.mean(0)
    found = run.scorer.latest
    assert found["reward_generated"] == pytest.approx(2 * generated[0] - generated[1])
    assert found["reward_real"] == pytest.approx(2 * real[0] - real[1])
    assert found["reward_host_generated"] == pytest.approx(generated[0])
    assert found["reward_traced_real"] == pytest.approx(real[1])
    kept = -0.5 * values + (100 + np.array(SCORED))[:, None]
    assert found["reward_kept_generated"] == pytest.approx(kept[:, 0].mean())
    run.scorer.collect()
    assert run.scorer.latest == {}


def test_the_monitor_sees_generated_samples_alone(steps):
    """In the order they came: the latent model's word, the scaled true sum, and the held-out reward."""
    run, pairs, kept = steps(), [], []
    for step in range(3):
        values, expected = run.submit(step)
        run.scorer.collect()
        pairs.append(np.stack([7 + values[:, 0], expected[:, 0] @ [3.0, -4.0]], 1))
        kept.append(-0.5 * values[:, 0] + 100 * step + np.array(SCORED))
    state = run.scorer.monitor.state
    np.testing.assert_allclose(state["pairs"], np.concatenate(pairs)[-6:])
    np.testing.assert_allclose(state["held_out"][:, 0], np.concatenate(kept)[-6:])
    windows = [np.concatenate(kept)[0:6], np.concatenate(kept)[3:9]]
    best = max(windows, key=np.mean)
    np.testing.assert_allclose(state["peak"], [best.mean()])
    np.testing.assert_allclose(state["deviation"], [best.std()])
    assert run.scorer.latest["reward_fresh_correlation"] == pytest.approx(np.corrcoef(state["pairs"].T)[0, 1])
    assert run.scorer.latest["reward_kept_fall"] == pytest.approx((best.mean() - windows[-1].mean()) / best.std())


def test_a_reward_of_unknown_scale_says_nothing_of_the_latent_model(steps):
    run = steps()
    run.submit(0, scale=np.zeros((SAMPLES, 2)))
    run.scorer.collect()
    assert np.isnan(run.scorer.monitor.state["pairs"]).all()
    assert np.isfinite(run.scorer.monitor.state["held_out"]).sum() == SAMPLES


def test_a_latent_with_one_reward_missing_is_not_learned_from(steps):
    run = steps()
    reward = np.full((SAMPLES, 2, 3), np.nan)
    reward[1:, :, 2] = 4.0  # the first row's two latents have only the host's reward
    values, _ = run.submit(1, reward=reward)
    run.scorer.collect()
    drawn = {v for s in range(40) for v in inputs(run.scorer, s, run.captions(1))[0]["latent"].ravel()}
    assert drawn == set(values[1:].ravel())


def test_a_latent_that_is_not_finite_is_not_learned_from_whatever_a_reward_says_of_it(steps):
    run = steps()
    latent = np.ones((SAMPLES, 2, *LATENT))
    latent[1, 0, 0, 0, 0, 2] = np.inf
    run.submit(4, latent=latent)
    run.scorer.collect()
    assert np.isfinite([frames for frames, _ in run.seen["host"]]).all()  # zeros were decoded in its place
    rows = run.scorer.state["replay_" + "x".join(map(str, LATENT))]
    assert rows["added"] == 5 and np.isfinite(rows["latent"]).all()


def test_a_rollout_is_reinforced_once(steps):
    run = steps("ddpo")
    rows, _ = inputs(run.scorer, 0, run.captions(0))
    assert rows["states"].shape == (SAMPLES, 3, *LATENT) and np.isnan(rows["reward"]).all()
    for step in range(1, 3):
        values, expected = run.submit(step)
        run.scorer.collect()
        rows, _ = inputs(run.scorer, step, run.captions(step))
        np.testing.assert_allclose(rows["states"][..., 0, 0, 0, 0], values + np.arange(3))
        np.testing.assert_array_equal(rows["text"][:, 0, 0], 100 * step + np.array(SCORED))
        np.testing.assert_allclose(rows["reward"], expected[:, 0])
        again, _ = inputs(run.scorer, step + 1, run.captions(step))
        assert np.isnan(again["reward"]).all() and again["reward"].shape == (SAMPLES, 2)


def test_a_rollout_with_one_reward_missing_has_none(steps):
    run = steps("ddpo")
    reward = np.full((SAMPLES, 1, 3), np.nan)
    reward[1:, 0, 2] = 4.0
    run.submit(1, reward=reward)
    run.scorer.collect()
    rows, _ = inputs(run.scorer, 1, run.captions(1))
    np.testing.assert_array_equal(np.isfinite(rows["reward"]), [[False] * 2, [True] * 2, [True] * 2])


@pytest.mark.parametrize("method", ["lrm", "ddpo"])
def test_its_state_is_all_that_later_steps_depend_on(steps, method):
    one, other = steps(method), steps(method)
    for step in range(2):
        one.submit(step)
        one.scorer.collect()
    other.scorer.state = jax.tree.map(np.array, one.scorer.state)
    for run in (one, other):
        run.submit(2)
        run.scorer.collect()
    jax.tree.map(np.testing.assert_array_equal, one.scorer.state, other.scorer.state)
    assert one.scorer.latest == other.scorer.latest
    for a, b in zip(*(inputs(run.scorer, 3, run.captions(3)) for run in (one, other)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
