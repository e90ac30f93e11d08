"""The one compiled step, over real networks of toy size."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from jax.experimental.compilation_cache import compilation_cache

from dollar_jax import step as step_module
from dollar_jax.checkpoint import Checkpoints, abstract
from dollar_jax.config import OptimiserConfig
from dollar_jax.distillation import Batch, Frozen
from dollar_jax.models.latent_reward import FeatureHead
from dollar_jax.models.network import make_network
from dollar_jax.models.wan import WanConfig
from dollar_jax.optim import make_optimiser
from dollar_jax.programs import latent_reward_network
from dollar_jax.rewards import JaxReward
from dollar_jax.rewards.methods.ddpo import Rollouts
from dollar_jax.rewards.methods.lrm import ScoredLatents
from dollar_jax.rewards.pixels import pixel_rewards
from dollar_jax.schedule import Schedule
from dollar_jax.state import as_items, from_items, to_items
from dollar_jax.weights.wan import WAN_TRANSFORMER

LATENT, TEXT, ROWS = (2, 4, 4, 4), (3, 8), 8
NETWORK = WAN_TRANSFORMER.network(
    WanConfig(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
)
# Adam divides by √v: with the usual eps a gradient that is rounding noise alone moves its weight as
# far as any other. An eps near the gradients' own size keeps an update proportional to its gradient.
OPTIMISER = {
    "schedule": "constant",
    "warmup_steps": 0,
    "learning_rate": 3e-3,
    "eps": 1e-3,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
}
BASE = {
    "student.ema_decay": 0.9,
    "fake_score.updates": 3,
    "reward.updates": 2,
    "reward.batch_size": ROWS,
    "reward.weight": 0.3,
    "reward.start_step": 2,
    "reward.statistics_decay": 0.5,
    "reward.head.use_text": True,
    "consistency.boundary": "lcm",
    **{f"{part}.optimiser.{k}": v for part in ("student", "fake_score", "reward") for k, v in OPTIMISER.items()},
}


@functools.cache
def teacher():
    """Random everywhere: a fresh Wan's last layer is zero, and most gradients with it."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        # Scales around 1, kernels for signals of about unit size, the rest small.
        name = jax.tree_util.keystr(path[-1:], simple=True)
        size = leaf.shape[-2] ** -0.5 if name == "kernel" else 0.2
        return ((name == "scale") + size * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, NETWORK.shapes)


def make_batch(seed, updates=2):
    rng = np.random.default_rng(seed)

    def rows(*shape):
        return rng.normal(size=shape).astype(np.float32)

    latent, text = rows(ROWS, *LATENT), rows(ROWS, *TEXT)
    scored = ScoredLatents(
        latent=rows(updates, ROWS, *LATENT),
        text=rows(updates, ROWS, *TEXT),
        reward=5 + 2 * rows(updates, ROWS, 1),
        weight=np.ones((updates, ROWS), np.float32),
    )
    return Batch(latent, text, {}, scored)


class Runner:
    """A program with its frozen part; every `start` is a fresh copy of one state."""

    def __init__(self, programs, config, pixels=None):
        schedule, here = Schedule("rf", "velocity", shift=3.0), jax.devices()[: devices(config)]
        self.program = p = programs(config, NETWORK, schedule, LATENT, TEXT, here, pixels, decoder=np.float32(0.7))
        null = 0.1 * jax.random.normal(jax.random.key(3), (1, *TEXT))
        frozen = Frozen(teacher(), null, () if pixels is None else pixels.params(np.float32(0.7)))
        self.frozen = jax.device_put(frozen, p.frozen_sharding, may_alias=False)

    def start(self, items):
        return jax.device_put(from_items(items), self.program.state_sharding, may_alias=False)

    def step(self, state, batch):
        return self.program.step(state, self.frozen, jax.device_put(batch, self.program.batch_sharding))

    def run(self, items, count):
        """State and metrics after `count` steps, on the host."""
        state, history = self.start(items), []
        for seed in range(count):
            state, metrics, samples = self.step(state, make_batch(seed))
            history.append(metrics | {name: getattr(samples, name) for name in ("latent", "predicted", "scale")})
        return host(to_items(state)), host(history)


