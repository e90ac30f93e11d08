"""What happens to rewards on the host: scoring beside the devices, the replay, and what is known of both. While the
devices run a step, host rewards score what the previous one generated; they reach the student one step later."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dollar_jax import sharding
from dollar_jax.config import DistillConfig
from dollar_jax.distillation import RewardSamples
from dollar_jax.distributed import gather
from dollar_jax.program import BESIDE, Program
from dollar_jax.rewards.host import HostScorer
from dollar_jax.rewards.methods import method_of
from dollar_jax.rewards.methods.base import Memory
from dollar_jax.rewards.monitor import Monitor
from dollar_jax.rewards.pixels import Decode, PixelRewards
from dollar_jax.rewards.reward import AnyReward, JaxReward, calls
from dollar_jax.types import Params

Shape = tuple[int, ...]


class _Pending(NamedTuple):
    """A step's samples under way and their text, all of them on every process. `here` are those rows that this process
    scores. `shape` is that of the latents of the step's batch."""

    samples: RewardSamples
    text: Any
    here: np.ndarray
    shape: Shape


class Scorer:
    """Scores this process's share of each step's latents, one step behind the devices. What was scored goes to all
    processes, so that each has the same replay, and stops when the others do. `decode(params, latent)` gives frames in
    [0, 1]; it is dispatched like a step and not waited for, or runs beside the next on a CPU with cores to spare."""

    def __init__(
        self,
        config: DistillConfig,
        rewards: Sequence[AnyReward],
        pixels: PixelRewards | None,
        decode: Decode,
        decoder: Params,
        latent_shapes: Sequence[tuple[int, ...]],
        text_shape: tuple[int, ...],
    ):
        c = self.config = config.reward
        self.seed, self.accumulation = config.seed, config.accumulation
        self.pixels = pixels
        on_host = {columns: r for columns, r in calls(rewards).items() if not isinstance(r, JaxReward)}
        names = {columns: c.rewards[columns[0]].label.partition(".")[0] for columns in on_host}
        self.hosts = {columns: HostScorer(names[columns], r, c.timeout, c.retries) for columns, r in on_host.items()}
        self.latest: dict[str, float] = {}
        self._failed, self._decoder, self._decode = 0, decoder, decode
        self._programs: dict[Shape, Program] = {}
        self._beside = ThreadPoolExecutor(1)
        self._trained, self._held_out = np.array(c.trained, int), np.array(c.held_out, int)
        self._pending: _Pending | None = None
        # Data with aspect buckets has latents of several shapes: a step learns from those of its batch's.
        self.method = method_of(config)
        memories = {tuple(shape): self.method.memory(shape, text_shape) for shape in latent_shapes}
        self.memories: dict[Shape, Memory] = {k: memory for k, memory in memories.items() if memory is not None}
        self.monitor = Monitor(c.guard.window, [c.rewards[i].label for i in c.held_out])

    @property
    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """All that is to be checkpointed; nothing may be pending."""
        return {"monitor": self.monitor.state} | {self._name(k): memory.state for k, memory in self.memories.items()}

    @state.setter
    def state(self, parts: Mapping[str, Mapping[str, Any]]) -> None:
        copies = {name: {k: np.array(v) for k, v in part.items()} for name, part in parts.items()}
        self.monitor.state = copies["monitor"]
        for shape, memory in self.memories.items():
            stored = copies[self._name(shape)]  # by version 0.1.0 with text that is not read
            memory.state = {k: v[tuple(map(slice, memory.state[k].shape))] for k, v in stored.items()}

    def _name(self, shape: Shape) -> str:
        return f"{self.method.stored_as}_{'x'.join(map(str, shape))}"

    def inputs(self, step: int, captions: Sequence[str], shape: Shape) -> tuple[dict[str, np.ndarray], Any]:
        """`tokens`, of this process's captions, and `reward` of the `Batch` of a step on latents of `shape`."""
        tokens = {} if self.pixels is None else self.pixels.tokens(captions)
        return tokens, self.memories[shape].take(step) if shape in self.memories else None

    def program(self, latent: Any) -> Program:
        """What decodes latents of that shape for the rewards on the host, made once."""
        if latent.shape not in self._programs:
            self._programs[latent.shape] = decode_program(self._decode, self._decoder, latent)
        return self._programs[latent.shape]

    def submit(self, samples: RewardSamples, batch: Mapping[str, np.ndarray], captions: Sequence[str]) -> None:
        """Has the latents of a step scored, which devices may still be computing. `batch` and `captions` are local."""
        count, kinds = samples.latent.shape[:2]
        here = sharding.local_rows(samples.latent.sharding, count)
        # What is scored is of the last micro-batch, every accumulation-th row, and evenly from that.
        rows = np.arange(len(captions))[self.accumulation - 1 :: self.accumulation]
        rows = rows.reshape(len(here), -1)[:, 0]
        if self.hosts:
            program, latent = self.program(samples.latent), samples.latent
            spare = sharding.cores(latent.sharding.device_set) > 1
            decoded = self._beside.submit(program, self._decoder, latent) if spare else program(self._decoder, latent)
            prompts = [captions[int(i)] for i in rows.repeat(kinds)]
            for host in self.hosts.values():
                host.submit(LocalRows(decoded), prompts)
        shape = tuple(np.shape(batch["latent"])[1:])
        text = np.asarray(batch["text"])[rows]
        if jax.process_count() > 1:
            # At once: dispatched ahead of the next step, it is done before it, and `collect` need not wait for that.
            text = sharding.make_global_rows(text, here, samples.latent.sharding, count)
            samples, text = sharding.put((samples, text), sharding.replicated(samples.latent.sharding.mesh))
        self._pending = _Pending(samples, text, here, shape)

    def collect(self) -> None:
        """Waits for what was submitted, on every process, and takes it in; for no later step."""
        self.latest = {}
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        scores = {}
        for columns, host in self.hosts.items():
            rows = host.collect().T
            scored = np.broadcast_to(rows, (len(columns), rows.shape[-1])).T
            scores[columns] = of_all_processes(pending.here, scored.reshape(len(pending.here), -1))
        samples, text = jax.tree.map(np.asarray, (pending.samples, pending.text))
        reward = np.array(samples.reward)
        for columns, scored in scores.items():
            reward[..., columns] = scored.reshape(*reward.shape[:2], -1)
        # A reward may give a finite number to anything, so what is not finite never counts.
        reward[~np.isfinite(samples.latent).all((2, 3, 4, 5))] = np.nan
        reward[~np.isfinite(text).all((1, 2))] = np.nan
        samples = dataclasses.replace(samples, reward=reward)
        trained = samples.reward[..., self._trained]
        self._failed = 0 if np.isfinite(trained).all(-1).any() else self._failed + 1
        if self._failed >= self.config.max_failed_rounds:
            faults = ", ".join(f"{h.name} {dict(h.faults)}" for h in self.hosts.values() if h.faults) or "not finite"
            mend = "the last checkpoint is kept. Mend the reward, or let more fail with config.reward.max_failed_rounds"
            raise ValueError(f"no sample of {self._failed} steps got a reward ({faults}); {mend}")
        if pending.shape in self.memories:
            self.memories[pending.shape].add(samples, text, trained)
        total = np.full(len(trained), np.nan)
        if samples.scale is not None:
            # Without a known deviation a reward counts nothing, which says nothing of its latent model.
            total = np.where(samples.scale.any(1), (trained[:, 0] * samples.scale).sum(1), np.nan)
        self.monitor.add(samples.predicted[:, 0], total, samples.reward[:, 0][:, self._held_out])
        self._log(samples.reward)

    def _log(self, rewards: np.ndarray) -> None:
        """Means of [row, kind, reward]: of the weighted sum of raw rewards, and of each if there are several."""
        c = self.config
        for kind, name in zip(range(rewards.shape[1]), ("generated", "real"), strict=False):
            row = rewards[:, kind]
            weights = np.array([c.rewards[i].weight for i in c.trained])
            columns = {f"reward_{name}": row[:, self._trained] @ weights} if c.trained else {}
            if len(c.rewards) > 1 or not c.trained:
                columns |= {f"reward_{t.label}_{name}": row[:, i] for i, t in enumerate(c.rewards)}
            for key, values in columns.items():
                if np.isfinite(values).any():
                    self.latest[key] = float(values[np.isfinite(values)].mean())
        self.latest |= self.monitor.summary()
        for host in self.hosts.values():
            for kind, count in host.faults.items():
                self.latest[f"faults_{host.name}_{kind.replace(' ', '_')}"] = float(count)


