"""The ways a reward reaches the student, over closed-form networks."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dollar_jax import objectives, sampling
from dollar_jax import schedule as schedules
from dollar_jax.config import RewardConfig
from dollar_jax.distillation import Batch, Distillation, Frozen, Networks, References
from dollar_jax.rewards import JaxReward, Reward
from dollar_jax.rewards.methods import METHODS, base, ddpo, method_of
from dollar_jax.rewards.pixels import pixel_rewards
from dollar_jax.schedule import Schedule
from dollar_jax.state import RewardStatistics

SCHEDULES = [Schedule("rf", "velocity", shift=3.0), Schedule("ddpm", "v")]
SHAPE, BATCH = (3, 2, 2, 3), 4
STATISTICS = RewardStatistics(jnp.array([0.3, -1.0]), jnp.array([0.25, 4.0]), jnp.float32(9.0))
TERMS = (
    {"name": "red", "weight": 0.5, "folder": None},
    {"name": "blue", "weight": -2.0, "folder": None},
    {"name": "kept", "weight": 0.0, "folder": None},
)
ALONE = {
    "vsd.weight": 0.0,
    "consistency.weight": 0.0,
    "batch_size": BATCH,
    "reward.samples": 2,
    "reward.rewards": TERMS,
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def mix(params, x, t, text):
    return params["x"] * x + params["c"] * text.mean((1, 2)).reshape(-1, 1, 1, 1, 1)


def decode(params, latent):
    return jax.nn.sigmoid(params * latent + jnp.array([2.0, 0.0, -1.0]))


def reward(channel):
    def square(gain, frames, tokens):
        return (gain * frames[..., channel] ** 2).mean((1, 2, 3))

    return JaxReward(square, "", 1.5 + channel)


REWARDS = [reward(0), reward(2), reward(1)]
PARAMS = {"x": jnp.float32(0.4), "c": jnp.float32(-0.7)}


def frozen(pixels):
    return Frozen(PARAMS, normal(8, 1, 3, 4), pixels.params(jnp.float32(0.8)))


@pytest.fixture
def settings(make_config):
    def make(changes=None):
        config = make_config({**ALONE, **(changes or {})})
        pixels = pixel_rewards(config.reward, REWARDS, decode)
        return config, pixels, Networks(mix, None, pixels)

    return make


# The gradient through decoder and rewards


def direct_loss(config, networks, params, key=0):
    """With β_FT = 0.3."""
    config = dataclasses.replace(
        config, reward=dataclasses.replace(config.reward, weight=0.3, start_step=0, ramp_steps=0)
    )
    references = References(PARAMS, PARAMS, None, STATISTICS, frozen(networks.pixel_rewards), jnp.int32(0))
    batch = Batch(normal(1, BATCH, *SHAPE), normal(2, BATCH, 3, 4))
    return objectives.student(
        Distillation(config, networks, SCHEDULES[0]), params, references, batch, jax.random.key(key)
    )


def test_direct_reward_is_the_standardised_sum_of_the_pixels_rewards(settings):
    config, pixels, networks = settings({"reward.method": "direct"})
    total, (metrics, generated) = direct_loss(config, networks, PARAMS)
    frames = np.asarray(decode(0.8, generated.latent[::2]), np.float64)  # two of four rows, evenly
    raw = np.stack([(g * frames[..., c] ** 2).mean((1, 2, 3)) for g, c in ((1.5, 0), (3.5, 2), (2.5, 1))], -1)
    np.testing.assert_allclose(generated.reward, raw, rtol=1e-5)
    expected = (0.5 * (raw[:, 0] - 0.3) / 0.5 - 2.0 * (raw[:, 1] + 1.0) / 2.0).mean()  # the third is held out
    np.testing.assert_allclose(metrics["pixel_reward"], expected, rtol=1e-5)
    np.testing.assert_allclose(total, -0.3 * expected, rtol=1e-5)


@pytest.mark.parametrize("frames", [None, 2])
@pytest.mark.parametrize("remat", [True, False])
def test_direct_gradient_is_that_of_finite_differences(settings, remat, frames):
    config, _, networks = settings({"reward.method": "direct", "reward.remat": remat, "reward.latent_frames": frames})
    loss = jax.jit(lambda params: direct_loss(config, networks, params)[0])
    gradient = jax.grad(loss)(PARAMS)
    assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(PARAMS))) == remat
    for name in PARAMS:
        ends = [loss({**PARAMS, name: PARAMS[name] + h}) for h in (0.02, -0.02)]
        np.testing.assert_allclose(gradient[name], (ends[0] - ends[1]) / 0.04, rtol=2e-3, atol=3e-6)
        assert abs(gradient[name]) > 1e-3


def test_bad_host_rewards_cannot_be_differentiated(make_config):
    config = make_config({**ALONE, "reward.method": "direct"})
    with pytest.raises(ValueError, match="the reward 'blue' is a host reward, without a gradient"):
        pixel_rewards(config.reward, [REWARDS[0], Reward(len, ""), REWARDS[2]], decode)


def test_every_method_that_a_config_may_name_has_its_class():
    hints = typing.get_type_hints(RewardConfig)
    assert set(METHODS) == set(typing.get_args(hints["method"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reward.method": "ddpo", "student.timesteps": (900.0,)},
            "'ddpo' needs at least two of config.student.timest",
        ),
        ({"reward.method": "ddpo", "student.sampler": "ode"}, "'ddpo' needs noise in each step"),
        ({"reward.method": "direct", "reward.guard.min_correlation": 0.5}, "min_correlation needs a latent reward mod"),
        ({"reward.rewards": TERMS[2:], "reward.guard.min_correlation": 0.5}, "min_correlation needs a latent reward"),
    ],
)
def test_bad_settings_of_a_method_are_refused(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        method_of(make_config({**ALONE, **changes})).check()
    method_of(make_config(ALONE)).check()


def test_host_rewards_have_columns_without_numbers(make_config):
    config = make_config(ALONE)
    pixels = pixel_rewards(config.reward, [REWARDS[0], Reward(len, ""), REWARDS[2]], decode)
    latent = normal(3, 2, *SHAPE).at[1, 0, 0, 0, 0].set(jnp.nan)
    out = np.asarray(pixels(pixels.params(0.8), latent, {}))
    assert (np.isfinite(out) == [[True, False, True], [False, False, False]]).all()
    assert pixel_rewards(config.reward, [Reward(len, "")] * 3, decode) is None


# REINFORCE


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["rf", "ddpm"])
def test_policy_loss_and_gradient_have_their_closed_form(settings, schedule):
    config, _, networks = settings({"reward.method": "ddpo", "student.timesteps": (990.0, 700.0, 300.0)})
    states, text = normal(4, 2, 3, *SHAPE), normal(5, 2, 3, 4)
    advantage = jnp.array([0.7, -1.2])
    loss = functools.partial(ddpo.policy, Distillation(config, networks, schedule))
    (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(PARAMS, states, text, advantage)

    x64, elements = np.asarray(states, np.float64), np.prod(SHAPE)
    expected, slope = 0.0, 0.0
    for i, (t, t_next) in enumerate([(990.0, 700.0), (700.0, 300.0)]):
        (a, b), (a2, b2) = (
            [float(v[0]) for v in schedules.coefficients(schedule, jnp.full(1, s))] for s in (t, t_next)
        )
        x, m = x64[:, i], np.asarray(text, np.float64).mean((1, 2)).reshape(-1, 1, 1, 1, 1)
        prediction = 0.4 * x - 0.7 * m
        # velocity: x0 = x - b v; v: x0 = a x - b v. Either has dx0/dv = -b.
        x0 = (x if schedule.path == "rf" else a * x) - b * prediction
        # The posterior of x_next given x_t and x0, as a product of two Gaussians.
        variance = b**2 - (a / a2) ** 2 * b2**2
        sigma2 = b2**2 * variance / b**2
        mean = (a2 * variance * x0 + (a / a2) * b2**2 * x) / b**2
        difference = x64[:, i + 1] - mean
        weights = np.asarray(advantage).reshape(-1, 1, 1, 1, 1)
        expected += (weights * difference**2).sum() / (2 * sigma2) / elements / 2
        slope += (weights * difference * (a2 * variance / b**2) * b * x).sum() / sigma2 / elements / 2
    np.testing.assert_allclose(value, expected, rtol=2e-4)
    np.testing.assert_allclose(gradient["x"], slope, rtol=2e-3)


def test_rollouts_that_were_not_scored_move_nothing(settings):
    config, _, networks = settings({"reward.method": "ddpo"})
    loss = functools.partial(ddpo.policy, Distillation(config, networks, SCHEDULES[0]))
    states, text = normal(4, 2, 3, *SHAPE), normal(5, 2, 3, 4)
    both = jax.grad(loss, has_aux=True)(PARAMS, states, text, jnp.array([jnp.nan, 1.0]))[0]
    one = jax.grad(loss, has_aux=True)(PARAMS, states[1:], text[1:], jnp.array([1.0]))[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-5), both, one)


def test_policy_gradient_raises_the_expected_reward(settings):
    """Its mean is the derivative of E[R], R of the clean end, in what the last two random steps do."""
    count, schedule, times = 20_000, SCHEDULES[0], (900.0, 600.0, 300.0)
    config, _, networks = settings({"reward.method": "ddpo", "student.timesteps": times})
    text, shape = jnp.ones((count, 1, 1)), (1, 1, 1, 1)
    params = {"x": jnp.float32(0.4), "c": jnp.float32(-0.3)}
    distillation = Distillation(config, networks, schedule)
    clip = jnp.zeros((count, *shape))
    states, end = jax.jit(lambda key: ddpo.rollout(distillation, params, text, clip, key))(jax.random.key(0))
    assert states.shape == (count, 3, *shape)

    def reward(x0):
        return -jnp.square(x0 - 1.0).reshape(-1)

    def expected_reward(c):
        """The steps with another parameter, their start and the clean end's network as they were."""
        x, moved = states[:, 0], {**params, "c": c}
        for i, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
            t, t_next = jnp.full(count, t), jnp.full(count, t_next)

            def step(p, x, t=t, t_next=t_next):
                x0 = sampling.Denoiser(mix, p, schedule, text).x0(x, t)
                return schedules.posterior(schedule, x, x0, t, t_next)

            mean, deviation = step(params, states[:, i])
            noise = (states[:, i + 1] - mean) / deviation
            mean, deviation = step(moved, x)
            x = mean + deviation * noise
        return reward(sampling.Denoiser(mix, params, schedule, text).x0(x, jnp.full(count, times[-1]))).mean()

    np.testing.assert_allclose(expected_reward(params["c"]), reward(end).mean(), rtol=1e-4)
    slope = jax.grad(expected_reward)(params["c"])
    advantage = reward(end) - reward(end).mean()
    loss = functools.partial(ddpo.policy, Distillation(config, networks, schedule))
    gradient = jax.grad(loss, has_aux=True)(params, states, text, advantage)[0]["c"]
    np.testing.assert_allclose(-gradient, slope, rtol=0.1)
    assert abs(slope) > 0.05


