"""Wan 2.2's A14B, tiny: two experts imported, sampled, distilled one by one and exported as a pair, as diffusers.

With a text alone, and told of an image by further channels."""

import collections
import dataclasses
import json
import shutil
import types

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from diffusers.utils import torch_utils

from dollar_jax import cli, objectives
from dollar_jax.checkpoint import Checkpoints
from dollar_jax.config import ConsistencyConfig, VSDConfig
from dollar_jax.distillation import Batch, Distillation, Frozen, Networks, References
from dollar_jax.generate import make_generator, student_network, student_shapes
from dollar_jax.models import lora
from dollar_jax.programs import teacher_programs
from dollar_jax.run import CHECKPOINTS, drawing_config, read_config, record_config, restore_student
from dollar_jax.schedule import Schedule
from dollar_jax.state import as_items
from dollar_jax.video import read_video
from dollar_jax.weights.pipeline import load_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't find sharding info:UserWarning")
STEPS, BOUNDARY = 8, 875.0
PROMPTS = ["a small red circle moving left slowly", "a large cyan triangle moving up"]
TIMES = {"high": (1000.0, 954.5), "low": (874.0, 700.0)}
PHASE = {
    "high": {"expert": "high", "student.timesteps": TIMES["high"]},
    "low": {"expert": "low", "student.timesteps": TIMES["low"], "student.input": "forward"},
}
BOTH = {"sampling.guidance_weight": 3.0, "sampling.low_guidance_weight": 1.0, "sampling.shift": 12.0}
BOTH |= {"sampling.solver": "unipc", "sampling.num_steps": STEPS, "data.train_videos": 8}
HIGH, LOW = (Schedule("rf", "velocity", shift=12.0, boundary=BOUNDARY, expert=name) for name in ("high", "low"))


@pytest.fixture(scope="module")
def kind(request):
    """What a clip is made of: "text", or an "image" too."""
    return getattr(request, "param", "text")


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory, save_wan):
    """As from the hub: two transformers, their boundary, and UniPC with the flow shift 3 of the converted file."""
    path = tmp_path_factory.mktemp("a14b")
    if kind == "text":
        save_wan(path, boundary_ratio=BOUNDARY / 1000)
    else:
        save_wan(path, pipeline="WanImageToVideoPipeline", transformer={"in_channels": 12}, boundary_ratio=0.9)
    return path


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("imported") / "teacher"
    assert cli.main(["import", str(folder), str(target)]) == 0
    assert (target / "transformer_2" / "params").is_dir()
    return target


@pytest.mark.parametrize("kind", ["text", "image"], indirect=True)
def test_both_experts_draw_what_diffusers_draws(
    kind, folder, teacher, picture, make_config, assert_diffusers_draws, monkeypatch, capsys
):
    """UniPC, whose history crosses the boundary, each expert with its guidance, at the configuration's shift."""
    shift, image = (12.0, None) if kind == "text" else (5.0, picture)
    generator = make_generator(make_config({**BOTH, "sampling.shift": shift, "teacher": str(teacher)}), (5, 32, 16))
    assert f"config.sampling.shift is {shift:g}, and 3 in the scheduler's file" in capsys.readouterr().err
    assert generator.pipeline.schedule.boundary == {"text": BOUNDARY, "image": 900.0}[kind]
    asked, forward = collections.Counter(), diffusers.WanTransformer3DModel.forward

    def counted(self, *args, **kwargs):
        asked[id(self)] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.WanTransformer3DModel, "forward", counted)
    assert_diffusers_draws(folder, generator, 3.0, low=1.0, image=image)
    assert len(asked) == 2 <= min(asked.values()) and sum(asked.values()) == 2 * STEPS, "both experts take part"


