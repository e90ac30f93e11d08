"""Algorithm 29 of DOLLAR written out once more: in NumPy, float64, with every derivative by hand.

The networks are linear in their parameters, so that each gradient is a sum of products. Nothing here is taken
from the package but what `take_step` needs to run its step; where that draws random numbers, the same keys are
split in the same way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dollar_jax.distillation import Batch, Distillation, Frozen, Networks
from dollar_jax.optim import make_optimiser
from dollar_jax.rewards import JaxReward, Reward
from dollar_jax.rewards.methods.ddpo import Rollouts
from dollar_jax.rewards.methods.lrm import ScoredLatents
from dollar_jax.rewards.pixels import pixel_rewards
from dollar_jax.schedule import Schedule
from dollar_jax.state import Optimisers, RewardStatistics, init_state
from dollar_jax.step import make_step

LATENT, TEXT, ROWS = (3, 2, 2, 4), (3, 5), 8
TIMES = (1000.0, 820.0, 510.0, 240.0)
SHIFT, DECODER = 3.0, 0.7
GAINS = {"red": 2.0, "kept": 0.6, "green": 1.5}  # the rewards' parameters
FIRST_STEP, STEPS = 3, 2

BASE = {
    "steps": 9,
    "batch_size": ROWS,
    "accumulation": 2,
    "student.timesteps": TIMES,
    "student.ema_decay": 0.9,
    "vsd.weight": 0.8,
    "vsd.guidance_weight": 1.5,
    "vsd.score_range": (0.05, 0.9),
    "vsd.score_shift": 2.0,
    "consistency.weight": 0.6,
    "consistency.num_steps": 10,
    "consistency.skip": 2,
    "consistency.guidance_weight": 2.5,
    "consistency.huber_c": 0.3,
    "consistency.sigma_data": 400.0,
    "consistency.timestep_scaling": 0.5,
    "fake_score.updates": 2,
    "reward.rewards": tuple(
        {"name": name, "weight": weight, "folder": None}
        for name, weight in (("red", 0.7), ("kept", 0.0), ("green", -2.0))
    ),
    "reward.weight": 0.5,
    "reward.start_step": 2,
    "reward.ramp_steps": 4,
    "reward.samples": 2,
    "reward.head.use_text": True,
    "reward.updates": 3,
    "reward.batch_size": 4,
    "reward.statistics_decay": 0.8,
}
for _part, _rate in (("student", 0.02), ("fake_score", 0.03), ("reward", 0.04)):
    _adam = {"schedule": "cosine", "warmup_steps": 0, "final_ratio": 0.1, "learning_rate": _rate}
    _adam |= {"b1": 0.6, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.05, "clip_norm": 0.2}
    BASE |= {f"{_part}.optimiser.{name}": value for name, value in _adam.items()}

LABELS, TRAINED, WEIGHTS = ("red", "kept", "green"), [0, 2], np.array([0.7, -2.0])


# --- the package's step -----------------------------------------------------------------------------


def denoise(p, x, t, text):
    """A velocity that depends on everything, linearly in the parameters."""
    own = x @ p["linear"]["kernel"] + (t / 1000)[:, None, None, None, None] * p["bias"]
    return own + (text.mean(1) @ p["words"]["kernel"])[:, None, None, None]


def discriminator(p, x, t, text, early):
    """Of the denoiser's own output, averaged over the video, so that its gradient reaches every parameter."""
    features = denoise(p, x, t, text)
    logit = features.mean((1, 2, 3)) @ p["gan_head"]["kernel"]
    return logit if early else (features, logit)


def head(p, latent, text):
    features = latent.mean((1, 2, 3)) @ p["mean"]["kernel"] + (latent**2).mean((1, 2, 3)) @ p["square"]["kernel"]
    return features + text.mean(1) @ p["words"]["kernel"] + p["bias"]


def red(gain, frames, tokens):
    return gain * frames[..., 0].mean((1, 2, 3)) + 0.1 * tokens[:, 0]


def kept(gain, frames, tokens):
    return gain * frames[..., 2].mean((1, 2, 3))


def green(gain, frames, tokens):
    return gain * (frames[..., 1] ** 2).mean((1, 2, 3))


def decode(params, latent):
    return params * latent[..., :3]


