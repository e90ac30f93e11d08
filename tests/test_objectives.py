"""The objectives over closed-form networks: a function of the role's own parameters, no module."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dollar_jax import objectives, sampling
from dollar_jax import schedule as schedules
from dollar_jax.distillation import Batch, Distillation, Frozen, Networks, References, StudentPass
from dollar_jax.rewards.methods import lrm
from dollar_jax.rewards.methods.lrm import ScoredLatents
from dollar_jax.schedule import Schedule

RF = Schedule("rf", "velocity", shift=3.0)
DDPM = Schedule("ddpm", "v")
SHAPE = (2, 3, 2, 5)
BATCH = 6
REWARD = ({"name": "vividness", "weight": 1.0, "folder": None},)


def like(value, x):
    return value.reshape(-1, *(1,) * (x.ndim - 1))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def mix(params, x, t, text):
    """A denoiser that depends on everything, and whose guidance does something."""
    return params["x"] * x + params["t"] * like(t / 1000, x) + params["text"] * like(text.mean((1, 2)), x)


def weights(*values):
    return dict(zip(("x", "t", "text"), map(jnp.float32, values), strict=True))


def score(params, latent, text):
    return params["s"] * (latent**2).mean((1, 2, 3, 4)) + params["c"] * text.mean((1, 2))


NETWORKS = Networks(mix, score)


def inputs():
    """What the student's loss depends on, but for its settings and its key."""
    return {
        "params": weights(0.3, -0.2, 0.5),
        "ema": weights(0.25, -0.1, 0.4),
        "fake_score": weights(0.2, 0.3, -0.6),
        "reward_head": {"s": jnp.float32(0.7), "c": jnp.float32(-0.4)},
        "frozen": Frozen(weights(0.4, 0.1, 0.8), normal(8, 1, 3, 4)),
        "x0": normal(1, BATCH, *SHAPE),
        "text": normal(2, BATCH, 3, 4),
    }


def student(config, args=None, seed=0, networks=NETWORKS, schedule=RF):
    """`objectives.student` with β_FT = 0.3."""
    config = dataclasses.replace(
        config, reward=dataclasses.replace(config.reward, weight=0.3, start_step=0, ramp_steps=0)
    )

    @jax.jit
    def run(args, key):
        references = References(
            *(args[name] for name in ("ema", "fake_score", "reward_head")), None, args["frozen"], jnp.int32(0)
        )
        distillation, batch = Distillation(config, networks, schedule), Batch(args["x0"], args["text"])
        return objectives.student(distillation, args["params"], references, batch, key)

    return run(args or inputs(), jax.random.key(seed))


def references(ema, fake_score, frozen):
    return References(ema, fake_score, None, None, frozen, jnp.int32(0))


KINDS = [(i, t) for i in ("forward", "backward") for t in ("student", "grid")]


@pytest.mark.parametrize(("source", "times"), KINDS)
def test_student_loss_is_the_weighted_sum_of_its_parts(make_config, source, times):
    kind = {"student.input": source, "consistency.times": times}
    off = {"vsd.weight": 0.0, "consistency.weight": 0.0, "reward.rewards": ()}
    on = {"vsd.weight": 1.0, "consistency.weight": 1.0, "reward.rewards": REWARD}
    alone = {name: student(make_config({**kind, **off, name: on[name]}))[0] for name in off}
    # With neither VSD nor reward L_CD takes its own input only, and so draws others.
    beside = make_config({**kind, "vsd.weight": 0.0, "consistency.weight": 1.0, "reward.rewards": REWARD})
    alone["consistency.weight"] = student(beside)[1][0]["consistency"]
    assert all(abs(value) > 1e-3 for value in alone.values())
    total, (metrics, _) = student(
        make_config({**kind, "vsd.weight": 0.7, "consistency.weight": 0.5, "reward.rewards": REWARD})
    )
    # The reward's part came with its weight already, as in both calls.
    expected = 0.7 * alone["vsd.weight"] + 0.5 * alone["consistency.weight"] + alone["reward.rewards"]
    np.testing.assert_allclose(total, expected, rtol=0, atol=1e-6 * max(map(abs, alone.values())))
    np.testing.assert_allclose(metrics["latent_reward"], -alone["reward.rewards"] / 0.3, rtol=1e-6)


