"""What a run shows of itself: a collapsed student is seen, a healthy one is left alone."""

import dataclasses
import functools
import re
import sys
import threading
import time
import types
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dollar_jax import monitoring, objectives
from dollar_jax.config import VisibilityConfig
from dollar_jax.distillation import Batch, Distillation, Networks
from dollar_jax.flops import Throughput, count_flops
from dollar_jax.generate import Generator, student_shapes
from dollar_jax.models import activation_sharding
from dollar_jax.monitoring import Log, Profile, SampleLogger, SampleStats, Shown, collapse, make_throughput, readable
from dollar_jax.programs import step_flops
from dollar_jax.rewards import Reward
from dollar_jax.rewards.host import HostScorer
from dollar_jax.run import read_history
from dollar_jax.schedule import Schedule
from dollar_jax.sharding import make_mesh
from dollar_jax.video import read_video, to_uint8

CONFIG = VisibilityConfig(10, ("a ball", "a cube"), 4, 0, 0.5, (0.7, 1.4), 0.3, None, 0)


def sampler(keep=1.0, shift=0.0, scale=1.0):
    """Latents of 2 prompts × 4 videos; `keep` of what differs within a prompt is left."""
    rng = np.random.default_rng(0)
    prompt, own = rng.normal(size=(2, 1, 3, 8, 8, 3)), rng.normal(size=(2, 4, 3, 8, 8, 3))
    latent = prompt + keep * own
    latent = scale * latent * np.sqrt(2) / latent.std() + shift
    return latent.reshape(8, 3, 8, 8, 3).astype(np.float32)


def decode(latent):
    return 1 / (1 + np.exp(-latent))


def show(latent):
    """In two parts, the second filled up, as the devices give it."""
    parts = latent[:5], np.concatenate([latent[5:], latent[-1:], latent[-1:]])
    axes = (1, 2, 3, 4)
    return [Shown(to_uint8(np.nan_to_num(decode(x))), x.mean(axes), np.square(x).mean(axes)) for x in parts]


def make_logger(workdir, teacher=lambda: show(sampler()), config=CONFIG, key="", fps=8, scorer=None):
    return SampleLogger(config, workdir, show, teacher, config.prompts, key, fps, scorer)


@pytest.fixture
def logger(tmp_path):
    return make_logger(tmp_path)


