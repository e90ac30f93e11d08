"""The DDPM schedulers of diffusers ↔ `Schedule`: `CogVideoXDDIMScheduler` and its kin, `DDIMScheduler`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dollar_jax.schedule import Schedule

CLASS_NAME = "CogVideoXDDIMScheduler"
_PREDICTIONS = {"v_prediction": "v", "epsilon": "eps", "sample": "x0"}
# What a field means to the class when its file leaves it out.
_COGVIDEOX = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "snr_shift_scale": 3.0,
    "clip_sample": False,  # it has the field, True by default, and never reads it
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    CLASS_NAME: _COGVIDEOX,
    "CogVideoXDPMScheduler": _COGVIDEOX,
    "DDIMScheduler": {
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "snr_shift_scale": 1.0,
        "clip_sample": True,
    },
}
DDPM_SCHEDULERS = tuple(_DEFAULTS)
# Fields that change what a sampler draws, with the values that ours assumes.
_FIXED = {"trained_betas": None, "set_alpha_to_one": True, "thresholding": False}


def ddpm_schedule(fields: Mapping[str, Any]) -> Schedule:
    """From a scheduler_config.json of one of DDPM_SCHEDULERS.

    The spacing of timesteps is left to our sampler, which spaces them "trailing". Raises ValueError naming
    the field that cannot be followed.
    """
    name = fields["_class_name"]
    known = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    known |= _DEFAULTS[name] | dict(fields)
    fixed = _FIXED | ({"clip_sample": False} if name == "DDIMScheduler" else {})
    for field, value in fixed.items():
        if known.get(field, value) != value:
            raise ValueError(f"a {name} with {field} = {known[field]!r} is not supported, only with {value!r}")
    if known["prediction_type"] not in _PREDICTIONS:
        raise ValueError(
            f"prediction_type is {known['prediction_type']!r}; it can be one of {', '.join(_PREDICTIONS)}"
        )
    return Schedule(
        "ddpm",
        _PREDICTIONS[known["prediction_type"]],
        num_train_timesteps=int(known["num_train_timesteps"]),
        beta_schedule=known["beta_schedule"],
        beta_start=float(known["beta_start"]),
        beta_end=float(known["beta_end"]),
        rescale_zero_snr=bool(known["rescale_betas_zero_snr"]),
        snr_shift_scale=float(known["snr_shift_scale"]),
    )


def ddpm_schedule_json(schedule: Schedule) -> dict[str, Any]:
    """The scheduler_config.json with which diffusers takes our steps; raises ValueError where it cannot."""
    names = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if schedule.path != "ddpm" or schedule.prediction not in names:
        raise ValueError(
            f"a CogVideoX pipeline cannot be written with path {schedule.path!r} and prediction "
            f"{schedule.prediction!r}: diffusers' {CLASS_NAME} knows 'ddpm' and one of {', '.join(names)}"
        )
    return {
        "_class_name": CLASS_NAME,
        "num_train_timesteps": schedule.num_train_timesteps,
        "prediction_type": names[schedule.prediction],
        "beta_schedule": schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "rescale_betas_zero_snr": schedule.rescale_zero_snr,
        "snr_shift_scale": schedule.snr_shift_scale,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
