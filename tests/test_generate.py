"""From prompts to frames: what a video may and may not depend on."""

import dataclasses
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dollar_jax import sharding
from dollar_jax.config import MeshConfig, SamplingConfig
from dollar_jax.data import shapes
from dollar_jax.data.prepared import fingerprint
from dollar_jax.generate import (
    Generator,
    draw_beside,
    draw_videos,
    load_teacher,
    make_generator,
    sampling_mesh,
    subset,
    video_keys,
)
from dollar_jax.program import Program
from dollar_jax.sharding import make_mesh
from dollar_jax.weights.families import clean_prompt

TIMES = (1000.0, 700.0, 400.0)
PROMPTS = ["a bb ccc", "aaaa b", "aa aa aa"]


@pytest.fixture(autouse=True)
def _the_same_keys_again():
    with jax.debug_key_reuse(False):
        yield


def test_fewer_steps_are_a_subset_and_more_lie_between():
    times = (1000.0, 900.0, 750.0, 500.0)
    assert subset(times, 1) == (1000.0,)
    assert subset(times, 2) == (1000.0, 750.0)
    assert subset(times, 4) == times
    assert subset(times, 8) == (1000.0, 950.0, 900.0, 825.0, 750.0, 625.0, 500.0, 250.0)
    assert all(a > b for a, b in zip(subset(times, 7), subset(times, 7)[1:], strict=False))
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        subset(times, 0)


def test_neither_batches_nor_devices_change_a_video(toy_generator):
    prompts, keys = [PROMPTS[i % 3] for i in range(5)], video_keys(3, 5)
    one = make_mesh(MeshConfig(1, 1, 1, 1), jax.local_devices()[:1])
    drawn = []
    for size, mesh in ((2, one), (8, sampling_mesh(MeshConfig(-1, 4, 1, 1)))):
        generator = dataclasses.replace(toy_generator, mesh=mesh)
        draw, params = generator.student_sampler(TIMES), generator.pipeline.transformer.params
        drawn.append(list(draw_videos(generator, draw, params, prompts, keys, size)))
    assert [len(part) for part in drawn[0]] == [2, 2, 1] and [len(part) for part in drawn[1]] == [5]
    alone, sharded = (np.concatenate(parts).astype(int) for parts in drawn)
    assert alone.shape == (5, 5, 32, 32, 3)
    assert np.abs(alone - sharded).max() <= 1
    assert all(np.abs(alone[i] - alone[j]).max() > 2 for i in range(5) for j in range(i))


def test_no_mesh_changes_a_latent_or_a_frame_and_the_smallest_pictures_are_the_fingerprints():
    teacher, sampling = load_teacher("moving_shapes"), SamplingConfig(1, 1.0, 0.0)
    meshes = make_mesh(MeshConfig(1, 1, 1, 1), jax.local_devices()[:1]), make_mesh(MeshConfig(1, 4, 2, 1))
    one, spread = (Generator(teacher, 12, sampling, (1, 8, 8), mesh=mesh) for mesh in meshes)
    assert fingerprint(one)["vae"] == pytest.approx(fingerprint(spread)["vae"], abs=2e-5)
    latent = np.random.default_rng(0).standard_normal((1, 1, 2, 2, 16), np.float32)
    np.testing.assert_allclose(one.decode(latent), spread.decode(latent), atol=1e-5)


def test_a_video_depends_on_its_prompt_seed_and_number_alone(toy_generator):
    generator = dataclasses.replace(toy_generator, mesh=sampling_mesh(MeshConfig(-1, 1, 1, 1)))
    draw, params = generator.student_sampler(TIMES), generator.pipeline.transformer.params

    def run(prompts, seeds, num):
        noise = np.tile(np.arange(len(seeds) * num), len(prompts))
        each = [prompt for prompt in prompts for _ in range(len(seeds) * num)]

        def keys():
            return jnp.concatenate([video_keys(seed, num) for seed in seeds])[noise]

        videos = np.stack(list(draw_beside(generator, [(draw, params)], each, keys)))
        return videos.reshape(len(prompts), -1, *videos.shape[1:]).astype(int)

    many, one = run(PROMPTS, [0, 7], 2), run(PROMPTS[1:2], [7], 1)
    assert many.shape == (3, 4, 5, 32, 32, 3) and one.shape == (1, 1, 5, 32, 32, 3)
    assert np.abs(many[1, 2] - one[0, 0]).max() <= 1
    assert np.abs(many[1, 0] - one[0, 0]).max() > 2  # the other seed
    assert np.abs(many[1, 3] - one[0, 0]).max() > 2  # the seed's second


@pytest.mark.parametrize("fsdp, expected", [(1, 1), (4, 4), (16, 8), (3, 1), (-1, 8)])
def test_the_sampling_mesh_takes_all_devices_and_what_fits_of_fsdp(fsdp, expected):
    mesh = sampling_mesh(MeshConfig(2, fsdp, 1, 1))
    assert mesh.shape["fsdp"] == expected and mesh.size == 8


@pytest.fixture(scope="module")
def pipeline():
    return load_teacher("moving_shapes")


