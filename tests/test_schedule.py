import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from dollar_jax import sampling
from dollar_jax import schedule as sch
from dollar_jax.schedule import Schedule

PREDICTIONS = ("v", "eps", "x0", "velocity", "conjugate_velocity")
COGVIDEOX = dict(rescale_zero_snr=True, snr_shift_scale=3.0)
ALL = [Schedule(path, p) for path in ("ddpm", "rf") for p in PREDICTIONS] + [
    Schedule("ddpm", p, **COGVIDEOX) for p in PREDICTIONS if p != "eps"
]
TORCH_NAMES = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}


def name(schedule):
    return f"{schedule.path}-{schedule.prediction}{'-zero_snr' * schedule.rescale_zero_snr}"


def latents(seed, batch=6):
    x0, eps = np.random.default_rng(seed).normal(size=(2, batch, 2, 3, 2, 4)).astype(np.float32)
    return jnp.asarray(x0), jnp.asarray(eps)


def column(values):
    return np.asarray(values, np.float32).reshape(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_conversions_recover_x0(schedule):
    x0, eps = latents(0)
    # A noise prediction loses x0 where there is no signal, on the last rectified-flow time.
    last = 990.0 if schedule.path == "rf" and schedule.prediction == "eps" else 999.0
    if schedule.path == "rf" and schedule.prediction != "eps":
        last = 1000.0
    t = jnp.array([20.0, 150.0, 400.0, 650.0, 900.0, last])
    a, b = (column(c) for c in sch.coefficients(schedule, t))
    x_t = a * x0 + b * eps
    expected = {"v": a * eps - b * x0, "eps": eps, "x0": x0, "velocity": eps - x0, "conjugate_velocity": x0 - eps}[
        schedule.prediction
    ]

    np.testing.assert_allclose(sch.add_noise(schedule, x0, eps, t), x_t, atol=1e-6)
    np.testing.assert_allclose(sch.target(schedule, x0, eps, t), expected, atol=1e-6)
    # fp32 rounding of x_t is magnified by 1/a or 1/b where only the other term is predicted.
    atol = 2e-4 if schedule.prediction == "eps" else 1e-5
    np.testing.assert_allclose(sch.to_x0(schedule, expected, x_t, t), x0, atol=atol)


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_ends_are_finite_and_exact(schedule):
    x0, eps = latents(1)
    clean = jnp.full(6, sch.CLEAN)
    np.testing.assert_array_equal(sch.add_noise(schedule, x0, eps, clean), x0)
    np.testing.assert_array_equal(sch.ddim_step(schedule, eps, x0, clean + 500.0, clean), x0)
    for t in (clean, jnp.zeros(6), jnp.full(6, 1000.0)):
        assert np.isfinite(sch.to_x0(schedule, x0, eps, t)).all()


def test_zero_terminal_snr_is_pure_noise_and_v_is_minus_x0():
    schedule = Schedule("ddpm", "v", **COGVIDEOX)
    x0, eps = latents(2)
    t = jnp.full(6, 999.0)
    np.testing.assert_array_equal(sch.add_noise(schedule, x0, eps, t), eps)
    np.testing.assert_array_equal(sch.to_x0(schedule, -x0, eps, t), x0)


def test_conjugate_velocity_follows_the_paper():
    schedule = Schedule("ddpm", "conjugate_velocity", beta_schedule="linear", beta_end=0.02)
    x_t, v = latents(3)
    t = jnp.array([19.0, 199.0, 399.0, 599.0, 799.0, 999.0])
    alphas_bar = DDIMScheduler(beta_start=0.00085, beta_end=0.02).alphas_cumprod.double().numpy()
    index = np.asarray(t).astype(int)
    root, root_noise = column(alphas_bar[index] ** 0.5), column((1 - alphas_bar[index]) ** 0.5)
    x0 = (x_t + root_noise * v) / (root + root_noise)
    np.testing.assert_allclose(sch.to_x0(schedule, v, x_t, t), x0, rtol=2e-4, atol=1e-5)

    # The same x0 through the rectified flow at the conjugate point (DOLLAR eq. (8.20)-(8.23)).
    total = root + root_noise
    y, tau = x_t / total, jnp.asarray(1000 * root_noise / total, jnp.float32).ravel()
    flow = Schedule("rf", "velocity")
    np.testing.assert_allclose(sch.to_x0(flow, -v, y, tau), x0, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("rescale", [False, True])
def test_tables_match_diffusers(beta_schedule, rescale):
    betas = dict(beta_schedule=beta_schedule, beta_start=1e-3, beta_end=0.015)
    references = {1.0: DDIMScheduler(**betas, rescale_betas_zero_snr=rescale)}
    for scale in (1.0, 3.0):
        references[scale, "cog"] = CogVideoXDDIMScheduler(
            **betas, rescale_betas_zero_snr=rescale, snr_shift_scale=scale
        )
    for key, reference in references.items():
        scale = key[0] if isinstance(key, tuple) else key
        schedule = Schedule("ddpm", "v", rescale_zero_snr=rescale, snr_shift_scale=scale, **betas)
        a, b = sch.coefficients(schedule, jnp.arange(1000.0))
        alphas_bar = reference.alphas_cumprod.double().numpy()
        np.testing.assert_allclose(np.square(a), alphas_bar, atol=3e-6)
        np.testing.assert_allclose(np.square(b), 1 - alphas_bar, atol=3e-6)
        assert a.dtype == b.dtype == jnp.float32


def model(x, t, xp):
    return xp.tanh(1.3 * x + t / 1000.0) - 0.2 * x


def run_ours(schedule, x, num_steps):
    grid = sch.timestep_grid(schedule, num_steps)

    @jax.jit
    def step(x, t, t_next):
        x0 = sch.to_x0(schedule, model(x, t[0], jnp), x, t)
        return sch.ddim_step(schedule, x, x0, t, t_next)

    states = []
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        x = step(x, jnp.full(len(x), t), jnp.full(len(x), t_next))
        states.append(x)
    return np.stack(states)


def run_diffusers(scheduler, x, **timesteps):
    scheduler.set_timesteps(**timesteps)
    x, states = torch.from_numpy(np.array(x)).double(), []
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, float(t), torch), t, x, return_dict=False)[0]
        states.append(x.numpy())
    return np.stack(states)


