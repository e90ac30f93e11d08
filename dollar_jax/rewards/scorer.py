"""What happens to rewards on the host: scoring beside the devices, the replay, and what is known of both.

While the devices run a step, host rewards score what the previous one generated; they reach the student,
or its latent reward model, one step later. All that a later step depends on is in `Scorer.state`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dollar_jax import sharding
from dollar_jax.config import DistillConfig
from dollar_jax.program import Program
from dollar_jax.rewards import AnyReward, JaxReward
from dollar_jax.rewards.host import HostScorer
from dollar_jax.rewards.monitor import Monitor
from dollar_jax.rewards.pixels import Decode, PixelRewards
from dollar_jax.rewards.replay import Replay
from dollar_jax.types import Params

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step's latents under way: what the step said of them, their text, whether they are finite.

    `here` are those rows of `fresh` that this process holds, `text` theirs. `shape` is that of the latents
    of the step's batch.
    """

    fresh: Mapping[str, jax.Array]
    here: np.ndarray
    text: np.ndarray
    finite: jax.Array
    shape: Shape


class Scorer:
    """Scores this process's share of each step's latents, one step behind the devices.

    What was scored goes to all processes, so that each has the same replay, and stops when the others do.
    `decode(params, latent)` gives frames in [0, 1]; it is dispatched like a step and not waited for.
    """

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
        self.hosts = {
            i: HostScorer(c.rewards[i].label, reward, c.timeout, c.retries)
            for i, reward in enumerate(rewards)
            if not isinstance(reward, JaxReward)
        }
        self.latest: dict[str, float] = {}
        self._decoder = decoder
        self._decode = decode
        self._decode_programs: dict[Shape, Program] = {}
        self._trained, self._held_out = np.array(c.trained, int), np.array(c.held_out, int)
        self._pending: _Pending | None = None
        # Data with aspect buckets has latents of several shapes: a step learns from those of its batch's.
        self.replays: dict[Shape, Replay] = {}
        self.walks: dict[Shape, dict[str, np.ndarray]] = {}
        for shape in map(tuple, latent_shapes):
            if c.trained and c.method == "lrm":
                scored = c.scored_shape(shape)
                self.replays[shape] = Replay(c.replay, scored, text_shape, (len(c.trained),))
            elif c.trained and c.method == "ddpo":
                states = min(3, len(config.student.timesteps))
                self.walks[shape] = {
                    "walk_states": np.zeros((c.samples, states, *shape), np.float32),
                    "walk_text": np.zeros((c.samples, *text_shape), np.float32),
                    "walk_reward": np.full((c.samples, len(c.trained)), np.nan, np.float32),
                }
        self.monitor = Monitor(c.guard.window, [c.rewards[i].label for i in c.held_out])

    @property
    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """All that is to be checkpointed; nothing may be pending."""
        parts = {"monitor": self.monitor.state}
        parts |= {f"replay_{_name(shape)}": replay.state for shape, replay in self.replays.items()}
        return parts | {f"walk_{_name(shape)}": walk for shape, walk in self.walks.items()}

    @state.setter
    def state(self, parts: Mapping[str, Mapping[str, Any]]) -> None:
        copies = {name: {k: np.array(v) for k, v in part.items()} for name, part in parts.items()}
        self.monitor.state = copies["monitor"]
        for shape, replay in self.replays.items():
            replay.state = copies[f"replay_{_name(shape)}"]
        for shape in self.walks:
            self.walks[shape] = copies[f"walk_{_name(shape)}"]

    def inputs(self, step: int, captions: Sequence[str], shape: Shape) -> dict[str, np.ndarray]:
        """What a step on latents of `shape` needs of rewards; see `step.make_step`.

        The scored latents or walks are the same on every process; the tokens are of this process's captions.
        """
        c, rows = self.config, {}
        if shape in self.replays:
            rows = self.replays[shape].sample(c.updates, c.batch_size, [self.seed, step])
        elif shape in self.walks:
            rows = self.walks[shape]
            # Each walk counts once.
            self.walks[shape] = {**rows, "walk_reward": np.full_like(rows["walk_reward"], np.nan)}
        if self.pixels is not None:
            rows = rows | {f"tokens_{k}": v for k, v in self.pixels.tokens(captions).items()}
        return rows

    def submit(self, fresh: Mapping[str, jax.Array], batch: Mapping[str, np.ndarray], captions: Sequence[str]) -> None:
        """Has the latents of a step scored, which the devices may still be computing.

        `batch` and `captions` are this process's rows of the step's batch.
        """
        count, kinds = fresh["latent"].shape[:2]
        here = sharding.local_rows(fresh["latent"].sharding, count)
        # What is scored is of the last micro-batch, every accumulation-th row, and evenly from that.
        rows = np.arange(len(captions))[self.accumulation - 1 :: self.accumulation]
        rows = rows.reshape(len(here), -1)[:, 0]
        finite = jnp.ones((count * kinds,), bool)
        if self.hosts:
            latent = fresh["latent"]
            if latent.shape not in self._decode_programs:
                self._decode_programs[latent.shape] = decode_program(self._decode, self._decoder, latent)
            frames, finite = self._decode_programs[latent.shape](self._decoder, latent)
            prompts = [captions[int(i)] for i in rows.repeat(kinds)]
            for host in self.hosts.values():
                host.submit(LocalRows(frames), prompts)
        shape = tuple(np.shape(batch["latent"])[1:])
        self._pending = _Pending(fresh, here, np.asarray(batch["text"])[rows], finite, shape)

    def collect(self) -> None:
        """Waits for what was submitted, on every process, and takes it in."""
        self.latest = {}
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        shape, kinds = pending.shape, pending.fresh["latent"].shape[1]
        rows = {name: local_rows(value) for name, value in pending.fresh.items()}
        rows |= {"text": pending.text, "reward": np.array(rows["reward"])}
        for i, host in self.hosts.items():
            # A reward may give a finite number to anything, so what is not finite never counts.
            scored = np.where(local_rows(pending.finite), host.collect(), np.nan)
            rows["reward"][..., i] = scored.reshape(-1, kinds)
        rows = of_all_processes(pending.here, rows)
        latent, predicted, rewards = (
            rows[k].reshape(-1, *rows[k].shape[2:]) for k in ("latent", "predicted", "reward")
        )
        text, trained = rows["text"].repeat(kinds, 0), rewards[:, self._trained]
        if shape in self.replays:
            self.replays[shape].add(latent, text, trained)
        elif shape in self.walks:
            good = np.isfinite(trained).all(1, keepdims=True)
            self.walks[shape] = {
                "walk_states": rows["states"],
                "walk_text": text,
                "walk_reward": np.where(good, trained, np.nan).astype(np.float32),
            }
        generated = slice(None, None, kinds)
        if len(self._trained):
            scale = rows["scale"].repeat(kinds, 0)
            # Without a known deviation a reward counts nothing, which says nothing of its latent model.
            total = np.where(scale.any(1), (trained * scale).sum(1), np.nan)
            self.monitor.add(predicted[generated], total[generated], rewards[generated][:, self._held_out])
        else:
            nothing = np.full(len(latent[generated]), np.nan)
            self.monitor.add(nothing, nothing, rewards[generated][:, self._held_out])
        self._log(rewards.reshape(-1, kinds, rewards.shape[1]))

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


