"""The host's loop over a random pipeline of toy size: what a run leaves, and that it resumes to the bit."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dollar_jax import sharding, skips
from dollar_jax import train as loop
from dollar_jax.checkpoint import Checkpoints
from dollar_jax.config import GANConfig, RewardGuard, VisibilityConfig
from dollar_jax.data.latents import EncodedVideos
from dollar_jax.distillation import RewardSamples
from dollar_jax.distributed import Preempted
from dollar_jax.models import activation_sharding
from dollar_jax.models import attention as attention_module
from dollar_jax.monitoring import SampleLogger
from dollar_jax.program import Program
from dollar_jax.programs import latent_reward_network, run_programs
from dollar_jax.rewards import Reward
from dollar_jax.rewards.methods.lrm import Replay, ScoredLatents
from dollar_jax.run import read_history, record_config, restore_student
from dollar_jax.state import to_items

STEPS = 6
ITEMS = {"student", "ema", "fake_score", "reward_head", "optimisers", "progress", "data", "replay"}


@pytest.fixture(scope="module")
def generator(toy_generator, make_pipeline, config):
    """Of a teacher of three blocks, whose first and last are the student's."""
    pipeline = make_pipeline(layers=3, scale=0.2, tokenizer=toy_generator.pipeline.tokenizer)
    return dataclasses.replace(toy_generator, pipeline=pipeline, student=config.student)


@pytest.fixture(scope="module")
def data(generator):
    captions = [f"{'a' * (1 + i % 5)} {'b' * (1 + i % 7)}" for i in range(24)]
    latent = np.random.default_rng(0).normal(size=(24, *generator.latent_shape)).astype(np.float32)
    return EncodedVideos(latent, generator.text(captions), captions)


@pytest.fixture(scope="module")
def config(make_config):
    return make_config(
        {
            "seed": 3,
            "steps": STEPS,
            "mesh.data": 2,
            "mesh.fsdp": 4,
            "checkpoint_every": 3,
            "keep_checkpoints": 9,
            "student.layers": 2,
            "student.optimiser.warmup_steps": 1,
            "visibility.samples_every": 3,
            "visibility.prompts": ("a bb ccc", "dddd e"),
            "visibility.videos": 2,
        }
    )


class Killed(Exception):
    """Stands for a machine that is gone."""


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """A run's program is built once, not once per resumption: the same settings give the same one."""
    build, built = loop.teacher_programs, {}

    def remembered(config, *args, **rewards):
        # Without its mappings a config can be hashed; what is replaced is no concern of the program.
        reward = dataclasses.replace(config.reward, timeout=1.0, guard=RewardGuard(4, None, None))
        other = {
            "max_skipped": 0,
            "pretrain": None,
            "log_every": 1,
            "keep_checkpoints": 1,
            "init": None,
            "reward": reward,
            "visibility": VisibilityConfig(),
        }
        key = dataclasses.replace(config, **other)
        if key not in built:
            programs = build(config, *args, **rewards)
            step = programs.step

            def counted(*arguments):
                step_traces[key] += 1
                return step.function(*arguments)

            built[key] = dataclasses.replace(programs, step=dataclasses.replace(step, function=counted))
        return built[key]

    step_traces = collections.Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "teacher_programs", remembered)
        yield step_traces


@pytest.fixture(scope="module")
def train(generator, data, config):
    def run(workdir, config=config):
        return jax.tree.map(np.array, to_items(loop.train(config, workdir, generator, data)))

    return run