# A first frame that is given


@pytest.mark.parametrize(
    "case", ["vsd-forward", "vsd-backward", "cd-grid", "cd-student", "lrm", "direct", "ddpo", "fake", "fake-x0"]
)
def test_a_given_frame_is_in_every_input_and_in_no_loss(settings, case):
    """Every network sees it as it is, else NaN; what a network says there changes no number, and gets no gradient."""
    name, _, kind = case.partition("-")
    weights = {"vsd.weight": float(name == "vsd"), "consistency.weight": float(name == "cd")}
    changes = {
        **weights,
        "reward.weight": 0.0 if any(weights.values()) else 1.0,
        "reward.method": name if name in ("direct", "ddpo") else "lrm",
        "student.input": "forward" if "forward" in kind or name == "cd" else "backward",
        "student.timesteps": (990.0, 700.0, 300.0),
        "consistency.times": kind if name == "cd" else "grid",
        "fake_score.loss": kind if kind == "x0" else "prediction",
    }
    config, pixels, networks = settings(changes)
    schedule = Schedule("rf", kind if kind == "x0" else "velocity", shift=3.0, given_frames=1)
    clip, text = normal(1, BATCH, *SHAPE).at[:, 0].set(7.0), normal(2, BATCH, 3, 4)

    def network(params, x, t, text, given):
        assert given == 1
        said = mix(PARAMS, x, t, text) + params + x.mean(1, keepdims=True)
        return jnp.where((x[:, :1] == 7.0).all(), said, jnp.nan)

    networks = Networks(network, lambda params, latent, text: jnp.square(latent).mean((1, 2, 3, 4)), pixels)
    distillation, batch = Distillation(config, networks, schedule), Batch(clip, text)
    others = jnp.zeros(SHAPE)
    teacher = Frozen(others, jnp.zeros((1, 3, 4)), frozen(pixels).reward)
    references = References(others, others, None, STATISTICS, teacher, jnp.int32(10_000))

    @jax.jit
    def loss(params):
        """Of the student or the fake score whose network says `params` more."""
        key = jax.random.key(0)
        if name == "fake":
            return objectives.fake_score(distillation, params, others, batch, key)[0]
        if name == "ddpo":
            states, _ = ddpo.rollout(distillation, others, text, clip, key)
            return ddpo.policy(distillation, params, states, text, jnp.arange(BATCH) - 1.0)[0]
        return objectives.student(distillation, params, references, batch, key)[0]

    params = 0.1 * normal(3, *SHAPE)
    value, gradient = jax.value_and_grad(loss)(params)
    assert np.isfinite(value) and value != 0 and np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.abs(gradient[1:]).max((1, 2, 3)).all()
    np.testing.assert_array_equal(loss(params.at[0].add(1e4)), value)


