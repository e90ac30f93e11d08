"""Eight virtual CPU devices, a reused random key is an error, annotated shapes are checked.

A test that passes a wrong value to see our own error is named `test_bad_...` and goes unchecked."""

import contextlib
import json
import os
import re
import resource
import runpy
import shutil
import struct
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jaxtyping
import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dollar_jax.config import DistillConfig, distill_config
from dollar_jax.distributed import share_cpu

jax.config.update("jax_num_cpu_devices", 8)
share_cpu(8)
jax.config.update("jax_debug_key_reuse", True)
# Half of the time is compilation, and half of that its optimisations; `whole_compilation` brings them back.
jax.config.update("jax_disable_most_optimizations", True)

# Not where registered dataclasses are: `jax.tree.map` may put anything into the fields of those.
CHECKED = ["losses", "models", "sampling", "schedule"]
jaxtyping.install_import_hook([f"dollar_jax.{name}" for name in CHECKED], "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs live in pytest's cache: a second run compiles only what has changed."""
    if cache := getattr(config, "cache", None):
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session", autouse=True)
def _memory_is_as_the_system_has_it() -> Iterator[None]:
    """A command run here would have all threads of this process share one heap, which compilers leave in pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dollar_jax.cli.base.ctypes", SimpleNamespace())
        yield


@pytest.fixture(autouse=True)
def _types_are_checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    unchecked = request.node.name.startswith("test_bad_")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", unchecked)


TINY = {
    "batch_size": 8,
    "steps": 20,
    "log_every": 1,
    "mesh.data": 1,
    "vsd.guidance_weight": 1.0,
    "fake_score.samples": "fresh",
    "compute.remat": "none",
    "student.optimiser.name": "adamw",
    "student.optimiser.learning_rate": 3e-4,
    "consistency.skip": 2,
    "student.timesteps": (1000.0, 700.0, 400.0),
    "reward.rewards": ({"name": "compressibility", "weight": 1.0, "folder": None},),
    "reward.samples": 2,
    "reward.replay": 12,
    "reward.batch_size": 8,
    "reward.updates": 2,
    "reward.start_step": 0,
    "reward.head.width": 8,
    "visibility.samples_every": 0,
}


@pytest.fixture(scope="session")
def get_config() -> Callable[..., ConfigDict]:
    """`get_config` of configs/demo.py."""
    return runpy.run_path(str(Path(__file__).parents[1] / "configs" / "demo.py"))["get_config"]


@pytest.fixture(scope="session")
def make_config(get_config: Callable[..., ConfigDict]) -> Callable[..., DistillConfig]:
    """configs/demo.py made tiny, with settings changed by their dotted names: `{"vsd.weight": 0.0}`."""

    def make(changes: dict[str, Any] | None = None) -> DistillConfig:
        config = get_config()
        config.update_from_flattened_dict({**TINY, **(changes or {})})
        return distill_config(config)

    return make


@pytest.fixture(scope="module")
def whole_compilation() -> Iterator[None]:
    """For tests that look at what the compiler makes of a program, or need its speed."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def shown_events(workdir: Path) -> list[tuple[int, str, float | None]]:
    """(step, tag, value) of every event that TensorBoard shows of a run, in its order, videos without a value.

    A file is a row of records: length, its checksum, so many bytes, their checksum. Where a run starts again, what
    came before it at its step or later is not shown."""
    shown: list[tuple[int, str, float | None]] = []
    for path in sorted((workdir / "events").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                shown = [old for old in shown if old[0] < event.step]
            for value in event.summary.value:
                shown.append((event.step, value.tag, value.simple_value if value.HasField("simple_value") else None))
    return shown


@pytest.fixture(scope="session")
def check_events() -> Callable[[Path], list[int]]:
    """Asserts that a run's TensorBoard events are its history: no resumption has doubled or lost one.

    Returns the steps that have a video."""

    def check(workdir: Path) -> list[int]:
        lines = [json.loads(line) for line in (workdir / "history.jsonl").read_text().splitlines()]
        logged = {(line["step"], tag): value for line in lines for tag, value in line.items() if tag != "step"}
        shown = shown_events(workdir)
        # Tags are grouped, as loss/vsd.
        scalars = [(step, tag.rpartition("/")[2], value) for step, tag, value in shown if value is not None]
        assert sorted((step, tag) for step, tag, _ in scalars) == sorted(logged)
        for step, tag, value in scalars:
            assert value == pytest.approx(logged[step, tag], rel=1e-6)
        return [step for step, tag, _ in shown if tag == "samples/teacher_left_student_right"]

    return check


class ToyTokenizer:
    """A word's length is its id."""

    def __call__(self, prompts, max_length, **_):
        ids = np.zeros((len(prompts), max_length), np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            words = [len(word) for word in prompt.split()][:max_length] or [1]
            row[: len(words)] = words
        return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}


@pytest.fixture(scope="session")
def make_pipeline() -> Callable[..., Any]:
    """A Wan pipeline of toy size with random weights, made by our own code; its tokenizer is the default domain's."""
    from dollar_jax.data import shapes
    from dollar_jax.data.vocabulary import build_tokenizer
    from dollar_jax.models.umt5 import UMT5Config
    from dollar_jax.models.wan import WanConfig
    from dollar_jax.models.wan_vae import WanVAEConfig
    from dollar_jax.schedule import Schedule
    from dollar_jax.weights.families import COMPONENTS, WAN
    from dollar_jax.weights.pipeline import Component, Pipeline

    def make(layers: int = 1, scale: float = 0.3, tokenizer: Any = None) -> Pipeline:
        configs = (
            WanConfig(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=16,
                freq_dim=16,
                ffn_dim=32,
                num_layers=layers,
                rope_max_seq_len=32,
            ),
            WanVAEConfig(
                base_dim=4,
                z_dim=4,
                dim_mult=(1, 1, 1),
                num_res_blocks=1,
                temperal_downsample=(True, True),
                latents_mean=(0.1, 0.2, 0.3, 0.4),
                latents_std=(1.0, 2.0, 3.0, 4.0),
                in_channels=12,
                out_channels=12,
                patch_size=2,
            ),
            UMT5Config(vocab_size=24, d_model=16, d_kv=8, d_ff=32, num_layers=layers, num_heads=2),
        )
        parts = []
        for name, config in zip(COMPONENTS, configs, strict=True):
            network, rng = getattr(WAN, name).network(config), np.random.default_rng(0)
            values = [scale * rng.standard_normal(x.shape, np.float32) for x in jax.tree.leaves(network.shapes)]
            params = jax.tree.unflatten(jax.tree.structure(network.shapes), map(np.float32, values))
            parts.append(Component(config, network, params))
        tokenizer = tokenizer or build_tokenizer(shapes.VOCABULARY)
        return Pipeline(WAN, *parts, tokenizer, Schedule("rf", "velocity", shift=3.0))

    return make


@pytest.fixture(scope="session")
def toy_generator(make_pipeline: Callable[..., Any]) -> Any:
    """A random pipeline of toy size: prompts of three words, clips of 5 × 32 × 32."""
    from dollar_jax.config import SamplingConfig
    from dollar_jax.generate import Generator

    pipeline = make_pipeline(scale=0.2, tokenizer=ToyTokenizer())
    return Generator(pipeline, 3, SamplingConfig(50, 1.0, 0.0), (5, 32, 32))


@pytest.fixture(scope="session")
def save_wan() -> Callable[..., Any]:
    """Writes a tiny Wan pipeline as the hub has them: UniPC, and random weights in every part, `clip` an image encoder.

    A boundary_ratio asks for a second transformer. Gives diffusers' pipeline."""
    import diffusers
    import torch
    import transformers
    from diffusers.pipelines.wan import pipeline_wan_i2v

    from dollar_jax.data import shapes
    from dollar_jax.data.vocabulary import build_tokenizer

    # diffusers' image-to-video pipeline cleans prompts by it, and has to find it.
    vars(pipeline_wan_i2v).setdefault("ftfy", types.SimpleNamespace(fix_text=lambda text: text))
    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    heads |= {"text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    levels = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    levels |= {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    words = {"vocab_size": 24, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    sight = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    sight |= {"image_size": 32, "patch_size": 8, "hidden_act": "gelu"}

    def save(
        folder: Path,
        flow_shift: float = 3.0,
        pipeline: str = "WanPipeline",
        transformer: Any = None,
        vae: Any = None,
        clip: bool = False,
        **options: Any,
    ) -> Any:
        torch.manual_seed(0)
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        )
        networks = {
            "transformer": diffusers.WanTransformer3DModel(**heads | (transformer or {})),
            "vae": diffusers.AutoencoderKLWan(**levels | (vae or {})),
            "text_encoder": transformers.UMT5EncoderModel(
                transformers.UMT5Config(**words, feed_forward_proj="gated-gelu")
            ),
        }
        if clip:
            size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
            options["image_processor"] = transformers.CLIPImageProcessorPil(**size)
            networks["image_encoder"] = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sight))
        if "boundary_ratio" in options:
            networks["transformer_2"] = diffusers.WanTransformer3DModel(**heads | (transformer or {}))
        with torch.no_grad():
            for network in networks.values():
                for parameter in network.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        parts = {"tokenizer": build_tokenizer(shapes.VOCABULARY), "scheduler": scheduler, **networks}
        made = getattr(diffusers, pipeline)(**parts, **options)
        made.save_pretrained(folder)
        return made

    return save


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the first frame of a clip of moving shapes, 32 × 32."""
    from PIL import Image

    from dollar_jax.data import shapes

    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(shapes.example(3, "train", 0)[0][0]).save(path)
    return path


@pytest.fixture(scope="session")
def teacher(make_pipeline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that pipeline, for tests that only read it."""
    from dollar_jax.weights.pipeline import save_pipeline

    folder = tmp_path_factory.mktemp("teacher")
    save_pipeline(folder, make_pipeline())
    return folder