@pytest.fixture(scope="module")
def pair(teacher, make_config, tmp_path_factory):
    """Two runs of random students, of both experts whole or of adapters, as a checkpoint leaves them."""

    def save(**changes):
        runs = []
        for seed, (name, phase) in enumerate(PHASE.items()):
            workdir = tmp_path_factory.mktemp(name)
            config = make_config({**BOTH, **phase, "teacher": str(teacher), **changes})
            record_config(config, workdir)
            network = load_pipeline(teacher).transformer.network
            shapes = student_shapes(network, config.student.layers)
            shapes = lora.adapters(student_network(network, config.lora).shapes) if config.lora.rank else shapes
            rng = np.random.default_rng(seed)
            params = jax.tree.map(lambda x, rng=rng: jnp.asarray(0.15 * rng.normal(size=x.shape), "float32"), shapes)
            with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
                checkpoints.save(7 + seed, {"ema": {"ema": params}})
            runs.append(workdir)
        return runs

    return save


@pytest.fixture(scope="module")
def runs(pair):
    """Of one of the teacher's two blocks."""
    return pair(**{"student.layers": 1})


def test_the_exported_pair_is_the_student(runs, tmp_path, assert_card_samples, capsys):
    high, low = runs
    out = tmp_path / "student"
    assert cli.main(["export", f"--workdir={high}", str(out)]) == 2
    assert "distilled the high expert" in (said := capsys.readouterr().err) and "--low" in said and not out.exists()
    assert cli.main(["export", f"--workdir={high}", f"--low={low}", str(out)]) == 0
    config = drawing_config(high, low)
    assert config.student.timesteps == TIMES["high"] + TIMES["low"]
    generator = make_generator(config)
    params = restore_student(high, generator, low=low)
    drawers = (pipeline_wan, torch_utils)
    snippet, undrawn = assert_card_samples(out, generator, params, config.student.timesteps, (0, 4, 1, 2, 3), drawers)
    assert undrawn == 1 and snippet["pipe"].config.boundary_ratio == BOUNDARY / 1000
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["step"], manifest["low"]["step"]) == (7, 8)
    shutil.rmtree(out / "__pycache__", ignore_errors=True)
    assert cli.main(["import", str(out), str(tmp_path / "again")]) == 0
    again = load_pipeline(tmp_path / "again")
    for ours, theirs in zip(params, (again.transformer, again.transformer_2), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs.params)


def test_an_exported_pair_of_adapters_is_the_merged_one(folder, pair, tmp_path):
    high, low = pair(**{"lora.rank": 2, "lora.alpha": 6.0})
    both = [f"--workdir={high}", f"--low={low}"]
    assert cli.main(["export", *both, "--adapter", str(tmp_path / "adapter")]) == 0
    assert cli.main(["export", *both, str(tmp_path / "merged")]) == 0
    assert "load_into_transformer_2" in (tmp_path / "adapter" / "README.md").read_text()
    pipe = diffusers.WanPipeline.from_pretrained(folder)
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 4, 4),
        "timestep": torch.tensor([300.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 3, 16),
        "return_dict": False,
    }
    names = "transformer", "transformer_2"
    with torch.no_grad():
        plain = [getattr(pipe, name)(**inputs)[0] for name in names]
        pipe.load_lora_weights(str(tmp_path / "adapter"))
        pipe.load_lora_weights(str(tmp_path / "adapter" / "transformer_2"), load_into_transformer_2=True)
        for name, before in zip(names, plain, strict=True):
            merged = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "merged" / name)(**inputs)[0]
            found = getattr(pipe, name)(**inputs)[0]
            assert (found - before).abs().max() > 0.01
            np.testing.assert_allclose(found, merged, rtol=1e-4, atol=1e-4)


