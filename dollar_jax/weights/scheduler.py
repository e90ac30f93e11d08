"""diffusers' scheduler_config.json ↔ `Schedule`: flow matching, and the DDPM schedulers of CogVideoX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dollar_jax.schedule import Path as DiffusionPath
from dollar_jax.schedule import Prediction, Schedule
from dollar_jax.weights.kind import typed

Fields = dict[str, tuple[Any, Any]]


def _only(**fields: Any) -> Fields:
    """Fields of which only diffusers' default is followed here."""
    return {name: (value, value) for name, value in fields.items()}


# Per flow-matching scheduler: its field for the time shift; and the fields that change what sampling means, with
# diffusers' default where the file leaves them out and the value this implementation has.
_COMMON = _only(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
_COMMON |= _only(use_dynamic_shifting=False, shift_terminal=None)
_UNIPC = {"prediction_type": ("epsilon", "flow_prediction"), "use_flow_sigmas": (False, True), **_COMMON}
_UNIPC |= _only(predict_x0=True, solver_order=2, solver_type="bh2", lower_order_final=True, disable_corrector=[])
_UNIPC |= _only(thresholding=False, final_sigmas_type="zero")
_FLOWS: dict[str, tuple[str, Fields]] = {
    "FlowMatchEulerDiscreteScheduler": ("shift", {**_COMMON, **_only(invert_sigmas=False)}),
    "UniPCMultistepScheduler": ("flow_shift", _UNIPC),
}

_PREDICTIONS: dict[str, Prediction] = {"v_prediction": "v", "epsilon": "eps", "sample": "x0"}
COGVIDEOX_NOISE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COGVIDEOX_NOISE["snr_shift_scale"] = 3.0
_DDIM_NOISE = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "snr_shift_scale": 1.0}
# Per DDPM scheduler: diffusers' defaults of the noise's fields; and the fields that change what sampling means.
# CogVideoX's never read their clip_sample. How timesteps are spaced is the sampler's affair.
_SAME = _only(trained_betas=None, set_alpha_to_one=True)
_DDPMS: dict[str, tuple[dict[str, Any], Fields]] = {
    "CogVideoXDDIMScheduler": (COGVIDEOX_NOISE, _SAME),
    "CogVideoXDPMScheduler": (COGVIDEOX_NOISE, _SAME),
    "DDIMScheduler": (_DDIM_NOISE, {**_SAME, "clip_sample": (True, False), **_only(thresholding=False)}),
}


def schedule_of(fields: Mapping[str, Any], path: DiffusionPath, file: Path) -> Schedule:
    """What a scheduler's file means on a diffusion path; ValueError naming the field that asks for something else."""
    schedulers = _FLOWS if path == "rf" else _DDPMS
    fields = fields.get("_teacher_scheduler", fields)  # of a student that 0.1 exported
    if (name := str(fields.get("_class_name"))) not in schedulers:
        raise ValueError(f"{file} is a {name}; the schedulers known are {', '.join(schedulers)}")
    for field, (default, value) in schedulers[name][1].items():
        if (found := fields.get(field, default)) != value:
            raise ValueError(f"{file} has {field} = {found!r}; a {name} must have {value!r} to be followed here")
    steps = typed(fields.get("num_train_timesteps", 1000), int, "num_train_timesteps", file)
    if path == "rf":
        shift = typed(fields.get(_FLOWS[name][0], 1.0), float, _FLOWS[name][0], file)
        return Schedule("rf", "velocity", num_train_timesteps=steps, shift=shift)
    defaults = _DDPMS[name][0].items()
    noise: Any = {key: typed(fields.get(key, default), type(default), key, file) for key, default in defaults}
    prediction = typed(fields.get("prediction_type", "epsilon"), str, "prediction_type", file)
    if prediction not in _PREDICTIONS:
        raise ValueError(f"{file} has prediction_type = {prediction!r}; it can be one of {', '.join(_PREDICTIONS)}")
    rescale = typed(fields.get("rescale_betas_zero_snr", False), bool, "rescale_betas_zero_snr", file)
    return Schedule("ddpm", _PREDICTIONS[prediction], num_train_timesteps=steps, rescale_zero_snr=rescale, **noise)


def scheduler_json(schedule: Schedule, path: DiffusionPath) -> dict[str, Any]:
    """The file with which diffusers follows the schedule with models of this path; ValueError where it cannot."""
    names = {ours: theirs for theirs, ours in _PREDICTIONS.items()} if path == "ddpm" else {"velocity": ""}
    if schedule.path != path or schedule.prediction not in names:
        found = f"a schedule of path {schedule.path!r} and prediction {schedule.prediction!r}"
        mend = f"it can be {path!r} with {', '.join(names)}"
        raise ValueError(f"{found} cannot be written for this family of models: {mend}")
    steps = {"num_train_timesteps": schedule.num_train_timesteps}
    if path == "rf":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", **steps, "shift": schedule.shift}
    noise = {name: getattr(schedule, name) for name in COGVIDEOX_NOISE}
    noise |= {"prediction_type": names[schedule.prediction], "rescale_betas_zero_snr": schedule.rescale_zero_snr}
    habits = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    return {"_class_name": "CogVideoXDDIMScheduler", **steps, **noise, **habits}