def take_step(config, state, frozen, batch, host_rewards):
    """The package's step, jitted: new state, metrics and what is to be scored, in the shape of `plain_step`'s."""
    functions = dict(zip(LABELS, (red, kept, green), strict=True))
    tokenize = {"red": lambda prompts: np.array([[len(p)] for p in prompts])}
    rewards = (
        []
        if not config.reward.rewards
        else [
            Reward(len, "")
            if label in host_rewards
            else JaxReward(function, "", np.float32(GAINS[label]), tokenize.get(label))
            for label, function in functions.items()
        ]
    )
    pixels = pixel_rewards(config.reward, rewards, decode)
    networks = Networks(denoise, head, pixels, discriminator)
    optimisers = Optimisers(
        make_optimiser(config.student.optimiser, 9),
        make_optimiser(config.fake_score.optimiser, 18),
        make_optimiser(config.reward.optimiser, 27),
    )
    distillation = Distillation(config, networks, Schedule("rf", "velocity", shift=SHIFT))
    step = jax.jit(make_step(distillation, optimisers))
    parameters = pixels.params(np.float32(DECODER)) if pixels else ()
    there = Frozen(*jax.tree.map(jnp.float32, (frozen["teacher"], frozen["null_text"])), parameters)
    gan_head = jax.tree.map(jnp.float32, state["fake_score"].get("gan_head"))
    start = init_state(
        jax.random.key(5), state["student"], jax.tree.map(jnp.float32, state["reward_head"]), optimisers, 2, gan_head
    )
    here = dataclasses.replace(
        start,
        step=jnp.int32(state["step"]),
        ema=jax.tree.map(jnp.float32, state["ema"]),
        fake_score=jax.tree.map(jnp.float32, state["fake_score"]),
        reward_statistics=RewardStatistics(
            *(jnp.float32(state["statistics"][k]) for k in ("mean", "variance", "count"))
        ),
    )
    for inputs in batch:
        earlier = None
        if config.reward.method == "lrm":
            earlier = ScoredLatents(**inputs["replay"])
        elif config.reward.method == "ddpo":
            earlier = Rollouts(**inputs["rollout"])
        latent, text, earlier = jax.tree.map(jnp.float32, (inputs["latent"], inputs["text"], earlier))
        tokens = {} if "red" in host_rewards else {"red": inputs["tokens"]}
        here, metrics, scored = step(here, there, Batch(latent, text, tokens, earlier))
    fields = {name: name for name in ("student", "ema", "fake_score")} | {"reward_head": "latent_reward"}
    state = {name: getattr(here, field) for name, field in fields.items()} | {"step": here.step}
    state["statistics"] = {k: getattr(here.reward_statistics, k) for k in ("mean", "variance", "count")}
    for name in ("student", "fake_score", "reward_head"):
        (adam,) = (
            part
            for part in jax.tree.leaves(
                getattr(here, f"{fields[name]}_optimiser"), is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
            )
            if isinstance(part, optax.ScaleByAdamState)
        )
        state[f"{name}_optimiser"] = {"mean": adam.mu, "square": adam.nu, "count": adam.count}
    assert (jax.random.key_data(here.key) == jax.random.key_data(start.key)).all()
    scored = vars(scored) if scored is not None else {}
    return state, dict(metrics), {name: value for name, value in scored.items() if value is not None}


# --- the same in NumPy ------------------------------------------------------------------------------


def wide(sigma):
    return np.reshape(sigma, (-1, 1, 1, 1, 1))


def normal(key, shape):
    return np.asarray(jax.random.normal(key, shape), np.float64)


def clean(p, x, t, text):
    """x̂0 of the rectified flow's velocity."""
    return x - wide(t / 1000) * denoise(p, x, t, text)


def clean_gradient(grad, x, t, text):
    """The gradient of Σ grad · x̂0 in the denoiser's parameters."""
    return denoise_gradient(-wide(t / 1000) * grad, x, t, text)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def of_logit(p, grad):
    """The gradient of Σ grad · logit in the denoiser's output."""
    return np.broadcast_to(wide(grad) * p["gan_head"]["kernel"] / np.prod(LATENT[:3]), (len(grad), *LATENT))


def discriminator_gradient(p, grad, x, t, text):
    """The gradient of Σ grad · logit in the fake score's parameters."""
    of_head = grad @ denoise(p, x, t, text).mean((1, 2, 3))
    return denoise_gradient(of_logit(p, grad), x, t, text) | {"gan_head": {"kernel": of_head}}


def denoise_gradient(grad, x, t, text):
    """The gradient of Σ grad · velocity in the denoiser's parameters."""
    return {
        "linear": {"kernel": np.einsum("bthwi,bthwo->io", x, grad)},
        "bias": np.einsum("bthwc,b->c", grad, t / 1000),
        "words": {"kernel": np.einsum("bthwc,bd->dc", grad, text.mean(1))},
    }


def head_gradient(grad, latent, text):
    """The gradient of Σ grad · R in the head's parameters."""
    return {
        "mean": {"kernel": grad @ latent.mean((1, 2, 3))},
        "square": {"kernel": grad @ (latent**2).mean((1, 2, 3))},
        "words": {"kernel": grad @ text.mean(1)},
        "bias": grad.sum(),
    }


def guided(p, x, t, text, null, weight):
    with_text, without = denoise(p, x, t, text), denoise(p, x, t, np.broadcast_to(null, text.shape))
    return with_text + weight * (with_text - without)


def shifted(shift, u):
    return shift * u / (1 + (shift - 1) * u)


