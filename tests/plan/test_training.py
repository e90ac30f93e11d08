"""Forwards of a step counted by the calls that its program makes; costs beside the rivals' recipes."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from dollar_jax.config import changed
from dollar_jax.distillation import Batch, Distillation, Frozen, Networks
from dollar_jax.experiment import load
from dollar_jax.optim import make_optimiser
from dollar_jax.plan.training import forwards, training_cost
from dollar_jax.rewards.methods.lrm import ScoredLatents
from dollar_jax.schedule import Schedule
from dollar_jax.state import Optimisers, init_state
from dollar_jax.step import make_step

BLOCKS = 4  # of the teacher
CASES = {
    "everything new": {},
    "one rollout": {"student.timestep_per": "micro_batch", "fake_score.samples": "rollout"},
    "student's samples": {"student.input": "forward", "fake_score.samples": "student", "consistency.times": "student"},
    "gan": {"gan.weight": 0.1, "gan.depth": 0.25},
    "latent reward on features": {
        "reward.rewards": ({"name": "vivid"},),
        "reward.head.depth": 0.25,
        **{f"reward.{name}": value for name, value in (("samples", 2), ("batch_size", 8), ("updates", 3))},
    },
    "a student of a quarter of the blocks": {"student.layers": 1, "consistency.times": "grid"},
    "decoupled guidance": {"vsd.guidance_time": "noisier"},
    "cd alone, unguided": {"vsd.weight": 0.0, "consistency.guidance_weight": 0.0, "consistency.skip": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_forwards_are_the_rows_that_reach_the_network_and_come_back(case):
    """Averaged over many steps; every row that goes forward counts 1, every one whose gradient is taken 2 more."""
    config = load("wan_1_3b", "vsd+cd")
    fields = {"batch_size": 4, "consistency.every": 1, "student.timestep_per": "sample", "fake_score.samples": "fresh"}
    config = changed(config, fields | CASES[case])
    rows = collections.Counter()

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def seen(x, share):
        jax.debug.callback(lambda: rows.update(forward=share * len(x)))
        return x

    def back(share, _, grad):
        jax.debug.callback(lambda: rows.update(backward=share * len(grad)))
        return (grad,)

    seen.defvjp(lambda x, share: (seen(x, share), None), back)

    def apply(params, x_t, t, text, share=1.0):
        w = params["blocks"]["w"]
        return seen(w.mean() * x_t, share * len(w) / BLOCKS)

    def discriminator(params, *args, early):
        y = apply(params, *args, share=config.gan.depth if early else 1.0)
        return y.mean((1, 2, 3, 4)) if early else (y, y.mean((1, 2, 3, 4)))

    def latent_reward(params, latent, text):
        share = config.reward.head.depth
        return params["w"] * (latent if share is None else seen(latent, share)).mean((1, 2, 3, 4))

    optimiser = make_optimiser(config.student.optimiser, 10)
    optimisers = Optimisers(optimiser, optimiser, optimiser)
    network = Networks(apply, latent_reward, None, discriminator)
    step = jax.jit(make_step(Distillation(config, network, Schedule("rf", "velocity")), optimisers))
    params, layers = {"blocks": {"w": jnp.full(BLOCKS, 0.5)}}, config.student.layers
    state = init_state(jax.random.key(0), params, {"w": jnp.zeros(1)}, optimisers, 0, layers=layers)
    scored = ScoredLatents(jnp.ones((3, 8, 1, 2, 2, 1)), jnp.ones((3, 8, 1, 1)), jnp.ones((3, 8, 1)), jnp.ones((3, 8)))
    batch = Batch(jnp.ones((4, 1, 2, 2, 1)), jnp.ones((4, 1, 1)), {}, scored)
    steps = 120
    for _ in range(steps):
        state, _, _ = step(state, Frozen(params, jnp.zeros((1, 1, 1))), batch)
    jax.block_until_ready(state)
    jax.effects_barrier()
    counted = (rows["forward"] + 2 * rows["backward"]) / steps / 4
    assert sum(forwards(config, BLOCKS).values()) == pytest.approx(counted, rel=0.03)


def test_the_defaults_of_real_teachers_are_affordable():
    config = load("wan_1_3b", "vsd+cd+lrm,vivid")
    assert sum(forwards(config).values()) == 33.5 and config.steps == 1200
    before = {"student.timestep_per": "sample", "fake_score.samples": "fresh", "consistency.every": 1}
    assert sum(forwards(changed(config, before)).values()) == pytest.approx(58, abs=1e-4)
    assert sum(forwards(load("wan_1_3b", "cd")).values()) == 14
    assert sum(forwards(load("paper")).values()) == 40


def test_chip_hours_follow_from_the_forwards(make_config):
    config = dataclasses.replace(make_config(), steps=10)
    cost, words = training_cost(config, "v5p:2x2x2")
    expected = sum(cost["forwards"].values()) * 10 * config.batch_size * cost["forward_tflops"] / 459 / 3600
    assert cost["chip_hours"] == pytest.approx({"30%": expected / 0.3, "50%": expected / 0.5})
    assert f"10 updates of {config.batch_size} videos" in words and " CD + " in words


def test_a_forward_that_is_told_of_an_image_costs_its_channels_and_tokens_more():
    """20 channels of a patch of 4 for each of 32,760 tokens; of 257 image tokens their embedding, and in each of 40
    blocks keys, values and the attention to them."""
    video = 480, 832, 81
    told, plain = (
        training_cost(load(n), "v5p:4x4x4", video)[0]["forward_tflops"] for n in ("wan21_i2v_14b", "wan_14b")
    )
    tokens, dim, image, width = 32760, 5120, 257, 1280
    blocks = 40 * (2 * 2 * image * dim**2 + 2 * 2 * tokens * image * dim)
    more = 2 * tokens * 80 * dim + 2 * image * (width**2 + width * dim) + blocks
    assert told - plain == pytest.approx(more / 1e12, rel=1e-3)