# Weights, statistics, rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2]),
        ({"ramp_steps": 4}, [0, 0, 0, 0.5, 1, 1.5, 2, 2, 2, 2, 2]),
        (
            {"ramp_steps": 2, "decay": "cosine", "final_ratio": 0.5},
            [0, 0, 0, 1, 2] + [1 + 0.5 * (1 + np.cos(np.pi * i / 6)) for i in range(6)],
        ),
    ],
    ids=["constant", "ramp", "cosine"],
)
def test_reward_weight_follows_its_schedule(make_config, changes, expected):
    config = make_config(
        {"steps": 11, "reward.weight": 2.0, "reward.start_step": 3, **{f"reward.{k}": v for k, v in changes.items()}}
    )
    found = [config.reward.weight * base.reward_schedule(config, jnp.int32(step)) for step in range(len(expected))]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_rewards_are_combined_raw_or_standardised(make_config):
    raw = jnp.array([[1.0, 2.0], [jnp.nan, 1.0]])
    config = make_config(ALONE).reward
    combined = base.combined_reward(config, STATISTICS, raw)
    np.testing.assert_allclose(combined, [0.5 * 0.7 / 0.5 - 2 * 3.0 / 2.0, np.nan], rtol=1e-6)
    plain = dataclasses.replace(config, normalise=False)
    np.testing.assert_allclose(base.combined_reward(plain, STATISTICS, raw), [-3.5, np.nan], rtol=1e-6)
    unknown = RewardStatistics(jnp.zeros(2), jnp.zeros(2), jnp.zeros(()))
    np.testing.assert_array_equal(base.combined_reward(config, unknown, raw[:1]), [0.0])


