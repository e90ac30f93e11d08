"""`dollar evaluate`."""

import functools
from pathlib import Path
from typing import Any

from dollar_jax.cli.base import FLAGS, define, define_vae, prepare_jax
from dollar_jax.files import read_json, write_json


def define_flags(_: list[str]) -> None:
    define("string", "workdir", None, "Folder of the run whose student is measured.")
    define_vae()
    define("string", "videos", None, "Measure this folder of {prompt}-{index}.mp4 instead of drawing any.")
    define("string", "reference", None, "With --videos: a folder of real videos.")
    define("string", "reward", None, "One more reward by its name; clip is the fit to the prompts.")
    define("string", "reward_folder", None, "The weights of a reward that has some.")
    define("bool", "dimensions", False, "With --videos: some of VBench's dimensions, into *_vbench.json beside --out.")
    define("string", "clip", None, "With --dimensions: a folder of CLIP ViT-B/32, for both consistencies.")
    define("string", "aesthetic", None, "With --dimensions: folder of LAION's aesthetic predictor.")
    features = "AlexNet's safetensors by torchvision's names, with LPIPS's heads lin0 to lin4 if you have them"
    define("string", "features", None, f"For diversity and Fréchet distance: folder with {features}; else the VAE.")
    define("string", "out", None, "The JSON of measures, and the name of page and videos; metrics.json by default.")
    define("bool", "allow_code", False, "Run the rewards that are code named by the run (path.py:function).")
    define("bool", "quick", False, "Fewer videos.")
    define("string", "vbench", None, "Write the videos VBench asks for into this folder, and measure nothing.")
    define("string", "prompts_file", None, "A prompt per line; with --vbench also its VBench_full_info.json.")
    define("string", "images", None, "With --vbench and VBench-I2V's list: folder of its images, cropped.")
    define("string", "names", None, "With --vbench and rewritten prompts: VBench's own, line by line, to name files.")
    define("float", "fps", None, "With --vbench: frames per second of the files; the teacher's by default.", 0.1)
    define("integer", "num", 5, "Videos per prompt.", 1)
    define("integer", "steps", 4, "With --vbench: sampling steps.", 1, 1000)
    define("integer", "seed", 0, "Seed of the noise.")
    define("integer", "batch_size", None, "Videos drawn at a time; by default as many as their size allows.", 1)
    define("bool", "teacher", False, "With --vbench: the teacher's videos.")
    define("string", "low", None, "With --vbench: the low-noise expert's run, where the teacher has two.")


def run() -> None:
    from dollar_jax.data.clip import MOVING_SHAPES
    from dollar_jax.evaluate.features import alexnet_features, vae_features
    from dollar_jax.evaluate.run import Evaluation
    from dollar_jax.generate import make_generator
    from dollar_jax.run import drawing_config

    prepare_jax()
    if not FLAGS.workdir and not FLAGS.videos:
        raise ValueError("--workdir or --videos must be given")
    needs = {"reference": "videos", "dimensions": "videos", "clip": "dimensions", "aesthetic": "dimensions"}
    for name, flag in (needs | dict.fromkeys(("names", "fps", "steps", "teacher", "low"), "vbench")).items():
        if FLAGS[name].present and not FLAGS[flag].value:
            raise ValueError(f"--{name} goes with --{flag}, which is not given")
    if FLAGS.vbench:
        _vbench_videos()
        return
    features = alexnet_features(Path(FLAGS.features)) if FLAGS.features else None
    if FLAGS.workdir:
        config = drawing_config(Path(FLAGS.workdir), vae=FLAGS.vae)
        generator = make_generator(config, hold_vae=True)
        shapes = MOVING_SHAPES in (config.teacher, config.data.name)  # a domain with prompts and measures of its own
        features = features or (vae_features(generator) if shapes else None)
        if not FLAGS.videos:
            out = Path(FLAGS.out or Path(FLAGS.workdir) / "metrics.json")
            evaluation = Evaluation(Path(FLAGS.workdir), generator, out, features, FLAGS.allow_code)
            if shapes and not FLAGS.prompts_file:
                if FLAGS.reward:
                    raise ValueError("--reward goes with --prompts_file here: the run's own rewards are measured")
                evaluation.of_captions(FLAGS.quick)
            else:
                _evaluate_prompts(evaluation, config)
            print_table(out)
    if FLAGS.videos:
        from dollar_jax.evaluate.dimensions import OURS, load_dimensions
        from dollar_jax.evaluate.folder import measure_folder
        from dollar_jax.evaluate.manifest import find_manifest
        from dollar_jax.rewards import get_reward

        folder = Path(FLAGS.videos)
        reference = Path(FLAGS.reference) if FLAGS.reference else None
        reward = get_reward(FLAGS.reward, FLAGS.reward_folder) if FLAGS.reward else None
        weights = [Path(name) if name else None for name in (FLAGS.clip, FLAGS.aesthetic)]
        dimensions = load_dimensions(*weights) if FLAGS.dimensions else None
        out = Path(FLAGS.out or folder / "metrics.json")
        measures = measure_folder(folder, features, reference, reward and {"reward": reward}, dimensions)
        if (made := find_manifest(folder)) is not None:
            measures["manifest"] = made
        if rows := measures.pop("dimensions", {}):
            published = {name: row for name, row in rows.items() if not name.endswith("_ours")}
            write_json(out.with_name(f"{out.stem}_vbench.json"), published)
            measures |= {name: mean for name, (mean, _) in rows.items()}
            measures["ours"] = OURS
        write_json(out, measures)
        for name, value in measures.items():
            print(f"{name:26}{value:.6g}" if isinstance(value, float) else f"{name:26}{value}")


