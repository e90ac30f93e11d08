"""Memory of a reward's gradient with respect to one video's latent, by the TPU's own compiler.

    pip install dollar_jax[plan]
    python benchmarks/reward_memory.py --out=memory.md
    python benchmarks/reward_memory.py --frames 12 --ways latent pixels+remat

DOLLAR's comparison at its real size: 192×320 videos, Wan's VAE decoder, HPSv2's CLIP ViT-H/14 on every
frame, all in bf16, against the text-image latent reward model. Nothing runs on a TPU: the programs are
compiled for a v5p chip, and what their temporaries need is read off. The VAE makes 1 + 4n frames; the
asked number is rounded up to that."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dollar_jax.config import LatentRewardSettings
from dollar_jax.models.clip import VIT_H_14, preprocess
from dollar_jax.models.latent_reward import LatentRewardModel
from dollar_jax.models.network import make_network
from dollar_jax.models.wan_vae import WanVAE, WanVAEConfig
from dollar_jax.weights.clip import clip_network

HEIGHT, WIDTH = 192, 320
TOKENS, TEXT_WIDTH = 256, 4096
WAYS = ("latent", "pixels", "pixels+remat")
GIB = 2**30
BF16: dict[str, Any] = {"dtype": "bfloat16", "param_dtype": "bfloat16"}


def latent_reward(latent: jax.ShapeDtypeStruct) -> tuple[Callable[..., jax.Array], Any, Any]:
    """DOLLAR's text-image latent reward model."""
    settings, channels = LatentRewardSettings(), latent.shape[-1]
    head = make_network(lambda rngs: LatentRewardModel(settings, channels, TEXT_WIDTH, rngs, "bfloat16"))
    text = jax.ShapeDtypeStruct((1, TOKENS, TEXT_WIDTH), jnp.bfloat16)
    return lambda x, params, text: head.apply(params, x, text).sum(), head.shapes, text


def pixel_reward(remat: bool) -> tuple[Callable[..., jax.Array], Any, Any]:
    """Decoder, then HPSv2 of every frame; with remat both are computed again in the backward pass."""
    vae_config = WanVAEConfig(**BF16)
    vae = make_network(lambda rngs: WanVAE(vae_config, rngs))
    clip = clip_network(dataclasses.replace(VIT_H_14, **BF16, remat="full" if remat else "none"))
    keep = jax.checkpoint if remat else lambda function: function

    @keep
    def decode(params: Any, latent: jax.Array) -> jax.Array:
        return (vae.apply(params, latent, method="decode") + 1) / 2

    @keep
    def score(params: Any, frames: jax.Array, ids: jax.Array) -> jax.Array:
        images = clip.apply(params, preprocess(frames[0], fit="pad"), method="embed_images")
        return (images @ clip.apply(params, ids, method="embed_text")[0]).mean()

    def reward(latent: jax.Array, params: Any, ids: jax.Array) -> jax.Array:
        return score(params["clip"], decode(params["vae"], latent), ids)

    ids = jax.ShapeDtypeStruct((1, VIT_H_14.max_position_embeddings), jnp.int32)
    return reward, {"vae": vae.shapes, "clip": clip.shapes}, ids


def measure(way: str, frames: int, device: Any) -> tuple[float, str, float]:
    """GiB of parameters and of temporaries, which may be more than the chip has, and the compilation's seconds."""
    shape = WanVAEConfig().latent_shape(frames, HEIGHT, WIDTH)
    latent = jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16)
    reward, params, text = latent_reward(latent) if way == "latent" else pixel_reward("remat" in way)
    here = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), (latent, params, text))
    start = time.perf_counter()
    lowered = jax.jit(jax.grad(reward), out_shardings=here).lower(*arguments)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments)) / GIB
    try:
        compiled = lowered.compile(compiler_options={"exec_time_optimization_effort": -1.0})
        temporaries = f"{compiled.memory_analysis().temp_size_in_bytes / GIB:.3f}"
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"HLO temporaries \(([\d.]+)G\)|Used ([\d.]+)G of", str(error))
        if needed is None:
            raise
        temporaries = f"{float(needed[1] or needed[2]):.0f}: does not fit"
    return held, temporaries, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[12, 24, 64, 128])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--topology", default="v5p:2x2x1", help="of which one chip is compiled for")
    parser.add_argument("--out", type=Path, help="where to write the table too")
    args = parser.parse_args()
    device = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices[0]
    columns = ("frames", "gradient through", "parameters, GiB", "temporaries, GiB", "compiled in, s")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    print("\n".join(rows), flush=True)
    for asked in args.frames:
        frames = 1 + 4 * -(-(asked - 1) // 4)
        for way in args.ways:
            parameters, temporaries, seconds = measure(way, frames, device)
            rows.append(f"| {frames} | {way} | {parameters:.3f} | {temporaries} | {seconds:.0f} |")
            print(rows[-1], flush=True)
            if args.out is not None:
                args.out.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