@pytest.mark.parametrize(("source", "times"), KINDS)
def test_gradients_reach_the_student_alone(make_config, source, times):
    config = make_config({"student.input": source, "consistency.times": times})

    def loss(trained):
        return student(config, {**inputs(), **trained})[0]

    names = ("params", "ema", "fake_score", "reward_head", "frozen")
    grads = jax.grad(loss)({name: inputs()[name] for name in names})
    assert all(value != 0 for value in jax.tree.leaves(grads.pop("params")))
    for leaf in jax.tree.leaves(grads):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize(
    ("source", "times", "expected"),
    [("forward", "student", 1), ("forward", "grid", 2), ("backward", "student", 2), ("backward", "grid", 2)],
)
def test_number_of_forward_passes(make_config, source, times, expected):
    """Forward-noised at the student's own times one pass serves VSD, CD and reward; CFG is one call."""
    calls = collections.Counter()

    def counting(params, x, t, text):
        (role,) = params
        # Simulated inputs are reached without gradient; those passes come before and are not counted.
        calls[role, x.shape[0]] += 1
        return mix(params[role], x, t, text)

    args = inputs()
    for name in ("params", "ema", "fake_score"):
        args[name] = {name: args[name]}
    args["frozen"] = dataclasses.replace(args["frozen"], teacher={"teacher": args["frozen"].teacher})
    config = make_config({"student.input": source, "consistency.times": times})
    simulation = collections.Counter()
    if source == "backward":
        rollout = functools.partial(
            objectives.student_input,
            Distillation(config, Networks(counting, score), RF),
            args["params"],
            Batch(args["x0"], args["text"]),
        )
        jax.eval_shape(rollout, jax.random.key(0))
        simulation, calls = calls, collections.Counter()
        assert simulation["params", BATCH] == 1

    jax.eval_shape(lambda: student(config, args, networks=Networks(counting, score)))
    assert calls - simulation == {
        ("params", BATCH): expected,
        ("fake_score", BATCH): 1,
        ("ema", BATCH): 1,
        ("teacher", 2 * BATCH): 2,  # VSD, and the one step that the loop over CD's steps repeats
    }


# Consistency


def table(params, x, t, text):
    """x̂0 = gain(t) · x, the gain given at some times: any linear consistency function or denoiser."""
    return like(jnp.interp(t, params["times"], params["gains"]), x) * x


def path(schedule, t):
    """(a, b) in fp64, written anew."""
    t = np.asarray(t, np.float64)
    if schedule.path == "rf":
        return 1 - t / 1000, t / 1000
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.append(1.0, np.cumprod(1 - betas))[np.round(np.maximum(t, -1)).astype(int) + 1]
    return np.sqrt(alphas), np.sqrt(1 - alphas)


def exact_tables(schedule, times, variance=0.3):
    """Teacher and student for N(0, variance I) data along descending times: E[x0|x_t], and where DDIM ends."""
    a, b = path(schedule, times)
    teacher = a * variance / (a**2 * variance + b**2)
    factors = [a[i + 1] * teacher[i] + b[i + 1] / b[i] * (1 - a[i] * teacher[i]) for i in range(len(times) - 1)]
    ends = np.append(np.cumprod(factors[::-1])[::-1], 1.0)
    return ({"times": jnp.float32(times[::-1]), "gains": jnp.float32(gains[::-1])} for gains in (teacher, ends))


@pytest.mark.parametrize("path_name", ["rf", "ddpm"])
@pytest.mark.parametrize("times", ["student", "grid"])
@pytest.mark.parametrize("boundary", ["none", "lcm"])
def test_consistency_is_zero_for_the_exact_solution(make_config, path_name, times, boundary):
    """A wrong target time, a skipped teacher step or a wrong clean end each leave a loss above 1e-4."""
    schedule = Schedule(path_name, "x0")
    steps = (999.0, 749.0, 499.0, 249.0) if path_name == "ddpm" else (1000.0, 900.0, 750.0, 500.0)
    config = make_config(
        {
            "student.timesteps": steps,
            "consistency.times": times,
            "consistency.skip": 5,
            "consistency.boundary": boundary,
            "consistency.weight": 1.0,
            "vsd.weight": 0.0,
            "reward.rewards": (),
            "vsd.score_shift": 1.0,
        }
    )
    if times == "grid":
        grid = schedules.timestep_grid(schedule, 50)
    else:
        ends = (*steps[1:], -1.0 if path_name == "ddpm" else 0.0)
        segments = [np.linspace(a, b, 6) for a, b in zip(steps, ends, strict=True)]
        grid = np.unique(np.concatenate(segments))[::-1]
        grid = np.round(grid) if path_name == "ddpm" else grid
    teacher, exact = exact_tables(schedule, grid)

    def loss(params):
        args = {**inputs(), "params": params, "ema": params, "fake_score": params}
        args["frozen"] = Frozen(teacher, normal(8, 1, 3, 4))
        return student(config, args, networks=Networks(table, score), schedule=schedule)[0]

    # At times above 900 of an RF the denoiser's own gain differs from the solution's the most.
    assert loss(exact) < 1e-9
    assert loss(teacher) > 1e-4


