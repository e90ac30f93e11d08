"""Every setting as a frozen dataclass: its default, meaning and range, and whether a resumed run may change it. These
defaults are the only ones: `configs/*.py` say what an experiment changes, and a config.json written before a field
existed is read with the field's default. Where the paper gives a value, that is the default; where it leaves a value
unknown the meaning says so, and the default is what systems that distil Wan use."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from dollar_jax.fields import REQUIRED, field, from_config, merged, plain, settings

LARGEST_SEED = 2**32 - 1
Range = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A training with Muon and Adam."""

    batch_size: int = field(64, "Videos to a step.", low=1)
    steps: int = field(2000, "Training steps.", low=1)
    learning_rate: float = field(5e-3, "Muon's, of the weight matrices; follows a cosine.", above=0)
    adam_learning_rate: float = field(3e-3, "Adam's, of all other parameters; follows a cosine.", above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEPhase(Fit):
    """One phase of VAE training."""

    frames: int = field(1, "Frames of a clip.", low=1)
    kl_weight: float = field(1e-5, "Weight of the KL divergence beside the reconstruction.", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherTraining(Fit):
    """Training of the text encoder and DiT together on the denoising loss."""

    videos: int = field(20480, "Rendered training videos.", low=1)
    steps: int = field(12000, "Training steps.", low=1)
    learning_rate: float = field(4e-3, "Muon's, of the weight matrices; follows a cosine.", above=0)
    adam_learning_rate: float = field(1.2e-3, "Adam's, of all other parameters; follows a cosine.", above=0)
    ema_decay: float = field(0.999, "Decay of the moving average that is kept.", low=0, high=1)
    caption_dropout: float = field(0.1, "Share of the videos that are trained on without their caption.", low=0, high=1)
    shift: float = field(3.0, "Time shift of the rectified flow.", above=0)
    given_frames: int = field(0, "1: a clip's first latent frame is given, an image to continue.", low=0, high=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderTraining(Fit):
    """`dollar pretrain --decoder`: a narrower decoder learns to decode latents of the data as the teacher's does."""

    width: int = field(32, "Its channels, `decoder_base_dim`; those of Wan 2.1's VAE are 96.", low=1)
    batch_size: int = field(8, "Latents to a step.", low=1)
    latent_frames: int = field(5, "The first latent frames of each are learnt from, at most.", low=1)
    latent_size: int = field(32, "Most rows and columns of each: a random part.", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """`dollar pretrain`."""

    seed: int = field(0, "Seed of everything.", low=0, high=LARGEST_SEED)
    init: str | None = field(None, "Pipeline folder whose weights training goes on from; None for fresh ones.")
    vae: Mapping[str, Any] = field(REQUIRED, "The VAE's own settings.")
    vae_phases: tuple[VAEPhase, ...] = field(REQUIRED, "The VAE's training phases, one after another.")
    vae_videos: int = field(4096, "Rendered videos that the VAE is trained on.", low=1)
    text_encoder: Mapping[str, Any] = field(REQUIRED, "The text encoder's own settings.")
    max_text_length: int = field(12, "Tokens of a caption.", low=1, high=4096)
    transformer: Mapping[str, Any] = field(REQUIRED, "The transformer's own settings.")
    teacher: TeacherTraining = field(TeacherTraining(), "Training of text encoder and transformer.")
    guidance_weight: float = field(1.0, "w of the samples that the finished teacher is measured by.")
    num_steps: int = field(50, "Steps of those samples.", low=1)
    dtype: Literal["float32", "float16", "bfloat16"] = field("float16", "Type of the weights on disk.")
    checkpoint_every: int = field(500, "Steps between checkpoints.", low=1)

    def __post_init__(self) -> None:
        if not self.vae_phases and self.init is None:
            raise ValueError("config.pretrain.vae_phases is empty, and config.pretrain.init names no VAE to take over")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1, at most once, takes what the others leave."""

    data: int = field(1, "Devices among which the batch is shared, each with all parameters.", low=-1)
    fsdp: int = field(-1, "Devices among which the batch, the parameters and the optimiser states are shared.", low=-1)
    context: int = field(1, "Devices among which the tokens of a clip are shared.", low=-1)
    tensor: int = field(1, "Devices among which heads and channels are shared.", low=-1)


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """AdamW or Muon; rates, betas, decay and clipping are unknown in the paper."""

    name: Literal["adamw", "muon"] = field("adamw", "Muon is of blocks' kernels, its momentum 0.95, the rest AdamW's.")
    learning_rate: float = field(1e-5, "Highest learning rate; unknown in the paper.", above=0, resumable=True)
    schedule: Literal["constant", "cosine"] = field("constant", "Course of the learning rate after the warm-up.")
    warmup_steps: int = field(100, "Updates over which the learning rate rises from 0.", low=0)
    final_ratio: float = field(1.0, "The cosine's last learning rate as a share of its highest.", low=0, high=1)
    b1: float = field(0.9, "Decay of the gradient's moving average; unknown in the paper.", low=0, high=0.99999)
    b2: float = field(0.999, "Decay of the squared gradient's average; unknown in the paper.", low=0, high=0.999999)
    eps: float = field(1e-8, "Added to the divisor.", above=0)
    weight_decay: float = field(0.01, "Decoupled weight decay of kernels and embeddings.", low=0)
    clip_norm: float | None = field(10.0, "Global norm of clipped gradients; None for all.", above=0, resumable=True)


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The student: its timesteps, and what it is trained on. The paper does not settle `input`."""

    timesteps: tuple[float, ...] = field((1000.0, 750.0, 500.0, 250.0), "Descending teacher times.", above=0, high=1000)
    input: Literal["forward", "backward"] = field("backward", "Real latents noised, or its own way from noise.")
    timestep_per: Literal["sample", "micro_batch"] = field("sample", "What draws one of n: costs in docs/recipe.md.")
    layers: int | None = field(None, "Blocks, spread over the teacher's, that it starts from; None for all.", low=1)
    sampler: Literal["renoise", "ode"] = field("renoise", "Way to the next timestep: fresh noise, or a DDIM step.")
    ema_decay: float = field(0.99, "Decay of the average that is CD's target and sampled from.", low=0, high=1)
    ema_start: int = field(0, "Steps in which that average is the student itself; FastVideo's are 200.", low=0)
    optimiser: OptimiserConfig = field(OptimiserConfig(), "The student's optimiser.")

    def __post_init__(self) -> None:
        if not self.timesteps or list(self.timesteps) != sorted(set(self.timesteps), reverse=True):
            raise ValueError(f"config.student.timesteps must descend, not {self.timesteps}")


@dataclasses.dataclass(frozen=True)
class VSDConfig:
    """Variational score distillation, DOLLAR eq. (8.7-8.9). Normalisation and score timesteps are unknown there."""

    weight: float = field(1.0, "Weight of L_VSD.", low=0)
    guidance_weight: float = field(3.5, "The paper's w in v_c + w (v_c - v_∅); diffusers' guidance scale is w + 1.")
    guidance_by_step: tuple[float, ...] = field((), "Factors of w, one for each student timestep; empty for 1.")
    guidance_range: Range = field((0.0, 1000.0), "Timesteps with guidance (arXiv 2404.07724).", low=0, high=1000)
    guidance_time: Literal["score", "noisier"] = field("score", "Of the guided part; noisier as in arXiv 2511.22677.")
    normalisation: Literal["dmd", "batch", "none"] = field("dmd", "What the gradient is divided by; see losses.vsd.")
    floor: float = field(1e-6, "Smallest divisor of the normalisation.", above=0)
    nan_to_zero: bool = field(False, "Replace what is not a number in the gradient by 0.")
    score_range: tuple[float, float] = field((0.001, 0.999), "Uniform range of the score timesteps.", low=0, high=1)
    score_shift: float = field(1.0, "Time shift of that map; 1 on a DDPM path.", above=0)

    def __post_init__(self) -> None:
        if self.score_range[0] > self.score_range[1]:
            raise ValueError(f"config.vsd.score_range must ascend, not {self.score_range}")
        if self.guidance_range[0] > self.guidance_range[1]:
            raise ValueError(f"config.vsd.guidance_range must ascend, not {self.guidance_range}")


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig:
    """Consistency distillation, DOLLAR eq. (8.4-8.6). Distance and boundary values are unknown in the paper."""

    weight: float = field(0.5, "β_CD, the weight of L_CD.", low=0)
    times: Literal["grid", "student"] = field("grid", "The paper's, on the teacher's grid, or the student's timesteps.")
    num_steps: int = field(50, "Steps of the teacher's grid.", low=1)
    skip: int = field(5, "m, the teacher's steps between input and target.", low=1)
    every: int = field(1, "Steps from one with L_CD, 2 m + 4 forwards, to the next; it counts as often as much.", low=1)
    guidance_weight: float = field(7.5, "The paper's w of the teacher's steps; diffusers' guidance scale is w + 1.")
    distance: Literal["mse", "huber", "pseudo_huber"] = field("pseudo_huber", "Distance to the target.")
    huber_c: float = field(1e-3, "Where the Huber distances turn from quadratic to linear.", above=0)
    boundary: Literal["lcm", "none"] = field("lcm", "Skip scalings that make f the identity at the clean end.")
    sigma_data: float = field(0.5, "σ_data of the skip scalings.", above=0)
    timestep_scaling: float = field(10.0, "Factor of the timestep in the skip scalings.", above=0)

    def __post_init__(self) -> None:
        if self.skip > self.num_steps:
            raise ValueError(f"config.consistency.skip must be at most num_steps, {self.num_steps}, not {self.skip}")


@dataclasses.dataclass(frozen=True)
class FakeScoreConfig:
    """The fake-score network, which learns the student's score by denoising its samples; not without L_VSD."""

    updates: int = field(5, "Updates per update of the student, 3 forwards each.", low=1)
    samples: Literal["fresh", "rollout", "student"] = field("fresh", "New each update, of one rollout, or the loss's.")
    loss: Literal["prediction", "x0"] = field("prediction", "Towards the network's target, eq. (8.13), or x0.")
    optimiser: OptimiserConfig = field(OptimiserConfig(), "The fake score's optimiser.")


@dataclasses.dataclass(frozen=True)
class GANConfig:
    """A discriminator on the fake score's features, which tells noised real latents from the student's, as in DMD2
    (arXiv 2405.14867). It is in the fake score's state, and has its optimiser."""

    weight: float = field(0.0, "Weight of the student's -log D; DMD2's is 0.005, FastGen's 0.03.", low=0)
    fake_score_weight: float = field(0.01, "Weight of the discriminator's loss beside the fake score's.", low=0)
    depth: float = field(0.5, "Share of the fake score's blocks before the features.", above=0, high=1)
    width: int = field(128, "Channels of the head.", low=1)


@dataclasses.dataclass(frozen=True)
class LatentRewardSettings:
    """The latent reward model; see `models.latent_reward`."""

    width: int = field(128, "Channels.", low=1)
    use_text: bool | None = field(None, "Score the agreement with the text; None where a reward reads prompts.")
    depth: float | None = field(None, "Reads the teacher's features after this share of its blocks.", above=0, high=1)
    time: float = field(250.0, "Timestep of the noise at which it reads them.", low=0, high=1000)
    stem_kernel: int = field(4, "Kernel of the first convolution.", low=1)
    stem_stride: int = field(4, "Stride of the first convolution.", low=1)
    stem_padding: int = field(1, "Padding of the first convolution.", low=0)
    second_kernel: int = field(3, "Kernel of the second convolution.", low=1)
    second_stride: int = field(2, "Stride of the second convolution.", low=1)
    second_padding: int = field(1, "Padding of the second convolution.", low=0)
    temporal_kernel: int = field(1, "Latent frames a convolution sees, odd, zeros around; 1 averages scores.", low=1)
    group_norm: bool = field(True, "Normalise after each convolution, which hides the latent's overall scale.")
    groups: int = field(32, "Groups of the normalisation; divides the width.", low=1)

    def __post_init__(self) -> None:
        if self.temporal_kernel % 2 == 0:
            raise ValueError(f"config.reward.head.temporal_kernel must be odd and positive, not {self.temporal_kernel}")
        if self.group_norm and self.width % self.groups:
            raise ValueError(f"config.reward.head.width {self.width} does not divide into {self.groups} groups")


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """One reward of the weighted sum."""

    name: str = field(REQUIRED, "One of ours, module:function or path.py:function, or a .part of what it gives.")
    weight: float = field(1.0, "Weight in the sum; 0 holds the reward out: it is measured and never trained on.")
    folder: str | None = field(None, "Folder of the reward's weights, for a reward that has some.")

    @property
    def label(self) -> str:
        """Its name in logs: of module:function the function."""
        return self.name.rpartition(":")[2]


@dataclasses.dataclass(frozen=True)
class RewardGuard:
    """When a reward counts as hacked and training stops."""

    window: int = field(64, "Last generated samples, scored before they are learned from, of both bounds.", low=2)
    min_correlation: float | None = field(None, "Least correlation of latent and true reward.", low=-1, high=1)
    max_fall: float | None = field(None, "Deepest fall of a held-out reward, in its deviations.", above=0)


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The rewards and how they reach the student, DOLLAR eq. (8.10-8.12)."""

    rewards: tuple[RewardTerm, ...] = field((RewardTerm("vivid"),), "The rewards that are summed or held out.")
    method: Literal["lrm", "direct", "ddpo"] = field("lrm", "By a latent reward model, the decoder, or REINFORCE.")
    normalise: bool = field(True, "Standardise rewards by running statistics; raw HPSv2 deviates by about 0.01.")
    weight: float = field(0.01, "β_FT, the weight of L_FT.", low=0)
    start_step: int = field(1000, "Step from which L_FT counts; before it the latent model only learns.", low=0)
    ramp_steps: int = field(0, "Steps over which β_FT then rises linearly to its weight.", low=0)
    decay: Literal["constant", "cosine"] = field("constant", "Course of β_FT after that, to the last step.")
    final_ratio: float = field(0.0, "The cosine's last β_FT as a share of its weight.", low=0, high=1)
    samples: int = field(8, "Real and generated latents, of each so many, that are scored per step.", low=1)
    latent_frames: int | None = field(None, "Latent frames scored, a random run; None for all.", low=1)
    timeout: float = field(60.0, "Seconds a host reward may take per step.", above=0, resumable=True)
    retries: int = field(1, "Further tries of a host reward that failed.", low=0, resumable=True)
    max_failed_rounds: int = field(50, "Steps without any reward that end a run.", low=1, resumable=True)
    remat: bool = field(True, "direct recomputes decoder and rewards in the backward pass.", resumable=True)
    replay: int = field(128, "Scored latents kept in the host's memory and in checkpoints.", low=1)
    batch_size: int = field(64, "Scored latents to one update of the latent model.", low=1)
    updates: int = field(1, "Updates of the latent model per step.", low=1)
    statistics_decay: float = field(0.99, "Decay of the rewards' running mean and deviation.", low=0, high=1)
    guard: RewardGuard = field(RewardGuard(), "When training stops because a reward is being hacked.", resumable=True)
    head: LatentRewardSettings = field(LatentRewardSettings(), "The latent reward model.")
    optimiser: OptimiserConfig = field(OptimiserConfig(), "The latent reward model's optimiser.")

    @property
    def trained(self) -> tuple[int, ...]:
        """Positions in `rewards` of those that are trained on."""
        return tuple(i for i, term in enumerate(self.rewards) if term.weight)

    @property
    def use_text(self) -> bool:
        """Whether the latent reward model reads the text: as asked, or where a reward may; one's own is taken to."""
        named = ("clip", "viclip", "hpsv2", "pickscore")
        reads = (t.weight and (":" in t.name or t.name in named) for t in self.rewards)
        return self.head.depth is not None or (any(reads) if self.head.use_text is None else self.head.use_text)

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
        if self.guard.max_fall is not None and not self.held_out:
            mend = "add one with weight 0 to config.reward.rewards, or set it to None"
            raise ValueError(f"config.reward.guard.max_fall needs a held-out reward: {mend}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Clips and captions, encoded once by the teacher's own VAE and text encoder."""

    name: str = field(REQUIRED, 'Folder that `dollar prepare` left, or "moving_shapes" for the default domain.')
    given_frames: int = field(0, "1: a clip's first latent frame is given, an image to continue.", low=0, high=1)
    train_videos: int = field(1024, "Rendered training videos of the default domain.", low=1)
    max_text_length: int = field(512, "Tokens of a caption.", low=1, high=4096)
    corrupt_records: int = field(0, "Damaged records that are skipped before a run stops.", low=0, resumable=True)
    prefetch: int = field(2, "Batches on the devices ahead of the step.", low=1, resumable=True)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the teacher is sampled."""

    num_steps: int = field(50, "Sampling steps.", low=1)
    guidance_weight: float = field(7.5, "The paper's w in v_c + w (v_c - v_∅); diffusers' guidance scale is w + 1.")
    eta: float = field(0.0, "Share of fresh noise in DDIM's steps; 0 is deterministic.", low=0, high=1)
    solver: Literal["ddim", "unipc"] = field("ddim", "The paper's (Euler on a flow), or Wan's.")
    negative_prompt: str = field("", "The prompt of guidance's other half, in distillation too; empty for no text.")
    low_guidance_weight: float | None = field(None, "w of the low-noise expert of two; None: as of the other.")
    shift: float | None = field(None, "Shift of a flow's grid, in place of the scheduler file's; None: that.", above=0)
    vae: str | None = field(None, "Folder of a VAE with a smaller decoder; None: the teacher's own VAE.")

    def __post_init__(self) -> None:
        if self.solver == "unipc" and self.eta:
            raise ValueError(f"config.sampling.eta must be 0 with solver 'unipc', not {self.eta}")


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How networks are computed, which changes no more than rounding. Norms, modulation, rotary and timestep embeddings
    stay fp32, as do the student's and fake score's own weights."""

    dtype: Literal["float32", "bfloat16"] = field("bfloat16", "Type of the transformer's matrix products.")
    teacher_dtype: Literal["float32", "bfloat16"] = field("bfloat16", "Of teacher and text encoder.")
    whole_teacher: bool = field(False, "Every device keeps all of the teacher in a run, which is then not gathered.")
    remat: Literal["none", "full", "dots", "attention", "qkv"] = field("attention", "Kept for the backward pass.")
    scan_layers: bool = field(True, "One compiled block instead of a program as long as the network is deep.")
    vae_chunk: int | None = field(1, "Latent frames the video VAE takes at a time; None is the whole clip.", low=1)
    attention: Literal["auto", "splash", "cudnn", "xla"] = field("auto", "Kernel; see models.attention.")
    context_parallel: Literal["gather", "ulysses"] = field("gather", "How keys meet over the context axis.")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of student and fake score on the frozen teacher (arXiv 2106.09685), whose weights are held once
    for all three: state, average and checkpoints hold only the adapters."""

    rank: int = field(0, "Rank of the adapters; 0 trains all weights of student and fake score.", low=0)
    alpha: float = field(8.0, "The adapters are scaled by alpha / rank.", above=0)
    targets: tuple[str, ...] = field(
        ("blocks/attn./to_(q|k|v|out)", "blocks/ffn?/proj_(in|out)"), "Regular expressions for paths of dense layers."
    )

    def __post_init__(self) -> None:
        if self.rank and not self.targets:
            raise ValueError("config.lora needs targets where its rank is not 0")

    @property
    def scale(self) -> float:
        return self.alpha / max(self.rank, 1)


@dataclasses.dataclass(frozen=True)
class VisibilityConfig:
    """What a run shows of itself, see `visibility`; none of it changes the training."""

    samples_every: int = field(100, "Steps between sample grids; 0 for none.", low=0)
    prompts: tuple[str, ...] = field((), "Prompts of the sample grids; without any, three captions of the data.")
    videos: int = field(8, "Videos per prompt.", low=1)
    seed: int = field(0, "Seed of their noise.", low=0, high=LARGEST_SEED)
    least_diversity: float = field(0.5, "Warned of: a Vendi score above 1 below this share of the teacher's.", low=0)
    std_range: tuple[float, float] = field((0.6, 1.5), "Not warned of: latents' deviation by the teacher's.", above=0)
    most_drift: float = field(0.3, "Warned of: latents' mean so many of the teacher's deviations off its.", low=0)
    peak_tflops: float | None = field(None, "Peak TFLOP/s of a device, for the MFU; None if known.", above=0)
    profile_steps: int = field(0, "Steps traced for XProf; 0 for none.", low=0)
    device_hour_price: float | None = field(None, "Price of a device's hour, to show a run's cost.", above=0)
    most_saturation: float = field(2.5, "Share of vivid pixels, by the teacher's, that is warned of.", above=0)

    def __post_init__(self) -> None:
        if self.samples_every and self.videos < 2:
            mend = "needs videos of at least 2 per prompt to tell diversity by; or set it to 0"
            raise ValueError(f"config.visibility.samples_every {mend}")
        if self.std_range[0] >= self.std_range[1]:
            raise ValueError(f"config.visibility.std_range must ascend, not {self.std_range}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """`dollar train` and `dollar demo`."""

    seed: int = field(0, "Seed of everything.", low=0, high=LARGEST_SEED)
    teacher: str = field(REQUIRED, 'Pipeline folder in diffusers layout, or "moving_shapes" for the shipped teacher.')
    expert: Literal["high", "low"] | None = field(None, "Which of a teacher's two experts, by noise, a run trains.")
    init: str | None = field(None, "Workdir of a run whose student and fake score this one goes on from.")
    steps: int = field(10_000, "Updates of the student.", low=1, resumable=True)
    batch_size: int = field(64, "Videos to a step, over all devices.", low=1)
    accumulation: int = field(1, "Micro-batches whose gradients are summed within a step.", low=1)
    checkpoint_every: int = field(500, "Steps between checkpoints.", low=1, resumable=True)
    checkpoint_minutes: float | None = field(60.0, "Most minutes between two; None: any.", above=0, resumable=True)
    keep_checkpoints: int = field(2, "Newest checkpoints that are kept.", low=1, resumable=True)
    log_every: int = field(10, "Steps between logged metrics.", low=1, resumable=True)
    log_minutes: float = field(5.0, "Minutes after which metrics are logged anyway.", above=0, resumable=True)
    max_skipped: int = field(10, "Steps in a row that may be skipped before a run stops.", low=0, resumable=True)
    max_gradient_norm: float | None = field(None, "The student's that skips a step.", above=0, resumable=True)
    mesh: MeshConfig = field(MeshConfig(), "Devices along each mesh axis.", resumable=True)
    compute: ComputeConfig = field(ComputeConfig(), "How networks are computed.", resumable=True)
    lora: LoraConfig = field(LoraConfig(), "Low-rank adapters.")
    data: DataConfig = field(REQUIRED, "Clips and captions.")
    sampling: SamplingConfig = field(SamplingConfig(), "How the teacher is sampled.")
    student: StudentConfig = field(StudentConfig(), "The student.")
    vsd: VSDConfig = field(VSDConfig(), "Variational score distillation.")
    consistency: ConsistencyConfig = field(ConsistencyConfig(), "Consistency distillation.")
    fake_score: FakeScoreConfig = field(FakeScoreConfig(), "The fake-score network.")
    gan: GANConfig = field(GANConfig(), "The discriminator.")
    reward: RewardConfig = field(RewardConfig(), "The rewards.")
    visibility: VisibilityConfig = field(VisibilityConfig(), "What a run shows of itself.", resumable=True)
    decoder: DecoderTraining = field(DecoderTraining(), "A smaller decoder.", resumable=True)
    pretrain: PretrainConfig | None = field(None, "How `dollar pretrain` trains a teacher.", resumable=True)

    def __post_init__(self) -> None:
        if self.data.name == "moving_shapes" and self.data.train_videos < self.batch_size:
            videos = self.data.train_videos
            raise ValueError(f"config.data.train_videos {videos} are fewer than config.batch_size {self.batch_size}")
        if self.data.given_frames and self.visibility.prompts:
            raise ValueError("config.visibility.prompts have no first frames: leave them to config.data.given_frames")
        if self.expert and self.visibility.samples_every:
            raise ValueError("config.expert draws no videos by itself: set config.visibility.samples_every to 0")
        if self.expert == "low" and self.student.input != "forward":
            raise ValueError("config.expert 'low' starts from no noise: config.student.input must be 'forward'")
        if self.student.layers and self.lora.rank:
            raise ValueError("config.student.layers leaves blocks out, and config.lora.rank keeps them all: set one")
        rows, rest = divmod(self.batch_size, self.accumulation)
        if rest:
            parts = f"{self.accumulation} micro-batches"
            raise ValueError(f"config.batch_size {self.batch_size} does not divide into {parts}")
        if (found := len(self.vsd.guidance_by_step)) not in (0, known := len(self.student.timesteps)):
            raise ValueError(f"config.vsd.guidance_by_step has {found} factors for {known} of config.student.timesteps")
        if self.gan.weight and not self.vsd.weight:
            raise ValueError("config.gan.weight needs the fake score: set config.vsd.weight")
        if self.fake_score.samples == "rollout" and self.student.input == "forward":
            raise ValueError("config.fake_score.samples 'rollout' needs config.student.input 'backward'")
        if self.reward.rewards and rows % self.reward.samples:
            raise ValueError(f"config.reward.samples {self.reward.samples} does not divide a micro-batch of {rows}")


# Settings that are no more, by group.name: since which version, what to use instead, and what all runs have now.
DROPPED: dict[str, Any] = {"compute.offload": ("0.2.0", "a larger mesh.fsdp, or compute.remat=full", ())}


def distill_config(fields: Any, past: bool = False) -> DistillConfig:
    """The configuration of a ConfigDict or mapping; ValueError naming what is wrong. In a run's config.json (`past`) of
    an earlier version, a dropped setting is passed over where the run had the value that all runs have now."""
    for path, (version, instead, now) in DROPPED.items():
        group, name = path.split(".")
        if group in fields and hasattr(fields[group], "items") and name in fields[group]:
            rest = dict(fields[group].items())
            if not past or plain(rest.pop(name)) != plain(now):
                raise ValueError(f"config.{path} was dropped in version {version}: {instead}")
            fields = {**fields, group: rest}
    return from_config(DistillConfig, fields)


def changed(config: DistillConfig, changes: Mapping[str, Any]) -> DistillConfig:
    """The configuration with settings changed by their dotted paths, checked anew; ValueError for an unknown one."""
    return distill_config(merged(dataclasses.asdict(config), changes))


def unresumable(before: DistillConfig, now: DistillConfig) -> list[tuple[str, Any, Any]]:
    """The settings, as (path, before, now), that differ though a run may not be resumed with another value."""
    new = {setting.path: setting.value for setting in settings(now)}
    found = []
    for setting in settings(before):
        old, value = setting.value, new.get(setting.path)
        # An optimiser that clips keeps a state of another structure than one that does not.
        clips = setting.path.endswith("clip_norm") and (old is None) != (value is None)
        if plain(old) != plain(value) and (clips or not setting.resumable):
            found.append((setting.path, old, value))
    return found
