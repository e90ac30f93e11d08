"""Speed beside PyTorch: the networks, sampling and the whole distillation step, on the same weights and shapes.

    python benchmarks/speed.py --out=speed.md
    python benchmarks/speed.py --sizes demo --threads 2 --cases step --rivals diffusers --repeats 5

The rivals are diffusers' and transformers' own modules in eager PyTorch, the same under torch.compile, and for
50 steps diffusers' pipeline too. The step's rival is a plain PyTorch one below: the same algorithm on diffusers'
networks, fed with the same random numbers while it is checked. What is timed agrees before it is timed. Each number
of threads has a process of its own, held to as many cores; the implementations take turns there (A B A B ...), the
table has medians, and ratios of medians: below 1 ours is faster. Needs dollar_jax[test]."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

CASES = ("forward", "backward", "encode", "decode", "text", "teacher", "student", "step")
RIVALS = ("diffusers", "compiled", "pipeline")
STEPS, WEIGHT = 50, 1.0  # of the teacher's sampler; diffusers' guidance scale is 1 more
DIT = {"in_channels": 16, "out_channels": 16, "freq_dim": 256, "text_dim": 512, "attention_head_dim": 64}
VAE = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
ENCODER = {
    "d_kv": 64,
    "num_heads": 8,
    "d_model": 512,
    "d_ff": 1024,
    "vocab_size": 4096,
    "feed_forward_proj": "gated-gelu",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Videos at a time, the latent's frames, rows and columns, tokens of text, and the fields of the networks that are
    not the shipped teacher's. A VAE sees the clip that such a latent is of."""

    rows: int
    latent: tuple[int, int, int]
    tokens: int = 64
    dit: dict[str, Any] | None = None
    vae: dict[str, Any] | None = None
    encoder: dict[str, Any] | None = None
    cases: tuple[str, ...] = CASES


def dit(heads: int, layers: int) -> dict[str, Any]:
    return {**DIT, "num_attention_heads": heads, "num_layers": layers, "ffn_dim": 256 * heads}


SIZES = {
    "tiny": Size(2, (2, 4, 4), 12),
    "demo": Size(24, (5, 4, 4), 12),
    "36M": Size(
        2, (4, 36, 36), dit=dit(8, 8), encoder={**ENCODER, "num_layers": 8}, cases=("forward", "backward", "text")
    ),
    "100M": Size(1, (2, 36, 36), dit=dit(12, 10), cases=("forward", "backward")),
    "Wan 2.1's VAE": Size(1, (2, 8, 8), vae=VAE, cases=("encode", "decode")),
}


@dataclasses.dataclass
class Case:
    """A row: what is run, by implementation, and how far results may be apart, relative to the largest."""

    what: str
    runs: dict[str, Callable[[], Any]]
    tolerance: float = 1e-3


