import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dollar_jax import losses
from dollar_jax import schedule as sch
from dollar_jax.schedule import Schedule

SHAPE = (3, 2, 2, 2, 4)
ELEMENTS = 32


def arrays(count, seed=0, shape=SHAPE):
    values = np.random.default_rng(seed).normal(size=(count, *shape))
    return [jnp.asarray(v, jnp.float32) for v in values]


def per_sample_mean(x):
    return np.asarray(x, np.float64).reshape(len(x), -1).mean(1)


@pytest.mark.parametrize("normalisation", ["dmd", "batch", "none"])
def test_vsd_gradient_is_the_analytic_one(normalisation):
    x, real, fake = arrays(3)
    weight = jnp.array([1.0, 0.5, 2.0])
    distance = np.abs(np.asarray(x - real))
    norm = {"dmd": distance.mean((1, 2, 3, 4), keepdims=True), "batch": distance.mean(), "none": 1.0}[normalisation]
    g = np.asarray(fake - real) / norm

    def loss(x, real, fake):
        return weight * losses.vsd(x, real, fake, normalisation)

    np.testing.assert_allclose(loss(x, real, fake), weight * 0.5 * per_sample_mean(g**2), rtol=1e-5)
    np.testing.assert_allclose(losses.vsd_gradient(x, real, fake, normalisation), g, rtol=1e-5)
    grad_x, grad_real, grad_fake = jax.grad(lambda *a: loss(*a).sum(), (0, 1, 2))(x, real, fake)
    expected = np.asarray(weight).reshape(-1, 1, 1, 1, 1) * g / ELEMENTS
    np.testing.assert_allclose(grad_x, expected, rtol=1e-5)
    assert not grad_real.any() and not grad_fake.any()


def test_vsd_descends_towards_the_teacher():
    x, real, _ = arrays(3)
    step = jax.grad(lambda x: losses.vsd(x, real, x, "none").sum())(x)
    assert (np.sign(-step) == np.sign(real - x)).all()


def test_vsd_gradient_survives_large_x():
    x = jnp.full(SHAPE, 1e4)
    g = 1e-4 * arrays(1)[0]
    grad = jax.grad(lambda x: losses.vsd(x, jnp.zeros(SHAPE), g, "none").sum())(x)
    np.testing.assert_allclose(grad, g / ELEMENTS, rtol=1e-6)


def test_vsd_floor_and_nan():
    x, fake = arrays(2)
    np.testing.assert_allclose(losses.vsd_gradient(x, x, fake, floor=0.5), (fake - x) / 0.5, rtol=1e-6)
    assert np.isfinite(losses.vsd(x, x, fake)).all()
    broken = fake.at[1, 0, 0, 0, 0].set(jnp.nan).at[1, 0, 0, 0, 1].set(jnp.inf)
    assert np.isnan(losses.vsd(x, x + 1, broken)[1])
    grad = jax.grad(lambda x: losses.vsd(x, x + 1, broken, nan_to_zero=True).sum())(x)
    assert np.isfinite(grad).all()
    assert not grad[1, 0, 0, 0, :2].any()
    np.testing.assert_allclose(grad[0], (fake - x - 1)[0] / ELEMENTS, rtol=1e-4)


@pytest.mark.parametrize("distance", ["mse", "huber", "pseudo_huber"])
def test_consistency_matches_torch_and_its_target_has_no_gradient(distance):
    student, target = arrays(2)
    c = 0.3
    a, b = (torch.from_numpy(np.array(v)).double() for v in (student, target))
    expected = {
        "mse": torch.nn.functional.mse_loss(a, b, reduction="none"),
        "huber": torch.nn.functional.huber_loss(a, b, reduction="none", delta=c),
        "pseudo_huber": torch.sqrt((a - b) ** 2 + c**2) - c,
    }[distance]
    weight = jnp.array([1.0, 0.0, 3.0])

    def loss(student, target):
        return weight * losses.consistency(student, target, distance, c)

    np.testing.assert_allclose(loss(student, target), per_sample_mean(expected) * weight, rtol=1e-5)
    grad_student, grad_target = jax.grad(lambda *v: loss(*v).sum(), (0, 1))(student, target)
    a.requires_grad_()
    value = {
        "mse": (a - b) ** 2,
        "huber": torch.nn.functional.huber_loss(a, b, reduction="none", delta=c),
        "pseudo_huber": torch.sqrt((a - b) ** 2 + c**2) - c,
    }[distance]
    (value.mean((1, 2, 3, 4)) * torch.from_numpy(np.array(weight))).sum().backward()
    np.testing.assert_allclose(grad_student, a.grad, rtol=1e-4, atol=1e-8)
    assert not grad_target.any()


