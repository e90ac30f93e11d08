"""Training from what `dollar prepare` left: batches, their position, damage; whole runs, resumed to the bit."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import grain
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from dollar_jax import programs
from dollar_jax import train as loop
from dollar_jax.data import prepared
from dollar_jax.data.clip import clip_size
from dollar_jax.data.latents import load_data
from dollar_jax.data.prepared import PreparedVideos
from dollar_jax.prepare.job import prepare
from dollar_jax.run import read_history
from dollar_jax.state import to_items

ROWS = np.arange(3)
SHAPES = {(2, 2, 4, 4), (2, 4, 2, 4)}


@pytest.fixture(scope="module")
def config(make_config, whole, teacher):
    return make_config(
        {
            "data.name": str(whole[0]),
            "teacher": str(teacher),
            "batch_size": 8,
            "steps": 4,
            "checkpoint_every": 2,
            "keep_checkpoints": 9,
            "mesh.data": 8,
            "student.optimiser.warmup_steps": 1,
        }
    )


@pytest.fixture(scope="module")
def one_each(whole):
    """The records by caption and video, as TFDS reads them."""
    source = tfds.builder_from_directory(whole[0]).as_data_source("train")
    return [source[i] for i in range(len(source))]


def small(config, batch_size=3, **data):
    """The configuration for small batches; no step ever sees them."""
    reward = replace(config.reward, samples=1)
    return replace(config, batch_size=batch_size, reward=reward, data=replace(config.data, **data))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(one, other):
    for a, b in zip(one, other, strict=True):
        for name in ("latent", "text", "caption"):
            np.testing.assert_array_equal(a[name], b[name])


# --- batches --------------------------------------------------------------------------------------


def test_a_batch_holds_one_bucket_and_an_epoch_every_clip_once(config, one_each):
    c = small(config)
    data = PreparedVideos(c.data)
    assert set(data.latent_shapes) == SHAPES
    batches = take(data.batches(c), 12)  # two epochs of 9 + 9 clips
    shapes = [batch["latent"].shape for batch in batches]
    assert Counter(shapes) == {(3, *shape): 6 for shape in SHAPES}
    captions = {record["caption"].decode() for record in one_each}
    for shape in SHAPES:
        rows = [caption for b in batches if b["latent"].shape[1:] == shape for caption in b["caption"]]
        assert sorted(rows[:9]) == sorted(rows[9:]) and rows[:9] != rows[9:]
        captions -= set(rows)
    assert not captions


def test_rows_are_fresh_samples_of_the_posterior_with_padded_text(config, one_each):
    c = small(config)
    data = PreparedVideos(c.data)
    noise = []
    for batch in take(data.batches(c), 60):
        for latent, text, caption in zip(batch["latent"], batch["text"], batch["caption"], strict=True):
            (record,) = (r for r in one_each if r["caption"].decode() == caption)
            noise.append(((latent - record["latent"]) / record["latent_std"]).ravel())
            np.testing.assert_array_equal(text[:9], record["text"])
            assert text.shape == (12, 16) and not text[9:].any()
    noise = np.stack(noise)  # 180 rows of 64
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert len(np.unique(noise[:, 0])) == len(noise)


def test_a_given_frame_is_the_posteriors_mean(config, one_each, generator):
    data, by_caption = (
        PreparedVideos(replace(config.data, given_frames=1)),
        {r["caption"].decode(): r for r in one_each},
    )
    (batch,) = take(data.batches(small(config)), 1)
    for latent, caption in zip(batch["latent"], batch["caption"], strict=True):
        same_as_mean = latent == by_caption[caption]["latent"]
        assert same_as_mean[:1].all() and not same_as_mean[1:].any()
    some = data.some_captions(3)
    assert len(some) == 3
    for caption, given in some.items():
        np.testing.assert_array_equal(given, by_caption[caption]["latent"][:1])
        assert given.shape == (1, 2, 4, 4)  # of the first bucket, whose size samples have
    data.about["settings"]["sample"] = True
    with pytest.raises(ValueError, match="prepare it without --sample"):
        data.check(config, generator)


def test_the_position_is_exact_although_batches_are_placed_ahead(config):
    c = small(config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sharding = {"latent": here, "text": here}
    iterator = PreparedVideos(c.data).batches(c, ROWS, sharding)
    assert isinstance(iterator, grain.DatasetIterator)
    first = take(iterator, 5)
    state = iterator.get_state()
    rest = take(iterator, 9)
    for batch in rest:
        np.testing.assert_array_equal(batch["on_device"]["latent"], batch["latent"])
        np.testing.assert_array_equal(batch["on_device"]["text"], batch["text"])
    again = PreparedVideos(c.data).batches(c, ROWS, sharding)
    same(take(again, 5), first)
    resumed = PreparedVideos(c.data).batches(c, ROWS, sharding)
    resumed.set_state(json.loads(json.dumps(state)))
    same(take(resumed, 9), rest)
    with pytest.raises(AssertionError):
        same(take(PreparedVideos(c.data).batches(replace(c, seed=1)), 5), first)


def test_processes_share_the_very_batches_of_one_and_read_their_rows_alone(config, monkeypatch):
    c, read = small(config), []
    whole = take(PreparedVideos(c.data).batches(c), 12)
    monkeypatch.setattr(
        prepared.Records, "readable", lambda self, i, real=prepared.Records.readable: (read.append(i), real(self, i))[1]
    )
    for rows in ([0, 1], [2], [0, 2]):
        read.clear()
        iterator = PreparedVideos(c.data).batches(c, np.array(rows))
        part = take(iterator, 12)
        same(part, [{name: b[name][rows] for name in ("latent", "text", "caption")} for b in whole])
        assert 12 * len(rows) <= len(read) < 3 * 12 * len(rows)  # some are read ahead
    # Another number of processes goes on from where this one was.
    other = PreparedVideos(c.data).batches(c, np.array([1]))
    iterator = PreparedVideos(c.data).batches(c, np.array([0, 2]))
    take(iterator, 5)
    other.set_state(iterator.get_state())
    same(take(other, 7), [{name: b[name][[1]] for name in ("latent", "text", "caption")} for b in whole[5:]])


def test_a_bucket_smaller_than_a_batch_is_left_out(config, whole, settings, generator, videos, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("00", "01", "02", "03", "05"):
        for kind in ("mp4", "txt"):
            shutil.copy(videos / f"{name}.{kind}", tmp_path / "in")
    prepare(replace(settings, source=str(tmp_path / "in")), generator, tmp_path / "out")
    c = small(config, name=str(tmp_path / "out"))
    assert {b["latent"].shape for b in take(PreparedVideos(c.data).batches(c), 4)} == {(3, 2, 2, 4, 4)}
    assert "bucket 32x16 is left out: 2 clips are fewer than a batch" in "".join(capsys.readouterr())
    with pytest.raises(ValueError, match="there are 3 training videos of one size .* config.batch_size 4"):
        PreparedVideos(c.data).batches(replace(c, batch_size=4))


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture
def broken(whole, tmp_path):
    """A copy of the data set with one record's bytes overwritten, and its captions."""
    copy = tmp_path / "broken"
    shutil.copytree(whole[0], copy)
    shard = sorted(copy.glob("*array_record*"))[2]
    raw = bytearray(shard.read_bytes())
    raw[100:140] = bytes(40)
    shard.write_bytes(raw)
    return copy, shard


