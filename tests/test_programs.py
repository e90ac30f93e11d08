"""What a program gives its step: which settings reach which optimiser, and the shapes of its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dollar_jax import programs
from dollar_jax.distillation import Batch, RewardSamples
from dollar_jax.rewards import JaxReward
from dollar_jax.rewards.methods.ddpo import Rollouts
from dollar_jax.rewards.methods.lrm import ScoredLatents
from dollar_jax.rewards.pixels import pixel_rewards
from dollar_jax.schedule import Schedule

LATENT, TEXT = (2, 4, 4, 4), (3, 8)
STEPS = 5
OPTIMISERS = {  # every one different in everything
    "student": {"learning_rate": 0.01, "b1": 0.3, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.2, "clip_norm": 0.5},
    "fake_score": {"learning_rate": 0.02, "b1": 0.0, "b2": 0.8, "eps": 1e-2, "weight_decay": 0.0, "clip_norm": None},
    "reward": {"learning_rate": 0.03, "b1": 0.9, "b2": 0.99, "eps": 1e-1, "weight_decay": 0.1, "clip_norm": 2.0},
}
UPDATES = {"student": 1, "fake_score": 3, "reward": 2}  # of a step
CONFIG = {"steps": STEPS, "fake_score.updates": 3, "reward.updates": 2, "reward.rewards": ()}
CONFIG |= {f"{part}.optimiser.{name}": v for part, fields in OPTIMISERS.items() for name, v in fields.items()}
CONFIG |= {f"{part}.optimiser.schedule": "cosine" for part in OPTIMISERS}
CONFIG |= {f"{part}.optimiser.final_ratio": 0.2 for part in OPTIMISERS}
CONFIG |= {f"{part}.optimiser.warmup_steps": 1 for part in OPTIMISERS}


class Linear:
    """A velocity by one matrix: the least that is a network."""

    shapes = {"linear": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)}}  # as a teacher may lie in memory

    @staticmethod
    def apply(params, x, t, text):
        return x @ params["linear"]["kernel"]


@pytest.fixture
def build(make_config, network_programs, monkeypatch):
    """The program of some settings, and the optimisers that its step got."""

    def build(changes, rewards=(), **more):
        got = {}

        def make_step(distillation, optimisers, *others):
            got.update(student=optimisers.student, fake_score=optimisers.fake_score, reward=optimisers.latent_reward)
            return step(distillation, optimisers, *others)

        config = make_config({**CONFIG, **changes})
        pixels = pixel_rewards(config.reward, rewards, lambda params, latent: latent[..., :3])
        with monkeypatch.context() as patch:
            step = programs.make_step
            patch.setattr(programs, "make_step", make_step)
            schedule, here = Schedule("rf", "velocity", shift=3.0), jax.devices()[:1]
            built = network_programs(config, Linear(), schedule, LATENT, TEXT, here, pixels, **more)
            if not more and not rewards:
                jax.eval_shape(built.step.function, *built.step.arguments)  # the step is made as it is traced
        return built, got

    return build


def plain_adamw(c, updates, gradients, p):
    """p after each of the gradients of one number, warmed up once and then on a cosine to the last update."""
    m = v = 0.0
    for i, g in enumerate(gradients):
        g = g if c["clip_norm"] is None else g * min(1.0, c["clip_norm"] / abs(g))
        rate = (i > 0) * (0.2 + 0.8 * (1 + np.cos(np.pi * (i - 1) / (updates - 1))) / 2)
        m, v = c["b1"] * m + (1 - c["b1"]) * g, c["b2"] * v + (1 - c["b2"]) * g * g
        direction = m / (1 - c["b1"] ** (i + 1)) / (np.sqrt(v / (1 - c["b2"] ** (i + 1))) + c["eps"])
        p = p - rate * c["learning_rate"] * (direction + c["weight_decay"] * p)
        yield p


@pytest.mark.parametrize("part", OPTIMISERS)
def test_each_optimiser_has_its_own_settings_and_a_schedule_as_long_as_its_updates(build, part):
    _, got = build({})
    count = STEPS * UPDATES[part]
    gradients = np.random.default_rng(0).normal(size=count) + 0.5

    def update(carry, g):
        p, state = carry
        updates, state = got[part].update({"kernel": g}, state, p)
        p = jax.tree.map(jnp.add, p, updates)
        return (p, state), p["kernel"]

    start = {"kernel": jnp.float32(2.0)}
    _, found = jax.lax.scan(update, (start, got[part].init(start)), jnp.float32(gradients))
    expected = list(plain_adamw(OPTIMISERS[part], count, gradients, 2.0))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert abs(expected[-1] - expected[-2]) > 1e-4


def test_what_is_trained_is_fp32_whatever_the_teacher(build):
    state = build({})[0].state_shapes
    kinds = {x.dtype for part in (state.student, state.ema, state.fake_score) for x in jax.tree.leaves(part)}
    assert kinds == {jnp.dtype("float32")}


TERMS = tuple({"name": name, "weight": weight, "folder": None} for name, weight in (("red", 1.0), ("kept", 0.0)))


def brightness(params, frames, tokens):
    return frames.mean((1, 2, 3, 4))


RED = JaxReward(brightness, "", (), lambda prompts: np.array([[1, 2, 3, 4, 5] for _ in prompts]))
KEPT = JaxReward(brightness, "")


def shapes_of(built):
    """Shapes of the batch, and of what is to be scored."""
    null = jax.ShapeDtypeStruct((1, *TEXT), jnp.float32)
    frozen = programs.Frozen(Linear.shapes, null, {"decoder": (), "rewards": {"red": (), "kept": ()}})
    _, _, scored = jax.eval_shape(built.step, built.state_shapes, frozen, built.batch_shapes)
    return tuple(jax.tree.map(lambda x: x.shape, part) for part in (built.batch_shapes, scored))


@pytest.mark.parametrize("real", [True, False])
def test_batch_and_scored_shapes_of_the_latent_reward(build, real):
    changes = {"batch_size": 8, "accumulation": 2, "reward.rewards": TERMS, "reward.samples": 4}
    changes |= {"reward.batch_size": 6, "reward.latent_frames": 1}
    built, _ = build(changes, [RED, KEPT], real=real)
    batch, scored = shapes_of(built)
    cut = (1, *LATENT[1:])
    kept = ScoredLatents(latent=(2, 6, *cut), text=(2, 6, 1, TEXT[1]), reward=(2, 6, 1), weight=(2, 6))
    assert batch == Batch((8, *LATENT), (8, *TEXT), {"red": (8, 5)}, kept)
    kinds = 1 + real
    assert scored == RewardSamples(
        latent=(4, kinds, *cut), predicted=(4, kinds), reward=(4, kinds, 2), scale=(4, 1), states=None
    )


@pytest.mark.parametrize(("times", "states"), [((1000.0, 700.0, 400.0, 100.0), 3), ((1000.0, 400.0), 2)])
def test_batch_and_scored_shapes_of_ddpo(build, times, states):
    changes = {"reward.rewards": TERMS, "reward.method": "ddpo", "student.timesteps": times}
    built, _ = build(changes, [KEPT, KEPT])
    batch, scored = shapes_of(built)
    assert batch.reward == Rollouts(scored.states, text=(2, *TEXT), reward=(2, 1))
    assert scored.states == (2, states, *LATENT)
    assert scored.latent == (2, 1, *LATENT) and scored.reward == (2, 1, 2)