def test_sample_draws_with_both(runs, teacher, make_config, tmp_path, capsys):
    high, low = runs
    given = [f"--prompt={PROMPTS[0]}", "--num=1", f"--out={tmp_path / 'video.gif'}"]
    sizes = ["--frames=5", "--height=32", "--width=16"]
    assert cli.main(["sample", f"--workdir={high}", f"--low={low}", *given, *sizes]) == 0
    assert read_video(tmp_path / "video.gif").std() > 1
    assert cli.main(["sample", f"--workdir={low}", "--teacher", "--steps=4", *given, *sizes]) == 0
    made = json.loads((tmp_path / "video.gif.manifest.json").read_text())
    assert (made["guidance_weight"], made["low_guidance_weight"]) == (3.0, 1.0)
    other, whole = tmp_path / "other", tmp_path / "whole"
    record_config(make_config({**BOTH, **PHASE["low"], "teacher": "elsewhere"}), other)
    record_config(make_config({**BOTH, **PHASE["low"], "teacher": str(teacher)}), whole)
    capsys.readouterr()
    for flags, said in (
        ([f"--workdir={high}"], "distilled the high expert"),
        ([f"--workdir={low}", f"--low={high}"], "where 'high' of"),
        ([f"--workdir={high}", f"--low={other}"], "'low' of elsewhere"),
        ([f"--workdir={high}", f"--low={whole}"], "layers None, where"),
    ):
        assert cli.main(["sample", *flags, *given]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="distilled the low expert"):
        drawing_config(low)


@pytest.mark.parametrize("name", [pytest.param("high", marks=pytest.mark.slow), "low"])
def test_one_expert_is_trained_and_a_resumed_run_is_the_same(name, teacher, own_config, tmp_path):
    own = own_config(
        tmp_path,
        {
            **BOTH,
            **PHASE[name],
            "teacher": str(teacher),
            "steps": 2,
            "batch_size": 8,
            "checkpoint_every": 1,
            "log_every": 1,
            "mesh.fsdp": 8,
            "fake_score.updates": 1,
            "consistency.num_steps": 20,
            "consistency.skip": 2,
            "visibility.samples_every": 0,
        },
        "vsd+cd",
    )
    train = ["train", f"--config={own}"]
    assert cli.main([*train, f"--workdir={tmp_path / 'whole'}"]) == 0
    assert cli.main([*train, f"--workdir={tmp_path / 'parts'}", "--config.steps=1"]) == 0
    assert cli.main([*train, f"--workdir={tmp_path / 'parts'}"]) == 0
    generator = make_generator(read_config(tmp_path / "whole"))
    expert = {"high": "transformer", "low": "transformer_2"}[name]
    jax.tree.map(
        np.testing.assert_array_equal,
        generator.pipeline.transformer.params,
        getattr(load_pipeline(teacher), expert).params,
    )
    assert generator.pipeline.transformer_2 is None
    states = []
    for run in ("whole", "parts"):
        history = [json.loads(line) for line in (tmp_path / run / "history.jsonl").read_text().splitlines()]
        assert [row["step"] for row in history] == [1, 2] and all(np.isfinite(row["vsd"]) for row in history)
        programs = teacher_programs(read_config(tmp_path / run), generator, None)
        with Checkpoints(tmp_path / run / CHECKPOINTS) as checkpoints:
            shapes = programs.state_shapes
            shapes = dataclasses.replace(shapes, key=jax.eval_shape(jax.random.key_data, shapes.key))
            states.append(checkpoints.restore(as_items(shapes)))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "image"], indirect=True)