def test_a_damaged_record_is_named_and_skipped(config, broken, one_each, capsys):
    copy, shard = broken
    c = small(config, 1, name=str(copy), corrupt_records=1)
    seen = Counter(str(b["caption"][0]) for b in take(PreparedVideos(c.data).batches(c), 17 * 2))
    assert sum(seen.values()) == 34
    lost = {record["caption"].decode() for record in one_each} - seen.keys()
    assert lost == {one_each[4]["caption"].decode()}  # the first of the third shard, after two of two
    said = "".join(capsys.readouterr())
    assert said.count("skipped: record 0 of ") == 1 and str(shard) in said and "mismatch" in said


def test_one_damaged_record_too_many_stops_the_run(config, broken):
    c = small(config, 1, name=str(broken[0]))
    with pytest.raises(ValueError, match=r"record 0 of .*-00002-of-00011 is damaged .*corrupt_records, now 0"):
        take(PreparedVideos(c.data).batches(c), 40)


def test_a_record_that_is_not_finite_is_damage_too(config):
    data = PreparedVideos(config.data)
    records = next(iter(data.buckets.values()))
    features, assert_named = records._features, pytest.raises(ValueError, match="record 0 of .*its text is not finite")

    class Poisoned:
        def deserialize_example_np(self, raw):
            record = features.deserialize_example_np(raw)
            return record | {"text": np.full_like(record["text"], np.inf)}

    assert np.isfinite(records[0]["text"]).all()
    records._features = Poisoned()
    with assert_named:
        records[0]