def following(c, p, x, now, then, text, key):
    """The state at the student's next timestep, and its prediction."""
    time = np.full(len(x), now)
    x0 = clean(p, x, time, text)
    if c.student.sampler == "ode":
        return x + (then - now) / 1000 * denoise(p, x, time, text), x0
    return (1 - then / 1000) * x0 + then / 1000 * normal(key, x0.shape), x0


def student_input(c, p, x0, text, key):
    keys = jax.random.split(key, 3)
    if c.student.timestep_per == "sample":
        index = np.asarray(jax.random.randint(keys[0], (len(x0),), 0, len(TIMES)))
    else:
        index = np.full(len(x0), int(jax.random.randint(keys[0], (), 0, len(TIMES))))
    noise, times = normal(keys[1], x0.shape), np.array(TIMES)
    t = times[index]
    if c.student.input == "forward":
        return wide(1 - t / 1000) * x0 + wide(t / 1000) * noise, t, index
    states = [noise]
    for now, then, k in zip(TIMES, TIMES[1:], jax.random.split(keys[2], len(TIMES)), strict=False):
        states.append(following(c, p, states[-1], now, then, text, k)[0])
    return np.stack([states[k][row] for row, k in enumerate(index)]), t, index


def score_times(c, key, count, above=None):
    low, high = c.vsd.score_range
    if above is not None:  # σ = s u / (1 + (s - 1) u) solved for u
        sigma = above / 1000
        low = np.clip(sigma / (c.vsd.score_shift * (1 - sigma) + sigma), low, high)
    u = low + (high - low) * np.asarray(jax.random.uniform(key, (count,)), np.float64)
    return 1000 * shifted(c.vsd.score_shift, u)


def vsd_guidance(c, t_student, t):
    factors = c.vsd.guidance_by_step or [1.0] * len(TIMES)
    low, high = c.vsd.guidance_range
    by_step = np.array([factors[TIMES.index(time)] for time in t_student])
    return wide(c.vsd.guidance_weight * by_step * ((t >= low) & (t <= high)))


def vsd(c, frozen, fake_score, x, t_student, text, key):
    """Value, and the gradient in x."""
    keys = jax.random.split(key)
    t = score_times(c, keys[0], len(x))
    s = wide(t / 1000)
    x_t = (1 - s) * x + s * normal(keys[1], x.shape)
    teacher, null = frozen["teacher"], frozen["null_text"]
    if c.vsd.guidance_time == "score":
        real = x_t - s * guided(teacher, x_t, t, text, null, vsd_guidance(c, t_student, t))
    else:
        keys = jax.random.split(jax.random.fold_in(key, 2))
        noisier = score_times(c, keys[0], len(x), t_student)
        s2 = wide(noisier / 1000)
        x_n = (1 - s2) * x + s2 * normal(keys[1], x.shape)
        difference = denoise(teacher, x_n, noisier, text)
        difference = difference - denoise(teacher, x_n, noisier, np.broadcast_to(null, text.shape))
        real = clean(teacher, x_t, t, text) - vsd_guidance(c, t_student, noisier) * s2 * difference
    fake = x_t - s * denoise(fake_score, x_t, t, text)
    distance = np.abs(x - real)
    norm = {"dmd": distance.mean((1, 2, 3, 4), keepdims=True), "batch": distance.mean(), "none": 1.0}
    g = (fake - real) / norm[c.vsd.normalisation]
    return (g**2).mean() / 2, g / g.size


def consistency(c, frozen, ema, prediction, x_t, times, text):
    """Value, and the gradient in the prediction at x_t, times[0]."""
    cd = c.consistency

    def boundary(t):
        if cd.boundary == "none":
            return 0.0, 1.0
        s = wide(cd.timestep_scaling * t)
        return cd.sigma_data**2 / (s**2 + cd.sigma_data**2), s / np.sqrt(s**2 + cd.sigma_data**2)

    x = x_t
    for now, then in zip(times, times[1:], strict=False):
        x = x + wide((then - now) / 1000) * guided(
            frozen["teacher"], x, now, text, frozen["null_text"], cd.guidance_weight
        )
    skip, out = boundary(times[-1])
    target = np.where(wide(times[-1]) <= 0, x, skip * x + out * clean(ema, x, times[-1], text))
    skip, out = boundary(times[0])
    d = skip * x_t + out * prediction - target
    h = cd.huber_c
    value, slope = {
        "mse": (d**2, 2 * d),
        "huber": (np.where(abs(d) < h, d**2 / 2, h * (abs(d) - h / 2)), np.clip(d, -h, h)),
        "pseudo_huber": (np.sqrt(d**2 + h**2) - h, d / np.sqrt(d**2 + h**2)),
    }[cd.distance]
    return value.mean(), out * slope / d.size