def _name(shape: Shape) -> str:
    return "x".join(map(str, shape))


class LocalRows:
    """Frames that become this process's rows as NumPy only when, and where, they are looked at."""

    def __init__(self, frames: jax.Array):
        self.frames = frames

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(local_rows(self.frames), dtype)


def decode_program(decode: Decode, decoder: Params, latent: Any) -> Program:
    """(decoder, latents [n g t h w c]) → frames as one batch, of zeros where a latent is not finite; whether it is.

    `decoder` and `latent` are arrays, or their shapes with their shardings.
    """

    def decode_finite(params: Params, latent: jax.Array) -> tuple[jax.Array, jax.Array]:
        latent = latent.reshape(-1, *latent.shape[2:])
        finite = jnp.isfinite(latent).all(axis=tuple(range(1, latent.ndim)))
        return decode(params, jnp.where(finite[:, None, None, None, None], latent, 0.0)), finite

    rows = latent.sharding
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (decoder, latent))
    mesh: Any = getattr(rows, "mesh", None)
    places = (None, rows) if mesh is None else (sharding.replicated(mesh), rows)
    return Program("decode_for_rewards", decode_finite, shapes, mesh, places, (rows, rows))


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a batch-sharded or replicated array that this process holds, in order, each once."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def of_all_processes(here: np.ndarray, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All rows in order, of which each process has those that `here` numbers.

    Of a row that several have, the first one's counts, so that all have the same.
    """
    if jax.process_count() == 1:
        return rows
    parts = jax.tree.map(np.asarray, multihost_utils.process_allgather((here, rows), tiled=True))
    _, first = np.unique(parts[0], return_index=True)
    return {name: x[first] for name, x in parts[1].items()}