def test_the_vae_chunk_changes_no_video(pipeline):
    size = (shapes.FRAMES, shapes.SIZE, shapes.SIZE)
    whole = Generator(pipeline, 12, SamplingConfig(50, 1.0, 0.0), size)
    chunked = dataclasses.replace(whole, vae_chunk=2)
    video = np.stack([shapes.example(0, "validation", 0)[0]])
    latent = whole.encode(video)
    np.testing.assert_allclose(chunked.encode(video), latent, atol=1e-5)
    np.testing.assert_allclose(chunked.decode(latent), whole.decode(latent), atol=1e-5)


@pytest.mark.parametrize(("cores", "parts"), [(1, 1), (2, 2), (4, 2), (5, 1), (12, 6)])
def test_a_cpu_takes_parts_of_the_videos_side_by_side(toy_generator, monkeypatch, cores, parts):
    """As many as both cores and videos divide into; the same videos in the same order."""
    frames = np.random.default_rng(0).integers(0, 256, (6, 5, 32, 32, 3), np.uint8)
    generator, called = dataclasses.replace(toy_generator), []
    monkeypatch.setattr(sharding, "cores", lambda devices: 1)
    latent = generator.encode(frames)
    whole = generator.decode(latent)
    run = Program.__call__
    monkeypatch.setattr(Program, "__call__", lambda p, *x: called.append((p.name, len(x[1]))) or run(p, *x))
    monkeypatch.setattr(sharding, "cores", lambda devices: cores)
    mean, std = generator.encode_posterior(frames)
    np.testing.assert_allclose(mean, latent, atol=1e-6)
    assert std.shape == mean.shape
    np.testing.assert_allclose(generator.decode(latent), whole, atol=1e-6)
    np.testing.assert_allclose(generator.decode(jnp.asarray(latent)), whole, atol=1e-6)
    assert called == [("vae_encode", 6 // parts)] * parts + [("vae_decode", 6 // parts)] * 2 * parts


def test_only_a_lone_cpu_has_cores_to_share(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6})
    cpu, tpu = types.SimpleNamespace(platform="cpu"), types.SimpleNamespace(platform="tpu")
    assert [sharding.cores(devices) for devices in ([cpu], [tpu], [cpu, cpu], [])] == [3, 1, 1, 1]


def test_the_devices_hold_the_vae_if_asked(make_config):
    config = make_config({})
    there, held = (make_generator(config, hold_vae=hold).pipeline.vae.params for hold in (False, True))
    jax.tree.map(np.testing.assert_array_equal, held, there)
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(there))
    assert all(x.sharding.is_fully_replicated and len(x.sharding.device_set) == 8 for x in jax.tree.leaves(held))


@pytest.mark.parametrize("count", [16, 3])
def test_videos_one_after_another_are_those_of_the_whole_batch(toy_generator, count):
    """On a mesh of eight, with rows that divide over it and that do not; in less memory."""
    mesh = make_mesh(MeshConfig(2, 2, 2, 1))
    rng, temp = np.random.default_rng(0), {}
    frames = rng.integers(0, 256, (count, 5, 32, 32, 3), np.uint8)
    for chunk in (None, 1):
        generator = dataclasses.replace(toy_generator, vae_chunk=chunk, mesh=mesh)
        latent = generator.encode(frames)
        compiled = generator.encode_program(frames.shape, mesh).compile()
        temp[chunk] = latent, generator.decode(latent), compiled.memory_analysis().temp_size_in_bytes
    np.testing.assert_allclose(temp[None][0], temp[1][0], atol=1e-4)
    np.testing.assert_allclose(temp[None][1], temp[1][1], atol=1e-4)
    assert temp[1][2] < temp[None][2]


def test_the_negative_prompt_is_the_other_half_of_guidance(toy_generator):
    """In samples; and in distillation, which takes null_text from here. It tells no two text encoders apart."""
    avoided = dataclasses.replace(toy_generator.sampling, negative_prompt="ccc aa", eta=0.0)
    generator = dataclasses.replace(toy_generator, sampling=avoided)
    np.testing.assert_array_equal(generator.null_text, toy_generator.text(["ccc aa"]))
    assert fingerprint(generator) == fingerprint(toy_generator)
    draw, params, keys = generator.teacher_sampler(2, 3.0), generator.pipeline.transformer.params, video_keys(0, 1)
    text = generator.text(PROMPTS[:1])
    away = np.asarray(draw(params, keys, text))
    assert np.abs(away - np.asarray(toy_generator.teacher_sampler(2, 3.0)(params, keys, text))).max() > 1e-4
    toward = dataclasses.replace(generator, sampling=dataclasses.replace(avoided, negative_prompt=PROMPTS[0]))
    plain = np.asarray(toward.teacher_sampler(2, 0.0)(params, keys, text))  # both halves alike: no guidance
    np.testing.assert_allclose(np.asarray(toward.teacher_sampler(2, 3.0)(params, keys, text)), plain, atol=1e-4)


@pytest.mark.parametrize("prompt", ["a &#32; b", " a\tcat\n\n &amp;amp; dog ", "plain", "&lt;b&gt; caf\u00e9 \u732b"])
def test_prompts_are_cleaned_as_diffusers_does(prompt):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_prompt(prompt) == prompt_clean(prompt)


def test_the_text_states_are_of_the_cleaned_prompt(toy_generator):
    dirty, clean = toy_generator.text(["a &#32; bb \n ccc", "a bb ccc"])
    np.testing.assert_array_equal(dirty, clean)