def test_statistics_keep_their_precision_far_from_zero():
    """Mean square minus squared mean has no correct digit here."""
    values = (1e4 + 0.02 * np.random.default_rng(0).normal(size=(50, 4, 2))).astype(np.float32)
    statistics = RewardStatistics(jnp.zeros(2), jnp.zeros(2), jnp.zeros(()))
    for step in values:
        statistics = statistics.updated(jnp.asarray(step), jnp.ones(4), 0.9)
    shares = np.repeat(0.9 ** np.arange(49, -1, -1), 4)
    flat = values.reshape(-1, 2).astype(np.float64)
    mean = np.average(flat, 0, shares)
    std = np.sqrt(np.average((flat - mean) ** 2, 0, shares))
    np.testing.assert_allclose(statistics.std, std, rtol=0.02)  # fp32 has steps of 0.001 here
    np.testing.assert_allclose(statistics.mean, mean, atol=2e-3)


def test_runs_of_frames_are_consecutive_and_begin_anywhere():
    latent = jnp.arange(6.0).reshape(1, 6, 1, 1, 1) + 10 * jnp.arange(64.0).reshape(-1, 1, 1, 1, 1)
    runs = np.asarray(base.random_run(latent, 3, jax.random.key(0)))[..., 0, 0, 0]
    start = runs[:, 0] - 10 * np.arange(64)
    np.testing.assert_array_equal(np.diff(runs), 1)
    assert set(start) == {0, 1, 2, 3}
    assert base.random_run(latent, None, jax.random.key(0)) is latent
    np.testing.assert_array_equal(base.scored_rows(jnp.arange(12), 3), [0, 4, 8])