@contextlib.contextmanager
def from_step(n, act):
    """Has `act(batch)` replace the batch of the n-th step from here and of all later ones."""
    whole, calls = loop._global_batch, itertools.count(1)

    def acted_on(*args):
        return act(whole(*args)) if next(calls) >= n else whole(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_global_batch", acted_on)
        yield


@pytest.fixture(scope="module")
def whole(train, called, asked, generator, tmp_path_factory):
    """An uninterrupted run: its folder and its last state."""
    workdir = tmp_path_factory.mktemp("whole")
    vars(generator).pop("null_text", None)  # as in a new process

    def noted(method):
        def call(self, *args):
            asked[method.__name__].append(jax.tree.map(lambda x: np.array(x) if isinstance(x, jax.Array) else x, args))
            return method(self, *args)

        return call

    def recorded(program, *arguments):
        called.append(dataclasses.replace(program, arguments=jax.eval_shape(lambda *a: a, *arguments)))
        return program.jitted(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "__call__", recorded)
        for part, name in ((loop.Scorer, "inputs"), (loop.Scorer, "submit"), (SampleLogger, "draw")):
            patch.setattr(part, name, noted(getattr(part, name)))
        state = train(workdir)
    return workdir, state


@pytest.fixture(scope="module")
def asked():
    """What the loop of the uninterrupted run asked of its parts: arguments by method, arrays copied."""
    return collections.defaultdict(list)


@pytest.fixture(scope="module")
def called():
    """The programs that the uninterrupted run has called, with the shapes it called them with."""
    return []


def history(workdir):
    timings = ("seconds_per_step", "data_wait", "videos_per_second")
    return [{k: v for k, v in line.items() if k not in timings} for line in read_history(workdir)]


def make_scorer(generator, config, reward=None):
    """A scorer of one reward, a host one unless given."""
    return loop.Scorer(
        config,
        [reward or Reward(lambda frames, prompts: np.zeros(len(frames)), "")],
        None,
        generator.frames,
        generator.pipeline.vae.params,
        [generator.latent_shape],
        generator.null_text.shape[1:],
    )


def replay(workdir, like):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore({"replay": like})["replay"]


def assert_same_run(workdir, state, whole, generator, config, check_events):
    there, expected = whole
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert history(workdir) == history(there)
    assert check_events(workdir) == [3, 6]
    like = make_scorer(generator, config).state
    jax.tree.map(np.testing.assert_array_equal, replay(workdir, like), replay(there, like))


def test_a_run_leaves_its_history_and_items(whole, generator, config, check_events):
    workdir, state = whole
    assert [line["step"] for line in history(workdir)] == list(range(1, STEPS + 1))
    assert all(np.isfinite(list(line.values())).all() for line in history(workdir))
    scored = [line["step"] for line in history(workdir) if "reward_generated" in line]
    assert scored == [2, 3, 5, 6]  # one step late, but at a checkpoint at once
    for step in (3, 6):
        found = {path.name for path in (workdir / "checkpoints" / str(step)).iterdir() if path.is_dir()}
        assert found == ITEMS
    assert check_events(workdir) == [3, 6]
    sampled = [line["step"] for line in history(workdir) if "sample_vendi" in line]
    assert sampled == [3, 6]
    assert {path.name for path in (workdir / "samples").glob("*.mp4")} == {"step_000003.mp4", "step_000006.mp4"}
    # Two generated and two real latents per step, in a ring of twelve.
    parts = replay(workdir, make_scorer(generator, config).state)
    (kept,) = (part for name, part in parts.items() if name.startswith("replay_"))
    assert int(kept["added"]) == 4 * STEPS and (kept["weight"] == 1).all()
    assert int(state["progress"]["step"]) == STEPS


def test_the_step_that_is_compiled_beside_other_work_is_the_one_that_runs(whole, one_program):
    assert list(one_program.values())[0] == 1


def test_a_run_that_is_over_compiles_no_step(whole, generator, data, config, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(Program, "compile", lambda self: compiled.append(self.name))
    loop.train(config, shutil.copytree(whole[0], tmp_path / "run"), generator, data)
    assert not compiled


def test_the_loop_gives_each_part_what_belongs_together(whole, asked, data, config):
    _, state = whole
    assert [step for step, _, _ in asked["inputs"]] == list(range(STEPS))
    for (_, captions, shape), (_, batch, submitted) in zip(asked["inputs"], asked["submit"], strict=True):
        places = [int(name.removeprefix("video ")) for name in batch["name"]]
        assert captions == submitted == batch["caption"].tolist() == [data.captions[i] for i in places]
        assert shape == data.latent.shape[1:]
        np.testing.assert_array_equal(batch["text"], data.text[places])
    assert len({batch["name"].tobytes() for _, batch, _ in asked["submit"]}) == STEPS
    (first, _), (last, params) = asked["draw"]
    assert (first, last) == (3, 6)
    jax.tree.map(np.testing.assert_array_equal, params, state["ema"]["ema"])
    key = jax.random.split(jax.random.key(config.seed))[0]
    np.testing.assert_array_equal(state["progress"]["key"], jax.random.key_data(key))


def test_what_a_run_executes_is_what_is_declared_for_it(whole, called, generator, config):
    """By name and by every argument's shape, from the weights' shapes alone."""
    pipeline = generator.pipeline
    parts = {
        name: dataclasses.replace(part, params=part.network.shapes)
        for name, part in (("transformer", pipeline.transformer), ("vae", pipeline.vae))
    }
    weightless = dataclasses.replace(generator, pipeline=dataclasses.replace(pipeline, **parts))
    programs = loop.teacher_programs(config, weightless, None)
    rewards = loop.load_rewards(config.reward.rewards)

    def described(program):
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), program.arguments)
        return program.name, str(shapes)

    declared = {described(p) for p in run_programs(config, weightless, programs, rewards)}
    assert {described(p) for p in called} == declared


