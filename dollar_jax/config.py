"""Every setting as a frozen dataclass. `configs/*.py` spell them out as ConfigDicts, which end here.

Where the paper leaves a value unknown the field says so; the value lives in the experiment's config.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def from_config(cls: type[T], config: Mapping[str, Any], where: str = "config") -> T:
    """The dataclass `cls` of a ConfigDict or mapping with exactly its fields.

    Raises ValueError naming the key that is missing, unknown or of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in config:
        if key not in names:
            raise ValueError(
                f"{where} has no field {key!r}; its fields are {', '.join(sorted(names))}"
            )
    missing = names - set(config)
    if missing:
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    return cls(**{name: _convert(hints[name], config[name], f"{where}.{name}") for name in names})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (arg for arg in args if arg is not type(None))
        return _convert(hint, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(
                f"{where} is {value!r}, but must be one of {', '.join(map(repr, args))}"
            )
        return value
    group = origin is collections.abc.Mapping
    if (group or dataclasses.is_dataclass(hint)) and not hasattr(value, "items"):
        raise ValueError(f"{where} must be a group of settings, not {value!r}")
    if group:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_config(typing.cast(type, hint), value, where)
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ValueError(f"{where} must be a sequence, not {value!r}")
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise ValueError(f"{where} needs {len(kinds)} values, not {len(value)}")
        return tuple(
            _convert(kind, v, f"{where}[{i}]")
            for i, (kind, v) in enumerate(zip(kinds, value, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r}, but must be of type {hint.__name__}")
    return value


@dataclasses.dataclass(frozen=True)
class VAEPhase:
    """One phase of VAE training: `steps` Adam steps on clips of `frames` frames, a cosine from `learning_rate`."""

    frames: int
    batch_size: int
    steps: int
    learning_rate: float
    kl_weight: float


@dataclasses.dataclass(frozen=True)
class TeacherTraining:
    """Training of the text encoder and DiT together on the denoising loss."""

    videos: int
    batch_size: int
    steps: int
    learning_rate: float
    ema_decay: float
    caption_dropout: float
    shift: float


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """`dollar pretrain`. `vae`, `text_encoder` and `transformer` are the components' own settings.

    `init` is a pipeline folder whose weights training goes on from, or None for fresh ones.
    """

    seed: int
    init: str | None
    vae: Mapping[str, Any]
    vae_phases: tuple[VAEPhase, ...]
    vae_videos: int
    text_encoder: Mapping[str, Any]
    max_text_length: int
    transformer: Mapping[str, Any]
    teacher: TeacherTraining
    guidance_weight: float
    num_steps: int
    dtype: str
    checkpoint_every: int


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1, at most once, takes what the others leave."""

    data: int
    fsdp: int
    context: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """AdamW; rates, betas, decay and clipping are unknown in the paper."""

    learning_rate: float
    schedule: Literal["constant", "cosine"]
    warmup_steps: int
    final_ratio: float  # of the cosine's last learning rate to its peak
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float | None


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The student: its timesteps, descending, and what it is trained on.

    `input` "forward" noises real latents to the student's timesteps; "backward" walks there from noise
    with the student's own steps. The paper settles neither.
    """

    timesteps: tuple[float, ...]
    input: Literal["forward", "backward"]
    # Of the target θ⁻ and of the weights that are sampled from; unknown in the paper.
    ema_decay: float
    optimiser: OptimiserConfig


@dataclasses.dataclass(frozen=True)
class VSDConfig:
    """Variational score distillation, DOLLAR eq. (8.7-8.9).

    `guidance_weight` is the paper's w in v_c + w (v_c - v_∅), 3.5 there; diffusers' scale is w + 1.
    Normalisation and the range of score timesteps are unknown in the paper.
    """

    weight: float
    guidance_weight: float
    normalisation: Literal["dmd", "batch", "none"]
    floor: float
    nan_to_zero: bool
    score_range: tuple[float, float]  # of the uniform variable that is mapped to score timesteps
    score_shift: float  # time shift of that map; 1 on a DDPM path


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig:
    """Consistency distillation, DOLLAR eq. (8.4-8.6), over `skip` = m teacher steps.

    `times` "grid" takes t_{n+m} from the teacher's grid of `num_steps`, as in the paper. "student" takes
    the student's own timesteps, each with its next one as the target, `skip` teacher steps apart; the
    student's forward is then shared with VSD. `guidance_weight` is the paper's w, 7.5 there.
    Distance and boundary values are unknown in the paper.
    """

    weight: float  # β_CD
    times: Literal["grid", "student"]
    num_steps: int
    skip: int
    guidance_weight: float
    distance: Literal["mse", "huber", "pseudo_huber"]
    huber_c: float
    boundary: Literal["lcm", "none"]
    sigma_data: float
    timestep_scaling: float


@dataclasses.dataclass(frozen=True)
class FakeScoreConfig:
    """The fake-score network: `updates` per student update (5 in the paper) on its denoising loss.

    `loss` "prediction" is the network's own target (8.13), "x0" the clean latent.
    """

    updates: int
    loss: Literal["prediction", "x0"]
    optimiser: OptimiserConfig


@dataclasses.dataclass(frozen=True)
class RewardHeadSettings:
    """The latent reward model; see `models.reward_head`."""

    width: int
    use_text: bool
    stem_kernel: int
    stem_stride: int
    stem_padding: int
    second_kernel: int
    second_stride: int
    second_padding: int
    group_norm: bool
    groups: int


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The reward and its latent model, DOLLAR eq. (8.10-8.12).

    `name` is one of `rewards.REWARDS`, or None for none. Rewards are standardised by running
    statistics before the latent model learns them, so `weight` (β_FT) counts standard deviations;
    the paper's 1.0 goes with raw HPSv2 values, whose deviation is about 0.01.
    """

    name: str | None
    weight: float  # β_FT
    start_step: int  # from which L_FT counts; before it the latent model only learns
    samples: int  # of real and of generated latents each that are scored per step
    replay: int  # scored latents kept
    batch_size: int  # of one update of the latent model
    updates: int  # of the latent model per step
    statistics_decay: float
    head: RewardHeadSettings
    optimiser: OptimiserConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Clips and captions, encoded once by the teacher's own VAE and text encoder."""

    name: Literal["moving_shapes"]
    train_videos: int
    max_text_length: int


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the teacher is sampled. `guidance_weight` is the paper's w (diffusers' scale is w + 1)."""

    num_steps: int
    guidance_weight: float
    eta: float


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How networks are computed: nothing here changes what they are, but for rounding.

    `dtype` is that of the transformer's matrix products; norms, modulation, rotary and timestep embeddings
    stay fp32, as do the student's and fake score's own weights. `remat` says what the backward pass keeps
    of a block (see `models.layers.run_blocks`).
    """

    dtype: Literal["float32", "bfloat16"]
    teacher_dtype: Literal["float32", "bfloat16"]  # of the frozen teacher's and text encoder's weights
    remat: Literal["none", "full", "dots", "attention"]
    scan_layers: bool  # one compiled block instead of a program as long as the network is deep
    vae_chunk: int | None  # latent frames the video VAE takes at a time; None is the whole clip
    # The kernel of the transformer's attention: "auto" goes by the platform (see `models.attention`).
    attention: Literal["auto", "splash", "cudnn", "xla"]
    # How the keys of a sequence that is shared over the mesh's context axis meet.
    context_parallel: Literal["gather", "ulysses"]

    def __post_init__(self) -> None:
        if self.vae_chunk is not None and self.vae_chunk < 1:
            raise ValueError(f"config.compute.vae_chunk must be at least 1 or None, not {self.vae_chunk}")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """`dollar train` and `dollar demo`."""

    seed: int
    teacher: str  # a pipeline folder in diffusers layout, or "moving_shapes" for the shipped one
    steps: int
    batch_size: int
    accumulation: int  # micro-batches whose gradients are summed within a step
    checkpoint_every: int
    keep_checkpoints: int
    log_every: int
    mesh: MeshConfig
    compute: ComputeConfig
    data: DataConfig
    sampling: SamplingConfig
    student: StudentConfig
    vsd: VSDConfig
    consistency: ConsistencyConfig
    fake_score: FakeScoreConfig
    reward: RewardConfig
    pretrain: PretrainConfig | None

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"config.batch_size {self.batch_size} does not divide into {self.accumulation} micro-batches"
            )
        for name in ("fake_score", "reward"):
            if getattr(self, name).updates < 1:
                raise ValueError(f"config.{name}.updates must be at least 1")
        times = self.student.timesteps
        if not times or any(a <= b for a, b in zip(times, times[1:], strict=False)):
            raise ValueError(f"config.student.timesteps must descend, not {times}")
        if (
            self.reward.name is not None
            and self.reward.samples > self.batch_size // self.accumulation
        ):
            raise ValueError(
                f"config.reward.samples {self.reward.samples} is more than a micro-batch of "
                f"{self.batch_size // self.accumulation}"
            )
