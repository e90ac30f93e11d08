"""The host's loop over a random pipeline of toy size: what a run leaves, and that it resumes to the bit."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from dollar_jax import train as loop
from dollar_jax.checkpoint import Checkpoints
from dollar_jax.config import SamplingConfig
from dollar_jax.data.latents import EncodedVideos
from dollar_jax.generate import Generator
from dollar_jax.models.umt5 import UMT5Config
from dollar_jax.models.wan import WanConfig
from dollar_jax.models.wan_vae import WanVAEConfig
from dollar_jax.schedule import Schedule
from dollar_jax.state import to_items
from dollar_jax.weights.pipeline import Component, Pipeline, umt5_encoder, wan_transformer, wan_vae

STEPS = 6
WORDS = 3
ITEMS = {"student", "ema", "fake_score", "reward_head", "optimisers", "progress", "data", "replay"}


class Tokenizer:
    """A word's length is its id."""

    def __call__(self, prompts, max_length, **_):
        ids = np.zeros((len(prompts), max_length), np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            words = [len(word) for word in prompt.split()][:max_length] or [1]
            row[: len(words)] = words
        return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}


def component(config, network):
    rng = np.random.default_rng(len(jax.tree.leaves(network.shapes)))
    params = jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), network.shapes)
    return Component(config, network, params)


@pytest.fixture(scope="module")
def generator():
    wan = WanConfig(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=1,
    )  # fmt: skip
    vae = WanVAEConfig(
        base_dim=4, z_dim=4, dim_mult=(1, 1, 1), num_res_blocks=1, temperal_downsample=(True, True),
        latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4, in_channels=12, out_channels=12, patch_size=2,
    )  # fmt: skip
    text = UMT5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    pipeline = Pipeline(
        component(wan, wan_transformer(wan)), component(vae, wan_vae(vae)),
        component(text, umt5_encoder(text)), Tokenizer(), Schedule("rf", "velocity", shift=3.0),
    )  # fmt: skip
    return Generator(pipeline, WORDS, SamplingConfig(50, 1.0, 0.0), (5, 32, 32))


@pytest.fixture(scope="module")
def data(generator):
    captions = [f"{'a' * (1 + i % 5)} {'b' * (1 + i % 7)}" for i in range(24)]
    latent = np.random.default_rng(0).normal(size=(24, *generator.latent_shape)).astype(np.float32)
    return EncodedVideos(latent, generator.text(captions), captions)


@pytest.fixture(scope="module")
def config(make_config, quick_compilation):
    return make_config({
        "steps": STEPS, "mesh.data": 2, "mesh.fsdp": 4, "checkpoint_every": 3, "keep_checkpoints": 9,
        "student.optimiser.warmup_steps": 1,
    })  # fmt: skip


class Killed(Exception):
    """Stands for a machine that is gone."""


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """A run's program is built once, not once per resumption: the same settings give the same one."""
    build, built = loop.build_program, {}

    def remembered(config, *args):
        # Without its mappings a config can be hashed; what is replaced is no concern of the program.
        key = dataclasses.replace(config, pretrain=None, log_every=1, keep_checkpoints=1)
        if key not in built:
            built[key] = build(config, *args)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_program", remembered)
        yield


@pytest.fixture(scope="module")
def train(generator, data, config):
    def run(workdir, config=config):
        return jax.tree.map(np.array, to_items(loop.train(config, workdir, generator, data)))

    return run