def test_a_shard_that_is_gone_is_damage_too(config, broken):
    copy, shard = broken
    shard.unlink()
    c = small(config, 1, name=str(copy))
    with pytest.raises(ValueError, match=r"record \d of .*-00002-of-00011 is damaged"):
        take(PreparedVideos(c.data).batches(c), 40)


# --- what does not fit ----------------------------------------------------------------------------


def test_bad_data_for_a_run(config, whole, generator, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no prepared data set; dollar prepare makes one"):
        clip_size(replace(config.data, name=str(tmp_path)))
    (tmp_path / "prepare.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="it is not finished: run dollar prepare again"):
        clip_size(replace(config.data, name=str(tmp_path)))
    with pytest.raises(ValueError, match="captions of up to 12 tokens, more than config.data.max_text_length 8"):
        PreparedVideos(replace(config.data, max_text_length=8))
    pipeline = generator.pipeline
    for name in ("vae", "text_encoder"):
        part = getattr(pipeline, name)
        other = replace(part, params=jax.tree.map(lambda x: 1.5 * x, part.params))
        with pytest.raises(ValueError, match=f"was encoded by another {name} than that of config.teacher"):
            changed = replace(generator, pipeline=replace(pipeline, **{name: other}))
            load_data(config, changed, tmp_path)


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """A run's program is built once, not once per resumption."""
    build, built = loop.teacher_programs, {}

    make, traced = programs.make_step, []

    def counted(*args):
        step = make(*args)

        def counting(state, frozen, batch):
            traced.append(batch.latent.shape[1:])
            return step(state, frozen, batch)

        return counting

    def remembered(config, *args, **rewards):
        key = replace(config, pretrain=None)
        if key not in built:
            built[key] = build(config, *args, **rewards)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "teacher_programs", remembered)
        patch.setattr(programs, "make_step", counted)
        yield traced


def run(config, generator, workdir):
    data = load_data(config, generator, workdir)
    return jax.tree.map(np.array, to_items(loop.train(config, workdir, generator, data)))


class Killed(Exception):
    """Stands for a machine that is gone."""


@pytest.mark.slow
def test_a_run_on_two_buckets_compiles_twice_and_resumes_to_the_bit(
    config, generator, tmp_path, monkeypatch, one_program
):
    assert clip_size(config.data) == (5, 16, 32)
    whole = run(config, generator, tmp_path / "whole")
    assert sorted(one_program) == sorted(SHAPES)  # traced, and so compiled, once for each bucket
    history = read_history(tmp_path / "whole")
    assert [line["step"] for line in history] == [1, 2, 3, 4]
    assert all(np.isfinite(list(line.values())).all() and 0 <= line["data_wait"] <= 1 for line in history)

    whole_batch, calls = loop._global_batch, 0

    def die_at_the_fourth(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return whole_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_global_batch", die_at_the_fourth)
        with pytest.raises(Killed):
            run(config, generator, tmp_path / "killed")
    resumed = run(config, generator, tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    timings = {"seconds_per_step", "data_wait", "videos_per_second"}
    for one, other in zip(history, read_history(tmp_path / "killed"), strict=True):
        assert {k: v for k, v in one.items() if k not in timings} == {
            k: v for k, v in other.items() if k not in timings
        }


def test_prompts_alone_train_a_student_by_backward_simulation(config, settings, generator, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a {size} red circle moving {way}\n" for size in "ab" for way in "abcd"))
    alone = replace(settings, source=None, prompts=str(prompts), buckets=((16, 16),))
    prepare(alone, generator, tmp_path / "out")
    c = replace(config, steps=3, data=replace(config.data, name=str(tmp_path / "out")))
    message = "prompts without videos: set config.student.input to 'backward', config.consistency"
    with pytest.raises(ValueError, match=message):
        load_data(c, generator, tmp_path)
    backward = replace(c, student=replace(c.student, input="backward"))
    with pytest.raises(ValueError, match=message):
        load_data(backward, generator, tmp_path)
    c = replace(backward, consistency=replace(c.consistency, weight=0.0))
    state = run(c, generator, tmp_path / "run")
    moved = jax.tree.map(
        lambda x, y: np.abs(x - y).max(), state["student"]["student"], generator.pipeline.transformer.params
    )
    assert max(jax.tree.leaves(moved)) > 0
    history = read_history(tmp_path / "run")
    assert [line["step"] for line in history] == [1, 2, 3]
    assert all(np.isfinite(list(line.values())).all() for line in history)
    assert "reward_generated" in history[-1] and "vsd" in history[-1]
    assert not {"reward_real", "consistency"} & history[-1].keys()