class LocalRows:
    """Frames that become this process's rows as NumPy only when, and where, they are looked at."""

    def __init__(self, frames: jax.Array | Future):
        self.frames = frames

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        frames = self.frames.result() if isinstance(self.frames, Future) else self.frames
        return np.asarray(local_rows(frames), dtype)


def decode_program(decode: Decode, decoder: Params, latent: Any) -> Program:
    """(decoder, latents [n g t h w c]) → frames as one batch, of zeros where a latent is not finite. `decoder` and
    `latent` are arrays, or their shapes with their shardings."""

    def decode_finite(params: Params, latent: jax.Array) -> jax.Array:
        latent = latent.reshape(-1, *latent.shape[2:])
        finite = jnp.isfinite(latent).all(axis=(1, 2, 3, 4), keepdims=True)
        return decode(params, jnp.where(finite, latent, 0.0))

    rows = latent.sharding
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (decoder, latent))
    mesh: Any = getattr(rows, "mesh", None)
    places = (None, rows) if mesh is None else (sharding.replicated(mesh), rows)
    return Program("decode_for_rewards", decode_finite, shapes, mesh, places, rows, share=BESIDE)


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a batch-sharded or replicated array that this process holds, in order, each once."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def of_all_processes(here: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """All rows in order, of which each process has those that `here` numbers; the devices are not asked. Of a row that
    several have, the first one's counts, so that all have the same."""
    found = gather(np.column_stack([here, rows]).astype(np.float64).tobytes())
    table = np.concatenate([np.frombuffer(part).reshape(-1, 1 + rows.shape[1]) for part in found])
    _, first = np.unique(table[:, 0], return_index=True)
    return table[first, 1:]