@contextlib.contextmanager
def from_step(n, act):
    """Has `act(batch)` replace the batch of the n-th step from here and of all later ones."""
    put, calls = loop._put, itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_put", lambda p, rows, b: put(p, rows, act(b) if next(calls) >= n else b))
        yield


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """An uninterrupted run: its folder and its last state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(workdir)


def history(workdir):
    return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in loop.read_history(workdir)]


def replay(workdir, like):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore({"replay": like})["replay"]


def assert_same_run(workdir, state, whole, generator, config):
    there, expected = whole
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert history(workdir) == history(there)
    like = loop.Scorer(config, generator, None, generator.null_text.shape[1:]).replay.state
    jax.tree.map(np.testing.assert_array_equal, replay(workdir, like), replay(there, like))


def test_a_run_leaves_its_history_and_items(whole, generator, config):
    workdir, state = whole
    assert [line["step"] for line in history(workdir)] == list(range(1, STEPS + 1))
    assert all(np.isfinite(list(line.values())).all() for line in history(workdir))
    scored = [line["step"] for line in history(workdir) if "reward_generated" in line]
    assert scored == [2, 3, 5, 6]  # one step late, but at a checkpoint at once
    for step in (3, 6):
        found = {path.name for path in (workdir / "checkpoints" / str(step)).iterdir() if path.is_dir()}
        assert found == ITEMS
    assert list((workdir / "events").iterdir())
    # Two generated and two real latents per step, in a ring of twelve.
    like = loop.Scorer(config, generator, None, generator.null_text.shape[1:]).replay.state
    kept = replay(workdir, like)
    assert int(kept["added"]) == 4 * STEPS and (kept["weight"] == 1).all()
    assert int(state["progress"]["step"]) == STEPS


@pytest.mark.parametrize("dies_in", [4, 6])
def test_a_killed_run_resumes_to_the_bit(train, whole, generator, config, tmp_path, dies_in):
    """Just after a checkpoint, and two steps later: what the lost steps wrote is written anew, once."""
    seen = []

    def die(batch):
        seen.extend(line["step"] for line in history(tmp_path))
        raise Killed

    with from_step(dies_in, die), pytest.raises(Killed):
        train(tmp_path)
    assert 3 in seen  # on disk before the checkpoint that goes on from there
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 9, "student_lo')  # cut off in writing
    state = train(tmp_path)
    assert_same_run(tmp_path, state, whole, generator, config)


def test_a_half_written_checkpoint_is_not_one(train, whole, generator, config, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "6"
    last.rename(last.with_name("6.orbax-checkpoint-tmp"))
    (last.with_name("6.orbax-checkpoint-tmp") / "student").rename(tmp_path / "student")
    state = train(tmp_path / "run")
    assert_same_run(tmp_path / "run", state, whole, generator, config)


def test_a_finished_run_is_not_trained_again(train, whole, generator, config, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    state = train(tmp_path / "run")
    assert_same_run(tmp_path / "run", state, whole, generator, config)


def test_other_settings_are_refused(train, whole, config):
    workdir, _ = whole
    other = dataclasses.replace(config, vsd=dataclasses.replace(config.vsd, guidance_weight=3.5))
    before = sorted(path.name for path in workdir.rglob("*"))
    with pytest.raises(ValueError, match=r"config\.vsd\.guidance_weight = 1\.0, not 3\.5"):
        train(workdir, other)
    assert sorted(path.name for path in workdir.rglob("*")) == before


def test_the_student_is_restored_from_its_item_alone(whole, generator, tmp_path):
    """Sampling must not need the memory, or the presence, of the other networks."""
    workdir, state = whole
    shutil.copytree(workdir, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "6"
    for item in ITEMS - {"ema", "student"}:
        shutil.rmtree(newest / item)
    for ema, name in ((True, "ema"), (False, "student")):
        params = loop.restore_student(tmp_path / "run", generator, ema)
        jax.tree.map(np.testing.assert_array_equal, params, state[name][name])
    shutil.rmtree(newest / "ema")
    with pytest.raises(FileNotFoundError, match=r"checkpoints/6 has no ema"):
        loop.restore_student(tmp_path / "run", generator)


def test_a_missing_checkpoint_is_one_sentence(generator, tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoints holds no checkpoint"):
        loop.restore_student(tmp_path, generator)


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(train, whole, config, tmp_path):
    """NaN from the 5th step on: neither history nor a checkpoint may hold it, nor may the good one go."""

    def poison(batch):
        return {**batch, "latent": np.full_like(batch["latent"], np.nan)}

    message = r"is nan at step 6: lower the learning rate"
    with from_step(5, poison), pytest.raises(FloatingPointError, match=message):
        train(tmp_path, dataclasses.replace(config, log_every=100, keep_checkpoints=1))
    assert [line["step"] for line in loop.read_history(tmp_path)] == [3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    state = train(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, whole[1])


def test_latents_and_rewards_that_are_not_finite_are_not_learned_from(generator, config, data):
    def reward(frames, prompts):
        assert np.isfinite(frames).all()
        return np.array([1.0, np.nan, 2.0, 4.0], np.float32)

    scorer = loop.Scorer(config, generator, reward, generator.null_text.shape[1:])
    batch = {"latent": data.latent[:2], "text": data.text[:2]}
    generated = np.array(batch["latent"])
    generated[0, 0, 0, 0, 0] = np.nan
    scorer.pend(jax.numpy.asarray(generated), batch, ["a", "b"])
    scorer.score_pending()
    assert scorer.replay.state["reward"][:3].tolist() == [2.0, 4.0, 0.0]
    np.testing.assert_array_equal(scorer.replay.state["latent"][:2], batch["latent"])
    assert scorer.latest == {"reward_real": 3.0}


def test_a_signal_profiles_the_next_steps(train, tmp_path):
    def ask(batch):
        if not (tmp_path / "asked").exists():
            (tmp_path / "asked").touch()
            os.kill(os.getpid(), signal.SIGUSR1)
        return batch

    before = signal.getsignal(signal.SIGUSR1)
    with from_step(2, ask):
        train(tmp_path)
    assert signal.getsignal(signal.SIGUSR1) is before
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_history_is_json_and_drops_what_comes_after(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in (2, 4, 6)))
    loop._truncate(path, 4)
    assert [line["step"] for line in loop.read_history(tmp_path)] == [2, 4]
    assert loop.read_history(tmp_path / "nowhere") == []


# The scorer's replay


@pytest.fixture
def make_replay():
    return functools.partial(loop.Replay, latent=(1, 1, 1, 1), text=(1, 1))


def rows(values):
    values = np.asarray(values, np.float32)
    return values.reshape(-1, 1, 1, 1, 1), values.reshape(-1, 1, 1), values


def test_replay_is_a_ring_without_failed_rewards(make_replay):
    ring = make_replay(4)
    assert (ring.sample(2, 3, [0])["scored_weight"] == 0).all()  # nothing to learn from yet
    ring.add(*rows([1, np.nan, 2, np.inf, 3]))
    assert sorted(set(ring.sample(8, 8, [0])["scored_reward"].ravel())) == [1, 2, 3]
    ring.add(*rows([4, 5]))
    drawn = ring.sample(8, 8, [0])
    assert sorted(set(drawn["scored_reward"].ravel())) == [2, 3, 4, 5]  # 1 was the oldest
    np.testing.assert_array_equal(drawn["scored_latent"].ravel(), drawn["scored_reward"].ravel())
    np.testing.assert_array_equal(drawn["scored_text"].ravel(), drawn["scored_reward"].ravel())
    ring.add(*rows(range(10, 20)))  # more than it holds
    assert sorted(ring.state["reward"]) == [16, 17, 18, 19]


def test_replay_draws_by_content_and_seed(make_replay):
    one, other = make_replay(8), make_replay(8)
    one.add(*rows([1, 2, 3, 4, 5]))
    other.state = {name: np.array(value) for name, value in one.state.items()}
    a, b, c = (r.sample(2, 8, [0, step, 0])["scored_reward"] for r, step in ((one, 3), (other, 3), (one, 4)))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
