"""Each term of the losses alone, against its gradient worked out on paper.

Every network says one velocity for a whole sample, u = b + c m, with m the mean of the sample's text. A clean
prediction is x_t - σ u then, and its derivative is -σ in b and -σ m in c: no random number is left in a gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dollar_jax.distillation import Batch, Distillation, Frozen, Networks
from dollar_jax.rewards import JaxReward
from dollar_jax.rewards.methods.ddpo import Rollouts
from dollar_jax.rewards.methods.lrm import ScoredLatents
from dollar_jax.rewards.pixels import pixel_rewards
from dollar_jax.schedule import Schedule
from dollar_jax.state import Optimisers, RewardStatistics, init_state
from dollar_jax.step import make_step

ROWS, LATENT, TEXT = 4, (2, 3, 2, 3), (2, 5)
STUDENT, EMA, TEACHER, FAKE = ({"b": b, "c": c} for b, c in ((0.5, -0.3), (0.2, 0.6), (-0.4, 0.9), (0.3, 0.1)))
NULL = 0.7  # the mean of the text of no prompt
TERMS = tuple({"name": name, "weight": weight, "folder": None} for name, weight in (("red", 1.5), ("green", -0.5)))
STATISTICS = {"mean": np.array([0.2, -0.3]), "variance": np.array([0.25, 4.0]), "count": np.array(1e9)}
BETA = 0.3
ALONE = {
    "batch_size": ROWS,
    "student.timesteps": (800.0, 400.0),
    "vsd.weight": 0.0,
    "vsd.guidance_weight": 1.5,
    "vsd.normalisation": "none",
    "vsd.score_range": (0.5, 0.5),
    "vsd.score_shift": 1.0,
    "consistency.weight": 0.0,
    "consistency.skip": 2,
    "consistency.guidance_weight": 2.0,
    "consistency.huber_c": 1.0,
    "fake_score.updates": 1,
    "reward.rewards": (),
    "reward.weight": BETA,
    "reward.samples": 2,
    "reward.head.use_text": True,
    "reward.updates": 1,
    "reward.statistics_decay": 1.0,
}


def denoise(p, x, t, text):
    u = p["b"] + p["c"] * text.mean((1, 2))
    return jnp.broadcast_to(u.reshape(-1, 1, 1, 1, 1), x.shape)


def linear_head(p, latent, text):
    return (latent * jnp.arange(3)).mean((1, 2, 3, 4)) * p["w"] + text.mean((1, 2)) * p["v"]


def red(params, frames, tokens):
    return params * frames[..., 0].mean((1, 2, 3))


def green(params, frames, tokens):
    return (frames[..., 1] ** 2).mean((1, 2, 3))


def take_gradients(config, batch):
    """Gradients of student, fake score and latent reward model in one step of the package, and its metrics."""
    rewards = [JaxReward(red, "", np.float32(2.0)), JaxReward(green, "")][: len(config.reward.rewards)]
    pixels = pixel_rewards(config.reward, rewards, decode)
    keep = optax.scale(1.0)  # so that what a network changes by is its gradient
    optimisers = Optimisers(keep, keep, keep)
    step = make_step(
        Distillation(config, Networks(denoise, linear_head, pixels), Schedule("rf", "velocity")), optimisers
    )
    weights = functools.partial(jax.tree.map, jnp.float32)
    null = jnp.full((1, *TEXT), NULL)
    frozen = Frozen(weights(TEACHER), null, () if pixels is None else pixels.params(jnp.float32(0.5)))
    head = weights({"w": 1.2, "v": -0.8})
    state = init_state(jax.random.key(0), weights(STUDENT), head, optimisers, 2)
    statistics = RewardStatistics(**weights(STATISTICS))
    state = dataclasses.replace(
        state, ema=weights(EMA), fake_score=weights(FAKE), reward_statistics=statistics, step=jnp.int32(3)
    )
    kept = None
    if config.reward.rewards and config.reward.method == "lrm":
        kept = ScoredLatents(**batch["replay"])
    if config.reward.rewards and config.reward.method == "ddpo":
        kept = Rollouts(**batch["rollout"])
    new, metrics, _ = jax.jit(step)(state, frozen, Batch(batch["latent"], batch["text"], {}, kept))
    names = ("student", "fake_score", "latent_reward")
    changed = {n: jax.tree.map(lambda a, b: float(a - b), getattr(new, n), getattr(state, n)) for n in names}
    return changed, {name: float(value) for name, value in metrics.items()}


def decode(params, latent):
    return params * latent


def drawn_timesteps(alone=False):
    """σ of the student's input in each row, and what noise made it: by the keys that the step splits.

    `alone` is the input that consistency distillation draws where there is nothing else."""
    student, _, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), 3), 3)
    key = jax.random.split(jax.random.split(student, 1)[0], 4)[0]
    index_key, noise_key = jax.random.split(key)[::-1] if alone else jax.random.split(key, 3)[:2]
    index = np.asarray(jax.random.randint(index_key, (ROWS,), 0, 2))
    assert set(index) == {0, 1}
    return np.array([0.8, 0.4])[index], np.asarray(jax.random.normal(noise_key, (ROWS, *LATENT)))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    rollout = {"states": normal(2, 2, *LATENT), "text": normal(2, *TEXT), "reward": normal(2, 2)}
    replay = {"latent": normal(1, 4, *LATENT), "text": normal(1, 4, *TEXT), "reward": normal(1, 4, 2)}
    replay["weight"] = np.ones((1, 4), np.float32)
    return {"latent": normal(ROWS, *LATENT), "text": 3 * normal(ROWS, *TEXT), "rollout": rollout, "replay": replay}


def mean(text):
    return text.mean((1, 2)).astype(np.float64)


def says(network, m):
    return network["b"] + network["c"] * m


def guided(m, weight):
    return says(TEACHER, m) + weight * (says(TEACHER, m) - says(TEACHER, NULL))


def assert_student(found, slope, sigma, m):
    """`slope` is the loss's in each sample's clean prediction, summed over its elements."""
    expected = {"b": (-sigma * slope).mean(), "c": (-sigma * m * slope).mean()}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6)
        assert abs(value) > 1e-4


def test_vsd_moves_the_student_from_the_fake_score_to_the_guided_teacher(make_config, batch):
    changed, metrics = take_gradients(make_config({**ALONE, "vsd.weight": 0.7}), batch)
    sigma, _ = drawn_timesteps()
    m = mean(batch["text"])
    g = 0.5 * (guided(m, 1.5) - says(FAKE, m))  # x̂0 of fake less real, at σ = 0.5
    assert_student(changed["student"], 0.7 * g, sigma, m)
    np.testing.assert_allclose(metrics["vsd"], (g**2).mean() / 2, rtol=1e-5)


@pytest.mark.parametrize("distance", ["mse", "huber", "pseudo_huber"])
def test_consistency_moves_the_student_to_the_average_after_the_teachers_steps(make_config, batch, distance):
    changes = {"consistency.weight": 0.6, "consistency.distance": distance}
    changed, metrics = take_gradients(make_config({**ALONE, **changes}), batch)
    sigma, _ = drawn_timesteps(alone=True)
    m = mean(batch["text"])
    # From 0.8 the teacher goes on to 0.4, where the average takes over; from 0.4 to the clean end.
    target = np.where(sigma == 0.8, -0.4 * guided(m, 2.0) - 0.4 * says(EMA, m), -0.4 * guided(m, 2.0))
    d, h = -sigma * says(STUDENT, m) - target, 1.0
    assert (abs(d) > h).any() and (abs(d) < h).any()
    slopes = {"mse": 2 * d, "huber": np.clip(d, -h, h), "pseudo_huber": d / np.sqrt(d**2 + h**2)}
    assert_student(changed["student"], 0.6 * slopes[distance], sigma, m)


def test_the_latent_reward_reaches_the_student_through_the_head(make_config, batch):
    """Nothing else moves the student here: with VSD on, a head that is cut off from it would not be missed."""
    changed, metrics = take_gradients(make_config({**ALONE, "reward.rewards": TERMS}), batch)
    sigma, noise = drawn_timesteps()
    m = mean(batch["text"])
    # R is linear in the latent: its derivative in all elements of a sample together is w mean(0, 1, 2).
    assert_student(changed["student"], -BETA * 1.2 * np.ones(ROWS), sigma, m)
    s = sigma.reshape(-1, 1, 1, 1, 1)
    x = (1 - s) * batch["latent"] + s * noise - s * says(STUDENT, m).reshape(s.shape)
    expected = 1.2 * (x * np.arange(3)).mean((1, 2, 3, 4)) - 0.8 * m
    np.testing.assert_allclose(metrics["latent_reward"], expected.mean(), rtol=1e-4)


def test_direct_rewards_reach_the_student_through_the_decoder(make_config, batch):
    config = make_config({**ALONE, "reward.rewards": TERMS, "reward.method": "direct"})
    changed, _ = take_gradients(config, batch)
    sigma, noise = drawn_timesteps()
    m, s = mean(batch["text"]), sigma.reshape(-1, 1, 1, 1, 1)
    x = (1 - s) * batch["latent"] + s * noise - s * says(STUDENT, m).reshape(s.shape)
    frames = 0.5 * x
    # Red is 2 mean(f_0) and green mean(f_1²); a frame is half a latent; weight over standard deviation.
    slope = 1.5 / 0.5 * 2 * 0.5 - 0.5 / 2.0 * 2 * 0.5 * frames[..., 1].mean((1, 2, 3))
    slope = -BETA * slope * np.array([2, 0, 2, 0])  # the mean is over the two rows that are scored
    assert_student(changed["student"], slope, sigma, m)


def test_ddpo_follows_the_score_function(make_config, batch):
    config = make_config({**ALONE, "reward.rewards": TERMS, "reward.method": "ddpo"})
    changed, _ = take_gradients(config, batch)
    states, reward = (np.float64(batch["rollout"][k]) for k in ("states", "reward"))
    m = mean(batch["rollout"]["text"])
    # The scale is as known as before: a count of 1e9 outweighs two more rewards.
    advantage = (reward - STATISTICS["mean"]) @ (np.array([1.5, -0.5]) / np.sqrt(STATISTICS["variance"]))
    # From σ = 0.8 to 0.4: x' given x and x̂0 by the product of two Gaussians.
    a, b, a2, b2 = 0.2, 0.8, 0.6, 0.4
    noise = b**2 - (a / a2 * b2) ** 2
    of_x0, of_x, variance = a2 * noise / b**2, a / a2 * b2**2 / b**2, b2**2 * noise / b**2
    x0 = states[:, 0] - 0.8 * says(STUDENT, m).reshape(-1, 1, 1, 1, 1)
    d = of_x0 * x0 + of_x * states[:, 0] - states[:, 1]
    slope = BETA * advantage * of_x0 * d.mean((1, 2, 3, 4)) / variance
    assert_student(changed["student"], slope, np.array([0.8, 0.8]), m)


def test_the_fake_score_regresses_what_the_moved_student_makes(make_config, batch):
    """Of the student as it is after its own update: here moved by a large step of VSD."""
    for weight in (1e-3, 40.0):
        changed, metrics = take_gradients(make_config({**ALONE, "vsd.weight": weight}), batch)
        student = {k: STUDENT[k] + changed["student"][k] for k in STUDENT}
        assert (max(map(abs, changed["student"].values())) > 1) == (weight > 1)
        fake = jax.random.split(jax.random.fold_in(jax.random.key(0), 3), 3)[1]
        keys = jax.random.split(jax.random.split(jax.random.split(fake, 1)[0], 1)[0], 3)
        draws = jax.random.split(keys[0], 3)
        sigma = np.array([0.8, 0.4])[np.asarray(jax.random.randint(draws[0], (ROWS,), 0, 2))]
        s, m = sigma.reshape(-1, 1, 1, 1, 1), mean(batch["text"])
        x_t = (1 - s) * batch["latent"] + s * np.asarray(jax.random.normal(draws[1], (ROWS, *LATENT)))
        x0 = x_t - s * says(student, m).reshape(s.shape)
        d = says(FAKE, m) - (np.asarray(jax.random.normal(keys[2], x0.shape)) - x0).mean((1, 2, 3, 4))
        np.testing.assert_allclose(changed["fake_score"]["b"], (2 * d).mean(), rtol=1e-4)
        np.testing.assert_allclose(changed["fake_score"]["c"], (2 * d * m).mean(), rtol=1e-4)


def test_the_head_regresses_the_standardised_sum(make_config, batch):
    changed, metrics = take_gradients(make_config({**ALONE, "reward.rewards": TERMS}), batch)
    # Rewards of the replay; what the step has scored itself comes besides, of the student as it was.
    replay = {k: np.float64(v[0]) for k, v in batch["replay"].items()}
    sigma, noise = drawn_timesteps()
    m, s = mean(batch["text"]), sigma.reshape(-1, 1, 1, 1, 1)
    x = (1 - s) * batch["latent"] + s * noise - s * says(STUDENT, m).reshape(s.shape)
    fresh = np.stack([x, batch["latent"]], 1)[::2].reshape(4, *LATENT)
    raw = np.stack([2 * (0.5 * fresh[..., 0]).mean((1, 2, 3)), ((0.5 * fresh[..., 1]) ** 2).mean((1, 2, 3))], -1)
    latent, reward = np.concatenate([replay["latent"], fresh]), np.concatenate([replay["reward"], raw])
    m = np.concatenate([mean(replay["text"]), m[::2].repeat(2)])
    goal = (reward - STATISTICS["mean"]) @ (np.array([1.5, -0.5]) / np.sqrt(STATISTICS["variance"]))
    feature = (latent * np.arange(3)).mean((1, 2, 3, 4))
    d = 1.2 * feature - 0.8 * m - goal
    np.testing.assert_allclose(changed["latent_reward"]["w"], (2 * d * feature).mean(), rtol=1e-4)
    np.testing.assert_allclose(changed["latent_reward"]["v"], (2 * d * m).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["reward_regression"], (d**2).mean(), rtol=1e-4)