@pytest.mark.parametrize("prediction", ["v", "eps", "x0"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_fifty_ddim_steps_match_diffusers(prediction, beta_schedule):
    betas = dict(beta_schedule=beta_schedule, beta_start=1e-3, beta_end=0.012)
    reference = DDIMScheduler(
        **betas, prediction_type=TORCH_NAMES[prediction], timestep_spacing="trailing", clip_sample=False
    )
    schedule = Schedule("ddpm", prediction, **betas)
    _, x = latents(4, batch=2)
    expected = run_diffusers(reference, x, num_inference_steps=50)
    np.testing.assert_array_equal(sch.timestep_grid(schedule, 50)[:-1], reference.timesteps)
    np.testing.assert_allclose(run_ours(schedule, x, 50), expected, rtol=1e-4, atol=1e-4)


def test_fifty_cogvideox_steps_match_diffusers():
    reference = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
    )
    _, x = latents(5, batch=2)
    expected = run_diffusers(reference, x, num_inference_steps=50)
    ours = run_ours(Schedule("ddpm", "v", **COGVIDEOX), x, 50)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_fifty_flow_steps_match_diffusers(shift):
    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = Schedule("rf", "velocity", shift=shift)
    _, x = latents(6, batch=2)
    expected = run_diffusers(reference, x, sigmas=np.linspace(1, 0, 51)[:-1])
    grid = sch.timestep_grid(schedule, 50)
    np.testing.assert_allclose(grid[:-1], reference.timesteps, rtol=1e-6)
    assert grid[-1] == 0 and len(grid) == 51
    np.testing.assert_allclose(run_ours(schedule, x, 50), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_unipc_steps_match_diffusers(steps, shift):
    reference = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    schedule = Schedule("rf", "velocity", shift=shift)
    _, x = latents(6, batch=2)
    expected = run_diffusers(reference, x, num_inference_steps=steps)[-1]
    times, sigmas = sch.unipc_grid(schedule, steps)
    np.testing.assert_array_equal(times, reference.timesteps)
    np.testing.assert_array_equal(sigmas, reference.sigmas)

    def apply(params, x, t, text):
        return model(x, t[:, None, None, None, None], jnp)

    text = jnp.zeros((2, 1, 1))
    ours = sampling.unipc_sample(sampling.Denoiser(apply, {}, schedule, text), x, steps)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("t", [999, 519, 19])
def test_stochastic_step_matches_diffusers(eta, t):
    reference = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    reference.set_timesteps(50)
    schedule = Schedule("ddpm", "eps", beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    x, noise = latents(7)
    prediction = model(np.asarray(x), float(t), np)
    expected = reference.step(
        *(torch.from_numpy(prediction), t, torch.from_numpy(np.array(x))),
        eta=eta,
        variance_noise=torch.from_numpy(np.array(noise)),
    ).prev_sample
    times = jnp.full(6, float(t))
    x0 = sch.to_x0(schedule, jnp.asarray(prediction), x, times)
    ours = sch.ddim_step(schedule, x, x0, times, times - 20, eta, noise)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("schedule", [Schedule("ddpm", "v"), Schedule("rf", "velocity")], ids=name)
def test_eta_one_is_the_posterior_and_any_eta_keeps_the_marginal(schedule):
    t, t_next = jnp.array([700.0]), jnp.array([400.0])
    (a, b), (a_next, b_next) = ((float(c[0]) for c in sch.coefficients(schedule, time)) for time in (t, t_next))
    zero, one = jnp.zeros((1, 1, 1, 1, 1)), jnp.ones((1, 1, 1, 1, 1))
    for eta in (0.3, 1.0):
        slope = float(sch.ddim_step(schedule, one, zero, t, t_next, eta, zero).squeeze())
        sigma = float(sch.ddim_step(schedule, zero, zero, t, t_next, eta, one).squeeze())
        assert (slope * b) ** 2 + sigma**2 == pytest.approx(b_next**2, rel=1e-5)
    # Bayes' rule for x_next between x0 and x_t, whose conditional variance is the transition's.
    ratio = a / a_next
    transition = b**2 - ratio**2 * b_next**2
    variance = 1 / (1 / b_next**2 + ratio**2 / transition)
    assert sigma**2 == pytest.approx(variance, rel=1e-5)
    assert slope == pytest.approx(variance * ratio / transition, rel=1e-5)


def test_deterministic_flow_step_is_euler():
    schedule = Schedule("rf", "velocity", shift=5.0)
    x, velocity = latents(8)
    t, t_next = jnp.linspace(1000, 300, 6), jnp.linspace(900, 0, 6)
    x0 = sch.to_x0(schedule, velocity, x, t)
    euler = x + column((t_next - t) / 1000) * velocity
    np.testing.assert_allclose(sch.ddim_step(schedule, x, x0, t, t_next), euler, atol=2e-6)


def test_guidance_weight_is_the_papers():
    cond, uncond = jnp.full((2, 1, 1, 1, 1), 3.0), jnp.full((2, 1, 1, 1, 1), 1.0)
    np.testing.assert_allclose(sch.guide(cond, uncond, 7.5).ravel(), 18.0)
    np.testing.assert_allclose(sch.guide(cond, uncond, jnp.array([0.0, 1.0])).ravel(), [3.0, 5.0])
    scale = 8.5  # diffusers' guidance_scale
    ours = sch.guide(cond, uncond, scale - 1)
    np.testing.assert_allclose(ours, uncond + scale * (cond - uncond))


def test_grids_are_the_papers():
    grid = sch.timestep_grid(Schedule("ddpm", "v"), 50)
    np.testing.assert_array_equal(grid, [*range(999, 0, -20), -1])
    np.testing.assert_array_equal(sch.timestep_grid(Schedule("ddpm", "v"), 4), [999, 749, 499, 249, -1])
    reference = DDIMScheduler(timestep_spacing="trailing")
    reference.set_timesteps(7)
    np.testing.assert_array_equal(sch.timestep_grid(Schedule("ddpm", "v"), 7)[:-1], reference.timesteps)
    assert sch.timestep_grid(Schedule("ddpm", "v"), 1000)[-2] == 0
    # Published by users of Wan with shift 5 (four steps).
    flow = sch.timestep_grid(Schedule("rf", "velocity", shift=5.0), 4)
    np.testing.assert_allclose(flow, [1000, 937.5, 2500 / 3, 625, 0], rtol=1e-6)


def test_training_times():
    u = jnp.array([0.0, 0.25, 0.9999999])
    np.testing.assert_array_equal(sch.time_from_uniform(Schedule("ddpm", "v"), u), [0, 250, 999])
    flow = sch.time_from_uniform(Schedule("rf", "velocity", shift=3.0), u[:2])
    np.testing.assert_allclose(flow, [0, 500.0], rtol=1e-6)


def test_jit_vmap_and_grad_with_traced_time():
    schedule = Schedule("rf", "velocity")
    x0, eps = latents(9)
    t = jnp.linspace(100.0, 900.0, 6)
    batched = sch.add_noise(schedule, x0, eps, t)
    jitted = jax.jit(sch.add_noise, static_argnums=0)(schedule, x0, eps, t)
    mapped = jax.vmap(lambda *args: sch.add_noise(schedule, *args))(x0[:, None], eps[:, None], t[:, None])[:, 0]
    np.testing.assert_allclose(jitted, batched, atol=1e-6)
    np.testing.assert_allclose(mapped, batched, atol=1e-6)

    slope = jax.grad(lambda t: sch.add_noise(schedule, x0, eps, t).sum())(t)
    np.testing.assert_allclose(slope, (eps - x0).sum((1, 2, 3, 4)) / 1000, atol=1e-5)
    for ddpm in (Schedule("ddpm", "v", **COGVIDEOX), Schedule("ddpm", "eps")):
        for eta in (0.0, 1.0):

            def end(x, ddpm=ddpm, eta=eta):
                times = jnp.array([999.0, 999.0, 500.0, 500.0, 0.0, 0.0])
                after = jnp.array([979.0, -1.0, 480.0, -1.0, -1.0, 0.0])
                x0_hat = sch.to_x0(ddpm, x**2, x, times)
                return sch.ddim_step(ddpm, x, x0_hat, times, after, eta, eps).sum()

            assert np.isfinite(jax.grad(end)(x0)).all()


def test_low_precision_inputs_are_computed_in_fp32():
    x0, eps = (v.astype(jnp.bfloat16) for v in latents(10))
    t = jnp.full(6, 501.0)
    for schedule in ALL:
        for function in (sch.target, sch.to_x0, sch.add_noise):
            assert function(schedule, x0, eps, t).dtype == jnp.float32
    assert sch.guide(x0, eps, 7.5).dtype == jnp.float32


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(path="vp"), "path"),
        (dict(prediction="score"), "prediction"),
        (dict(beta_schedule="cosine"), "beta_schedule"),
        (dict(num_train_timesteps=0), "num_train_timesteps"),
        (dict(path="rf", shift=0.0), "shift"),
        (dict(shift=3.0), "shift"),
        (dict(path="rf", rescale_zero_snr=True), "rescale_zero_snr"),
        (dict(beta_start=0.1), "beta_start"),
        (dict(snr_shift_scale=float("nan")), "snr_shift_scale"),
        (dict(prediction="eps", rescale_zero_snr=True), "eps"),
    ],
)
def test_bad_schedules_say_what_is_wrong(change, word):
    with pytest.raises(ValueError, match=word):
        Schedule(**{"path": "ddpm", "prediction": "v", **change})


def test_bad_calls_say_what_is_wrong():
    schedule = Schedule("ddpm", "v")
    x, t = jnp.zeros((1, 1, 1, 1, 1)), jnp.array([999.0])
    with pytest.raises(ValueError, match="noise"):
        sch.ddim_step(schedule, x, x, t, t - 20, eta=1.0)
    with pytest.raises(ValueError, match="num_steps"):
        sch.timestep_grid(schedule, 0)
    with pytest.raises(ValueError, match="rectified flow"):
        sch.unipc_grid(schedule, 4)