def devices(config):
    m = config.mesh
    return m.data * m.fsdp * m.context * m.tensor


def host(tree):
    return jax.tree.map(np.array, tree)


@pytest.fixture(scope="module")
def runner(make_config, network_programs):
    return functools.cache(lambda *changes: Runner(network_programs, make_config({**BASE, **dict(changes)})))


@pytest.fixture(scope="module")
def base(runner):
    return runner()


@pytest.fixture(scope="module")
def initial(base):
    return host(to_items(base.program.init(jax.random.key(0), base.frozen.teacher)))


# The same numbers on every mesh

BACKWARD = (
    ("student.input", "backward"),
    ("accumulation", 2),
    ("consistency.times", "grid"),
    ("compute.whole_teacher", True),
)


@pytest.fixture(scope="module")
def alone(runner, initial):
    """Three steps on one device."""
    return functools.cache(lambda changes: runner(*changes).run(initial, 3))


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        pytest.param((), {"data": 8}, marks=pytest.mark.slow),
        ((), {"data": 2, "fsdp": 4}),
        pytest.param((), {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param((), {"data": 1, "fsdp": 2, "context": 4}, marks=pytest.mark.slow),
        pytest.param(BACKWARD, {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        (BACKWARD, {"data": 2, "context": 2, "tensor": 2}),
    ],
    ids=["data", "fsdp", "tensor", "context", "backward-accumulated", "backward-context"],
)
def test_step_is_the_same_on_eight_devices(runner, alone, initial, changes, mesh):
    """A sum missing over an axis, a row on the wrong device or a different random draw fails here."""
    spread = runner(*changes, *((f"mesh.{k}", v) for k, v in mesh.items()))
    (state, metrics), (state8, metrics8) = alone(changes), spread.run(initial, 3)
    kernel = spread.frozen.teacher["blocks"]["attn1"]["to_q"]["kernel"].sharding
    assert kernel.is_fully_replicated == (changes == BACKWARD or set(mesh) == {"data"})
    for one, eight in zip(metrics, metrics8, strict=True):
        assert one.keys() == eight.keys()
        for name in one:
            scale = np.abs(one[name]).max()
            np.testing.assert_allclose(eight[name], one[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(state8), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "reward_head" in name and name.endswith("to_k/bias"):
            # A constant on all of an attention's keys changes nothing: these gradients are rounding alone.
            assert max(np.abs(a).max(), np.abs(b).max()) < 1e-6
            continue
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max(), err_msg=name)


def test_initial_state_is_the_same_on_eight_devices(runner, base, initial):
    spread = runner(("mesh.data", 2), ("mesh.fsdp", 4)).program
    frozen = jax.device_put(teacher(), spread.frozen_sharding.teacher)
    state = spread.init(jax.random.key(0), frozen)
    jax.tree.map(np.testing.assert_array_equal, host(to_items(state)), initial)
    for name in ("student", "ema", "fake_score"):
        jax.tree.map(np.testing.assert_array_equal, initial[name][name], host(teacher()))
    kernel = state.student_optimiser[1][0].mu["blocks"]["attn1"]["to_q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 4, 16)


def test_a_latent_reward_on_features_is_its_head_on_the_teachers_of_the_noised_latent(runner):
    run = runner(("reward.head.depth", 0.5), ("reward.head.time", 250.0), ("consistency.weight", 0.0))
    state = run.program.init(jax.random.key(0), run.frozen.teacher)
    state, metrics, samples = run.step(state, make_batch(0))
    assert metrics["latent_reward"] == 0 and not np.asarray(samples.predicted).any()  # as it starts
    head, batch = host(state.latent_reward), make_batch(1)
    _, _, samples = run.step(state, batch)
    latent = np.asarray(samples.latent).reshape(-1, *LATENT)
    text = np.repeat(batch.text[:: ROWS // len(samples.latent)], 2, 0)
    noise = np.asarray(jax.random.normal(jax.random.key(0), LATENT))
    noised, t = jnp.asarray(0.75 * latent + 0.25 * noise), jnp.full(len(latent), 250.0)
    tokens = jax.jit(functools.partial(NETWORK.apply, tap=0.5, early=True))(teacher(), noised, t, jnp.asarray(text))
    expected = make_network(lambda rngs: FeatureHead(16, 128, rngs)).apply(head, tokens)
    assert np.ptp(expected) > 1e-4
    np.testing.assert_allclose(np.ravel(samples.predicted), expected, rtol=1e-3, atol=1e-5)


# A student of fewer blocks


def test_a_student_of_the_first_block_is_one_whose_second_adds_nothing(runner, base, initial):
    """The same losses in the first step; then all of it has moved, and all of the fake score."""
    few = runner(("student.layers", 1))
    items = host(to_items(few.program.init(jax.random.key(0), few.frozen.teacher)))
    state, history = few.run(items, 2)
    silent = host(initial)
    for name in ("student", "ema"):
        for part in ("attn1/to_out", "attn2/to_out", "ffn/proj_out"):
            block, layer = part.split("/")
            for value in silent[name][name]["blocks"][block][layer].values():
                value[1] = 0.0
    expected = base.run(silent, 1)[1][0]
    assert np.abs(expected["vsd"] - base.run(initial, 1)[1][0]["vsd"]) > 1e-3
    for name in ("vsd", "consistency", "student_loss", "latent_std"):
        np.testing.assert_allclose(history[0][name], expected[name], rtol=1e-5, err_msg=name)
    held = {"student": 1, "ema": 1, "fake_score": 2}
    for name, blocks in held.items():
        before, after = (flatten_dict(x[name][name], sep="/") for x in (items, state))
        for path, value in after.items():
            if path.startswith("blocks/"):
                assert len(value) == blocks
                assert all((new != old).any() for new, old in zip(value, before[path], strict=True)), path
    mu = state["optimisers"]["student_optimiser"][1][0].mu["blocks"]["attn1"]["to_q"]["kernel"]
    assert mu.shape == (1, 16, 16)


def test_a_student_of_all_blocks_starts_as_the_whole_one(runner, base, initial):
    every = runner(("student.layers", 2)).program
    assert every.state_shapes == base.program.state_shapes
    items = host(to_items(every.init(jax.random.key(0), base.frozen.teacher)))
    jax.tree.map(np.testing.assert_array_equal, items, initial)


# Low-rank adapters

LORA = (("lora.rank", 2), ("lora.targets", ("blocks/attn./to_(q|v|out)", "blocks/ffn/proj_(in|out)")))


@pytest.mark.slow
def test_a_discriminator_is_in_the_fake_scores_state_beside_adapters(runner):
    """It is 0 at first, so that both losses are known, and learns."""
    run = runner(*LORA, ("gan.weight", 0.1), ("mesh.data", 2), ("mesh.fsdp", 2))
    items = host(to_items(run.program.init(jax.random.key(0), run.frozen.teacher)))
    state, history = run.run(items, 2)
    first, second = history
    np.testing.assert_allclose(first["gan"], np.log(2), rtol=1e-6)
    losses = first["vsd"] + 0.5 * first["consistency"] + 0.1 * first["gan"]
    np.testing.assert_allclose(first["student_loss"], losses, rtol=1e-5)
    assert 0 < abs(second["gan"] - np.log(2)) < 0.5 and first["discriminator"] < 2 * np.log(2) + 0.1
    paths = set(flatten_dict(state["fake_score"]["fake_score"], sep="/"))
    assert {p.split("/")[0] for p in paths if "adapter" not in p} == {"gan_head"}
    assert not any("gan_head" in p for p in flatten_dict(state["student"], sep="/"))
    changed = jax.tree.map(lambda a, b: (a != b).any(), *(x["fake_score"]["fake_score"] for x in (items, state)))
    assert all(jax.tree.leaves(changed["gan_head"]["score"])) and changed["gan_head"]["hidden"]["kernel"]


def test_adapters_start_where_the_whole_network_does(runner, base, initial, alone):
    """The same losses in the first step; then only adapters have moved, and they are all the state holds."""
    adapted = runner(*LORA)
    items = host(to_items(adapted.program.init(jax.random.key(0), adapted.frozen.teacher)))
    for name in ("student", "ema", "fake_score"):
        paths = list(flatten_dict(items[name], sep="/"))
        assert paths and all("/adapter/" in path for path in paths)
    state, history = adapted.run(items, 2)
    first, whole = history[0], alone(())[1][0]
    same = ("vsd", "consistency", "student_loss", "latent_std")
    for name in same:
        np.testing.assert_allclose(first[name], whole[name], rtol=1e-5, err_msg=name)
    assert all(np.abs(history[1][name] - alone(())[1][1][name]) > 0 for name in same[:2])
    same_bits = jax.tree.map(np.array_equal, state["student"], items["student"])
    assert not any(jax.tree.leaves(same_bits))
    jax.tree.map(np.testing.assert_array_equal, host(adapted.frozen.teacher), host(teacher()))


@pytest.mark.slow
def test_adapters_are_the_same_on_eight_devices(runner):
    one, eight = runner(*LORA), runner(*LORA, ("mesh.data", 2), ("mesh.fsdp", 2), ("mesh.tensor", 2))
    items = host(to_items(one.program.init(jax.random.key(0), one.frozen.teacher)))
    (state, metrics), (state8, metrics8) = one.run(items, 3), eight.run(items, 3)
    for name, value in metrics[-1].items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(metrics8[-1][name], value, rtol=1e-5, atol=1e-5 * scale, err_msg=name)
    for a, b in zip(jax.tree.leaves(state["student"]), jax.tree.leaves(state8["student"]), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max())


# One program


def test_one_compilation_and_donated_state(base, initial):
    """Twenty steps with changing batches: the state goes round in its own shardings, in its own memory.

    A warning that a donated buffer was not usable would be an error."""
    state = base.start(initial)
    for seed in range(20):
        old = state
        state, _, _ = base.step(state, make_batch(seed))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert base.program.step.jitted._cache_size() == 1
    assert int(state.step) == 20
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base.frozen))
    assert jax.tree.map(lambda x: x.sharding, state) == base.program.state_sharding
    jax.tree.map(np.testing.assert_array_equal, host(base.frozen.teacher), host(teacher()))


@pytest.fixture
def fresh_compilation():
    """XLA speaks of what it did only when it compiles."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def test_no_state_buffer_is_copied_and_none_is_moved_in_vain(runner, capfd, fresh_compilation):
    """On fsdp × tensor: every array of the state is written where it was read, and XLA found a way there."""
    program = runner(("mesh.data", 2), ("mesh.fsdp", 2), ("mesh.tensor", 2)).program
    compiled = program.step.compile()
    header = compiled.as_text().split("entry_computation_layout")[0]
    pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}, (?:may|must)-alias\)", header)
    assert sorted(int(out) for out, _ in pairs) == list(range(len(jax.tree.leaves(program.state_shapes))))
    assert all(out == into for out, into in pairs)
    assert "rematerialization" not in capfd.readouterr().err


# What a step does


def counts(items):
    return {
        name: {
            int(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(optimiser)
            if jax.tree_util.keystr(path[-1:], simple=True) == "count"
        }
        for name, optimiser in items["optimisers"].items()
    }


def test_each_network_is_updated_as_often_as_configured(alone, initial):
    state, _ = alone(())
    assert counts(initial) == {f"{n}_optimiser": {0} for n in ("student", "fake_score", "reward_head")}
    assert counts(state) == {"student_optimiser": {3}, "fake_score_optimiser": {9}, "reward_head_optimiser": {6}}
    for name in ("student", "ema", "fake_score", "reward_head"):
        changed = jax.tree.map(lambda a, b: (a != b).any(), state[name], initial[name])
        assert all(jax.tree.leaves(changed)), name
    np.testing.assert_array_equal(state["progress"]["key"], initial["progress"]["key"])


def test_average_is_exact(base, initial):
    state, _ = base.run(initial, 1)
    expected = jax.tree.map(
        lambda old, new: 0.9 * old.astype(np.float64) + 0.1 * new, initial["ema"]["ema"], state["student"]["student"]
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7, atol=1e-8), state["ema"]["ema"], expected)


def test_reward_counts_from_its_start_step(alone):
    _, metrics = alone(())
    for i, m in enumerate(metrics):
        expected = m["vsd"] + 0.5 * m["consistency"] - (i >= 2) * 0.3 * m["latent_reward"]
        assert abs(0.3 * m["latent_reward"]) > 1e-3
        np.testing.assert_allclose(m["student_loss"], expected, rtol=1e-5)


def test_reward_statistics_are_decayed_moments(alone):
    _, metrics = alone(())
    rewards = [make_batch(seed).reward.reward.astype(np.float64) for seed in range(3)]
    for last, m in enumerate(metrics):
        shares = np.concatenate([np.full(r.size, 0.5 ** (last - i)) for i, r in enumerate(rewards[: last + 1])])
        values = np.concatenate([r.ravel() for r in rewards[: last + 1]])
        mean = np.average(values, weights=shares)
        np.testing.assert_allclose(m["reward_mean"], mean, rtol=1e-6)
        std = np.sqrt(np.average((values - mean) ** 2, weights=shares))
        np.testing.assert_allclose(m["reward_std"], std, rtol=1e-5)


def test_failed_rewards_are_as_if_never_scored(base, initial):
    failed, absent = make_batch(0), make_batch(0)
    for batch, value in ((failed, np.nan), (absent, 7.0)):
        batch.reward.reward[:, 2:5] = value
    failed.reward.reward[1, 3] = np.inf
    absent.reward.weight[:, 2:5] = 0
    states = []
    for batch in (failed, absent):
        state, metrics, _ = base.step(base.start(initial), batch)
        assert all(np.isfinite(value) for value in metrics.values())
        states.append(host(to_items(state)))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("field, value", [("latent", np.nan), ("text", np.inf), ("latent", 1e30)])
def test_a_batch_that_is_not_finite_changes_nothing_but_the_count(base, initial, field, value):
    batch = make_batch(0)
    getattr(batch, field)[3].flat[5] = value
    state, metrics, _ = base.step(base.start(initial), batch)
    assert not all(np.isfinite(v) for v in metrics.values())
    state, before = host(to_items(state)), dict(initial)
    assert state.pop("progress")["step"] == 1 and before.pop("progress")["step"] == 0
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_a_reward_whose_regression_overflows_spares_the_latent_model(base, initial):
    """The student, updated before, keeps its update."""
    batch = make_batch(0)
    batch.reward.reward[0, 3] = 3e38
    state, metrics, _ = base.step(base.start(initial), batch)
    state, fine = host(to_items(state)), host(to_items(base.step(base.start(initial), make_batch(0))[0]))
    assert not np.isfinite(metrics["reward_std"])
    jax.tree.map(np.testing.assert_array_equal, state["reward_head"], initial["reward_head"])
    jax.tree.map(np.testing.assert_array_equal, state["student"], fine["student"])


@pytest.mark.slow
def test_a_spike_of_the_gradient_is_skipped_where_asked_for(runner, initial, alone):
    """The student's norm of a step lies between the two bounds."""
    norm = float(alone(())[1][0]["student_gradient"])
    states = []
    for bound in (1.01 * norm, 0.99 * norm):
        one = runner(("max_gradient_norm", bound))
        states.append(host(to_items(one.step(one.start(initial), make_batch(0))[0])))
    taken, skipped = states
    for name in ("student", "ema", "fake_score", "reward_head"):
        same = jax.tree.map(lambda a, b: (a == b).all(), skipped[name], initial[name])
        assert all(jax.tree.leaves(same)), name
        assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), taken[name], initial[name]))), name