def test_pseudo_huber_keeps_small_differences():
    target = jnp.zeros((1, 1, 1, 1, 1))
    value = losses.consistency(target + 1e-6, target, "pseudo_huber", huber_c=1e-2)
    np.testing.assert_allclose(value, 0.5e-12 / 1e-2, rtol=1e-5)
    assert jax.grad(lambda x: losses.consistency(x, target, "pseudo_huber").sum())(target) == 0


def test_boundary_scalings_are_lcms():
    t = jnp.array([-1.0, 0.0, 0.1, 20.0])
    skip, out = losses.boundary_scalings(t)
    s = np.array([0.0, 0.0, 1.0, 200.0])
    np.testing.assert_allclose(skip, 0.25 / (s**2 + 0.25), rtol=1e-6)
    np.testing.assert_allclose(out, s / (s**2 + 0.25) ** 0.5, rtol=1e-6)
    skip, out = losses.boundary_scalings(t, "none")
    assert not skip.any() and (out == 1).all()


def test_denoising_and_latent_reward():
    prediction, target = arrays(2)
    expected = per_sample_mean((prediction - target) ** 2)
    np.testing.assert_allclose(losses.denoising(prediction, target), expected, rtol=1e-5)
    grads = jax.grad(lambda p, t: losses.denoising(p, t).sum(), (0, 1))(prediction, target)
    np.testing.assert_allclose(grads[0], 2 * (prediction - target) / ELEMENTS, rtol=1e-5)
    assert not grads[1].any()
    grad = jax.grad(lambda r: losses.latent_reward(r).sum())(jnp.array([0.3, 2.0]))
    np.testing.assert_array_equal(grad, [-1.0, -1.0])


def test_unusable_reward_rows_contribute_nothing():
    nan, inf = jnp.nan, jnp.inf
    predicted = jnp.array([1.0, 2.0, nan, 4.0, inf, 6.0])
    reward = jnp.array([0.5, nan, 1.0, inf, 1.0, 2.0])
    weight = jnp.array([1.0, 1.0, 0.0, 1.0, 0.0, 3.0])
    value, pull = jax.vjp(lambda *v: losses.reward_regression(*v, weight), predicted, reward)
    np.testing.assert_allclose(value, [0.25, 0, 0, 0, 0, 48.0])
    grad_predicted, grad_reward = pull(jnp.ones(6))
    np.testing.assert_allclose(grad_predicted, [1.0, 0, 0, 0, 0, 24.0])
    assert not grad_reward.any()
    two = losses.reward_regression(jnp.array([1.0, 2.0]), jnp.array([nan, 0.0]), jnp.ones(2))
    np.testing.assert_allclose(two, [0.0, 4.0])


def test_low_precision_inputs_give_fp32_losses():
    x, y, z = (v.astype(jnp.bfloat16) for v in arrays(3))
    wide = [v.astype(jnp.float32) for v in (x, y, z)]
    for loss, count in ((losses.vsd, 3), (losses.consistency, 2), (losses.denoising, 2)):
        value = loss(*(x, y, z)[:count])
        assert value.dtype == jnp.float32 and value.shape == (3,)
        np.testing.assert_array_equal(value, loss(*wide[:count]))
    reward = x[:, 0, 0, 0, 0]
    assert losses.latent_reward(reward).dtype == jnp.float32
    assert losses.reward_regression(reward, reward, reward).dtype == jnp.float32