HEALTHY = {"like the teacher": {}, "a little less": {"keep": 0.8, "shift": 0.1, "scale": 0.9}}
COLLAPSED = {
    "one video for every noise": ({"keep": 0.0}, "diversity is down to a Vendi score of 1.00"),
    "nearly one": ({"keep": 0.2}, "diversity is down"),
    "washed out": ({"scale": 0.4}, "the latents' deviation is"),
    "saturated": ({"scale": 3.0}, "the latents' deviation is"),
    "lurid": ({"scale": 3.0}, "54% of coloured pixels are vivid, the teacher's 12%"),
    "drifted": ({"shift": -1.0}, "the latents' mean is"),
    "broken": ({"scale": np.nan}, "not finite"),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_student_raises_no_warning(logger, kind, capsys):
    scalars, _, warnings = logger.draw(10, sampler(**HEALTHY[kind])).result()
    assert not warnings and scalars["collapse"] == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", COLLAPSED)
def test_a_collapsed_student_raises_the_warning(logger, kind, capsys):
    how, message = COLLAPSED[kind]
    scalars, _, warnings = logger.draw(20, sampler(**how)).result()
    assert any(message in warning for warning in warnings)
    assert scalars["collapse"] == len(warnings)
    assert f"warning: step 20: {warnings[0]}" in capsys.readouterr().err


def test_diversity_is_of_the_videos_beyond_the_first():
    """Half of the teacher's score, but a sixth of what it has beyond one video alone."""
    config, teacher = VisibilityConfig(least_diversity=0.4), SampleStats(2.5, 0.0, 1.0)
    (warning,) = collapse(config, SampleStats(1.25, 0.0, 1.0), teacher)
    assert "Vendi score of 1.25, the teacher's is 2.50" in warning
    assert not collapse(config, SampleStats(1.7, 0.0, 1.0), teacher)


def test_samples_stand_beside_the_teachers(logger, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(monitoring, "write_video", lambda *args: written.append(args))
    student = sampler(shift=0.2)
    scalars, sheet, _ = logger.draw(10, student).result()
    ((path, video, _, scale),) = written
    assert path == tmp_path / "samples" / "step_000010.mp4" and scale == 12
    assert video.shape == (3, 2 * 8 + 6, 4 * 18 + 3 * 6, 3)
    for source, offset in ((sampler(), 0), (student, 10)):
        expected = np.round(255 * decode(source[5]))  # the second video of the second prompt
        np.testing.assert_array_equal(video[:, 14:22, 24 + offset : 32 + offset], expected)
        # The picture has the first video of each prompt at four times, the last one on the right.
        np.testing.assert_array_equal(sheet[14:22, 72 + offset : 80 + offset], np.round(255 * decode(source[4]))[-1])
    assert sheet.shape == (2 * 8 + 6, 4 * 18 + 3 * 6, 3)
    assert scalars["sample_mean_drift"] == pytest.approx(0.2, abs=1e-5)
    assert scalars["sample_std_ratio"] == pytest.approx(1, abs=1e-5)
    assert 1 < scalars["sample_vendi_teacher"] < 4


def test_samples_are_scored_beside_the_teachers_whatever_a_reward_does(tmp_path):
    """Of frames as they are shown, by prompt; a reward that fails leaves no number, and one of NaN does not count."""

    def reward(frames, prompts):
        if frames.mean() > 0.9:
            raise ConnectionError
        return np.where(np.array(prompts) == "a cube", np.nan, frames.mean((1, 2, 3, 4)))

    logger = make_logger(tmp_path, scorer=HostScorer("test", Reward(reward, ""), 5.0, 0, quiet=True))
    scalars, _, _ = logger.draw(10, sampler(scale=0.5)).result()
    shown = {"sample_reward": sampler(scale=0.5), "sample_reward_teacher": sampler()}
    for name, latent in shown.items():
        assert scalars[name] == pytest.approx(to_uint8(decode(latent[:4])).mean() / 255, abs=1e-5)
    scalars, _, _ = logger.draw(20, sampler(shift=20.0)).result()
    assert "sample_reward" not in scalars and "sample_reward_teacher" in scalars


def test_a_video_of_the_samples_is_left(logger, tmp_path):
    logger.draw(10, sampler()).result()
    assert read_video(tmp_path / "samples" / "step_000010.mp4").shape[0] == 3


def test_the_teacher_is_sampled_once_and_only_when_it_is_due_also_by_a_resumed_run(tmp_path):
    calls = []

    def teacher():
        calls.append(0)
        return show(sampler())

    logger = make_logger(tmp_path, teacher, key="a")
    assert [step for step in range(1, 31) if logger.due(step)] == [10, 20, 30] and not calls
    first = logger.draw(10, sampler(keep=0.8)).result()
    logger.draw(20, sampler()).result()
    assert len(calls) == 1
    again = make_logger(tmp_path, teacher, key="a").draw(30, sampler(keep=0.8)).result()
    assert len(calls) == 1 and again[0] == first[0]
    make_logger(tmp_path, teacher, key="other prompts").draw(40, sampler()).result()
    assert len(calls) == 2
    off = make_logger(tmp_path, teacher, dataclasses.replace(CONFIG, samples_every=0))
    assert not any(off.due(step) for step in range(30))


def test_samples_are_looked_at_in_the_background(tmp_path, monkeypatch):
    """The loop goes on while process 0 writes: only the result is waited for."""
    may_write = threading.Event()
    monkeypatch.setattr(monitoring, "write_video", lambda *_: may_write.wait(60))
    drawn = make_logger(tmp_path).draw(10, sampler())
    assert not drawn.done()
    may_write.set()
    assert drawn.result()[0]["collapse"] == 0


@pytest.mark.parametrize(
    "clip, shards, total, at_once, shrink",
    [
        ((81, 480, 832), 64, 24, 64, 3),
        ((81, 480, 832), 4, 24, 4, 3),
        ((17, 32, 32), 1, 24, 24, 1),
        ((17, 32, 32), 8, 6, 8, 1),
    ],
)
def test_real_videos_are_drawn_few_at_a_time_and_shown_small(clip, shards, total, at_once, shrink):
    class Drawn(Generator):
        def __init__(self):
            pass

    generator = Drawn()
    object.__setattr__(generator, "clip", clip)
    object.__setattr__(generator, "mesh", SimpleNamespace(shape={"data": 1, "fsdp": shards}))
    assert generator.samples_at_once(total) == at_once
    assert generator.shrink(2 * total) == shrink
    _, height, width = clip
    assert 2 * total * (height // shrink) * (width // shrink) <= 2**22


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="samples_every needs videos of at least 2"):
        dataclasses.replace(CONFIG, videos=1)
    dataclasses.replace(CONFIG, samples_every=0, videos=1)


@pytest.mark.parametrize("layers", [None, 1])
def test_a_steps_operations_are_those_of_its_forwards(make_config, toy_generator, make_pipeline, layers):
    """VSD alone: student 1 and its gradient 2, guided teacher 2, fake score 1; then student 1, fake score 3. A student
    of one of two blocks costs its own forwards."""
    pipeline = make_pipeline(layers=2, scale=0.2, tokenizer=toy_generator.pipeline.tokenizer)
    toy_generator = dataclasses.replace(toy_generator, pipeline=pipeline)
    config = make_config(
        {
            "mesh.data": 8,
            "student.layers": layers,
            "reward.rewards": (),
            "consistency.weight": 0.0,
            "fake_score.updates": 1,
            "visibility.peak_tflops": 2.0,
        }
    )
    network = toy_generator.pipeline.transformer.network
    latent, text = toy_generator.latent_shape, toy_generator.null_text.shape[1:]
    mesh, flops = make_mesh(config.mesh), functools.partial(step_flops, config, toy_generator, None)
    found = make_throughput(config, mesh, flops)
    one = [jax.ShapeDtypeStruct((8, *shape), "float32") for shape in (latent, (), text)]
    student, forward = (
        count_flops(jax.make_jaxpr(network.apply)(shapes, *one).jaxpr)
        for shapes in (student_shapes(network, layers), network.shapes)
    )
    assert 0 < student < (1.1 if layers is None else 0.9) * forward and found.flops is not None
    # Nothing is differentiated with respect to the latent or the text that goes in.
    assert 9 * forward < found.flops + 4 * (forward - student) < 10.01 * forward
    assert found.peak == 2e12 * 8
    unknown = dataclasses.replace(config, visibility=dataclasses.replace(config.visibility, peak_tflops=None))
    assert make_throughput(unknown, mesh, flops).flops is None


def test_a_steps_operations_are_the_models_whatever_kernel_and_recomputation(make_config, toy_generator, monkeypatch):
    """On a TPU, with the attention kernel that is chosen there, and with whole blocks computed again."""
    plain = make_config({"reward.rewards": ()})
    expected = step_flops(plain, toy_generator, None)
    transformer = toy_generator.pipeline.transformer
    options = dataclasses.replace(transformer.config, remat="full")
    network = toy_generator.pipeline.family.transformer.network(options)
    pipeline = dataclasses.replace(
        toy_generator.pipeline, transformer=dataclasses.replace(transformer, config=options, network=network)
    )
    monkeypatch.setattr(activation_sharding, "platform", lambda: "tpu")
    assert step_flops(plain, dataclasses.replace(toy_generator, pipeline=pipeline), None) == expected > 0


def test_the_fake_scores_loss_is_told_apart_by_timestep(make_config):
    config = make_config({"vsd.score_range": (0.0, 1.0), "vsd.score_shift": 1.0})
    schedule = Schedule("rf", "velocity")

    def apply(params, x_t, t, text):
        # Off by one where it is noisy, by less the cleaner: the loss is about (t / 1000)².
        return params["velocity"] + (t / 1000).reshape(-1, 1, 1, 1, 1) + 0 * x_t

    distillation = Distillation(config, Networks(apply, None), schedule)
    batch = Batch(jnp.zeros((256, 1, 1, 1, 1)), jnp.zeros((256, 1, 1)))
    zero = {"velocity": jnp.zeros(())}
    _, aux = objectives.fake_score(distillation, zero, zero, batch, jax.random.key(0))
    assert sum(aux[f"fake_score_count_{k}"] for k in range(4)) == 256
    total = sum(aux[f"fake_score_sum_{k}"] for k in range(4))
    np.testing.assert_allclose(total / 256, aux["fake_score"], rtol=1e-5)
    values = readable({name: float(value) for name, value in aux.items()})
    assert set(values) == {"fake_score", *(f"fake_score_bin_{k}" for k in range(4))}
    assert len({values[f"fake_score_bin_{k}"] for k in range(4)}) == 4
    assert readable({"fake_score_sum_0": 0.0, "fake_score_count_0": 0.0, "vsd": 1.0}) == {"vsd": 1.0}


def test_latents_are_set_against_the_data():
    values = readable({"latent_mean": 0.5, "latent_std": 0.6, "data_mean": 0.1, "data_std": 1.2})
    assert values["latent_mean_drift"] == pytest.approx(0.4)
    assert values["latent_std_ratio"] == pytest.approx(0.5)


def test_a_profile_is_of_the_steps_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profile = Profile(2, tmp_path, first=5)
    for step in range(5, 12):
        profile.before(step)
        calls.append(step)
        profile.after(step, ())
    profile.close()
    assert calls == [5, 6, str(tmp_path / "profile"), 7, 8, "stop", 9, 10, 11]
    calls.clear()
    cut = Profile(5, tmp_path, first=0)
    for step in range(3):
        cut.before(step)
        cut.after(step, ())
    cut.close()
    assert calls == [str(tmp_path / "profile"), "stop"]


# The log


def log_steps(config, workdir, first, last, checkpoints):
    """What a run leaves that begins after step `first` and is gone after `last`: a loss of 10 times the step."""
    workdir.mkdir(exist_ok=True)
    with Log(workdir, first, config, Throughput(8, None, None)) as log:
        for step in range(first + 1, last + 1):
            seen = None
            if step == 4:
                seen = Future()
                seen.set_result(({"collapse": 1.0}, np.zeros((8, 8, 3), np.uint8), ["it is grey"]))
            metrics = {"student_loss": np.float32(10 * step), "data_mean": np.float32(step)}
            metrics |= {"data_std": np.float32(2), "latent_mean": np.float32(0), "latent_std": np.float32(1)}
            log.step(step, metrics, {"reward_generated": 0.5 * step}, step in checkpoints, seen)
    for path in (workdir / "events").glob("*tfevents.1*"):  # two logs within a second would be one file
        path.rename(path.with_name(f"events.out.tfevents.{len(list(path.parent.iterdir())):010d}"))


@pytest.mark.parametrize("saved", [0, 4])
def test_a_resumed_log_doubles_nothing_and_loses_nothing(make_config, check_events, tmp_path, saved):
    config = make_config({"log_every": 3})
    log_steps(config, tmp_path / "cut", 0, 7, checkpoints=[saved])
    log_steps(config, tmp_path / "cut", saved, 8, checkpoints=[8])
    log_steps(config, tmp_path / "whole", 0, 8, checkpoints=[saved, 8])
    assert check_events(tmp_path / "cut") == check_events(tmp_path / "whole") == [4]
    for run in ("cut", "whole"):
        lines = read_history(tmp_path / run)
        assert [line["step"] for line in lines] == [3, 4, 6, 8]
        for line in lines:
            assert line["student_loss"] == 10 * line["step"] and line["reward_generated"] == 0.5 * line["step"]
            assert line["latent_mean_drift"] == -line["step"] and line["latent_std_ratio"] == 0.5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_of_a_step_that_is_not_finite_nothing_is_logged_but_what_the_host_knows(make_config, tmp_path, value):
    metrics = {"student_loss": np.float32(1), "vsd": np.float32(value)}
    with Log(tmp_path, 2, make_config(), Throughput(8, None, None)) as log:
        log.step(3, metrics, {"skipped_steps": 1.0}, True)
    (line,) = read_history(tmp_path)
    assert line["step"] == 3 and line["skipped_steps"] == 1 and not {"student_loss", "vsd"} & line.keys()
    assert all(np.isfinite(list(line.values())))


def test_weights_and_biases_gets_what_tensorboard_gets(make_config, tmp_path, monkeypatch):
    """With a stand-in of wandb's functions: no network, and no account."""
    calls, logged = [], []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: calls.append("finish"))
    module = types.ModuleType("wandb")
    module.init = lambda **given: calls.append(given) or run  # pyright: ignore[reportAttributeAccessIssue]
    module.Video = lambda path, format: (path, format)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = make_config({"steps": 2})
    metrics = {"student_loss": jnp.float32(0.25)}
    throughput = Throughput(8, None, None)
    with Log(tmp_path, 0, config, throughput) as log:
        log.step(1, metrics, {}, True)
    assert not calls and not logged, "nobody asked for it"

    monkeypatch.setenv("WANDB_PROJECT", "distillation")
    with Log(tmp_path, 1, config, throughput) as log:
        seen = Future()
        seen.set_result(({}, np.zeros((4, 5, 3), np.uint8), []))
        log.step(2, metrics, {"reward_real": 0.5}, True, seen)
    assert calls[0]["project"] == "distillation" and calls[0]["config"]["steps"] == 2 and calls[1:] == ["finish"]
    shown, scalars = logged
    assert {tag.rpartition("/")[2]: value for tag, value in scalars.items()} == read_history(tmp_path)[-1]
    assert scalars["loss/student_loss"] == 0.25 and scalars["reward/reward_real"] == 0.5
    video = str(tmp_path / "samples" / "step_000002.mp4"), "mp4"
    assert shown == {"samples/teacher_left_student_right": video, "samples/warnings": 0, "step": 2}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb, or unset it"), Log(tmp_path, 2, config, throughput):
        pass


def test_what_the_bar_waits_for_is_not_in_its_estimate(make_config, tmp_path, capfd):
    def refuse():
        raise ValueError("no such option")

    with Log(tmp_path, 0, make_config({"steps": 2}), Throughput(8, None, None)) as log:
        begun = log.bar.start_t
        with ThreadPoolExecutor(1) as beside:
            log.wait_for(beside.submit(time.sleep, 1.2))
            assert log.bar.desc == "distilling" and log.bar.start_t - begun > 1.1
            with pytest.raises(ValueError, match="no such option"):
                log.wait_for(beside.submit(refuse))
    assert "compiling, 1 s" in capfd.readouterr().err


def test_the_first_step_is_shown_at_once_and_long_steps_each(make_config, tmp_path, capsys, monkeypatch):
    config = make_config({"log_every": 100, "log_minutes": 4.0, "visibility.device_hour_price": 3.0, "steps": 20})
    now = [0.0]
    monkeypatch.setattr(monitoring.time, "perf_counter", lambda: now[0])
    with Log(tmp_path, 0, config, Throughput(8, None, None)) as log:
        for step in range(1, 8):
            now[0] += 90.0
            log.step(step, {"student_loss": np.float32(step)}, {}, False)
            if step == 1:
                assert "step 1: loss 1, after 90 s" in capsys.readouterr().out
    # A step of 90 s is logged when 4 minutes have passed: the third and the sixth.
    assert [line["step"] for line in read_history(tmp_path)] == [3, 6]
    shown = dict(part.split("=") for part in log.bar.postfix.split(", "))
    assert float(shown["hours_to_go"]) == pytest.approx(14 * 90 / 3600, rel=0.01)
    assert float(shown["cost"]) == pytest.approx(8 * 3 * 6 * 90 / 3600, rel=0.01)


def test_tags_are_grouped_and_learning_rates_logged(make_config, check_events, tmp_path):
    config = make_config({"log_every": 1})
    with Log(tmp_path, 0, config, Throughput(8, None, None)) as log:
        metrics = {name: np.float32(1) for name in ("student_loss", "vsd", "latent_reward", "latent_mean")}
        log.step(11, metrics, {"reward_generated": 1.0}, True)
    check_events(tmp_path)
    names = read_history(tmp_path)[0].keys() - {"step"}
    group = {name: next(g for g, p in monitoring.GROUPS.items() if re.match(p, name)) for name in names}
    assert group["vsd"] == group["student_loss"] == "loss" and group["latent_mean"] == "latents"
    assert group["latent_reward"] == group["reward_generated"] == "reward"
    rate = config.student.optimiser.learning_rate  # its warm-up of ten steps is over
    assert read_history(tmp_path)[0]["learning_rate_student"] == pytest.approx(rate, rel=0.1)