@pytest.fixture(scope="session")
def make_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """What `dollar prepare` leaves of eight clips of moving shapes, 5 × 32 × 32, with that teacher."""
    from dollar_jax import cli
    from dollar_jax.data import shapes
    from dollar_jax.video import encode_mp4

    def make(teacher: Path, fps: int, *flags: str) -> Path:
        source, out = tmp_path_factory.mktemp("videos"), tmp_path_factory.mktemp("prepared") / "data"
        for i in range(8):
            video, caption = shapes.example(3, "train", i)
            (source / f"{i}.mp4").write_bytes(encode_mp4(video[:5], fps=fps))
            (source / f"{i}.txt").write_text(str(caption))
        given = [f"--source={source}", f"--teacher={teacher}", f"--out={out}", "--workers=1", *flags]
        assert cli.main(["prepare", *given, "--frames=5", "--height=32", "--width=32"]) == 0
        return out

    return make


@pytest.fixture(scope="session")
def two_steps() -> dict[str, Any]:
    """Settings of a run of two steps with all losses, on data of its own."""
    return {
        "steps": 2,
        "batch_size": 8,
        "log_every": 1,
        "data.train_videos": 8,
        "mesh.fsdp": 8,
        "student.timesteps": (1000.0, 700.0),
        "consistency.skip": 1,
        "fake_score.updates": 1,
        "reward.samples": 2,
        "reward.replay": 8,
        "reward.batch_size": 8,
        "reward.updates": 1,
        "reward.start_step": 0,
        "reward.head.width": 8,
        "sampling.num_steps": 2,
        "visibility.samples_every": 0,
    }