def test_no_reward_at_all_leaves_statistics_and_no_nan(base, initial):
    """The first step of a run, before anything was scored."""
    batch = make_batch(0)
    for array in jax.tree.leaves(batch.reward):
        array[...] = 0
    state, metrics, _ = base.step(base.start(initial), batch)
    assert all(np.isfinite(value) for value in metrics.values())
    assert float(state.reward_statistics.count) == 0
    # Nothing but decay: 3e-3 · 0.01 per update, on kernels.
    before, after = initial["reward_head"]["reward_head"], host(state.latent_reward)
    np.testing.assert_allclose(after["conv1"]["kernel"], before["conv1"]["kernel"] * (1 - 3e-5) ** 2, rtol=1e-6)
    np.testing.assert_array_equal(after["conv1"]["bias"], before["conv1"]["bias"])


# Rewards inside the step

PIXELS = {
    "vsd.weight": 0.0,
    "consistency.weight": 0.0,
    "fake_score.updates": 1,
    "reward.start_step": 0,
    "reward.samples": 4,
    "accumulation": 2,
    "reward.statistics_decay": 0.5,
    "batch_size": 8,
    "reward.rewards": tuple({"name": n, "weight": w, "folder": None} for n, w in (("red", 1.0), ("kept", 0.0))),
}


