import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from dollar_jax import sampling
from dollar_jax import schedule as sch
from dollar_jax.sampling import Denoiser
from dollar_jax.schedule import Schedule
from dollar_jax.types import ImageCondition

MEAN, STD = 0.7, 0.4
GAUSSIANS = [
    Schedule("ddpm", "eps"),
    Schedule("ddpm", "conjugate_velocity"),
    Schedule("ddpm", "v", rescale_zero_snr=True, snr_shift_scale=3.0),
    Schedule("rf", "velocity"),
    Schedule("rf", "velocity", shift=3.0),
]
STUDENT = (999.0, 749.0, 499.0, 249.0)


def name(schedule):
    return f"{schedule.path}-{schedule.prediction}-{schedule.shift}"


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def text_states(batch):
    return normal(99, batch, 3, 2)


def predict(schedule, x0, x_t, t):
    """The network's prediction that means `x0` at x_t."""
    a, b = (c.reshape(-1, 1, 1, 1, 1) for c in sch.coefficients(schedule, t))
    return sch.target(schedule, x0, (x_t - a * x0) / b, t)


def gaussian_apply(schedule):
    """The exact network for x0 ~ N(MEAN, STD^2)."""

    def apply(params, x_t, t, text):
        a, b = (c.reshape(-1, 1, 1, 1, 1) for c in sch.coefficients(schedule, t))
        x0 = MEAN + a * STD**2 / (a**2 * STD**2 + b**2) * (x_t - a * MEAN)
        return predict(schedule, x0, x_t, t)

    return apply


def linear_apply(params, x_t, t, text):
    """Depends on every input of its own sample, and on no other sample."""
    shift = params["w"] * text.sum((1, 2)) + t / 1000
    return params["u"] * x_t + shift.reshape(-1, 1, 1, 1, 1)


LINEAR = {"w": jnp.float32(0.3), "u": jnp.float32(0.5)}


def exact_ode(schedule, x, t, t_next):
    (a, b), (a_next, b_next) = (
        (float(c[0]) for c in sch.coefficients(schedule, jnp.full(1, time))) for time in (t, t_next)
    )
    spread, spread_next = ((u**2 * STD**2 + v**2) ** 0.5 for u, v in ((a, b), (a_next, b_next)))
    return a_next * MEAN + spread_next / spread * (np.asarray(x) - a * MEAN)


@pytest.mark.parametrize("schedule", GAUSSIANS, ids=name)
def test_ddim_converges_to_the_exact_ode_at_first_order(schedule):
    x = normal(0, 4, 1, 2, 2, 1)
    # Short of the clean end, where DDPM's sigma ~ sqrt(t) costs a logarithm.
    exact = exact_ode(schedule, x, 999.0, 199.0)

    def error(steps):
        times = jnp.broadcast_to(jnp.linspace(999, 199, steps + 1)[:, None], (steps + 1, 4))
        apply = gaussian_apply(schedule)
        end = sampling.ode_solve(Denoiser(apply, {}, schedule, text_states(4)), x, times)
        return np.abs(end - exact).max()

    errors = np.array([error(steps) for steps in (40, 80, 160)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), 1.0, atol=0.08)


@pytest.mark.parametrize("schedule", GAUSSIANS, ids=name)
def test_whole_trajectory_converges_to_the_exact_ode(schedule):
    noise = normal(0, 4, 1, 2, 2, 1)
    exact = exact_ode(schedule, noise, sch.timestep_grid(schedule, 1)[0], sch.CLEAN)

    def error(steps):
        apply, text = gaussian_apply(schedule), text_states(4)
        end = sampling.ode_sample(Denoiser(apply, {}, schedule, text), noise, steps)
        return np.abs(end - exact).max()

    errors = np.array([error(steps) for steps in (50, 200, 1000)])
    assert (errors[:-1] / errors[1:] > 2.8).all()
    assert errors[-1] < 0.015


def test_guided_ode_sample_matches_diffusers():
    steps, weight = 20, 3.5
    schedule = Schedule("ddpm", "v", rescale_zero_snr=True, snr_shift_scale=3.0)
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
    )
    scheduler.set_timesteps(steps)
    noise, text = normal(1, 2, 1, 2, 2, 3), text_states(2)
    null = jnp.full((1, 3, 2), 0.1)

    def apply(params, x_t, t, text):
        return 0.2 * jnp.tanh(linear_apply(params, x_t, t, text))

    x = torch.from_numpy(np.array(noise)).double()
    for t in scheduler.timesteps:
        both = [
            0.2 * torch.tanh(0.5 * x + (0.3 * torch.tensor(s).view(-1, 1, 1, 1, 1) + t / 1000))
            for s in (np.array(text.sum((1, 2))), [0.6])
        ]
        prediction = both[1] + (weight + 1) * (both[0] - both[1])
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    ours = sampling.ode_sample(Denoiser(apply, LINEAR, schedule, text, null, weight), noise, steps)
    np.testing.assert_allclose(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [7.5, jnp.array([0.0, 1.0, 7.5])], ids=["one", "each"])
