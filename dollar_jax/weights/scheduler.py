"""diffusers' scheduler_config.json ↔ `Schedule`: flow matching, and the DDPM schedulers of CogVideoX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dollar_jax.schedule import Path as DiffusionPath
from dollar_jax.schedule import Prediction, Schedule
from dollar_jax.weights.kind import typed

# Per flow-matching scheduler: its field for the time shift; and the fields that change what sampling means, with
# diffusers' default where the file leaves them out and the value this implementation has.
_SIGMAS = {f"use_{name}_sigmas": (False, False) for name in ("karras", "exponential", "beta")}
_SHIFTS = {"use_dynamic_shifting": (False, False), "shift_terminal": (None, None)}
_FLOWS: dict[str, tuple[str, dict[str, tuple[Any, Any]]]] = {
    "FlowMatchEulerDiscreteScheduler": ("shift", {**_SIGMAS, **_SHIFTS, "invert_sigmas": (False, False)}),
    "UniPCMultistepScheduler": (
        "flow_shift",
        {
            "prediction_type": ("epsilon", "flow_prediction"),
            "use_flow_sigmas": (False, True),
            "predict_x0": (True, True),
            "solver_order": (2, 2),
            "solver_type": ("bh2", "bh2"),
            "lower_order_final": (True, True),
            "disable_corrector": ([], []),
            "thresholding": (False, False),
            "final_sigmas_type": ("zero", "zero"),
            **_SIGMAS,
            **_SHIFTS,
        },
    ),
}

_PREDICTIONS: dict[str, Prediction] = {"v_prediction": "v", "epsilon": "eps", "sample": "x0"}
COGVIDEOX_NOISE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "snr_shift_scale": 3.0,
}
# Per DDPM scheduler: diffusers' defaults of the noise's fields; and the fields that change what sampling means.
# CogVideoX's never read their clip_sample. How timesteps are spaced is the sampler's affair.
_SAME = {"trained_betas": (None, None), "set_alpha_to_one": (True, True)}
_DDPMS: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, Any]]]] = {
    "CogVideoXDDIMScheduler": (COGVIDEOX_NOISE, _SAME),
    "CogVideoXDPMScheduler": (COGVIDEOX_NOISE, _SAME),
    "DDIMScheduler": (
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "snr_shift_scale": 1.0},
        {**_SAME, "clip_sample": (True, False), "thresholding": (False, False)},
    ),
}


def schedule_of(fields: Mapping[str, Any], path: DiffusionPath, file: Path) -> Schedule:
    """What a scheduler's file means on a diffusion path; ValueError naming the field that asks for something else."""
    schedulers = _FLOWS if path == "rf" else _DDPMS
    fields = fields.get("_teacher_scheduler", fields)  # of a student that 0.1 exported
    name = str(fields.get("_class_name"))
    if name not in schedulers:
        raise ValueError(f"{file} is a {name}; the schedulers known are {', '.join(schedulers)}")
    for field, (default, value) in schedulers[name][1].items():
        found = fields.get(field, default)
        if found != value:
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
    known = _PREDICTIONS[prediction]
    return Schedule("ddpm", known, num_train_timesteps=steps, rescale_zero_snr=rescale, **noise)


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
    return {
        "_class_name": "CogVideoXDDIMScheduler",
        **steps,
        "prediction_type": names[schedule.prediction],
        **{name: getattr(schedule, name) for name in COGVIDEOX_NOISE},
        "rescale_betas_zero_snr": schedule.rescale_zero_snr,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