def cases(name: str, threads: int, wanted: set[str], rivals: set[str]) -> Iterator[Case]:
    """The rows of a size, one after another: each needs its memory."""
    import diffusers
    import jax
    import numpy as np
    import torch
    import transformers

    from dollar_jax import sampling, schedule, sharding
    from dollar_jax.config import changed
    from dollar_jax.data import shapes
    from dollar_jax.experiment import load
    from dollar_jax.generate import SHIPPED_TEACHERS, make_generator, sampling_mesh, transformer_options, video_keys
    from dollar_jax.program import Program
    from dollar_jax.reproduce import WITH_ADAM
    from dollar_jax.weights.table import import_params
    from dollar_jax.weights.umt5 import UMT5
    from dollar_jax.weights.vae import WAN_VAE
    from dollar_jax.weights.wan import WAN_TRANSFORMER

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    size, folder = SIZES[name], SHIPPED_TEACHERS["moving_shapes"]
    wanted = wanted & set(size.cases)
    rng, mesh = np.random.default_rng(0), sampling_mesh(load("demo").mesh, jax.local_devices()[:1])

    def component(kind: Any, model: Any, fields: dict[str, Any]) -> tuple[Any, Any]:
        """Ours with a PyTorch model's weights: network and parameters."""
        config = kind.read(fields)
        if kind is WAN_TRANSFORMER:
            config = dataclasses.replace(config, **transformer_options(load("demo").compute))
        network = kind.network(config)
        tensors = {key: value.detach().numpy() for key, value in model.state_dict().items()}
        return network, jax.device_put(import_params(kind.table(config, network.shapes), tensors, network.shapes))

    def random(model: Any) -> Any:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * (0.02 if parameter.ndim > 1 else 0.5))
        return model.eval()

    def ours(title: str, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        program, placed = Program(title, function), jax.device_put(arguments)
        return lambda: jax.block_until_ready(program(*placed))

    def theirs(function: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(function)

    def rows(
        what: str, mine: Callable[[], Any], make: Callable[[Any], Callable[[], Any]], model: Any, **more: Any
    ) -> Case:
        """A case whose rivals are made of a module, eager and compiled."""
        runs = {"ours": mine}
        if "diffusers" in rivals:
            runs["diffusers"] = make(model)
        if "compiled" in rivals:
            runs["compiled"] = make(compiled(model))
        return Case(f"{what}, {name}", runs, **more)

    if size.dit is None:
        model = diffusers.WanTransformer3DModel.from_pretrained(
            folder / "transformer", torch_dtype=torch.float32
        ).eval()
    else:
        model = random(diffusers.WanTransformer3DModel(**size.dit, rope_max_seq_len=64))
    fields = dict(model.config)
    x = rng.normal(size=(size.rows, *size.latent, 16)).astype(np.float32)
    t = np.linspace(1000, 100, size.rows, dtype=np.float32)
    text = rng.normal(size=(size.rows, size.tokens, fields["text_dim"])).astype(np.float32)
    x_t, t_t, text_t = channels_first(x), torch.tensor(t), torch.tensor(text)
    if wanted & {"forward", "backward"}:
        network, params = component(WAN_TRANSFORMER, model, fields)

        def forward(net: Any) -> Callable[[], Any]:
            return theirs(lambda: channels_last(velocity(net, x_t, t_t, text_t)))

        if "forward" in wanted:
            yield rows("DiT forward", ours("forward", network.apply, params, x, t, text), forward, model)
        if "backward" in wanted:
            weight = rng.normal(size=x.shape).astype(np.float32)
            weight_t = channels_first(weight)

            def loss(params: Any, *inputs: Any) -> Any:
                return (network.apply(params, *inputs[:3]) * inputs[3]).mean()

            def value_and_norm(params: Any, *inputs: Any) -> Any:
                value, grads = jax.value_and_grad(loss)(params, *inputs)
                return value, grads["proj_out"]["kernel"].T, grads

            def backward(net: Any) -> Callable[[], Any]:
                def run() -> Any:
                    net.zero_grad(set_to_none=True)
                    value = (velocity(net, x_t, t_t, text_t) * weight_t).mean()
                    value.backward()
                    return value.detach(), net.proj_out.weight.grad

                return run

            mine = ours("backward", value_and_norm, params, x, t, text, weight)
            yield rows("DiT forward and backward", lambda: mine()[:2], backward, model)
            model.zero_grad(set_to_none=True)
        del network, params
    if wanted & {"encode", "decode"}:
        if size.vae is None:
            vae = diffusers.AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
        else:
            vae = random(diffusers.AutoencoderKLWan(**size.vae))
        network, params = component(WAN_VAE, vae, dict(vae.config))
        generator = make_generator(load("demo"), mesh=mesh)
        factor = vae.config["scale_factor_spatial"]
        clip = 1 + 4 * (size.latent[0] - 1), factor * size.latent[1], factor * size.latent[2]
        config = WAN_VAE.read(dict(vae.config))
        placed = sharding.put(params, sharding.replicated(generator.own_mesh))  # once, as of the commands
        part = dataclasses.replace(generator.pipeline.vae, network=network, config=config, params=placed)
        pipeline = dataclasses.replace(generator.pipeline, vae=part)
        generator = dataclasses.replace(generator, pipeline=pipeline, clip=clip)
        latent = rng.normal(size=x.shape).astype(np.float32)
        video = rng.integers(0, 256, (size.rows, *clip, 3)).astype(np.uint8)
        mean, std = (torch.tensor(vae.config[f"latents_{k}"]).view(1, -1, 1, 1, 1) for k in ("mean", "std"))

        def encoder(net: Any) -> Callable[[], Any]:
            frames = channels_first(video) / 127.5 - 1
            return theirs(lambda: channels_last((net(frames, encode=True) - mean) / std))

        def decoder(net: Any) -> Callable[[], Any]:
            z = channels_first(latent)
            return theirs(lambda: channels_last((net(z * std + mean, encode=False) + 1) / 2))

        coder = Coder(vae)
        if "encode" in wanted:
            yield rows("VAE encode", lambda: generator.encode(video), encoder, coder)
        if "decode" in wanted:
            yield rows("VAE decode", lambda: generator.decode(latent), decoder, coder)
        del network, params, generator, pipeline, part, vae, coder
    if "text" in wanted:
        if size.encoder is None:
            encoder_model = transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        else:
            encoder_model = random(transformers.UMT5EncoderModel(transformers.UMT5Config(**size.encoder)))
        encoder_model = encoder_model.eval()
        network, params = component(UMT5, encoder_model, encoder_model.config.to_dict())
        ids = rng.integers(1, 20, (24, size.tokens)).astype(np.int32)
        mask = np.ones_like(ids)
        ids_t, mask_t = torch.tensor(ids), torch.tensor(mask)

        def states(net: Any) -> Callable[[], Any]:
            return theirs(lambda: net(input_ids=ids_t, attention_mask=mask_t).last_hidden_state)

        yield rows("Text encoder", ours("text", network.apply, params, ids, mask), states, encoder_model)
        del network, params, encoder_model
    if not wanted & {"teacher", "student", "step"}:
        return

    config = changed(load("demo", "vsd+cd"), WITH_ADAM | {"batch_size": 2 if name == "tiny" else 32})
    clip = 1 + 4 * (size.latent[0] - 1), 8 * size.latent[1], 8 * size.latent[2]
    generator = make_generator(config, clip, mesh)
    prompts = [str(caption) for caption in shapes.covering_captions()[: size.rows]]
    states, teacher = generator.text(prompts), generator.pipeline.transformer.params
    text_t, null_t = torch.tensor(states), torch.tensor(generator.null_text)
    keys = video_keys(0, size.rows)
    noise = channels_first(generator.noise(keys))
    steps = 2 if name == "tiny" else STEPS
    if "teacher" in wanted:
        grid = torch.tensor(schedule.timestep_grid(generator.pipeline.schedule, steps))
        draw = generator.teacher_sampler(steps, WEIGHT)
        arguments = draw.arguments(teacher, keys, states)

        def sample(net: Any) -> Callable[[], Any]:
            return theirs(lambda: channels_last(euler(guided(net, text_t, null_t, WEIGHT), noise, grid[:, None])))

        mine = lambda: jax.block_until_ready(draw.program(size.rows)(*arguments))  # noqa: E731
        case = rows(f"Teacher, {steps} steps with guidance", mine, sample, model)
        if "pipeline" in rivals:
            pipe = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
            pipe.set_progress_bar_config(disable=True)
            height, width = 8 * size.latent[1], 8 * size.latent[2]
            # On our grid: an even one down to 0, which the scheduler then shifts.
            even, set_timesteps = np.linspace(1, 1 / steps, steps), pipe.scheduler.set_timesteps
            pipe.scheduler.set_timesteps = lambda _, device=None: set_timesteps(sigmas=even, device=device)
            # With the prompts' states, as the other implementations are given them.
            how: dict[str, Any] = {"prompt_embeds": text_t, "negative_prompt_embeds": null_t.expand_as(text_t)}
            how |= {"height": height, "width": width, "num_frames": generator.clip[0], "num_inference_steps": steps}
            how |= {"guidance_scale": WEIGHT + 1, "output_type": "latent"}
            case.runs["pipeline"] = lambda: channels_last(pipe(latents=noise.clone(), **how).frames)
        yield case
    if "student" in wanted:
        times = list(config.student.timesteps)
        few = generator.student_sampler(tuple(times))
        few_arguments = few.arguments(teacher, keys, states)
        step_keys = sampling._split(jax.vmap(jax.random.fold_in, (0, None))(keys, 1), len(times))
        fresh = [channels_first(sampling._noise(key, x)) for key in step_keys]

        def student(net: Any) -> Callable[[], Any]:
            def run() -> Any:
                state = noise
                for i, time_now in enumerate(times):
                    if i:
                        state = noised(x0, fresh[i - 1], torch.full((size.rows,), time_now))
                    now = torch.full((size.rows,), time_now)
                    x0 = state - sigma(now) * velocity(net, state, now, text_t)
                return channels_last(x0)

            return theirs(run)

        mine = lambda: jax.block_until_ready(few.program(size.rows)(*few_arguments))  # noqa: E731
        yield rows(f"Student, {len(times)} steps", mine, student, model)
    if "step" in wanted:
        yield step_case(name, config, generator, model, rivals)


def step_case(name: str, config: Any, generator: Any, model: Any, rivals: set[str]) -> Case:
    """The whole step. Before any is timed, the losses of CHECKED steps from the same start on the same random numbers
    are compared: the second and third tell of gradients, optimisers and the average too."""
    import jax
    import numpy as np
    import torch

    from dollar_jax import sharding
    from dollar_jax.config import changed
    from dollar_jax.distillation import Frozen
    from dollar_jax.programs import teacher_programs

    constant = {"schedule": "constant", "warmup_steps": 0}  # a first step that moves
    rates = {f"{part}.optimiser.{k}": v for part in ("student", "fake_score") for k, v in constant.items()}
    config = changed(config, rates)
    programs = teacher_programs(config, generator, None, list(generator.mesh.devices.flat))
    frozen = Frozen(generator.pipeline.transformer.params, generator.null_text, ())
    frozen = sharding.put(frozen, programs.frozen_sharding)
    rng = np.random.default_rng(1)
    batch = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), programs.batch_shapes)
    batch = sharding.put(batch, programs.batch_sharding)
    state = programs.init(jax.random.key(0), frozen.teacher)
    key = jax.random.key(0) if state.key is None else jax.random.wrap_key_data(np.array(jax.random.key_data(state.key)))
    text, null = (torch.tensor(np.asarray(v)) for v in (batch.text, frozen.null_text))
    latent = channels_first(batch.latent)
    found: dict[str, list[Any]] = {"ours": []}

    def ours() -> Any:
        nonlocal state
        state, metrics, _ = programs.step(state, frozen, batch)
        return [float(metrics["student_loss"]), float(metrics["fake_score"])]

    makers: dict[str, Callable[[Any], Any]] = {"diffusers": lambda net: net, "compiled": compiled}
    runs: dict[str, Callable[[], Any]] = {"ours": ours}
    found["ours"] = [ours() for _ in range(CHECKED)]
    draws = [drawn(programs.distillation, key, i, batch) for i in range(CHECKED)]
    for rival, wrap in makers.items():
        if rival not in rivals:
            continue
        step = PlainStep(config, programs.distillation, model, wrap, null)
        try:
            losses = [step(latent, text, one) for one in draws]
        except Exception as error:  # torch.compile does not work everywhere
            print(f"step, {rival}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        np.testing.assert_allclose(losses, found["ours"], rtol=1e-4, err_msg=rival)
        runs[rival] = functools.partial(step, latent, text)
    what = f"Distillation step (VSD + CD + {config.fake_score.updates} fake-score updates) of {config.batch_size}"
    return Case(f"{what}, {name}", runs, tolerance=float("inf"))  # by now they have drawn different numbers


CHECKED = 3


def drawn(d: Any, key: Any, step: int, batch: Any) -> dict[str, Any]:
    """The random numbers of ours' step, from the keys that it derives, for PyTorch."""
    import jax
    import torch

    from dollar_jax import objectives

    def tensors(*arrays: Any) -> list[Any]:
        return [channels_first(x) if x.ndim == 5 else torch.tensor(jax.device_get(x)) for x in arrays]

    def input_of(key: Any) -> Any:
        x_t, t, index = objectives.student_input(d, None, batch, key)
        noise = jax.random.normal(jax.random.split(key, 3)[1], batch.latent.shape)
        return index, noise

    count = len(batch.latent)
    student, fake, _ = jax.random.split(jax.random.fold_in(key, step), 3)
    keys = jax.random.split(jax.random.split(student, 1)[0], 1 + len(objectives.terms(d.config)))
    times, noises = jax.random.split(keys[1])
    at = objectives.score_times(d.config.vsd, d.schedule, times, count)
    found = {"student": tensors(*input_of(keys[0])), "vsd": tensors(at, jax.random.normal(noises, batch.latent.shape))}
    found["fake"] = []
    for update in jax.random.split(fake, d.config.fake_score.updates):
        parts = jax.random.split(jax.random.split(update, 1)[0], 3)
        at = objectives.score_times(d.config.vsd, d.schedule, parts[1], count)
        noise = jax.random.normal(parts[2], batch.latent.shape)
        found["fake"].append(tensors(*input_of(parts[0]), at, noise))
    return found


class PlainStep:
    """Algorithm 29 of DOLLAR in plain PyTorch: VSD + CD on one pass of the student, then updates of the fake score on
    fresh samples. As an optimised trainer would have it: one call for both halves of guidance, fused AdamW, foreach
    for average and clipping, no gradient where none is needed."""

    def __init__(self, config: Any, distillation: Any, teacher: Any, wrap: Callable[[Any], Any], null: Any):
        import numpy as np
        import torch

        from dollar_jax.objectives import student_segments

        self.c, self.null = config, null
        own = {name: copy.deepcopy(teacher) for name in ("student", "ema", "fake", "teacher")}
        for name in ("ema", "teacher"):
            own[name].requires_grad_(False)
        self.nets = {name: wrap(net) for name, net in own.items()}  # copies, where they are compiled
        self.params = {name: list(net.parameters()) for name, net in self.nets.items()}
        self.optimisers = {}
        for name, c in (("student", config.student.optimiser), ("fake", config.fake_score.optimiser)):
            how = {"lr": c.learning_rate, "betas": (c.b1, c.b2), "eps": c.eps, "weight_decay": 0.0, "fused": True}
            self.optimisers[name] = torch.optim.AdamW(self.params[name], **how)
        self.times = torch.tensor(config.student.timesteps)
        self.segments = torch.tensor(np.asarray(student_segments(config, distillation.schedule)))

    def __call__(self, latent: Any, text: Any, draws: dict[str, Any] | None = None) -> list[float]:
        import torch

        c, nets, clean = self.c, self.nets, self.segments[-1, -1]
        draws = draws or self.draw(latent)
        teacher = functools.partial(guided, nets["teacher"], text, self.null)
        scored, solved = teacher(c.vsd.guidance_weight), teacher(c.consistency.guidance_weight)
        index, noise = draws["student"]
        t = self.times[index]
        x_t = noised(latent, noise, t)
        x = x_t - sigma(t) * velocity(nets["student"], x_t, t, text)
        with torch.no_grad():
            at, eps = draws["vsd"]
            x_at = noised(x, eps, at)
            real = x_at - sigma(at) * scored(x_at, at)
            fake = x_at - sigma(at) * velocity(nets["fake"], x_at, at, text)
            norm = (x - real).abs().mean((1, 2, 3, 4), keepdim=True).clamp(min=c.vsd.floor)
            gradient = (fake - real) / norm
            segments = self.segments[:, index]
            earlier = euler(solved, x_t, segments)
            end = segments[-1]
            target = earlier - sigma(end) * velocity(nets["ema"], earlier, end, text)
            target = torch.where((end <= clean).view(-1, 1, 1, 1, 1), earlier, target)
        vsd = 0.5 * (x - (x - gradient).detach()).square().mean()
        loss = vsd + c.consistency.weight * (x - target).square().mean()
        self.update("student", loss, c.student.optimiser.clip_norm)
        torch._foreach_lerp_(self.params["ema"], [p.detach() for p in self.params["student"]], 1 - c.student.ema_decay)
        losses = []
        for index, noise, at, eps in draws["fake"]:
            with torch.no_grad():
                t = self.times[index]
                x_t = noised(latent, noise, t)
                x = x_t - sigma(t) * velocity(nets["student"], x_t, t, text)
                x_at = noised(x, eps, at)
            denoising = (velocity(nets["fake"], x_at, at, text) - (eps - x)).square().mean()
            self.update("fake", denoising, c.fake_score.optimiser.clip_norm)
            losses.append(float(denoising.detach()))
        return [float(loss.detach()), statistics.mean(losses)]

    def update(self, name: str, loss: Any, clip: float) -> None:
        import torch

        self.optimisers[name].zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params[name], clip, foreach=True)
        self.optimisers[name].step()

    def draw(self, latent: Any) -> dict[str, Any]:
        import torch

        rows, c = len(latent), self.c.vsd

        def student() -> list[Any]:
            return [torch.randint(0, len(self.times), (rows,)), torch.randn_like(latent)]

        def score() -> list[Any]:
            low, high = c.score_range
            u = low + (high - low) * torch.rand(rows)
            return [1000 * c.score_shift * u / (1 + (c.score_shift - 1) * u), torch.randn_like(latent)]

        fake = [[*student(), *score()] for _ in range(self.c.fake_score.updates)]
        return {"student": student(), "vsd": score(), "fake": fake}