def rewards_of(latent, tokens):
    """[b, 3] and the gradients of red and green in the latent."""
    frames, share = DECODER * latent, 1 / np.prod(LATENT[1:3]) / latent.shape[1]
    first = GAINS["red"] * frames[..., 0].mean((1, 2, 3)) + 0.1 * tokens[:, 0]
    second = GAINS["kept"] * frames[..., 2].mean((1, 2, 3))
    third = GAINS["green"] * (frames[..., 1] ** 2).mean((1, 2, 3))
    of_red, of_green = np.zeros_like(latent), np.zeros_like(latent)
    of_red[..., 0] = GAINS["red"] * DECODER * share
    of_green[..., 1] = GAINS["green"] * 2 * frames[..., 1] * DECODER * share
    return np.stack([first, second, third], -1), (of_red, of_green)


def reward_scale(c, statistics):
    return WEIGHTS / np.sqrt(statistics["variance"]) if c.reward.normalise else WEIGHTS


def combined(c, statistics, raw):
    return (raw - (statistics["mean"] if c.reward.normalise else 0)) @ reward_scale(c, statistics)


def updated(c, old, reward, weight):
    """Moments over everything so far, the old ones' weight decayed once."""
    reward, weight = reward.reshape(-1, 2), weight.reshape(-1)
    use = np.isfinite(reward).all(1) & (weight > 0)
    reward, before = reward[use], c.reward.statistics_decay * old["count"]
    count = before + use.sum()
    mean = (before * old["mean"] + reward.sum(0)) / count
    spread = before * (old["variance"] + (old["mean"] - mean) ** 2) + ((reward - mean) ** 2).sum(0)
    return {"mean": mean, "variance": spread / count, "count": count}


def posterior(t, then):
    """x_then given x_t and x0 is normal: what its mean takes of x0 and of x_t, and its variance."""
    a, b, a2, b2 = 1 - t / 1000, t / 1000, 1 - then / 1000, then / 1000
    between = b**2 - (a / a2) ** 2 * b2**2
    return a2 * between / b**2, a / a2 * b2**2 / b**2, b2**2 * between / b**2