def consistency(config, schedule, networks, ema, frozen, prediction, x_t, times, text):
    times = jnp.broadcast_to(jnp.asarray(times, jnp.float32)[:, None], (len(times), len(x_t)))
    distillation = Distillation(config, networks, schedule)
    return objectives.consistency(distillation, references(ema, None, frozen), prediction, x_t, times, Batch(x_t, text))


@pytest.mark.parametrize("schedule", [RF, DDPM], ids=["rf", "ddpm"])
def test_the_last_target_is_the_solution_itself(make_config, schedule):
    """At the clean end the average must not be asked: it was never trained there."""
    config = make_config({"consistency.boundary": "none", "consistency.guidance_weight": 0.5})
    args = inputs()
    x, text, prediction = args["x0"], args["text"], normal(5, BATCH, *SHAPE)
    times = [400.0, 200.0, 0.0 if schedule.path == "rf" else -1.0]

    def loss(ema):
        return consistency(config, schedule, NETWORKS, ema, args["frozen"], prediction, x, times, text)

    x64, c, null = (np.asarray(v, np.float64) for v in (x, text, args["frozen"].null_text))
    c = (1.5 * c.mean((1, 2)) - 0.5 * null.mean())[:, None, None, None, None]
    for t, t_next in zip(times, times[1:], strict=False):
        (a, b), (a2, b2) = path(schedule, t), path(schedule, t_next)
        p = 0.4 * x64 + 0.1 * t / 1000 + 0.8 * c
        x0 = x64 - b * p if schedule.path == "rf" else a * x64 - b * p
        x64 = a2 * x0 + b2 * (x64 - a * x0) / b
    expected = ((np.asarray(prediction) - x64) ** 2).mean((1, 2, 3, 4))
    np.testing.assert_allclose(loss(args["ema"]), expected, rtol=1e-5)
    np.testing.assert_array_equal(loss(weights(9.0, 9.0, jnp.nan)), loss(args["ema"]))


def test_the_target_carries_no_gradient(make_config):
    args, prediction = inputs(), normal(5, BATCH, *SHAPE)
    config = make_config({"consistency.boundary": "none", "consistency.distance": "mse"})

    def loss(prediction, x_t):
        return consistency(
            config, RF, NETWORKS, args["ema"], args["frozen"], prediction, x_t, [800.0, 600.0, 400.0], args["text"]
        ).sum()

    towards, through = jax.grad(loss, (0, 1))(prediction, args["x0"])
    assert not through.any()
    # 2 (f - target) / elements: along it the loss falls to zero, so the target stood still.
    np.testing.assert_allclose(loss(prediction - towards * prediction[0].size / 2, args["x0"]), 0, atol=1e-9)


def test_grid_segments_are_the_papers():
    """m = 5 steps on the 50-step DDIM grid 999, 979, ..., 19, clean; every start is drawn."""
    config = dataclasses.make_dataclass("C", ["num_steps", "skip"])(50, 5)
    times = np.asarray(objectives.grid_segments(config, DDPM, jax.random.key(0), 4096))
    assert times.shape == (6, 4096)
    starts = set(times[0].tolist())
    assert starts == {999.0 - 20 * n for n in range(46)}
    gaps = -np.diff(times, axis=0)
    assert ((gaps == 20) | (times[1:] == -1)).all()
    assert set(times[-1].tolist()) == {999.0 - 20 * n for n in range(5, 50)} | {-1.0}
    counts = np.unique(times[0], return_counts=True)[1]
    assert np.abs(counts - 4096 / 46).max() < 5 * np.sqrt(4096 / 46)


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (DDPM, (999.0, 749.0, 499.0, 249.0), [[999, 749, 499, 249], [874, 624, 374, 124], [749, 499, 249, -1]]),
        (RF, (1000.0, 900.0, 500.0), [[1000, 900, 500], [950, 700, 250], [900, 500, 0]]),
    ],
    ids=["ddpm", "rf"],
)
def test_student_segments(make_config, schedule, steps, expected):
    config = make_config({"student.timesteps": steps, "consistency.skip": 2})
    np.testing.assert_array_equal(objectives.student_segments(config, schedule), expected)