@pytest.fixture(scope="session")
def assert_diffusers_draws() -> Callable[..., Any]:
    """The teacher of a generator draws two videos as diffusers' pipeline does from the same noise, by UniPC.

    `weight` is the guidance's, `low` of a second transformer. Gives the latents and diffusers' pipeline."""
    import diffusers
    import torch
    from PIL import Image

    from dollar_jax.generate import video_keys
    from dollar_jax.video import read_image

    def check(folder: Path, generator: Any, weight: float, low: float | None = None, image: Path | None = None) -> Any:
        prompts = ["a small red circle moving left slowly", "a large cyan triangle moving up"]
        frames, height, width = generator.clip
        steps, keys = generator.sampling.num_steps, video_keys(0, len(prompts))
        if image:
            generator.continue_from(dict.fromkeys(prompts, image))
        draw = generator.teacher_sampler(steps, weight)
        latent = draw(generator.pipeline.params, keys, *generator.condition(prompts))
        theirs = (diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline).from_pretrained(folder)
        shift = generator.pipeline.schedule.shift
        theirs.scheduler = diffusers.UniPCMultistepScheduler.from_config(theirs.scheduler.config, flow_shift=shift)
        theirs.set_progress_bar_config(disable=True)
        drawn = theirs(
            **({"image": Image.fromarray(read_image(image, height, width))} if image else {}),
            **({} if low is None else {"guidance_scale_2": low + 1}),
            prompt=prompts,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=weight + 1,
            latents=torch.tensor(np.asarray(generator.noise(keys))).permute(0, 4, 1, 2, 3),
            output_type="np",
            max_sequence_length=generator.max_text_length,
        ).frames
        assert drawn.std() > 0.01 and np.mean((drawn > 0) & (drawn < 1)) > 0.5, "nothing to compare"
        np.testing.assert_allclose(generator.decode(latent), drawn, atol=1e-4)
        return latent, theirs

    return check