def _evaluate_prompts(evaluation: Any, config: Any) -> None:
    from dollar_jax.data.prepared import PreparedVideos
    from dollar_jax.evaluate.files import read_prompts
    from dollar_jax.rewards import get_reward

    rewards = {}
    if FLAGS.reward:
        name = "alignment" if FLAGS.reward == "clip" else FLAGS.reward.rpartition(":")[2]
        rewards[name] = get_reward(FLAGS.reward, FLAGS.reward_folder)
    if FLAGS.prompts_file:
        prompts = read_prompts(Path(FLAGS.prompts_file))
    else:
        given = PreparedVideos(config.data).check(config, evaluation.generator).some_captions(4 if FLAGS.quick else 16)
        evaluation.generator.given.update(given)
        prompts = list(given)
    evaluation.of_prompts(prompts, 2 if FLAGS.quick else FLAGS.num, FLAGS.seed, rewards, FLAGS.batch_size)


def _vbench_videos() -> None:
    import jax

    from dollar_jax.evaluate import manifest
    from dollar_jax.evaluate.files import draw_missing
    from dollar_jax.evaluate.vbench_videos import pair_names, read_vbench_prompts, video_rows
    from dollar_jax.files import hash_file
    from dollar_jax.generate import make_generator, video_keys
    from dollar_jax.run import choose_student, choose_teacher, drawing_config

    if not FLAGS.workdir or not FLAGS.prompts_file:
        raise ValueError("--vbench needs --workdir and --prompts_file, VBench's own list of prompts")
    workdir, folder, listed = Path(FLAGS.workdir), Path(FLAGS.vbench), Path(FLAGS.prompts_file)
    low, names = (Path(name) if name else None for name in (FLAGS.low, FLAGS.names))
    config = drawing_config(workdir, low, FLAGS.teacher, FLAGS.vae)
    prompts = None if names is None else pair_names(listed, names)
    counts = read_vbench_prompts(names or listed, FLAGS.num)
    rows = video_rows(counts, prompts)
    generator = make_generator(config, hold_vae=True)
    if FLAGS.images:  # whose names do not say what the camera does
        images = {name: Path(FLAGS.images, f"{name.rpartition(', camera ')[0] or name}.jpg") for name in counts}
        generator.continue_from({(prompts or {}).get(name, name): path for name, path in images.items()})
    fps = FLAGS.fps or generator.pipeline.family.fps
    if FLAGS.teacher:
        sampler = choose_teacher(generator, config)
    else:
        sampler = choose_student(generator, workdir, config, FLAGS.steps, low=low)
    if jax.process_index() == 0:
        made: dict[str, Any] = {"prompts_file": listed.name, "prompts_sha256": hash_file(listed), "num": FLAGS.num}
        made |= {"prompts": "raw" if names is None else "rewritten", "seeds": [FLAGS.seed], "videos": len(rows)}
        made |= {"names_file": names and names.name, "names_sha256": names and hash_file(names)}
        manifest.write_manifest(folder, made | manifest.describe(config, generator, fps, [sampler]))
    keys = functools.partial(video_keys, FLAGS.seed, max(counts.values()))
    drawn = draw_missing(folder, rows, keys, generator, [(sampler.draw, sampler.params)], FLAGS.batch_size, fps)
    print(f"{drawn} videos drawn; {folder} holds all of this process's {len(rows)}")
    print(f"How they were made is in {manifest.manifest_path(folder)}.")


def print_table(path: Path) -> None:
    """The rows of a metrics.json on the terminal."""
    from dollar_jax.report.measures import of_samplers

    metrics = read_json(path)
    columns = ("alignment", "reward", "vendi", "flicker", "nfe", "diffusion_seconds")
    print("\n" + f"{'':16}" + "".join(f"{name:>18}" for name in columns))
    for name, row in of_samplers(metrics).items():
        print(f"{name:16}" + "".join(f"{row[c]:>18.4g}" if c in row else f"{'–':>18}" for c in columns))
    faster = [f"{k[8:]} steps ×{v:.1f}" for k, v in metrics.items() if k.startswith("speedup_")]
    print(f"faster than the teacher: {', '.join(faster)}; {metrics['seconds']:.0f} s in all")