# Guidance


def constant(params, x, t, text):
    """x̂0 = k · mean(text) everywhere, under an x0 schedule."""
    return params["k"] * like(text.mean((1, 2)), x) * jnp.ones_like(x)


@pytest.mark.parametrize("time", ["score", "noisier"])
@pytest.mark.parametrize("w", [0.0, 2.5])
def test_guidance_is_the_papers_w_form(make_config, w, time):
    """v_c + w (v_c - v_∅): diffusers' form, v_∅ + s (v_c - v_∅), would be off by one v_c - v_∅."""
    config = make_config(
        {
            "vsd.guidance_weight": w,
            "vsd.guidance_time": time,
            "vsd.normalisation": "none",
            "consistency.guidance_weight": w,
            "consistency.boundary": "none",
            "consistency.distance": "mse",
        }
    )
    schedule, networks = Schedule("rf", "x0", shift=3.0), Networks(constant, score)
    args, generated = inputs(), normal(5, BATCH, *SHAPE)
    frozen = Frozen({"k": jnp.float32(1.3)}, args["frozen"].null_text)
    c, null = np.asarray(args["text"]).mean((1, 2)), np.asarray(frozen.null_text).mean()
    real = 1.3 * (c + w * (c - null))

    distillation, fake_score = Distillation(config, networks, schedule), {"k": jnp.float32(0.6)}
    student_t, compared = jnp.full(BATCH, 500.0), references(None, fake_score, frozen)
    batch = Batch(args["x0"], args["text"])
    student = StudentPass(None, compared, batch, generated, student_t, None, generated)
    vsd, _ = objectives.vsd(distillation, student, jax.random.key(3))
    np.testing.assert_allclose(vsd, 0.5 * (0.6 * c - real) ** 2, rtol=1e-5)
    cd = consistency(
        config, schedule, networks, frozen.teacher, frozen, generated, args["x0"], [600.0, 0.0], args["text"]
    )
    expected = (np.asarray(generated) - real[:, None, None, None, None]) ** 2
    np.testing.assert_allclose(cd, expected.mean((1, 2, 3, 4)), rtol=1e-5)


# Fake score and reward head


def point(params, x, t, text):
    """The RF velocity that points from x to the one point of `params`, at every time."""
    return (x - params["mu"]) * 1000 / like(t, x)


@pytest.mark.parametrize(("loss", "scale"), [("x0", 1.0), ("prediction", 0.75**-2)])
@pytest.mark.parametrize("source", ["forward", "backward"])
def test_fake_score_learns_the_students_samples(make_config, loss, scale, source):
    """The student generates mu = 0.4 and nothing else; times are fixed at the shifted u = 0.5, σ = 3/4."""
    config = make_config(
        {"fake_score.loss": loss, "student.input": source, "vsd.score_range": (0.5, 0.5), "vsd.score_shift": 3.0}
    )
    args = inputs()

    def value(fake, student):
        distillation, batch = Distillation(config, Networks(point, score), RF), Batch(args["x0"], args["text"])
        return objectives.fake_score(distillation, {"mu": fake}, {"mu": student}, batch, jax.random.key(0))[0]

    student_mu = jnp.float32(0.4)
    grads = jax.value_and_grad(value, (0, 1))
    found, (towards, through) = grads(jnp.float32(1.5), student_mu)
    np.testing.assert_allclose(found, scale * 1.1**2, rtol=1e-5)
    np.testing.assert_allclose(towards, scale * 2 * 1.1, rtol=1e-5)
    assert through == 0
    assert value(student_mu, student_mu) < 1e-10


def test_latent_reward_model_leaves_out_rows_without_weight_or_reward():
    latent, text = normal(1, 5, *SHAPE), normal(2, 5, 3, 4)
    reward = jnp.array([0.5, jnp.nan, 99.0, 0.1, -jnp.inf])
    weight = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0])
    params = {"s": jnp.float32(0.7), "c": jnp.float32(-0.4)}
    loss = functools.partial(lrm.regression, NETWORKS)
    rows = ScoredLatents(latent, text, reward, weight)
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, rows)
    rows = [0, 3]
    predicted = np.asarray(score(params, latent, text))[rows]
    error = predicted - np.asarray(reward)[rows]
    np.testing.assert_allclose(value, (error**2).mean(), rtol=1e-5)
    squares = np.asarray(latent**2).mean((1, 2, 3, 4))[rows]
    np.testing.assert_allclose(grads["s"], (2 * error * squares).mean(), rtol=1e-4)
    sign = np.sign((predicted[0] - predicted[1]) * 0.4)
    np.testing.assert_allclose(aux["reward_correlation"], sign, rtol=1e-4)  # of two rows