def red(gain, frames, tokens):
    return gain * frames[..., 0].mean((1, 2, 3)) + 0.01 * tokens[:, 0]


def decode_toy(params, latent):
    return params * latent[..., :3]


TOY = [
    JaxReward(red, "", np.float32(2.0), lambda prompts: np.array([[len(p), 0] for p in prompts])),
    JaxReward(lambda p, frames, t: frames[..., 1].mean((1, 2, 3)), ""),
]


@pytest.fixture
def pixel_runner(make_config, network_programs):
    def build(**changes):
        config = make_config({**BASE, **PIXELS, **changes})
        return Runner(network_programs, config, pixel_rewards(config.reward, TOY, decode_toy))

    return build


def pixel_batch(seed, kept=None):
    tokens = {"red": np.arange(ROWS * 2, dtype=np.int32).reshape(ROWS, 2)}
    return dataclasses.replace(make_batch(seed), tokens=tokens, reward=kept)


def test_jax_rewards_are_learned_from_in_the_same_step(pixel_runner):
    changes = {"mesh.data": 4, "reward.head.use_text": False, "reward.latent_frames": 1}
    runner = pixel_runner(**changes)
    scored = jax.tree.map(np.zeros_like, make_batch(0).reward)
    scored = dataclasses.replace(scored, latent=scored.latent[:, :, :1], text=scored.text[:, :, :1])  # as it is kept
    state = runner.program.init(jax.random.key(0), runner.frozen.teacher)
    head = host(state.latent_reward)
    state, metrics, samples = runner.step(state, pixel_batch(0, scored))
    samples, metrics = host(samples), host(metrics)
    assert samples.latent.shape == (4, 2, 1, *LATENT[1:])
    # The last micro-batch is rows 1, 3, 5 and 7; their captions' first tokens are 2, 6, 10 and 14.
    frames = 0.7 * samples.latent[..., :3]
    expected = 2 * frames[..., 0].mean((2, 3, 4)) + 0.01 * np.array([2, 6, 10, 14])[:, None]
    np.testing.assert_allclose(samples.reward[..., 0], expected, rtol=1e-5)
    np.testing.assert_allclose(samples.reward[..., 1], frames[..., 1].mean((2, 3, 4)), rtol=1e-5, atol=1e-7)
    real = make_batch(0).latent[1::2]
    assert all((samples.latent[i, 1, 0] == real[i]).all((1, 2, 3)).any() for i in range(4))
    np.testing.assert_allclose(metrics["reward_mean"], expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_std"], expected.std(), rtol=1e-4)
    np.testing.assert_allclose(samples.scale, 1 / expected.std(), rtol=1e-4)
    changed = jax.tree.map(lambda a, b: (a != b).any(), head, host(state.latent_reward))
    assert all(jax.tree.leaves(changed))
    assert metrics["reward_regression"] > 0.1


def test_rollouts_of_a_step_are_reinforced_in_a_later_one(pixel_runner):
    runner = pixel_runner(**{"reward.method": "ddpo"})
    shapes = (4, 3, *LATENT), (4, *TEXT), (4, 1)
    nothing = Rollouts(
        *(np.full(shape, value, np.float32) for shape, value in zip(shapes, (0, 0, np.nan), strict=True))
    )
    initial = host(to_items(runner.program.init(jax.random.key(0), runner.frozen.teacher)))
    state, metrics, samples = runner.step(runner.start(initial), pixel_batch(0, nothing))
    assert float(metrics["student_gradient"]) == 0 and float(metrics["policy"]) == 0
    samples = host(samples)
    assert samples.states.shape == (4, 3, *LATENT) and samples.latent.shape == (4, 1, *LATENT)
    kept = Rollouts(samples.states, make_batch(0).text[1::2], samples.reward[:, 0, :1])
    state, metrics, _ = runner.step(state, pixel_batch(1, kept))
    assert float(metrics["student_gradient"]) > 1e-4
    np.testing.assert_allclose(metrics["reward_mean"], kept.reward.mean(), rtol=1e-5)


def test_direct_rewards_move_the_student_and_leave_the_head(pixel_runner):
    runner = pixel_runner(**{"reward.method": "direct", "accumulation": 1})
    initial = host(to_items(runner.program.init(jax.random.key(0), runner.frozen.teacher)))
    state, metrics, samples = runner.step(runner.start(initial), pixel_batch(0))
    assert float(metrics["student_gradient"]) == 0  # nothing is known yet of the reward's scale
    first = host(samples).reward[..., 0]
    state, metrics, _ = runner.step(state, pixel_batch(1))
    assert float(metrics["student_gradient"]) > 1e-4
    assert float(metrics["reward_std"]) > 0 and first.std() > 0
    head = initial["reward_head"]["reward_head"]
    jax.tree.map(np.testing.assert_array_equal, host(state.latent_reward), head)


# Accumulation


def test_accumulated_gradient_is_that_of_the_whole_batch():
    x, y = (jax.random.normal(jax.random.key(i), (12, 3)) for i in range(2))
    params = {"w": jax.random.normal(jax.random.key(2), (3, 3))}

    def loss(params, rows, key):
        x, y = rows
        value = jnp.square(x @ params["w"] - y).mean()
        return value, ({"loss": value, "noise": jax.random.uniform(key)}, x)

    @functools.partial(jax.jit, static_argnums=0)
    def split(count):
        micro = jax.tree.map(lambda v: step_module.micro_batches(v, count), (x, y))
        return step_module._accumulated(loss, params, micro, jax.random.key(9))

    whole, (metrics, _) = split(1)
    for count in (2, 3):
        parts, (part_metrics, last) = split(count)
        np.testing.assert_allclose(parts["w"], whole["w"], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(part_metrics["loss"], metrics["loss"], rtol=1e-6)
        np.testing.assert_array_equal(last[-1], x[count - 1 :: count])  # the host scores these rows' captions
        keys = jax.random.split(jax.random.key(9), count)
        draws = [float(jax.random.uniform(keys[i])) for i in range(count)]
        np.testing.assert_allclose(part_metrics["noise"], np.mean(draws), rtol=1e-6)


# Optimisers


def optimiser(**changes):
    settings = {
        "learning_rate": 1.0,
        "schedule": "constant",
        "warmup_steps": 0,
        "final_ratio": 0.1,
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": None,
    }
    return make_optimiser(OptimiserConfig(**{**settings, **changes}), 10)


@pytest.mark.parametrize("trained", ["transformer", "reward_head"])
def test_weight_decay_is_for_kernels(make_config, trained):
    """Stacked layers give biases, scales and modulations a second axis; they are not to shrink for that."""
    network = NETWORK if trained == "transformer" else latent_reward_network(make_config(BASE), 4, 8)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), network.shapes)
    tx = optimiser(weight_decay=0.1)

    @jax.jit
    def update(params):
        return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]

    updates = update(params)
    kinds = {}
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        kinds.setdefault(jax.tree_util.keystr(path[-1:], simple=True), set()).update(np.unique(update).tolist())
    assert kinds.pop("kernel") == {np.float32(-0.1)}
    assert kinds and all(values == {0.0} for values in kinds.values())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0]),
        ({"warmup_steps": 2}, [0.0, 0.5, 1.0, 1.0]),
        ({"schedule": "cosine"}, [1.0] + [0.1 + 0.45 * (1 + np.cos(np.pi * i / 10)) for i in (1, 2, 3)]),
        ({"schedule": "cosine", "warmup_steps": 2}, [0.0, 0.5, 1.0, 0.1 + 0.45 * (1 + np.cos(np.pi / 8))]),
    ],
    ids=["constant", "warmup", "cosine", "warmup-cosine"],
)
def test_learning_rates(changes, expected):
    """Adam's first steps on a constant gradient have the length of the learning rate."""
    tx, params = optimiser(**changes), {"kernel": jnp.zeros(())}
    state, lengths = tx.init(params), []
    for _ in expected:
        updates, state = tx.update({"kernel": jnp.float32(-0.3)}, state, params)
        lengths.append(float(updates["kernel"]))
    np.testing.assert_allclose(lengths, expected, rtol=1e-4)