def sigma(t: Any) -> Any:
    """Of a rectified flow, to multiply latents with."""
    return (t / 1000).clamp(0, 1).view(-1, 1, 1, 1, 1)


def noised(x0: Any, eps: Any, t: Any) -> Any:
    return (1 - sigma(t)) * x0 + sigma(t) * eps


def velocity(net: Any, x: Any, t: Any, text: Any) -> Any:
    return net(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]


def guided(net: Any, text: Any, null: Any, weight: float) -> Callable[[Any, Any], Any]:
    """The velocity with guidance, both halves in one call."""
    import torch

    both = torch.cat([text, null.expand_as(text)])

    def call(x: Any, t: Any) -> Any:
        cond, free = velocity(net, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return cond + weight * (cond - free)

    return call


def euler(field: Callable[[Any, Any], Any], x: Any, times: Any) -> Any:
    """x along `times` [steps + 1, b or 1]."""
    for now, following in zip(times[:-1], times[1:], strict=True):
        now, following = now.expand(len(x)), following.expand(len(x))
        x = x + (sigma(following) - sigma(now)) * field(x, now)
    return x


def Coder(vae: Any) -> Any:  # noqa: N802 (a class that needs torch to be made)
    """A VAE as a module with a `forward` for either way, for torch.compile to take whole."""
    import torch

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = vae

        def forward(self, x: Any, encode: bool) -> Any:
            return self.vae.encode(x).latent_dist.mean if encode else self.vae.decode(x).sample

    return Module()


def compiled(module: Any) -> Any:
    """A copy under torch.compile for the shapes that come: whole where it is small, else block by block as diffusers
    recommends, and of a VAE encoder and decoder."""
    import torch

    torch._dynamo.config.recompile_limit = 64
    module = copy.deepcopy(module)
    if hasattr(module, "vae"):
        for name in ("encoder", "decoder"):
            getattr(module.vae, name).compile(dynamic=False)
        return module
    if len(getattr(module, "blocks", ())) > 4:
        module.compile_repeated_blocks(dynamic=False)
        return module
    return torch.compile(module, dynamic=False)


def channels_first(x: Any) -> Any:
    """[b t h w c] as a tensor [b c t h w]."""
    import numpy as np
    import torch

    return torch.tensor(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def channels_last(x: Any) -> Any:
    return x.permute(0, 2, 3, 4, 1)


def apart(ours: Any, theirs: Any) -> float:
    """The largest difference relative to the largest value, over the arrays of two results."""
    import jax
    import numpy as np

    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    found = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)) for a, b in found)