def test_bad_choices_say_what_is_wrong():
    x, t = jnp.zeros((1, 1, 1, 1, 1)), jnp.zeros(1)
    with pytest.raises(ValueError, match="normalisation"):
        losses.vsd(x, x, x, "mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="distance"):
        losses.consistency(x, x, "l1")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="huber_c"):
        losses.consistency(x, x, huber_c=0.0)
    with pytest.raises(ValueError, match="kind"):
        losses.boundary_scalings(t, "edm")  # pyright: ignore[reportArgumentType]


# A Gaussian x0 ~ N(mean, std^2) has its clean prediction and its ODE in closed form.
MEAN, STD = 0.7, 0.4


def posterior_mean(x, a, b, mean, std):
    return mean + a * std**2 / (a**2 * std**2 + b**2) * (x - a * mean)


@pytest.mark.parametrize(
    "schedule, normalisation",
    [(Schedule("ddpm", "v"), "none"), (Schedule("rf", "velocity"), "batch")],
    ids=["ddpm", "rf"],
)
def test_vsd_drives_an_affine_student_to_the_teachers_gaussian(schedule, normalisation):
    batch = 256

    def loss(student, keys):
        mean, std = student["mean"], student["std"]
        x = mean + std * jax.random.normal(keys[0], (batch, 1, 1, 1, 1))
        t = jax.random.uniform(keys[1], (batch,), minval=20.0, maxval=980.0)
        x_t = sch.add_noise(schedule, x, jax.random.normal(keys[2], x.shape), t)
        a, b = (c.reshape(-1, 1, 1, 1, 1) for c in sch.coefficients(schedule, t))
        real = posterior_mean(x_t, a, b, MEAN, STD)
        fake = posterior_mean(x_t, a, b, mean, std)
        return losses.vsd(x, real, fake, normalisation).mean()

    def descend(student, key):
        gradient = jax.grad(loss)(student, jax.random.split(key, 3))
        return jax.tree.map(lambda p, g: p - 0.3 * g, student, gradient), None

    start = {"mean": jnp.float32(-1.0), "std": jnp.float32(1.5)}
    keys = jax.random.split(jax.random.key(0), 600)
    student, _ = jax.jit(lambda s: jax.lax.scan(descend, s, keys))(start)
    np.testing.assert_allclose(student["mean"], MEAN, atol=1e-3)
    np.testing.assert_allclose(abs(student["std"]), STD, atol=1e-3)


def test_consistency_distillation_learns_the_ode_solution_map():
    schedule = Schedule("ddpm", "v")
    grid = sch.timestep_grid(schedule, 4)
    a, b = (np.asarray(c) for c in sch.coefficients(schedule, jnp.asarray(grid)))
    spread = np.sqrt(a**2 * STD**2 + b**2)
    data, eps = (v.reshape(-1, 1, 1, 1, 1) for v in arrays(2, shape=(128,)))
    data = MEAN + STD * data

    def student(params, x, n):
        t = jnp.full(len(x), grid[n])
        skip, out = (c.reshape(-1, 1, 1, 1, 1) for c in losses.boundary_scalings(t))
        return skip * x + out * (params["slope"][n] * x + params["offset"][n])

    def loss(params, ema):
        total = 0.0
        for n in range(4):
            x = sch.add_noise(schedule, data, eps, jnp.full(len(data), grid[n]))
            earlier = a[n + 1] * MEAN + spread[n + 1] / spread[n] * (x - a[n] * MEAN)
            predicted = student(params, x, n)
            total += losses.consistency(predicted, student(ema, earlier, n + 1)).mean()
        return total

    def descend(state, _):
        params, ema = state
        params = jax.tree.map(lambda p, g: p - 0.4 * g, params, jax.grad(loss)(params, ema))
        return (params, jax.tree.map(lambda e, p: 0.8 * e + 0.2 * p, ema, params)), None

    params = {"slope": jnp.zeros(5), "offset": jnp.zeros(5)}
    (params, _), _ = jax.jit(lambda s: jax.lax.scan(descend, s, length=800))((params, params))
    np.testing.assert_allclose(params["slope"][:4], STD / spread[:4], atol=2e-3)
    np.testing.assert_allclose(params["offset"][:4], MEAN * (1 - a[:4] * STD / spread[:4]), atol=2e-3)