def test_from_videos_to_a_pair_of_students(kind, teacher, make_data, picture, tmp_path, assert_card_samples, capsys):
    """The commands of the published teachers' configurations, with what makes them small."""
    data, config = (
        make_data(teacher, 16, "--max_text_length=12"),
        {"text": "wan22_a14b", "image": "wan22_a14b_i2v"}[kind],
    )
    small = {"teacher": teacher, "data.name": data, "data.max_text_length": 12, "batch_size": 8, "steps": 2}
    small |= {"checkpoint_every": 2, "log_every": 1, "fake_score.updates": 1, "consistency.num_steps": 20}
    small |= {"consistency.skip": 2, "sampling.num_steps": 4, "sampling.negative_prompt": "'a blue circle'"}
    small |= {"compute.dtype": "float32", "compute.teacher_dtype": "float32"}
    flags, runs = [f"--config.{name}={value}" for name, value in small.items()], {}
    for name in ("high", "low"):
        runs[name] = tmp_path / name
        assert cli.main(["train", f"--config={config}:{name}", *flags, f"--workdir={runs[name]}"]) == 0
        history = [json.loads(line) for line in (runs[name] / "history.jsonl").read_text().splitlines()]
        assert [row["step"] for row in history] == [1, 2]
        assert all(np.isfinite(value) for row in history for value in row.values())
    both, given = [f"--workdir={runs['high']}", f"--low={runs['low']}"], [f"--image={picture}"] * (kind == "image")
    for whose in ([], ["--teacher"]):
        sample = ["sample", *both[: 2 - len(whose)], *whose, f"--prompt={PROMPTS[0]}", "--num=1"]
        out = tmp_path / f"video{len(whose)}.gif"
        if given:
            assert cli.main([*sample, f"--out={out}"]) == 2 and "give --image" in capsys.readouterr().err
        assert cli.main([*sample, f"--out={out}", *given]) == 0
        assert read_video(out).std() > 1

    suite, videos = tmp_path / "VBench_full_info.json", tmp_path / "vbench"
    suite.write_text(json.dumps([{"prompt_en": prompt, "dimension": ["subject_consistency"]} for prompt in PROMPTS]))
    for prompt in PROMPTS:
        shutil.copy(picture, tmp_path / f"{prompt}.jpg")
    listed = [f"--prompts_file={suite}", "--num=1", *[f"--images={tmp_path}"] * bool(given)]
    assert cli.main(["evaluate", f"--vbench={videos}", *both, *listed]) == 0
    assert {path.name for path in videos.iterdir()} == {f"{prompt}-0.mp4" for prompt in PROMPTS}
    assert min(read_video(path).std() for path in videos.iterdir()) > 1

    student = tmp_path / "student"
    assert cli.main(["export", *both, str(student)]) == 0
    own = drawing_config(*runs.values())
    generator = make_generator(own)
    params = restore_student(runs["high"], generator, low=runs["low"])
    drawers = (pipeline_wan_i2v if given else pipeline_wan, torch_utils)
    image = picture if given else None
    found = assert_card_samples(student, generator, params, own.student.timesteps, (0, 4, 1, 2, 3), drawers, image)
    assert found[1] == 1 and len(own.student.timesteps) == 4
    shutil.rmtree(student / "__pycache__", ignore_errors=True)
    assert cli.main(["import", str(student), str(tmp_path / "again")]) == 0


def spy(schedule):
    """A denoiser that is nothing at a time outside of a schedule's range."""
    low, high = schedule.time_range

    def apply(params, x, t, text):
        t = t.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where((t >= low) & (t < high), params["x"] * x + params["t"] * t / 1000, jnp.nan)

    return apply


@pytest.mark.parametrize("times", ["grid", "student"])
@pytest.mark.parametrize("name, schedule", [("high", HIGH), ("low", LOW)])
def test_no_network_is_asked_at_a_time_of_the_other_expert(name, schedule, times, make_config):
    """So that neither expert gets a gradient there; without a range the same step meets such times."""
    changes = {"consistency.times": times, "consistency.num_steps": 20, "vsd.score_shift": 5.0}
    config = make_config({**PHASE[name], "data.train_videos": 8, "reward.rewards": (), **changes})
    params = {"x": jnp.float32(0.4), "t": jnp.float32(-0.3)}
    x0, text = jax.random.normal(jax.random.key(1), (8, 2, 3, 2, 5)), jax.random.normal(jax.random.key(2), (8, 3, 4))

    def gradients(schedule, key):
        d = Distillation(config, Networks(spy(HIGH if name == "high" else LOW), None), schedule)
        frozen = Frozen(params, text[:1])
        references = References(params, params, {}, None, frozen, jnp.int32(0))
        batch = Batch(x0, text)
        keys = jax.random.split(key)
        student = jax.grad(lambda p: objectives.student(d, p, references, batch, keys[0])[0])(params)
        fake = jax.grad(lambda p: objectives.fake_score(d, p, params, batch, keys[1])[0])(params)
        return student, fake

    run = jax.jit(gradients, static_argnums=0)
    found = np.array([jax.tree.leaves(run(schedule, jax.random.key(i))) for i in range(10)])
    assert np.isfinite(found).all() and np.abs(found).min(0).max() > 0
    whole = dataclasses.replace(schedule, expert=None)
    assert any(np.isnan(jax.tree.leaves(run(whole, jax.random.key(i)))).any() for i in range(10))