def scored_rows(x, count):
    return x[:: len(x) // count]


def some_frames(c, latent, key):
    """A run of frames of each, and the places they begin at."""
    frames = c.reward.latent_frames
    if frames is None:
        return latent, np.zeros(len(latent), int)
    start = np.asarray(jax.random.randint(key, (len(latent),), 0, LATENT[0] - frames + 1))
    return np.stack([x[i : i + frames] for x, i in zip(latent, start, strict=True)]), start


def student_gradient(c, state, frozen, beta, x0, text, tokens, key):
    """Gradient of L_VSD + β_CD L_CD + β_FT L_FT, metrics, and the generated latents with their rewards."""
    k_input, k_vsd, k_consistency, k_cut, *k_gan = jax.random.split(key, 5 if c.gan.weight else 4)
    p, cd = state["student"], c.consistency
    own = np.stack([np.linspace(a, b, cd.skip + 1) for a, b in zip(TIMES, (*TIMES[1:], 0.0), strict=True)], 1)

    def somewhere(key):
        """Real latents at a time of L_CD's own."""
        k_noise, k_index = jax.random.split(key)
        if cd.times == "grid":
            grid = 1000 * shifted(SHIFT, np.linspace(1, 0, cd.num_steps + 1))
            first = np.asarray(jax.random.randint(k_index, (len(x0),), 0, cd.num_steps - cd.skip + 1))
            times = np.stack([grid[first + i] for i in range(cd.skip + 1)])
        else:
            times = own[:, np.asarray(jax.random.randint(k_index, (len(x0),), 0, len(TIMES)))]
        s = wide(times[0] / 1000)
        return (1 - s) * x0 + s * normal(k_noise, x0.shape), times

    shared = cd.times == "student" and c.student.input == "forward"
    if c.vsd.weight or c.reward.rewards:
        x_t, t, index = student_input(c, p, x0, text, k_input)
        times = own[:, index]
    else:
        (x_t, times), shared = somewhere(k_input), True
        t = times[0]
    x = clean(p, x_t, t, text)
    in_x, metrics, total = np.zeros_like(x), {}, 0.0
    elsewhere = jax.tree.map(np.zeros_like, p)
    if c.vsd.weight:
        metrics["vsd"], slope = vsd(c, frozen, state["fake_score"], x, t, text, k_vsd)
        total, in_x = total + c.vsd.weight * metrics["vsd"], in_x + c.vsd.weight * slope
    if cd.weight and (state["step"] + 1) % cd.every:
        metrics["consistency"] = 0.0
    elif cd.weight:
        start, prediction = x_t, x
        if not shared:
            start, times = somewhere(k_consistency)
            prediction = clean(p, start, times[0], text)
        metrics["consistency"], slope = consistency(c, frozen, state["ema"], prediction, start, times, text)
        weight = cd.weight * cd.every
        total += weight * metrics["consistency"]
        if shared:
            in_x = in_x + weight * slope
        else:
            elsewhere = clean_gradient(weight * slope, start, times[0], text)
    raw = None
    if c.reward.rewards and c.reward.method == "lrm":
        h = state["reward_head"]
        score = head(h, x, text)
        metrics["latent_reward"] = score.mean()
        share = 1 / np.prod(LATENT[:3]) / len(x)
        in_x = in_x - beta * share * (h["mean"]["kernel"] + 2 * x * h["square"]["kernel"])
        total -= beta * score.mean()
    elif c.reward.method == "direct":
        cut, begin = some_frames(c, scored_rows(x, c.reward.samples), k_cut)
        raw, slopes = rewards_of(cut, scored_rows(tokens, c.reward.samples))
        score = combined(c, state["statistics"], raw[:, TRAINED])
        metrics["pixel_reward"] = score.mean()
        total -= beta * score.mean()
        scale = reward_scale(c, state["statistics"])
        in_cut = -beta * sum(w * slope for w, slope in zip(scale, slopes, strict=True)) / len(cut)
        for row, i, slope in zip(range(0, len(x), len(x) // len(cut)), begin, in_cut, strict=True):
            in_x[row, i : i + len(slope)] += slope
    if c.gan.weight:
        fake, keys = state["fake_score"], jax.random.split(k_gan[0])
        score_t = score_times(c, keys[0], len(x))
        s = wide(score_t / 1000)
        logit = discriminator(fake, (1 - s) * x + s * normal(keys[1], x.shape), score_t, text, True)
        metrics["gan"] = -np.log(sigmoid(logit)).mean()
        total += c.gan.weight * metrics["gan"]
        slope = of_logit(fake, (sigmoid(logit) - 1) / len(x)) @ fake["linear"]["kernel"].T
        in_x = in_x + c.gan.weight * (1 - s) * slope
    metrics |= {"student_loss": total, "latent_mean": x.mean(), "latent_std": x.std()}
    metrics |= {"data_mean": x0.mean(), "data_std": x0.std()}
    gradient = jax.tree.map(np.add, clean_gradient(in_x, x_t, t, text), elsewhere)
    return gradient, metrics, (x, raw)


def policy_gradient(c, p, states, text, advantage):
    """REINFORCE on the steps between the states, which lie at the last timesteps."""
    advantage = np.where(np.isfinite(advantage), advantage, 0.0)
    times, total, gradient = TIMES[-states.shape[1] :], 0.0, jax.tree.map(np.zeros_like, p)
    for i, (t, then) in enumerate(zip(times, times[1:], strict=False)):
        of_x0, of_x, variance = posterior(t, then)
        now = np.full(len(states), t)
        states_i, x = states[:, i], clean(p, states[:, i], now, text)
        d = of_x0 * x + of_x * states_i - states[:, i + 1]
        total += (wide(advantage) * d**2).mean() / (2 * variance)
        slope = wide(advantage) * d / variance * of_x0 / d.size
        gradient = jax.tree.map(np.add, gradient, clean_gradient(slope, states_i, now, text))
    return gradient, {"policy": total}


def rollout(c, p, shape, text, key):
    """The student's predictions at all its timesteps."""
    k_noise, key = jax.random.split(key)
    x, predictions = normal(k_noise, shape), []
    for now, then, k in zip(TIMES, (*TIMES[1:], 0.0), jax.random.split(key, len(TIMES)), strict=True):
        x, prediction = following(c, p, x, now, then, text, k)
        predictions.append(prediction)
    return np.stack(predictions)


def fake_score_gradient(c, p, student, x0, text, samples, key):
    keys = jax.random.split(key, 3)
    if samples is None:
        x_t, t, _ = student_input(c, student, x0, text, keys[0])
        x = clean(student, x_t, t, text)
    else:
        chosen = np.asarray(jax.random.randint(keys[0], (len(text),), 0, len(samples)))
        x = np.stack([samples[k][row] for row, k in enumerate(chosen)])
    t = score_times(c, keys[1], len(x))
    s, noise = wide(t / 1000), normal(keys[2], x.shape)
    x_t = (1 - s) * x + s * noise
    if c.fake_score.loss == "x0":
        d = clean(p, x_t, t, text) - x
        gradient = clean_gradient(2 * d / d.size, x_t, t, text)
    else:
        d = denoise(p, x_t, t, text) - (noise - x)
        gradient = clean_gradient(-2 * d / d.size / s, x_t, t, text)
    each = (d**2).mean((1, 2, 3, 4))
    metrics = {"fake_score": each.mean()}
    if c.gan.weight:
        x_real = (1 - s) * x0 + s * noise
        made, real = (discriminator(p, y, t, text, True) for y in (x_t, x_real))
        metrics["discriminator"] = -np.log(sigmoid(real) * (1 - sigmoid(made))).mean()
        share = c.gan.fake_score_weight / len(x)
        more = discriminator_gradient(p, share * sigmoid(made), x_t, t, text)
        less = discriminator_gradient(p, share * (sigmoid(real) - 1), x_real, t, text)
        gradient = _sum(gradient, more, less)
    for k in range(4):
        inside = (t >= 250 * k) & (t < 250 * (k + 1))
        metrics |= {f"fake_score_sum_{k}": each[inside].sum(), f"fake_score_count_{k}": inside.sum()}
    return gradient, metrics


def _sum(*trees):
    """Of trees that share a part, that of each part."""
    names = set().union(*trees)
    return {name: jax.tree.map(lambda *x: sum(x), *(t[name] for t in trees if name in t)) for name in names}


def head_regression(p, latent, text, reward, weight):
    good = np.isfinite(reward) & (weight > 0)
    latent, text, reward = latent[good], text[good], reward[good]
    predicted = head(p, latent, text)
    gradient = head_gradient(2 * (predicted - reward) / len(reward), latent, text)
    correlation = np.corrcoef(predicted, reward)[0, 1]
    return gradient, {"reward_regression": ((predicted - reward) ** 2).mean(), "reward_correlation": correlation}


def adamw(c, total, p, optimiser, gradient):
    """AdamW on a cosine over `total` updates, the gradient's norm clipped; also that norm."""
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(lambda g: g * min(1, c.clip_norm / norm), gradient)
    done = optimiser["count"]
    rate = c.learning_rate * (c.final_ratio + (1 - c.final_ratio) * (1 + np.cos(np.pi * done / total)) / 2)
    mean = jax.tree.map(lambda m, g: c.b1 * m + (1 - c.b1) * g, optimiser["mean"], gradient)
    square = jax.tree.map(lambda v, g: c.b2 * v + (1 - c.b2) * g**2, optimiser["square"], gradient)

    def step(path, p, m, v):
        decay = c.weight_decay if "kernel" in str(path[-1]) else 0.0
        m, v = m / (1 - c.b1 ** (done + 1)), v / (1 - c.b2 ** (done + 1))
        return p - rate * (m / (np.sqrt(v) + c.eps) + decay * p)

    new = jax.tree_util.tree_map_with_path(step, p, mean, square)
    return new, {"mean": mean, "square": square, "count": done + 1}, norm


def average(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def plain_step(c, state, frozen, batch, host_rewards):
    r, count = c.reward, c.accumulation
    k_student, k_fake, k_scored = jax.random.split(jax.random.fold_in(jax.random.key(5), state["step"]), 3)
    micro = [[batch[name][i::count] for name in ("latent", "text", "tokens")] for i in range(count)]
    beta = r.weight * min((state["step"] - r.start_step + 1) / r.ramp_steps, 1.0) if r.rewards else 0.0
    new, statistics = dict(state), state["statistics"]

    # The student, on all its losses at once (8.12).
    parts = [
        student_gradient(c, state, frozen, beta, *rows, key)
        for rows, key in zip(micro, jax.random.split(k_student, count), strict=True)
    ]
    gradient, metrics = average([part[0] for part in parts]), average([part[1] for part in parts])
    generated, raw = parts[-1][2]
    if r.method == "ddpo":
        states, text, reward = (batch["rollout"][name] for name in ("states", "text", "reward"))
        statistics = updated(c, statistics, reward, np.ones(len(reward)))
        more, aux = policy_gradient(c, state["student"], states, text, combined(c, statistics, reward))
        gradient, metrics = jax.tree.map(lambda a, b: a + beta * b, gradient, more), metrics | aux
    new["student"], new["student_optimiser"], metrics["student_gradient"] = adamw(
        c.student.optimiser, 9, state["student"], state["student_optimiser"], gradient
    )

    # The fake score, on the new student's samples.
    auxiliaries, samples = [], [None] * count
    if c.fake_score.samples == "student":
        samples = [part[2][0][None] for part in parts]
    elif c.fake_score.samples == "rollout":
        k_fake, key = jax.random.split(k_fake)
        pairs = zip(micro, jax.random.split(key, count), strict=True)
        samples = [rollout(c, new["student"], rows[0].shape, rows[1], key) for rows, key in pairs]
    for key in jax.random.split(k_fake, c.fake_score.updates if c.vsd.weight else 0):
        keys = jax.random.split(key, count)
        parts = [
            fake_score_gradient(c, new["fake_score"], new["student"], *rows[:2], made, k)
            for rows, made, k in zip(micro, samples, keys, strict=True)
        ]
        gradient, aux = average([part[0] for part in parts]), average([part[1] for part in parts])
        new["fake_score"], new["fake_score_optimiser"], aux["fake_score_gradient"] = adamw(
            c.fake_score.optimiser, 18, new["fake_score"], new["fake_score_optimiser"], gradient
        )
        auxiliaries.append(aux)
    metrics |= average(auxiliaries) if auxiliaries else {}

    # The average.
    d = c.student.ema_decay if state["step"] >= c.student.ema_start else 0.0
    new["ema"] = jax.tree.map(lambda old, x: d * old + (1 - d) * x, state["ema"], new["student"])
    new["step"] = state["step"] + 1
    if not r.rewards:
        return new, metrics, {}

    # What is to be scored: rows of the last micro-batch.
    real, text, tokens = (scored_rows(x, r.samples) for x in micro[-1])
    k_rollout, k_run = jax.random.split(k_scored)
    scored, kinds = {}, 1
    if r.method == "lrm":
        kinds = 2
        latent = np.stack([scored_rows(generated, r.samples), real], 1).reshape(-1, *LATENT)
    elif r.method == "direct":
        latent = scored_rows(generated, r.samples)
    else:
        keys = jax.random.split(k_rollout, len(TIMES))
        states = [normal(keys[0], real.shape)]
        for t, then, key in zip(TIMES, TIMES[1:], keys[1:], strict=False):
            of_x0, of_x, variance = posterior(t, then)
            x = clean(new["student"], states[-1], np.full(len(text), t), text)
            states.append(of_x0 * x + of_x * states[-1] + np.sqrt(variance) * normal(key, x.shape))
        scored["states"] = np.stack(states[1:], 1)
        latent = clean(new["student"], states[-1], np.full(len(text), TIMES[-1]), text)
    latent, _ = some_frames(c, latent, k_run)
    text, tokens = text.repeat(kinds, 0), tokens.repeat(kinds, 0)
    if r.method != "direct":
        raw, _ = rewards_of(latent, tokens)
        raw[:, [label in host_rewards for label in LABELS]] = np.nan
    predicted = head(state["reward_head"], latent, text) if r.method == "lrm" else np.full(len(latent), np.nan)
    for name, value in (("latent", latent), ("reward", raw), ("predicted", predicted)):
        scored[name] = value.reshape(r.samples, kinds, *value.shape[1:])
    if r.method == "direct":
        statistics = updated(c, statistics, raw[:, TRAINED], np.ones(len(raw)))

    # The latent reward model, on what was scored (8.10).
    if r.method == "lrm":
        sets = [[batch["replay"][k][u] for k in ("latent", "text", "reward", "weight")] for u in range(r.updates)]
        if "red" not in host_rewards:  # what has just been scored, too
            fresh = (latent, text, raw[:, TRAINED], np.ones(len(raw)))
            sets = [[np.concatenate(pair) for pair in zip(rows, fresh, strict=True)] for rows in sets]
        rewards, weights = (np.stack([rows[i] for rows in sets]) for i in (2, 3))
        statistics = updated(c, statistics, rewards, weights)
        auxiliaries = []
        for rows in sets:
            rows[2] = combined(c, statistics, rows[2])
            gradient, aux = head_regression(new["reward_head"], *rows)
            new["reward_head"], new["reward_head_optimiser"], aux["reward_head_gradient"] = adamw(
                r.optimiser, 27, new["reward_head"], new["reward_head_optimiser"], gradient
            )
            auxiliaries.append(aux)
        metrics |= average(auxiliaries)
    scored["scale"] = np.broadcast_to(reward_scale(c, statistics), (r.samples, 2))
    metrics["reward_weight"] = beta
    for k, i in enumerate(TRAINED):
        metrics[f"reward_mean_{LABELS[i]}"] = statistics["mean"][k]
        metrics[f"reward_std_{LABELS[i]}"] = np.sqrt(statistics["variance"][k])
    return new | {"statistics": statistics}, metrics, scored


# --- the comparison ---------------------------------------------------------------------------------

HOST = {"red", "green"}
CASES = {
    "latent-host": ({"student.input": "forward"}, HOST),
    "latent-jax": (
        {"student.input": "backward", "consistency.times": "grid", "consistency.distance": "pseudo_huber"}
        | {"reward.latent_frames": 2, "vsd.normalisation": "batch"},
        {},
    ),
    "latent-raw": ({"student.input": "backward", "reward.normalise": False, "consistency.boundary": "lcm"}, HOST),
    "ddpo-forward": (
        {"reward.method": "ddpo", "student.input": "forward", "consistency.times": "grid", "fake_score.loss": "x0"},
        {},
    ),
    "ddpo-backward": (
        {"reward.method": "ddpo", "student.input": "backward", "consistency.distance": "huber"}
        | {"vsd.normalisation": "none"},
        HOST,
    ),
    "direct-forward": (
        {"reward.method": "direct", "student.input": "forward", "reward.latent_frames": 2}
        | {"consistency.boundary": "lcm", "consistency.times": "student"},
        {},
    ),
    "one-rollout": (
        {"student.input": "backward", "student.timestep_per": "micro_batch", "fake_score.samples": "rollout"}
        | {"consistency.every": 2},
        {},
    ),
    "student-samples": (
        {"student.input": "forward", "fake_score.samples": "student", "consistency.times": "student"}
        | {"consistency.every": 2},
        {},
    ),
    "cd-grid": ({"vsd.weight": 0.0, "reward.rewards": (), "consistency.times": "grid"}, {}),
    "cd-student": ({"vsd.weight": 0.0, "reward.rewards": (), "consistency.times": "student"}, {}),
    "decoupled": (
        {"student.input": "forward", "vsd.guidance_time": "noisier", "vsd.guidance_by_step": (0.2, 1.5, 1.0, 0.7)}
        | {"vsd.guidance_range": (400.0, 950.0)},
        {},
    ),
    "guidance-by-step": (
        {
            "student.input": "forward",
            "vsd.guidance_by_step": (0.2, 1.5, 1.0, 0.7),
            "vsd.guidance_range": (300.0, 700.0),
        },
        {},
    ),
    "ode": (
        {"student.input": "backward", "student.sampler": "ode", "fake_score.samples": "rollout"}
        | {"student.ema_start": FIRST_STEP + 1},
        {},
    ),
    "gan": ({"student.input": "forward", "gan.weight": 0.4, "gan.fake_score_weight": 0.7, "reward.rewards": ()}, {}),
    "gan-latent": ({"student.input": "backward", "gan.weight": 0.4, "fake_score.loss": "x0"}, HOST),
    "direct-backward": ({"reward.method": "direct", "student.input": "backward", "reward.remat": False}, {}),
}


def draw_start(gan):
    """Networks that all differ, statistics that are known, and a batch for every step."""
    rng = np.random.default_rng(3)

    def network():
        return {
            "linear": {"kernel": rng.normal(size=(4, 4)) / 3},
            "bias": rng.normal(size=4) / 2,
            "words": {"kernel": rng.normal(size=(5, 4)) / 2},
        }

    latent_model = {name: {"kernel": rng.normal(size=4) / 2} for name in ("mean", "square")}
    latent_model |= {"words": {"kernel": rng.normal(size=5) / 2}, "bias": np.array(0.3)}
    state = {name: network() for name in ("student", "ema", "fake_score")} | {"reward_head": latent_model}
    if gan:
        state["fake_score"]["gan_head"] = {"kernel": rng.normal(size=4)}
    state["statistics"] = {"mean": np.array([0.4, -0.2]), "variance": np.array([0.3, 0.8]), "count": np.array(6.0)}
    state["step"] = FIRST_STEP
    for name in ("student", "fake_score", "reward_head"):
        zeros = jax.tree.map(np.zeros_like, state[name])
        state[f"{name}_optimiser"] = {"mean": zeros, "square": zeros, "count": 0}
    frozen = {"teacher": network(), "null_text": rng.normal(size=(1, *TEXT))}
    return state, frozen, rng


def draw_batches(config, rng):
    r, batches = config.reward, []
    for _ in range(STEPS):
        replay = {
            "latent": rng.normal(size=(3, 4, *r.scored_shape(LATENT))),
            "text": rng.normal(size=(3, 4, *TEXT)),
            "reward": rng.normal(size=(3, 4, 2)),
            "weight": np.ones((3, 4)),
        }
        replay["reward"][1, 2, 0], replay["weight"][2, 1] = np.nan, 0.0
        rollout = {"states": rng.normal(size=(2, 3, *LATENT)), "text": rng.normal(size=(2, *TEXT))}
        rollout["reward"] = rng.normal(size=(2, 2))
        batches.append(
            {
                "latent": rng.normal(size=(ROWS, *LATENT)),
                "text": rng.normal(size=(ROWS, *TEXT)),
                "tokens": rng.integers(0, 9, (ROWS, 1)).astype(np.int32),
                "replay": replay,
                "rollout": rollout,
            }
        )
    batches[-1]["rollout"]["reward"][0, 1] = np.nan
    return batches


@pytest.mark.parametrize("case", CASES)
def test_step_is_algorithm_29(make_config, case):
    changes, host_rewards = CASES[case]
    config = make_config({**BASE, **changes})
    state, frozen, rng = draw_start(bool(config.gan.weight))
    # In the precision that the step is given them in.
    state, frozen, batches = jax.tree.map(
        lambda x: np.float64(np.float32(x)) if np.asarray(x).dtype == float else x,
        (state, frozen, draw_batches(config, rng)),
    )
    found = take_step(config, state, frozen, batches, host_rewards)
    for batch in batches:
        state, metrics, scored = plain_step(config, state, frozen, batch, host_rewards)
    for name, a, b in zip(("state", "metrics", "scored"), found, (state, metrics, scored), strict=True):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
            where = f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
            y = np.asarray(y, np.float64)
            size = np.abs(y[np.isfinite(y)]).max(initial=0)
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4 * size, err_msg=where)