def measure(case: Case, repeats: int, seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds by implementation; at most about so many `seconds` are spent, beyond two rounds."""
    results, working = {}, {}
    for rival, run in case.runs.items():
        begun = time.perf_counter()
        try:
            results[rival] = run()
        except Exception as error:
            if rival == "ours":
                raise
            print(f"{case.what}, {rival}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        working[rival] = run
        print(f"{case.what}, {rival}: first call {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    for rival, result in results.items():
        if (found := apart(results["ours"], result)) > case.tolerance:
            raise AssertionError(f"{case.what}: {rival} is {found:.1e} from ours")
    taken: dict[str, list[float]] = {rival: [] for rival in working}
    end = time.perf_counter() + seconds
    for i in range(repeats + 1):
        for rival, run in working.items():
            run()  # not counted: it finds the caches, and threads that still wait, as the one before left them
            begun = clock()
            run()
            if i:
                taken[rival].append(clock() - begun)
        if i >= 2 and time.perf_counter() > end:
            break
    return {rival: statistics.median(each) for rival, each in taken.items()}


def child(args: argparse.Namespace) -> None:
    """Measures in this process, which is held to its cores; a line of JSON per row."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from dollar_jax.cli.base import prepare_jax

    if not args.default_memory:
        prepare_jax(one_heap=args.sizes not in (["demo"], ["tiny"]))  # as of the commands; PyTorch's are kept too
    clock = time.process_time if args.cpu else time.perf_counter
    failed = False
    for name in args.sizes:
        for case in cases(name, args.threads[0], set(args.cases), set(args.rivals)):
            try:
                medians = measure(case, args.repeats, args.seconds, clock)
            except AssertionError as error:  # the other rows are still worth having
                failed = print(error, file=sys.stderr) is None
                continue
            print(json.dumps({"what": case.what, "threads": args.threads[0], **medians}), flush=True)
    sys.exit(failed)


def table(rows: list[dict[str, Any]], rivals: list[str]) -> str:
    """Markdown: milliseconds of ours, and of each rival with the ratio of ours to it."""
    heads = {"diffusers": "diffusers, eager", "compiled": "torch.compile", "pipeline": "diffusers' pipeline"}
    columns = ["", "threads", "ours, ms", *(f"{heads[rival]}, ms" for rival in rivals)]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in rows:
        cells = [row["what"], str(row["threads"]), f"{1e3 * row['ours']:.1f}"]
        for rival in rivals:
            cells.append(f"{1e3 * row[rival]:.1f} ({row['ours'] / row[rival]:.2f})" if rival in row else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    """What it was measured on, in a line."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        model = next((s.partition(": ")[2] for s in info.read_text().splitlines() if s.startswith("model name")), model)
    packages = ("jax", "torch", "diffusers", "transformers", "dollar_jax")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{model}, {os.cpu_count()} cores, {versions}, Python {platform.python_version()}, {date.today()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[name for name in SIZES if name != "tiny"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="a process of so many cores per size")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of each row, at most")
    parser.add_argument(
        "--seconds", type=float, default=20, help="after which a row ends, though not before two rounds"
    )
    parser.add_argument("--cpu", action="store_true", help="processor time: with one thread, where others are at work")
    parser.add_argument("--default_memory", action="store_true", help="freed memory goes back, as outside the commands")
    parser.add_argument("--out", type=Path, help="where to write the table too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    begun, rows, failed = time.perf_counter(), [], False
    lists = {"--cases": args.cases, "--rivals": args.rivals}
    how = [word for flag, values in lists.items() for word in (flag, *values)]
    how += ["--repeats", str(args.repeats), "--seconds", str(args.seconds), "--child", *["--cpu"] * args.cpu]
    how += ["--default_memory"] * args.default_memory
    for threads, size in itertools.product(args.threads, args.sizes):
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": folder}
            command = [sys.executable, __file__, *how, "--threads", str(threads), "--sizes", size]
            cores = sorted(os.sched_getaffinity(0))[:threads]
            with subprocess.Popen(
                command,
                env=env,
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=lambda c=cores: os.sched_setaffinity(0, c),
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("{"):
                        rows.append(json.loads(line))
                        print(table(rows[-1:], args.rivals).splitlines()[-1], flush=True)
            failed |= bool(process.returncode)
    shown = " ".join(word for word in sys.argv[1:] if not word.startswith("--out"))
    head = f"`python benchmarks/speed.py {shown}`, {time.perf_counter() - begun:.0f} s on {machine()}."
    text = head + "\n\n" + table(rows, args.rivals) + "\n"
    print("\n" + text)
    if args.out is not None:
        args.out.write_text(text)
    sys.exit(failed)  # what was measured before is shown all the same


if __name__ == "__main__":
    main()