@pytest.mark.parametrize("schedule", [HIGH, LOW], ids=["high", "low"])
def test_score_times_are_those_of_both_cut_at_the_boundary(schedule):
    config = VSDConfig(score_range=(0.02, 0.98), score_shift=5.0)
    inside = np.array(objectives.score_times(config, schedule, jax.random.key(0), 200_000))
    low, high = schedule.time_range
    assert ((inside >= low) & (inside < high)).all()
    u = 0.02 + 0.96 * np.random.default_rng(0).random(400_000)
    t = 1000 * 5 * u / (1 + 4 * u)
    t = t[(t >= low) & (t < high)]
    parts = np.linspace(0, 1, 11)
    np.testing.assert_allclose(np.quantile(inside, parts), np.quantile(t, parts), atol=6)


def test_the_grid_is_cut_at_the_boundary():
    """By hand: 10 steps of shift 12 are at 1000, 990.8, 979.6, 965.5, 947.4, 923.1, 888.9, 837.2, 750, 571.4 and 0."""
    c = ConsistencyConfig(num_steps=10, skip=2)
    for schedule, starts in ((HIGH, (0, 5)), (LOW, (7, 9))):
        assert objectives.grid_starts(c, schedule) == starts
        drawn = np.array(objectives.grid_segments(c, schedule, jax.random.key(0), 200))
        assert {round(float(t), 1) for t in drawn[0]} == {
            HIGH: {1000.0, 990.8, 979.6, 965.5, 947.4},
            LOW: {837.2, 750.0},
        }[schedule]
        low, high = schedule.time_range
        assert ((drawn >= low) & (drawn < high)).all()
    with pytest.raises(ValueError, match="leaves no skip 4"):
        objectives.grid_starts(dataclasses.replace(c, skip=4), LOW)
    settings = types.SimpleNamespace(student=types.SimpleNamespace(timesteps=TIMES["high"]), consistency=c)
    segments = np.array(objectives.student_segments(settings, HIGH))
    np.testing.assert_allclose(segments, [[1000, 954.5], [977.25, 914.75], [954.5, BOUNDARY]], rtol=1e-6)


def test_what_does_not_fit_is_one_sentence(folder, teacher, make_config, tmp_path):
    def made(changes, draw=False):
        config = make_config({"teacher": str(teacher), "data.train_videos": 8, **changes})
        generator = make_generator(config, (5, 32, 16))
        return teacher_programs(config, generator, None)

    for changes, said in (
        ({}, "has two experts: set config.expert"),
        ({**PHASE["high"], "student.timesteps": (1000.0, 700.0)}, "must lie in the expert's range \\(875"),
        ({**PHASE["low"], "student.timesteps": (875.0, 700.0)}, "must lie in the expert's range \\(-inf, 875"),
        ({**PHASE["high"], "teacher": "moving_shapes"}, "this one has one: set it to None"),
        ({**PHASE["low"], "student.input": "backward"}, "config.student.input must be 'forward'"),
        ({**PHASE["high"], "visibility.samples_every": 1}, "config.visibility.samples_every to 0"),
    ):
        with pytest.raises(ValueError, match=said):
            made(changes)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    index = json.loads((broken / "model_index.json").read_text())
    for changes, said in (
        ({"boundary_ratio": None}, "boundary_ratio = None: two experts are"),
        ({"boundary_ratio": 875}, "and a ratio in 0..1"),
        ({"transformer_2": [None, None]}, "transformer_2 = None"),
    ):
        (broken / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(ValueError, match=said):
            load_pipeline(broken)
    (broken / "model_index.json").write_text(json.dumps(index))
    other = json.loads((broken / "transformer_2" / "config.json").read_text()) | {"num_layers": 1}
    (broken / "transformer_2" / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="describes another network"):
        load_pipeline(broken)
    shutil.rmtree(broken / "transformer_2")
    with pytest.raises(FileNotFoundError, match="transformer_2"):
        load_pipeline(broken)