def test_guidance_combines_each_samples_two_passes(weight):
    batches = []

    def apply(params, x_t, t, text):
        batches.append((len(x_t), len(t), len(text)))
        return linear_apply(params, x_t, t, text)

    x, text, null = normal(2, 3, 1, 2, 1, 2), text_states(3), normal(3, 1, 3, 2)
    t = jnp.array([19.0, 499.0, 999.0])
    ours = Denoiser(apply, LINEAR, Schedule("rf", "velocity"), text, null, weight).prediction(x, t)
    cond = linear_apply(LINEAR, x, t, text)
    uncond = linear_apply(LINEAR, x, t, jnp.repeat(null, 3, axis=0))
    scale = 1 + np.reshape(weight, (-1, 1, 1, 1, 1))
    np.testing.assert_allclose(ours, uncond + scale * (cond - uncond), rtol=1e-5, atol=1e-5)
    assert batches == [(6, 6, 6)]


@pytest.mark.parametrize("weight", [None, 1.5])
def test_both_passes_of_guidance_are_told_of_the_image(weight):
    def apply(params, x_t, t, text, image):
        return linear_apply(params, x_t, t, text) * image.tokens.mean((1, 2)).reshape(-1, 1, 1, 1, 1) + image.latent

    x, text, null, t = normal(2, 3, 1, 2, 1, 2), text_states(3), normal(3, 1, 3, 2), jnp.array([19.0, 499.0, 999.0])
    image = ImageCondition(normal(4, 3, 1, 2, 1, 2), normal(5, 3, 4, 2))
    denoiser = Denoiser(apply, LINEAR, Schedule("rf", "velocity"), text, null, weight, image)
    cond, uncond = (apply(LINEAR, x, t, told, image) for told in (text, jnp.repeat(null, 3, axis=0)))
    expected = cond if weight is None else uncond + (1 + weight) * (cond - uncond)
    np.testing.assert_allclose(denoiser.prediction(x, t), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [None, 0.0, 0])
def test_no_guidance_is_one_pass(weight):
    batches = []

    def apply(params, x_t, t, text):
        batches.append(len(x_t))
        return linear_apply(params, x_t, t, text)

    x, text, t = normal(4, 2, 1, 1, 1, 1), text_states(2), jnp.array([5.0, 6.0])
    ours = Denoiser(apply, LINEAR, Schedule("rf", "velocity"), text, None, weight).prediction(x, t)
    np.testing.assert_array_equal(ours, linear_apply(LINEAR, x, t, text))
    assert batches == [2]