def test_the_loop_goes_from_first_to_last_step_on_a_tpu(generator, data, config, tmp_path, monkeypatch):
    """As far as a host without one can tell: its programs are traced for a TPU, and give zeros."""
    chosen, splash = [], attention_module._splash

    def traced(self, *arguments):
        shapes = jax.eval_shape(self.jitted, *arguments)

        def zeros(x):
            return jax.random.key(0) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.zeros(x.shape, x.dtype)

        return sharding.put(jax.tree.map(zeros, shapes), self.out_shardings)

    monkeypatch.setattr(activation_sharding, "platform", lambda: "tpu")
    monkeypatch.setattr(attention_module, "_splash", lambda *args: chosen.append(1) or splash(*args))
    monkeypatch.setattr(Program, "__call__", traced)
    monkeypatch.setattr(Program, "compile", lambda self: None)
    visibility = dataclasses.replace(config.visibility, peak_tflops=100.0, samples_every=0)
    loop.train(dataclasses.replace(config, steps=2, visibility=visibility), tmp_path, generator, data)
    lines = history(tmp_path)
    assert [line["step"] for line in lines] == [1, 2] and all(line["mfu"] > 0 for line in lines)
    assert chosen


def test_other_programs_are_compiled_beside_the_steps(train, config, tmp_path, monkeypatch):
    """In threads of their own, the step first: for the rewards, and for samples where some are due."""
    compiled, compile_program = [], Program.compile

    def noted(program):
        compiled.append((program.name, threading.current_thread() is threading.main_thread()))
        return compile_program(program)

    monkeypatch.setattr(Program, "compile", noted)
    train(tmp_path / "some")
    names = list(dict.fromkeys(name for name, _ in compiled))
    assert names[0] == "step" and sorted(names[1:]) == [
        "decode_for_rewards",
        "show_samples",
        "student_sampler",
        "teacher_sampler",
        "text_encoder",
    ]
    assert not any(main for _, main in compiled)
    compiled.clear()
    visibility = dataclasses.replace(config.visibility, samples_every=0)
    train(tmp_path / "none", dataclasses.replace(config, visibility=visibility))
    assert {name for name, _ in compiled} == {"step", "decode_for_rewards"}


@pytest.mark.parametrize("dies_in", [pytest.param(4, marks=pytest.mark.slow), 6])
def test_a_killed_run_resumes_to_the_bit(train, whole, generator, config, tmp_path, dies_in, check_events):
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
    assert_same_run(tmp_path, state, whole, generator, config, check_events)


