"""What a smaller decoder saves and costs on the default domain: time beside the teacher's decoder, PSNR to it, and the
alignment of a student's samples decoded by either.

    dollar pretrain --decoder --config=demo --workdir=runs/decoder
    python benchmarks/decoder.py --run=runs/demo --vae runs/decoder/vae
    taskset -c 0 python benchmarks/decoder.py --run=runs/demo --vae runs/decoder/vae --cpu   # where others are at work

24 clips of 17×32×32 are decoded, as the commands do, and drawn by the teacher and by the student in one step, in turns
(A B C A B C ...); times are medians. PSNR is on 96 validation clips and the student's samples of the 72 captions that
`dollar evaluate` draws, of which alignment tells too."""

import argparse
import dataclasses
import os
import statistics
import time
from pathlib import Path

BATCH = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run of the demo's teacher")
    parser.add_argument("--vae", type=Path, nargs="+", required=True, help="folders of VAEs with smaller decoders")
    parser.add_argument("--repeats", type=int, default=9, help="turns")
    parser.add_argument("--cpu", action="store_true", help="processor time instead of wall time")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from dollar_jax.cli.base import prepare_jax

    prepare_jax()
    import jax
    import numpy as np

    from dollar_jax.data import shapes
    from dollar_jax.generate import make_generator, video_keys
    from dollar_jax.run import choose_student, choose_teacher, drawing_config

    config = drawing_config(args.run)
    full = make_generator(config, hold_vae=True)
    generators = {"the teacher's": full}
    for folder in args.vae:
        own = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, vae=str(folder)))
        generators[str(folder)] = dataclasses.replace(full, pipeline=make_generator(own, hold_vae=True).pipeline)
    captions = shapes.covering_captions()
    prompts, count = [str(caption) for caption in captions], len(captions)
    drawn = {}
    for steps in (1, 4):
        student = choose_student(full, args.run, config, steps)
        parts = [slice(start, start + BATCH) for start in range(0, count, BATCH)]
        keys = (video_keys(config.seed, count)[part] for part in parts)
        pairs = zip(parts, keys, strict=True)
        drawn[steps] = np.concatenate(
            [np.asarray(student.draw(student.params, k, *full.condition(prompts[part]))) for part, k in pairs]
        )
    clips = np.stack([shapes.example(shapes.SEED, "validation", i)[0] for i in range(96)])
    real = np.concatenate([full.encode(part) for part in np.split(clips, len(clips) // BATCH)])

    def decode(generator, latent):
        return np.concatenate([generator.decode(part) for part in np.split(latent, len(latent) // BATCH)])

    runs = {}
    for name, generator in generators.items():
        runs[name] = lambda generator=generator: generator.decode(real[:BATCH])
    for name, row in ("teacher", choose_teacher(full, config)), ("student", choose_student(full, args.run, config, 1)):
        placed = row.draw.arguments(row.params, video_keys(0, BATCH), *full.condition(prompts[:BATCH]))
        program = row.draw.program(BATCH)
        runs[name] = lambda program=program, placed=placed: jax.block_until_ready(program(*placed))
    clock = time.process_time if args.cpu else time.perf_counter
    seconds = {name: [] for name in runs}
    for turn in range(args.repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name] += [clock() - start] if turn else []
    ms = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}

    print(f"Latents of {BATCH} clips: teacher {ms['teacher']:.1f} ms, student in one step {ms['student']:.1f} ms\n")
    print(
        "| decoder | width | parameters | ms | one step, of the teacher's inference | PSNR, clips | PSNR, one step |",
        end="",
    )
    print(" alignment, 1 step | 4 steps |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    whole = ms["teacher"] + ms["the teacher's"]
    wide = {kind: decode(full, latent) for kind, latent in (("clips", real), *drawn.items())}
    for name, generator in generators.items():
        vae = generator.pipeline.vae
        own = wide if generator is full else {}
        own = own or {kind: decode(generator, latent) for kind, latent in (("clips", real), *drawn.items())}
        error = {kind: np.mean((frames - wide[kind]) ** 2) for kind, frames in own.items()}
        cells = [f"{-10 * np.log10(error[kind]):.1f}" if error[kind] else "–" for kind in ("clips", 1)]
        cells += [f"{shapes.alignment(own[steps], captions)['alignment']:.4f}" for steps in (1, 4)]
        size = sum(x.size for x in jax.tree.leaves(vae.params["decoder"]))
        share = 100 * (ms["student"] + ms[name]) / whole
        width = vae.config.decoder_base_dim
        print(f"| {name} | {width} | {size:,} | {ms[name]:.1f} | {share:.1f} % | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
