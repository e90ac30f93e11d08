"""`dollar export`: the student of a run as a diffusers pipeline folder or an adapter, with a model card."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from huggingface_hub import HfApi, ModelCard
from tqdm import tqdm

from dollar_jax import __version__
from dollar_jax.config import DistillConfig
from dollar_jax.data.clip import clip_size
from dollar_jax.files import checksums, first_line, new_folder, read_json, write_checksums, write_json
from dollar_jax.generate import SHIPPED_TEACHERS, teacher_folder
from dollar_jax.models import lora
from dollar_jax.objectives import terms
from dollar_jax.report.measures import MEASURES, of_samplers
from dollar_jax.run import drawing_config, read_runs, restore_trained
from dollar_jax.types import Params
from dollar_jax.weights import adapter as adapters
from dollar_jax.weights import pipeline as pipelines
from dollar_jax.weights import safetensors_io as files
from dollar_jax.weights.families import Family
from dollar_jax.weights.scheduler import scheduler_json
from dollar_jax.weights.table import export_stream

# A name that begins with an underscore passes diffusers' check of a scheduler's fields.
TIMESTEPS = "_student_timesteps"
_SPACE: Any = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
_FOLDER = jinja2.PackageLoader("dollar_jax", "assets/student")
_TEMPLATES = jinja2.Environment(loader=_FOLDER, undefined=jinja2.StrictUndefined, **_SPACE)


def export_run(
    workdir: Path,
    folder: Path,
    low: Path | None = None,
    vae: str | None = None,
    *,
    ema: bool,
    dtype: str,
    shard_size: int,
    adapter: bool,
) -> None:
    """Writes `folder`, which the teacher's diffusers pipeline loads and `dollar import` imports. The transformer is the
    newest student of the run, its average with `ema`, in `dtype` and in files of at most `shard_size` bytes, with
    adapters (config.lora) merged; or, with `adapter`, the folder holds those alone, for `load_lora_weights` and PEFT.
    Of two experts transformer_2 is the student of the `low` one's run. VAE (but for that in the folder `vae`), text
    encoder and tokenizer are the teacher's. A scheduler of its own refuses every call but the student's, and a manifest
    says how it is sampled, of what it was made, and what each file's SHA-256 is. The folder appears when it is whole;
    OSError or ValueError."""
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; delete it, or export into another folder")
    runs, config = read_runs(workdir, low), drawing_config(workdir, low, vae=vae)
    teacher = teacher_folder(config.teacher)
    family = pipelines.read_family(teacher)
    schedule = pipelines.read_schedule(teacher, family)
    if adapter and (whole := [run for run, c in runs.items() if not c.lora.rank]):
        raise ValueError(f"{whole[0]} trained the student whole (config.lora.rank is 0): it has no adapter")
    if adapter and vae:
        raise ValueError("--vae goes with a whole pipeline: an adapter's folder holds no VAE")
    pipelines.check_whole(teacher)
    parts = pipelines.read_parts(teacher)
    sources = {name: teacher / name for name in parts}
    if config.sampling.vae:
        sources["vae"] = Path(config.sampling.vae)
        parts["vae"] = pipelines.read_vae(sources["vae"], family.vae, parts["vae"].config)
    student = parts["transformer"]
    found = [(c, *restore_trained(run, student.network, c, ema)) for run, c in runs.items()]
    trained, step = dict(zip(pipelines.EXPERTS.values(), found, strict=False)), found[0][1]
    pipeline = (config.data.given_frames and family.image_pipeline) or family.pipeline
    times, ode = config.student.timesteps, config.student.sampler == "ode"
    module = f"student_{'ode_' * ode}{schedule.path}"
    with new_folder(folder) as draft:
        if adapter:
            for name, (c, _, params) in trained.items():
                save_adapter(draft / {"transformer": ""}.get(name, name), params, c, family, student.table, dtype)
        else:
            for name, part in tqdm(parts.items(), "exporting"):
                if name in trained:
                    c, _, params = trained[name]
                    if c.lora.rank:
                        whole = pipelines.load_component(teacher / name, student).params
                        params = lora.merge(whole, params, c.lora.scale)
                    own = dataclasses.replace(student.config, num_layers=c.student.layers or student.config.num_layers)
                    component = pipelines.Component(own, student.network, params)
                    pipelines.save_component(draft / name, part.kind, component, dtype, shard_size)
                elif (sources[name] / pipelines.IMPORTED).is_dir():
                    component = pipelines.load_component(sources[name], part)
                    pipelines.save_component(draft / name, part.kind, component, "float32", shard_size)
                else:
                    shutil.copytree(sources[name], draft / name)
            for name in ("tokenizer", *["image_processor"] * ("image_encoder" in parts)):
                shutil.copytree(teacher / name, draft / name)
            vllm_omni = {"num_inference_steps": len(times), "denoising_timesteps": [round(t) for t in times]}
            vllm_omni |= {"solver": "ode" if ode else "sde", "guidance_scale": 1.0}
            changes = {"scheduler": [module, "StudentScheduler"], "dmd2_config": vllm_omni, "_class_name": pipeline}
            write_json(draft / "model_index.json", read_json(teacher / "model_index.json") | changes)
        fields = scheduler_json(schedule, schedule.path)
        write_json(draft / "scheduler" / "scheduler_config.json", {**fields, TIMESTEPS: times})
        code = _TEMPLATES.get_template("scheduler.py.jinja")
        code = code.render(scheduler=fields["_class_name"], path=schedule.path, field=TIMESTEPS, ode=ode)
        (draft / "scheduler" / f"{module}.py").write_text(code)
        for video in sorted((workdir / "videos").glob("*.mp4"))[:1]:
            shutil.copy(video, draft / "sample.mp4")
        settings = public(config, teacher)
        of = {"name": settings["teacher"], "sha256": checksums(teacher / "transformer")}
        manifest: dict[str, Any] = {"dollar_jax": __version__, "teacher": of, "timesteps": times}
        manifest |= {"num_train_timesteps": schedule.num_train_timesteps, "shift": schedule.shift}
        way = "a DDIM step" if ode else "noise it"
        manifest |= {"solver": f"predict x0, then {way} to the next timestep", "guidance_scale": 1.0, "step": step}
        manifest |= {"weights": "moving average" if ema else "raw weights", "seed": config.seed, "config": settings}
        if low:
            of["low_sha256"] = checksums(teacher / "transformer_2")
            manifest["low"] = {"step": found[1][1], "config": public(found[1][0], teacher)}
        path = workdir / "metrics.json"
        metrics = read_json(path) if path.is_file() else {}
        context: dict[str, Any] = {"adapter": adapter, "module": module, "boundary": schedule.boundary}
        context |= {"sample": (draft / "sample.mp4").is_file(), "family": family, "pipeline": pipeline}
        card = model_card(config, teacher, manifest, metrics, **context)
        (draft / "README.md").write_text(card)
        hashes = checksums(draft)
        write_json(draft / "manifest.json", manifest | {"files": hashes})
        for path in draft.rglob("*"):  # safetensors makes files that only their owner may read
            path.chmod(0o755 if path.is_dir() else 0o644)
        write_checksums(draft, f"student of step {step}", hashes)


def push(folder: Path, name: str) -> str:
    """Uploads a folder to the hub's repository OWNER/NAME, made if need be; its URL. Raises OSError naming both."""
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        return api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by dollar export").repo_url
    except Exception as error:  # whatever the hub or the network answers, the folder is written
        first = first_line(error)
        raise OSError(f"{folder} is written, but not taken: {first}; hf upload {name} '{folder}' retries") from error