# The student's input


def test_forward_input_is_noised_data_at_evenly_drawn_times(make_config):
    config = make_config({"student.input": "forward"})
    b = 3000
    x0, text = normal(1, b, 1, 1, 1, 2), normal(2, b, 3, 4)
    x_t, t, index = objectives.student_input(
        Distillation(config, NETWORKS, RF), None, Batch(x0, text), jax.random.key(0)
    )
    np.testing.assert_array_equal(t, np.asarray(config.student.timesteps, np.float32)[index])
    counts = np.bincount(np.asarray(index), minlength=3)
    assert np.abs(counts - b / 3).max() < 5 * np.sqrt(b / 3)
    sigma = np.asarray(t, np.float64)[:, None] / 1000
    noise = (np.asarray(x_t - like(1 - t / 1000, x0) * x0).reshape(b, 2)) / sigma
    assert abs(noise.mean()) < 5 / np.sqrt(2 * b) and abs(noise.std() - 1) < 5 / np.sqrt(4 * b)
    assert abs((noise * np.asarray(x0).reshape(b, 2)).mean()) < 5 / np.sqrt(2 * b)  # independent of the data


def test_backward_input_is_the_samplers_own_way(make_config):
    """Where the student would be at inference: from its last time its prediction is the sample itself."""
    config = make_config({"student.input": "backward"})
    args, times = inputs(), config.student.timesteps
    b = 64
    x0, text = jnp.full((b, *SHAPE), jnp.nan), normal(2, b, 3, 4)  # data must not be looked at

    @jax.jit
    def generate(params, key):
        x_t, t, index = objectives.student_input(Distillation(config, NETWORKS, RF), params, Batch(x0, text), key)
        return x_t, t, index, sampling.Denoiser(mix, params, RF, text).x0(x_t, t)

    @jax.jit
    def draw(params, key):
        keys = jax.random.split(key, 3)
        noise = jax.random.normal(keys[1], x0.shape)
        return noise, sampling.few_step_predictions(sampling.Denoiser(mix, params, RF, text), times, noise, keys[2])[-1]

    x_t, t, index, found = generate(args["params"], jax.random.key(0))
    noise, sampled = draw(args["params"], jax.random.key(0))
    np.testing.assert_array_equal(t, np.asarray(times, np.float32)[index])
    assert set(np.asarray(index).tolist()) == {0, 1, 2}
    np.testing.assert_array_equal(x_t[index == 0], noise[index == 0])
    np.testing.assert_allclose(found[index == 2], sampled[index == 2], rtol=1e-5, atol=1e-5)
    assert not np.allclose(found[index == 1], sampled[index == 1], atol=0.1)


def test_score_times_cover_their_range_and_shift(make_config):
    config = make_config({"vsd.score_range": (0.2, 0.6), "vsd.score_shift": 3.0})
    t = np.asarray(objectives.score_times(config.vsd, RF, jax.random.key(0), 4096))
    u = t / 1000 / (3 - 2 * t / 1000)  # the shift undone
    assert 0.2 <= u.min() < 0.203 and 0.597 < u.max() <= 0.6
    assert np.abs(np.histogram(u, 8, (0.2, 0.6))[0] - 512).max() < 5 * np.sqrt(512)


@pytest.mark.parametrize(("at", "low"), [(900.0, 0.75), (0.0, 0.2), (1000.0, 0.8)])
def test_noisier_score_times_lie_above_the_students(make_config, at, low):
    """σ = 3 u / (1 + 2 u) is 0.9 at u = 3/4; above the range's end only that is left."""
    config = make_config({"vsd.score_range": (0.2, 0.8), "vsd.score_shift": 3.0})
    t = objectives.score_times(config.vsd, RF, jax.random.key(0), 4096, jnp.full(4096, at))
    u = np.asarray(t) / 1000 / (3 - 2 * np.asarray(t) / 1000)
    np.testing.assert_allclose([u.min(), u.max()], [low, 0.8], atol=1e-3)
    assert u.mean() == pytest.approx((low + 0.8) / 2, abs=0.015)
