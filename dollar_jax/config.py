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
            raise ValueError(f"{where} has no field {key!r}; its fields are {', '.join(sorted(names))}")
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
            raise ValueError(f"{where} is {value!r}, but must be one of {', '.join(map(repr, args))}")
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
        return tuple(_convert(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r}, but must be of type {hint.__name__}")
    return value


@dataclasses.dataclass(frozen=True)
class VAEPhase:
    """One phase of VAE training: `steps` steps on clips of `frames` frames.

    `learning_rate` is Muon's, of the weight matrices; `adam_learning_rate` that of all else. Both follow
    a cosine.
    """

    frames: int
    batch_size: int
    steps: int
    learning_rate: float
    adam_learning_rate: float
    kl_weight: float


@dataclasses.dataclass(frozen=True)
class TeacherTraining:
    """Training of the text encoder and DiT together on the denoising loss; rates as in `VAEPhase`."""

    videos: int
    batch_size: int
    steps: int
    learning_rate: float
    adam_learning_rate: float
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
    temporal_kernel: int  # 1 scores every latent frame alone and averages; 3 convolves over time too
    group_norm: bool
    groups: int


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """One reward of the weighted sum, by its name in `rewards`: ours, module:function or path.py:function.

    A `weight` of 0 holds the reward out: it is measured and never trained on. `folder` holds its weights,
    for the rewards that have some.
    """

    name: str
    weight: float
    folder: str | None

    @property
    def label(self) -> str:
        """Its name in logs: of module:function the function."""
        return self.name.rpartition(":")[2]


@dataclasses.dataclass(frozen=True)
class RewardGuard:
    """When a reward counts as hacked and training stops; None for never.

    Both bounds look at the last `window` generated samples, scored before anything learned from them:
    the correlation of latent and true reward there, and how far the mean of a held-out reward has fallen
    below its highest, in standard deviations of the held-out reward at its highest.
    """

    window: int
    min_correlation: float | None
    max_fall: float | None


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The rewards and how they reach the student, DOLLAR eq. (8.10-8.12).

    `method` "lrm" learns them by a latent model and differentiates that; "direct" differentiates decoder
    and JAX rewards; "ddpo" is REINFORCE on the last two student steps, DOLLAR eq. (8.24-8.26). With
    `normalise` every reward is standardised by running statistics before it is weighted, so that `weight`
    (β_FT) counts standard deviations; the paper's 1.0 goes with raw HPSv2 values, whose deviation is
    about 0.01.
    """

    rewards: tuple[RewardTerm, ...]
    method: Literal["lrm", "direct", "ddpo"]
    normalise: bool
    weight: float  # β_FT
    start_step: int  # from which L_FT counts; before it the latent model only learns
    ramp_steps: int  # over which β_FT then rises linearly to `weight`
    decay: Literal["constant", "cosine"]  # of β_FT after that, to the last step
    final_ratio: float  # of the cosine's last β_FT to `weight`
    samples: int  # of real and of generated latents each that are scored per step
    latent_frames: int | None  # scored of each: a random run of so many, or None for the whole clip
    timeout: float  # seconds that a host reward may take over one step's samples
    retries: int  # of a host reward that raised or took longer, before the samples are skipped
    remat: bool  # "direct" recomputes decoder and rewards in the backward pass
    replay: int  # scored latents kept
    batch_size: int  # of one update of the latent model
    updates: int  # of the latent model per step
    statistics_decay: float
    guard: RewardGuard
    head: RewardHeadSettings
    optimiser: OptimiserConfig

    @property
    def trained(self) -> tuple[int, ...]:
        """Positions in `rewards` of those that are trained on."""
        return tuple(i for i, term in enumerate(self.rewards) if term.weight)

    @property
    def held_out(self) -> tuple[int, ...]:
        """Positions in `rewards` of those that are only measured."""
        return tuple(i for i, term in enumerate(self.rewards) if not term.weight)

    def scored_shape(self, latent: tuple[int, ...]) -> tuple[int, ...]:
        """[t h w c] of what is scored of a latent of that shape."""
        frames = latent[0] if self.latent_frames is None else min(self.latent_frames, latent[0])
        return (frames, *latent[1:])

    def __post_init__(self) -> None:
        names = [term.label for term in self.rewards]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"config.reward.rewards names {name!r} twice; names must differ in the logs")
        for name, least in (("samples", 1), ("updates", 1), ("retries", 0), ("ramp_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"config.reward.{name} must be at least {least}")
        if self.latent_frames is not None and self.latent_frames < 1:
            raise ValueError("config.reward.latent_frames must be at least 1, or None for the whole clip")
        if not self.timeout > 0:
            raise ValueError(f"config.reward.timeout must be positive, not {self.timeout}")
        if self.guard.window < 2:
            raise ValueError("config.reward.guard.window must be at least 2")
        if self.guard.min_correlation is not None and (self.method != "lrm" or not self.trained):
            raise ValueError("config.reward.guard.min_correlation needs a latent reward model: set it to None")
        if self.guard.max_fall is not None and not self.held_out:
            raise ValueError(
                "config.reward.guard.max_fall needs a held-out reward: add one with weight 0 to "
                "config.reward.rewards, or set it to None"
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Clips and captions, encoded once by the teacher's own VAE and text encoder.

    `name` is "moving_shapes", the default domain, or the folder of a data set that `dollar prepare` made.
    """

    name: str
    train_videos: int  # of the default domain
    max_text_length: int
    corrupt_records: int  # of a prepared data set that are skipped, each named, before a run stops
    prefetch: int  # batches on the devices ahead of the step


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the teacher is sampled. `guidance_weight` is the paper's w (diffusers' scale is w + 1).

    `solver` "ddim" is the paper's, on a rectified flow Euler's; "unipc" is the one Wan is published with,
    which takes no `eta`.
    """

    num_steps: int
    guidance_weight: float
    eta: float
    solver: Literal["ddim", "unipc"] = "ddim"

    def __post_init__(self) -> None:
        if self.solver == "unipc" and self.eta:
            raise ValueError(f"config.sampling.eta must be 0 with solver 'unipc', not {self.eta}")


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
    # Parts of the state whose kernels lie in the host's memory between their uses.
    offload: tuple[Literal["ema", "student_optimiser", "fake_score_optimiser"], ...]

    def __post_init__(self) -> None:
        if self.vae_chunk is not None and self.vae_chunk < 1:
            raise ValueError(f"config.compute.vae_chunk must be at least 1 or None, not {self.vae_chunk}")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of student and fake score on the frozen teacher (arXiv 2106.09685).

    With `rank` 0 both are trained whole. Otherwise the teacher's weights are held once for all three, and
    state, average and checkpoints hold only the adapters, scaled by alpha / rank. `targets` are regular
    expressions for the paths of dense layers, such as `blocks/attn1/to_q`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 0 or (self.rank and not self.targets):
            raise ValueError("config.lora needs a rank of at least 0, and targets where it is not 0")

    @property
    def scale(self) -> float:
        return self.alpha / max(self.rank, 1)


@dataclasses.dataclass(frozen=True)
class VisibilityConfig:
    """What a run shows of itself, see `visibility`; none of it changes the training.

    A warning of collapse comes when less than `least_diversity` of the teacher's Vendi score above 1 is
    left, when the latents' deviation leaves `std_range` times the teacher's, or their mean moves further
    from the teacher's than `most_drift` of its deviations.
    """

    samples_every: int  # steps between sample grids; 0 for none
    prompts: tuple[str, ...]
    videos: int  # per prompt
    seed: int
    least_diversity: float
    std_range: tuple[float, float]
    most_drift: float
    peak_tflops: float | None  # of one device, for the MFU; None where `visibility` knows it, or for none
    profile_steps: int  # traced for XProf; 0 for none

    def __post_init__(self) -> None:
        if self.samples_every and (not self.prompts or self.videos < 2):
            raise ValueError(
                "config.visibility.samples_every needs prompts, and videos of at least 2 per prompt to tell "
                "diversity by; or set it to 0"
            )


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """`dollar train` and `dollar demo`."""

    seed: int
    teacher: str  # a pipeline folder in diffusers layout, or "moving_shapes" for the shipped one
    init: str | None  # the workdir of a run whose student and fake score this one goes on from, or None
    steps: int
    batch_size: int
    accumulation: int  # micro-batches whose gradients are summed within a step
    checkpoint_every: int
    keep_checkpoints: int
    log_every: int
    mesh: MeshConfig
    compute: ComputeConfig
    lora: LoraConfig
    data: DataConfig
    sampling: SamplingConfig
    student: StudentConfig
    vsd: VSDConfig
    consistency: ConsistencyConfig
    fake_score: FakeScoreConfig
    reward: RewardConfig
    visibility: VisibilityConfig
    pretrain: PretrainConfig | None

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"config.batch_size {self.batch_size} does not divide into {self.accumulation} micro-batches"
            )
        if self.data.prefetch < 1 or self.data.corrupt_records < 0:
            raise ValueError("config.data.prefetch must be at least 1, config.data.corrupt_records at least 0")
        if self.fake_score.updates < 1:
            raise ValueError("config.fake_score.updates must be at least 1")
        times = self.student.timesteps
        if not times or any(a <= b for a, b in zip(times, times[1:], strict=False)):
            raise ValueError(f"config.student.timesteps must descend, not {times}")
        rows = self.batch_size // self.accumulation
        if self.reward.rewards and rows % self.reward.samples:
            raise ValueError(f"config.reward.samples {self.reward.samples} does not divide a micro-batch of {rows}")
        if self.reward.trained and self.reward.method == "ddpo" and len(times) < 2:
            raise ValueError("config.reward.method 'ddpo' needs at least two of config.student.timesteps")