def test_a_run_that_is_terminated_saves_the_step_under_way_first(train, tmp_path):
    """SIGTERM in the fourth step, between two checkpoints: the fourth is saved, and the fifth comes next."""
    before = signal.getsignal(signal.SIGTERM)

    def terminated(batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with from_step(4, terminated), pytest.raises(Preempted, match="step 4"):
        train(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "4"}
    state = train(tmp_path)
    assert int(state["progress"]["step"]) == STEPS
    assert [line["step"] for line in history(tmp_path)] == list(range(1, STEPS + 1))


def test_a_half_written_checkpoint_is_not_one(train, whole, generator, config, tmp_path, check_events):
    shutil.copytree(whole[0], tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "6"
    last.rename(last.with_name("6.orbax-checkpoint-tmp"))
    (last.with_name("6.orbax-checkpoint-tmp") / "student").rename(tmp_path / "student")
    state = train(tmp_path / "run")
    assert_same_run(tmp_path / "run", state, whole, generator, config, check_events)


def test_a_finished_run_is_not_trained_again(train, whole, generator, config, tmp_path, check_events):
    shutil.copytree(whole[0], tmp_path / "run")
    state = train(tmp_path / "run")
    assert_same_run(tmp_path / "run", state, whole, generator, config, check_events)


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
        params = restore_student(tmp_path / "run", generator, ema)
        jax.tree.map(np.testing.assert_array_equal, params, state[name][name])
    for step in newest.parent.iterdir():
        shutil.rmtree(step / "ema")
    with pytest.raises(FileNotFoundError, match=r"checkpoints/6 has no ema"):
        restore_student(tmp_path / "run", generator)


def test_a_missing_checkpoint_is_one_sentence(config, generator, tmp_path):
    record_config(config, tmp_path)
    with pytest.raises(FileNotFoundError, match="checkpoints holds no checkpoint"):
        restore_student(tmp_path, generator)


def poison(batch):
    return dataclasses.replace(batch, latent=batch.latent.at[5, 0, 1, 1, 0].set(np.nan))


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(train, whole, config, tmp_path):
    """NaN from the 5th step on: neither history nor a checkpoint may hold it, nor may the good one go."""
    message = r"consistency is nan at step 5: lower the learning rate"
    changed = dataclasses.replace(config, log_every=100, keep_checkpoints=1, max_skipped=0)
    with from_step(5, poison), pytest.raises(FloatingPointError, match=message):
        train(tmp_path, changed)
    assert [line["step"] for line in read_history(tmp_path)] == [3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    state = train(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, whole[1])


def test_a_bad_batch_is_skipped_named_and_counted(train, whole, config, tmp_path, capsys):
    def second_only(batch, calls=itertools.count()):  # noqa: B008 (one count for all calls)
        return poison(batch) if next(calls) == 0 else batch

    with from_step(2, second_only):
        state = train(tmp_path, config)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    lines = history(tmp_path)
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 1, 1, 1, 1]  # known one step later
    assert ["student_loss" in line for line in lines] == [True, False, True, True, True, True]
    (noted,) = [json.loads(row) for row in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert noted["step"] == 2 and noted["because_of"]["data_std"] == "nan"
    assert len(noted["records"]) == 8 and noted["records"][0].startswith("video ")
    assert "skipped step 2: consistency is nan; its records are in" in capsys.readouterr().out
    assert all("student_loss" in line for line in read_history(whole[0]))  # a healthy run skips none
    assert not (whole[0] / "skipped.jsonl").exists()


def test_a_skipped_batch_is_named_by_all_processes(config, tmp_path, monkeypatch):
    """Whose rows lie between each other's; where tokens are shared among them, several have the same."""
    own, others = {0: "a", 3: "d"}, {1: "b", 2: "c", 3: "d"}
    monkeypatch.setattr(skips, "gather", lambda mine: [json.dumps([*others.items()]).encode(), mine])
    noted = skips.Skips(config, tmp_path, 0)
    noted.step(7, {"consistency": jnp.float32(np.nan)}, own, None)
    noted.check()
    assert json.loads((tmp_path / "skipped.jsonl").read_text())["records"] == ["a", "b", "c", "d"]


def test_the_batch_of_a_stopped_run_shows_its_row(train, config, generator, data, tmp_path, capsys):
    changed = dataclasses.replace(config, max_skipped=1)
    with from_step(5, poison), pytest.raises(FloatingPointError, match="2 steps in a row.*skipped_000006.npz"):
        train(tmp_path, changed)
    before = sorted(path for path in tmp_path.rglob("*"))
    loop.train(changed, tmp_path, generator, data, tmp_path / "skipped_000006.npz")
    said = capsys.readouterr().out
    names = json.loads((tmp_path / "skipped.jsonl").read_text().splitlines()[-1])["records"]
    assert "step 6 again, on the state after step 3:" in said
    assert f"latent is not finite in row 5 ({names[5]})" in said
    assert f"consistency is not finite in row 5 ({names[5]})" in said
    assert "  consistency is nan" in said and "text is not finite" not in said
    assert sorted(path for path in tmp_path.rglob("*")) == before
    (tmp_path / "no.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"no\.npz is no batch"):
        loop.train(changed, tmp_path, generator, data, tmp_path / "no.npz")


def test_a_run_goes_on_from_another_ones_student(train, whole, config, tmp_path):
    there, expected = whole
    begun = dataclasses.replace(config, init=str(there), steps=0)
    state = train(tmp_path / "run", begun)
    for name in ("student", "ema", "fake_score"):
        jax.tree.map(np.testing.assert_array_equal, state[name], expected[name])
    assert int(state["progress"]["step"]) == 0
    state = train(tmp_path / "gan", dataclasses.replace(begun, gan=GANConfig(weight=0.1)))
    assert state["fake_score"]["fake_score"].keys() - expected["fake_score"]["fake_score"].keys() == {"gan_head"}
    with pytest.raises(FileNotFoundError, match="nowhere holds no run"):
        train(tmp_path / "other", dataclasses.replace(begun, init=str(tmp_path / "nowhere")))


# Rewards that misbehave


def always(act):
    return lambda frames, prompts: act()


def sometimes(act):
    calls = itertools.count()
    return lambda frames, prompts: act() if next(calls) % 2 else frames.mean((1, 2, 3, 4))


def hang():
    time.sleep(3)
    return np.zeros(4)


FAULTS = {
    "raised": lambda: 1 / 0,
    "timed out": hang,
    "not finite": lambda: np.full(4, np.nan),
    "wrong shape": lambda: np.zeros((4, 1)),
}


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        *((always, kind) for kind in FAULTS),
        (sometimes, "raised"),
        *(pytest.param(sometimes, kind, marks=pytest.mark.slow) for kind in list(FAULTS)[1:]),
    ],
)
def test_a_faulty_reward_neither_stops_training_nor_corrupts_the_latent_model(
    train, config, monkeypatch, tmp_path, kind, how
):
    faulty = Reward(how(FAULTS[kind]), "")
    monkeypatch.setattr(loop, "load_rewards", lambda terms: [faulty])
    patience = 0.1 if kind == "timed out" else 10.0  # a busy machine is no fault
    changed = dataclasses.replace(config, reward=dataclasses.replace(config.reward, timeout=patience))
    with pytest.warns(RuntimeWarning, match="the reward 'compressibility'") as said:
        state = train(tmp_path, changed)
    assert len([w for w in said if "is left out" not in str(w.message)]) == 1
    lines = history(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert lines[-1][f"faults_compressibility_{kind.replace(' ', '_')}"] >= 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    untouched = jax.tree.map(lambda a, b: (a == b).all(), state["reward_head"]["reward_head"], first_head(config))
    assert all(jax.tree.leaves(untouched)) == (how is always)
    assert any("reward_generated" in line for line in lines) == (how is sometimes)


def first_head(config):
    """The latent reward model as every run with these settings begins."""
    network = latent_reward_network(config, 4, 8)
    return jax.tree.map(np.array, jax.jit(network.init)(jax.random.split(jax.random.key(config.seed))[1]))


def test_a_hacked_reward_stops_the_run_for_good(train, config, tmp_path, capsys):
    guard = RewardGuard(4, min_correlation=1.0, max_fall=None)  # which nothing reaches
    changed = dataclasses.replace(config, reward=dataclasses.replace(config.reward, guard=guard))
    state = train(tmp_path, changed)
    # Two samples per step, a window of four; the reward's scale is known from the third step on, whose samples
    # are known at its checkpoint, those of the fourth one step later.
    assert int(state["progress"]["step"]) == 5
    assert "stopped at step 5: latent and true reward correlate by" in capsys.readouterr().out
    assert "reward_fresh_correlation" in history(tmp_path)[-1]
    again = train(tmp_path, changed)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_latents_and_rewards_that_are_not_finite_are_not_learned_from(generator, config, data):
    seen = []

    def reward(frames, prompts):
        assert np.isfinite(frames).all()
        seen.append(prompts)
        return np.array([1.0, 2.0, np.nan, 4.0], np.float32)

    scorer = make_scorer(generator, config, Reward(reward, ""))
    batch = {"latent": data.latent[:8], "text": data.text[:8]}
    # Two rows of the batch, the first and the middle one, each generated and real.
    latent = np.stack([batch["latent"][[0, 4]] + 1, batch["latent"][[0, 4]]], 1)
    latent[0, 0, 0, 0, 0, 0] = np.nan
    unscored = np.full((2, 2, 1), np.nan)
    samples = {"latent": latent, "predicted": np.zeros((2, 2)), "reward": unscored, "scale": np.ones((2, 1))}
    scorer.submit(RewardSamples(**jax.tree.map(jax.numpy.asarray, samples)), batch, list("abcdefgh"))
    with pytest.warns(RuntimeWarning, match="a reward that is not finite"):
        scorer.collect()
    assert seen == [["a", "a", "e", "e"]]
    kept = scorer.memories[generator.latent_shape].state
    assert kept["reward"][:3, 0].tolist() == [2.0, 4.0, 0.0]
    np.testing.assert_array_equal(kept["latent"][:2], batch["latent"][[0, 4]])
    np.testing.assert_array_equal(kept["text"][:2], batch["text"][[0, 4], :1])  # no reward reads it
    assert scorer.latest == {"reward_real": 3.0, "faults_compressibility_not_finite": 1.0}


def test_a_reward_that_fails_on_every_sample_stops_the_run(generator, config, data):
    changed = dataclasses.replace(config, reward=dataclasses.replace(config.reward, max_failed_rounds=2))
    scorer = make_scorer(generator, changed, Reward(lambda frames, prompts: 1 / 0, ""))
    batch = {"latent": data.latent[:8], "text": data.text[:8]}
    latent = np.stack([batch["latent"][[0, 4]]] * 2, 1)
    samples = {"latent": latent, "predicted": np.zeros((2, 2)), "reward": np.full((2, 2, 1), np.nan)}
    given = RewardSamples(**jax.tree.map(jax.numpy.asarray, samples))
    scorer.submit(given, batch, list("abcdefgh"))
    with pytest.warns(RuntimeWarning, match="raised ZeroDivisionError"):
        scorer.collect()
    scorer.submit(given, batch, list("abcdefgh"))
    with pytest.raises(ValueError, match=r"no sample of 2 steps got a reward \(compressibility \{'raised': 4\}\)"):
        scorer.collect()


@pytest.mark.slow
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


# The scorer's replay


@pytest.fixture
def make_replay():
    def make(capacity, updates=8, seed=0):
        shapes = ((updates, 8, *shape) for shape in ((1, 1, 1, 1), (1, 1), (1,), ()))
        return Replay(capacity, ScoredLatents(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)), seed)

    return make


def rows(values):
    """Scored samples of one latent each, their text and their one reward."""
    values = np.asarray(values, np.float32)
    samples = RewardSamples(values.reshape(-1, 1, 1, 1, 1, 1), None, None)
    return samples, values.reshape(-1, 1, 1), values.reshape(-1, 1, 1)


def test_replay_is_a_ring_without_failed_rewards(make_replay):
    ring = make_replay(4)
    assert (ring.take(0).weight == 0).all()  # nothing to learn from yet
    ring.add(*rows([1, np.nan, 2, np.inf, 3]))
    assert sorted(set(ring.take(0).reward.ravel())) == [1, 2, 3]
    ring.add(*rows([4, 5]))
    drawn = ring.take(0)
    assert sorted(set(drawn.reward.ravel())) == [2, 3, 4, 5]  # 1 was the oldest
    np.testing.assert_array_equal(drawn.latent.ravel(), drawn.reward.ravel())
    np.testing.assert_array_equal(drawn.text.ravel(), drawn.reward.ravel())
    ring.add(*rows(range(10, 20)))  # more than it holds
    assert sorted(ring.state["reward"].ravel()) == [16, 17, 18, 19]


def test_replay_draws_by_content_and_seed(make_replay):
    one, other = make_replay(8, updates=2), make_replay(8, updates=2)
    one.add(*rows([1, 2, 3, 4, 5]))
    other.state = {name: np.array(value) for name, value in one.state.items()}
    a, b, c = (ring.take(step).reward for ring, step in ((one, 3), (other, 3), (one, 4)))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