def test_ode_solve_takes_each_sample_along_its_own_times():
    schedule = Schedule("rf", "velocity")
    x, text = normal(5, 2, 1, 2, 2, 1), text_states(2)
    times = jnp.array([[900.0, 500.0], [700.0, 450.0], [600.0, 100.0]])
    ours = sampling.ode_solve(Denoiser(linear_apply, LINEAR, schedule, text), x, times)
    for row in range(2):
        expected = np.asarray(x[row : row + 1], np.float64)
        for t, t_next in zip(times[:-1, row], times[1:, row], strict=True):
            velocity = linear_apply(LINEAR, expected, t[None], text[row : row + 1])
            expected = expected + (t_next - t) / 1000 * velocity
        np.testing.assert_allclose(ours[row : row + 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", [GAUSSIANS[1], GAUSSIANS[3]], ids=name)
def test_stochastic_sampler_reaches_the_data_distribution(schedule):
    noise = normal(6, 4096, 1, 1, 1, 1)
    run = jax.jit(
        lambda key: sampling.ode_sample(
            Denoiser(gaussian_apply(schedule), {}, schedule, text_states(4096)), noise, 100, eta=1.0, key=key
        )
    )
    x, other = (np.asarray(run(jax.random.key(seed))) for seed in (0, 1))
    # The standard error of the mean is 0.006; the rest is the bias of 100 steps.
    assert x.mean() == pytest.approx(MEAN, abs=0.03)
    assert x.std() == pytest.approx(STD, abs=0.03)
    # With eta = 1 the end forgets the start, and keys give unrelated samples.
    for y in (other, np.asarray(noise)):
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.1


def test_number_of_steps_does_not_change_the_number_of_traces():
    schedule = Schedule("rf", "velocity")
    noise, text = normal(7, 1, 1, 1, 1, 1), text_states(1)

    def traces(run):
        count = []

        def apply(params, x_t, t, text):
            count.append(1)
            return linear_apply(params, x_t, t, text)

        jax.make_jaxpr(lambda: run(apply))()
        return len(count)

    def ode(steps):
        args = LINEAR, schedule, text, text, 2.0
        return traces(lambda apply: sampling.ode_sample(Denoiser(apply, *args), noise, steps))

    def few(timesteps):
        args = timesteps, noise, jax.random.key(0)
        return traces(lambda apply: sampling.few_step_predictions(Denoiser(apply, LINEAR, schedule, text), *args)[-1])

    assert ode(2) == ode(50) == 1
    assert few(STUDENT[:1]) == few(STUDENT) == 1


def test_student_prediction_is_the_clean_latent():
    schedule = Schedule("ddpm", "conjugate_velocity")
    x, text, t = normal(8, 2, 1, 2, 1, 1), text_states(2), jnp.array([249.0, 999.0])
    v = linear_apply(LINEAR, x, t, text)
    a, b = (c.reshape(-1, 1, 1, 1, 1) for c in sch.coefficients(schedule, t))
    ours = Denoiser(linear_apply, LINEAR, schedule, text).x0(x, t)
    np.testing.assert_allclose(ours, (x + b * v) / (a + b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", GAUSSIANS[2:4], ids=name)
def test_student_renoises_with_fresh_noise_at_each_timestep(schedule):
    batch = 4096
    noise, text = normal(9, batch, 1, 1, 1, 1), text_states(batch)

    def apply(params, x_t, t, text):
        return predict(schedule, 0.2 + 0.5 * x_t + t.reshape(-1, 1, 1, 1, 1) / 5e3, x_t, t)

    args = Denoiser(apply, {}, schedule, text), STUDENT, noise
    x_t, t, states = sampling.simulate_backward(*args, 3, jax.random.key(3))
    assert states.shape == (4, *noise.shape)
    np.testing.assert_array_equal(states[0], noise)
    np.testing.assert_array_equal(states[3], x_t)
    np.testing.assert_array_equal(t, np.full(batch, 249.0))
    predictions = [0.2 + 0.5 * x + time / 5e3 for x, time in zip(states, STUDENT, strict=True)]
    fresh = [np.asarray(noise).ravel()]
    for index in range(3):
        a, b = sch.coefficients(schedule, jnp.array([STUDENT[index + 1]]))
        fresh.append(np.asarray((states[index + 1] - a * predictions[index]) / b).ravel())
    # Standard normal and independent of one another and of the start; 5 standard errors.
    np.testing.assert_allclose(np.cov(fresh), np.eye(4), atol=0.11)
    np.testing.assert_allclose(np.mean(fresh, axis=1), 0, atol=0.08)

    end = sampling.few_step_predictions(*args, jax.random.key(3))[-1]
    np.testing.assert_allclose(end, predictions[3], rtol=1e-5, atol=1e-5)


def test_a_key_per_sample_makes_it_independent_of_its_neighbours():
    schedule = Schedule("ddpm", "velocity")
    noise, text = normal(3, 4, 2, 2, 2, 3), text_states(4)
    keys = jax.random.split(jax.random.key(8), 4)

    def denoiser(rows):
        return Denoiser(linear_apply, LINEAR, schedule, text[rows])

    def few(rows):
        return sampling.few_step_predictions(denoiser(rows), STUDENT, noise[rows], keys[rows])[-1]

    def ode(rows):
        return sampling.ode_sample(denoiser(rows), noise[rows], 3, eta=1.0, key=keys[rows])

    with jax.debug_key_reuse(False):
        for run in (few, ode):
            np.testing.assert_allclose(run(slice(1, 3)), run(slice(None))[1:3], rtol=1e-5, atol=1e-6)
        other = sampling.few_step_predictions(denoiser(slice(None)), STUDENT, noise, keys[::-1])[-1]
        assert np.abs(other - few(slice(None))).max() > 0.1


def test_single_step_student_is_its_prediction():
    schedule = Schedule("rf", "velocity")
    noise, text = normal(10, 2, 1, 2, 1, 1), text_states(2)
    args = Denoiser(linear_apply, LINEAR, schedule, text), (999.0,), noise
    x = sampling.few_step_predictions(*args, jax.random.key(0))[-1]
    velocity = linear_apply(LINEAR, noise, jnp.full(2, 999.0), text)
    np.testing.assert_allclose(x, noise - 0.999 * velocity, rtol=1e-5, atol=1e-6)
    x_t, t, states = sampling.simulate_backward(*args, 0, jax.random.key(0))
    np.testing.assert_array_equal(x_t, noise)
    np.testing.assert_array_equal(states, noise[None])
    np.testing.assert_array_equal(t, [999.0, 999.0])


@pytest.mark.parametrize("schedule", GAUSSIANS[2:4], ids=name)
def test_an_ode_student_takes_the_teachers_steps_at_its_own_timesteps(schedule):
    noise, text, key = normal(9, 3, 1, 2, 2, 1), text_states(3), jax.random.key
    denoiser = Denoiser(gaussian_apply(schedule), {}, schedule, text)
    few = sampling.few_step_predictions(denoiser, STUDENT, noise, key(3), ode=True)[-1]
    times = jnp.broadcast_to(jnp.array([*STUDENT, sch.CLEAN])[:, None], (5, 3))
    np.testing.assert_allclose(few, sampling.ode_solve(denoiser, noise, times), rtol=1e-5, atol=1e-6)
    _, _, states = sampling.simulate_backward(denoiser, STUDENT, noise, 3, key(4), ode=True)
    np.testing.assert_allclose(states[3], sampling.ode_solve(denoiser, noise, times[:4]), rtol=1e-5, atol=1e-6)


def test_backward_simulation_stops_at_a_traced_k_and_runs_no_further():
    schedule = Schedule("ddpm", "v")
    noise, text = normal(11, 4, 1, 2, 1, 1), text_states(4)
    calls = []

    def apply(params, x_t, t, text):
        jax.debug.callback(lambda t: calls.append(float(t[0])), t)
        return linear_apply(params, x_t, t, text)

    @jax.jit
    def run(params, k):
        args = STUDENT, noise, k, jax.random.key(0)
        return sampling.simulate_backward(Denoiser(apply, params, schedule, text), *args)

    full = run(LINEAR, jnp.array(3))[2]
    for k in range(4):
        calls.clear()
        x_t, t, states = run(LINEAR, jnp.array(k))
        jax.effects_barrier()
        assert calls == list(STUDENT[:k])
        np.testing.assert_array_equal(x_t, full[k])
        np.testing.assert_array_equal(t, np.full(4, STUDENT[k]))
        np.testing.assert_array_equal(states[: k + 1], full[: k + 1])
        np.testing.assert_array_equal(states[k:], np.broadcast_to(x_t, (4 - k, *x_t.shape)))
    assert run._cache_size() == 1

    each = jnp.array([2, 0, 3, 1])
    x_t, t, _ = run(LINEAR, each)
    np.testing.assert_array_equal(x_t, full[each, np.arange(4)])
    np.testing.assert_array_equal(t, np.array(STUDENT)[each])


def test_backward_simulation_carries_no_gradient_and_the_student_does():
    schedule = Schedule("rf", "velocity")
    noise, text = normal(12, 2, 1, 1, 1, 1), text_states(2)

    def simulated(params, noise, text):
        args = Denoiser(linear_apply, params, schedule, text), STUDENT, noise, 3, jax.random.key(0)
        x_t, _, states = sampling.simulate_backward(*args)
        return x_t.sum() + states.sum()

    def sampled(params):
        args = Denoiser(linear_apply, params, schedule, text), STUDENT, noise, jax.random.key(0)
        return sampling.few_step_predictions(*args)[-1].sum()

    for grad in jax.tree.leaves(jax.grad(simulated, (0, 1, 2))(LINEAR, noise, text)):
        assert not grad.any()
    for grad in jax.tree.leaves(jax.grad(sampled)(LINEAR)):
        assert np.isfinite(grad) and grad != 0


def test_low_precision_noise_is_sampled_in_fp32():
    schedule = Schedule("rf", "velocity")
    noise, text = normal(13, 2, 1, 1, 1, 1).astype(jnp.bfloat16), text_states(2)

    def apply(params, x_t, t, text):
        return linear_apply(params, x_t, t, text).astype(jnp.bfloat16)

    key = jax.random.key(0)
    few = sampling.few_step_predictions(Denoiser(apply, LINEAR, schedule, text), STUDENT, noise, key)[-1]
    ode = sampling.ode_sample(Denoiser(apply, LINEAR, schedule, text, text, 2.0), noise, 3)
    assert few.dtype == ode.dtype == jnp.float32


def test_bad_calls_say_what_is_wrong():
    schedule = Schedule("ddpm", "v")
    noise, text, key = normal(14, 1, 1, 1, 1, 1), text_states(1), jax.random.key(0)
    plain = Denoiser(linear_apply, LINEAR, schedule, text)
    for timesteps in (STUDENT[::-1], (), (999.0, 999.0), (1000.0,), (999.0, -1.0)):
        with pytest.raises(ValueError, match="descending"):
            sampling.few_step_predictions(plain, timesteps, noise, key)[-1]
    with pytest.raises(ValueError, match="null_text"):
        sampling.ode_sample(Denoiser(linear_apply, LINEAR, schedule, text, None, 7.5), noise, 2)
    with pytest.raises(ValueError, match="key"):
        sampling.ode_sample(plain, noise, 2, eta=1.0)