def test_clipping_bounds_the_global_norm():
    tx = optimiser(clip_norm=1.0, b1=0.0, b2=0.0, eps=1e6)  # so that an update is the gradient / eps
    params = {"kernel": jnp.zeros(3), "bias": jnp.zeros(())}
    grads = {"kernel": jnp.array([3.0, 0.0, 0.0]), "bias": jnp.array(-4.0)}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"] * -1e6, [0.6, 0.0, 0.0], rtol=1e-4)
    np.testing.assert_allclose(updates["bias"] * -1e6, -0.8, rtol=1e-4)


def test_muon_takes_the_stacked_kernels_as_torch_does():
    """PyTorch's orthogonalises in bfloat16; what is not a block's kernel is Adam's, with Nesterov's momentum too."""
    rng = np.random.default_rng(0)
    grads = {"kernel": rng.normal(size=(2, 6, 9)).astype(np.float32), "bias": np.float32([[0.2, -3.0]])}
    tx = optimiser(name="muon", learning_rate=0.1, weight_decay=0.5)
    params = {"kernel": jnp.ones((2, 6, 9)), "bias": jnp.ones((1, 2))}
    updates, _ = tx.update(grads, tx.init(params), params)
    first = 0.1 * (1 + 0.9 / 1.9)  # b1 m / (1 - b1²) + (1 - b1) g / (1 - b1), of m = (1 - b1) g
    np.testing.assert_allclose(updates["bias"], [[-first, first]], rtol=1e-4)
    for gradient, update in zip(grads["kernel"], updates["kernel"], strict=True):
        weight = torch.nn.Parameter(torch.ones(9, 6))
        weight.grad = torch.tensor(gradient.T.copy())
        torch.optim.Muon([weight], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw").step()
        expected = weight.detach().numpy().T - 1
        assert np.linalg.norm(update - expected) < 0.02 * np.linalg.norm(expected)


def test_muons_state_is_sharded_and_comes_back_from_a_checkpoint(runner, tmp_path):
    run = runner(("student.optimiser.name", "muon"), ("mesh.data", 2), ("mesh.fsdp", 2), ("mesh.tensor", 2))
    state = run.program.init(jax.random.key(0), run.frozen.teacher)
    items = to_items(state)
    momentum = items["optimisers"]["student_optimiser"][1].inner_states["muon"].inner_state[0].mu
    kernel = momentum["blocks"]["attn1"]["to_q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, items, wait=True)
    shapes = abstract(jax.eval_shape(to_items, run.program.state_shapes), as_items(run.program.state_sharding))
    with Checkpoints(tmp_path) as checkpoints:
        back = checkpoints.restore(shapes)
    assert jax.tree.structure(back) == jax.tree.structure(items)
    jax.tree.map(np.testing.assert_array_equal, host(back), host(items))


@pytest.mark.slow
def test_muon_is_the_same_on_eight_devices(runner):
    changes = ("student.optimiser.name", "muon"), ("fake_score.optimiser.name", "muon")
    one = runner(*changes)
    eight = runner(*changes, ("mesh.data", 2), ("mesh.fsdp", 2), ("mesh.tensor", 2))
    items = host(to_items(one.program.init(jax.random.key(0), one.frozen.teacher)))
    (state, _), (state8, _) = one.run(items, 3), eight.run(items, 3)
    for name in ("student", "fake_score"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state[name], items[name])
        apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), state[name], state8[name])
        assert max(jax.tree.leaves(apart)) < 1e-3 * max(jax.tree.leaves(moved))