def public(config: DistillConfig, teacher: Path) -> dict[str, Any]:
    """The configuration without this machine's paths: of each its last part, of the teacher where it came from."""

    def last(value: Any, name: str = "") -> Any:
        if isinstance(value, Mapping):
            return {key: last(item, key) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [last(item, name) for item in value]
        path = isinstance(value, str) and "/" in value and " " not in value and name != "targets"
        return Path(value).name if path else value

    made = teacher / pipelines.PROVENANCE
    source = {"source": Path(config.teacher).name} | (read_json(made) if made.is_file() else {})
    return last(dataclasses.asdict(config)) | {"teacher": source["source"]}


def save_adapter(folder: Path, params: Params, config: DistillConfig, family: Family, table: Any, dtype: str) -> None:
    """The adapters for `load_lora_weights`, by the names of the family's own code where it has some, and for PEFT: A
    [rank, in] and B [out, rank], one pair for each layer of a stack. The scale is in B; there is no alpha."""

    def kernels(tree: Params, leaf: str) -> Params:
        return {
            name: {"kernel": np.asarray(value[lora.NAME][leaf])} if lora.NAME in value else kernels(value, leaf)
            for name, value in tree.items()
        }

    folder.mkdir(exist_ok=True)
    theirs, peft, modules, rank = {}, {}, [], config.lora.rank
    for leaf, part, factor in (("down", "lora_A", 1.0), ("up", "lora_B", config.lora.scale)):
        for name, tensor in export_stream(table, kernels(params, leaf)):
            module, tensor = name.removesuffix(".weight"), (tensor * np.float32(factor)).astype(tensor.dtype)
            native = adapters.rename(family.native, module)
            theirs[f"{f'diffusion_model.{native}' if native else f'transformer.{module}'}.{part}.weight"] = tensor
            peft[f"base_model.model.{module}.{part}.weight"] = tensor
            modules += [module] * (leaf == "up")
    files.write_file(folder / adapters.DIFFUSERS_FILE, theirs, dtype)
    files.write_file(folder / "adapter_model.safetensors", peft, dtype)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}
    write_json(folder / "adapter_config.json", fields)


def model_card(config: DistillConfig, teacher: Path, manifest: Any, metrics: Any, **context: Any) -> str:
    """README.md: what the student is, how diffusers' pipeline samples it, and what its run measured."""
    measured = of_samplers(metrics)
    readme = teacher / "README.md"
    theirs = ModelCard.load(readme).data.to_dict() if readme.is_file() else {}
    name = f"{len(config.student.timesteps)}-step student of {manifest['teacher']['name']}"
    licence = {key: theirs[key] for key in ("license", "license_name", "license_link") if key in theirs}
    losses = [(f"{t.label}, {t.symbol}".rstrip(", "), t.weight(config)) for t in filter(None, terms(config))]
    columns = sorted({column for row in measured.values() for column in row} & MEASURES.keys())
    context |= {"manifest": manifest, "name": name, "licence": licence, "config": config, "losses": losses}
    context |= {"shipped": config.teacher in SHIPPED_TEACHERS, "clip": clip_size(config.data), "measured": measured}
    context |= {"columns": columns, "settings": json.dumps(manifest["config"], indent=2)}
    return _TEMPLATES.get_template("README.md.jinja").render(context)