@pytest.fixture(scope="session")
def network_programs() -> Callable[..., Any]:
    """`teacher_programs` of a network and a schedule, without a pipeline around them."""
    from dollar_jax.programs import teacher_programs

    def build(config, network, schedule, latent, text, devices=None, pixels=None, real=True, decoder=()):
        parts = {"transformer": SimpleNamespace(network=network), "schedule": schedule}
        parts["vae"] = SimpleNamespace(network=SimpleNamespace(shapes=decoder))
        shapes = {"latent_shape": latent, "text_shape": text, "image_shapes": lambda rows: None}
        generator: Any = SimpleNamespace(pipeline=SimpleNamespace(**parts), **shapes)
        return teacher_programs(config, generator, pixels, devices, real)

    return build


@pytest.fixture(scope="session")
def own_config() -> Callable[..., Path]:
    """A configuration in a file of the user's own, which changes the demo's settings by their dotted names."""

    def write(folder: Path, changes: dict[str, Any], losses: str = "vsd+cd+lrm") -> Path:
        (folder / "own.py").write_text(
            "from dollar_jax.experiment import experiment\n\n\n"
            f"def get_config(losses={losses!r}):\n    return experiment('demo', losses, {changes!r})\n"
        )
        return folder / "own.py"

    return write


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory, save_wan):
    """A tiny Wan pipeline as from the hub: the transformer in several shards, UniPC with Wan's flow shift."""
    folder = tmp_path_factory.mktemp("wan")
    pipeline = save_wan(folder, transformer={"rope_max_seq_len": 32})
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="20KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def full_disk() -> Callable[[int], Any]:
    """A context in which no file may have more than so many bytes."""

    @contextlib.contextmanager
    def limit(most: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def assert_card_samples(monkeypatch):
    """The card's own snippet, executed in its folder, draws the video that we draw from the same noise.

    `axes` turns our latents' axes into diffusers'; `drawers` are the modules of diffusers that draw noise.
    Gives the snippet's variables, and how many of our draws of noise it did not make."""
    import torch

    from dollar_jax.sampling import few_step_predictions
    from dollar_jax.schedule import keep_given

    def check(exported, generator, params, times, axes, drawers, image=None):
        (snippet,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
        (prompt,) = re.findall(r'^    "(.*)",$', snippet, re.MULTILINE)
        pipeline = generator.pipeline
        noise, told = jax.random.normal(jax.random.key(2), (1, *generator.latent_shape)), None
        if image is not None:
            shutil.copy(image, exported / "image.png")
            generator.continue_from({prompt: image})
            given = jax.tree.map(jax.numpy.asarray, generator.condition([prompt]).given)
            told = given if pipeline.family.conditioned else None
            noise = noise if pipeline.family.conditioned else keep_given(pipeline.schedule, given, noise)
        renoise = [jax.random.normal(k, noise.shape) for k in jax.random.split(jax.random.key(3), len(times))]

        @jax.jit
        def draw(params, noise, text, told):
            denoiser = generator._denoiser(params, text, told)
            ode = generator.student.sampler == "ode"
            return few_step_predictions(denoiser, times, noise, jax.random.key(3), ode)[-1]

        latent = draw(params, noise, generator.text([prompt]), told)
        ours = generator.decode(latent)[0]

        drawn = iter([noise, *renoise])

        def randn_tensor(shape, **_):
            value = torch.tensor(np.asarray(next(drawn))).permute(*axes)
            assert value.shape == shape
            return value

        for module in drawers:
            monkeypatch.setattr(module, "randn_tensor", randn_tensor)
        monkeypatch.chdir(exported)
        monkeypatch.syspath_prepend(exported)
        scope = {}
        exec(snippet, scope)
        assert ours.std() > 0.01 and np.mean((ours > 0) & (ours < 1)) > 0.5, "nothing to compare"
        np.testing.assert_allclose(scope["video"], ours, atol=1e-4)
        return scope, len(list(drawn))

    return check
