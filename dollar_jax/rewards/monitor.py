"""Is the reward being hacked? What its latent model and the held-out rewards say of fresh samples. Fresh samples are
the student's, scored before anything has learned from them."""

import numpy as np

from dollar_jax.config import RewardGuard


class Monitor:
    """Rings over the last `window` fresh samples: latent and true reward, and the held-out rewards. `peak` and
    `deviation` are the highest mean that a held-out reward had over a full window, and its deviation there."""

    def __init__(self, window: int, held_out: list[str]):
        self.names = held_out
        columns = max(len(held_out), 1)  # Orbax saves nothing that is empty
        rings = {"pairs": np.full((window, 2), np.nan), "held_out": np.full((window, columns), np.nan)}
        self.state: dict[str, np.ndarray] = {**rings, "peak": np.full(columns, -np.inf), "deviation": np.zeros(columns)}

    def add(self, predicted: np.ndarray, true: np.ndarray, held_out: np.ndarray) -> None:
        """Rows of the latent and the true reward [b] and of the held-out ones [b, h]; NaN was not scored."""
        pairs = np.stack([predicted, true], 1)
        self._push("pairs", pairs[np.isfinite(pairs).all(1)])
        if self.names:
            self._push("held_out", held_out[np.isfinite(held_out).any(1)])
        ring = self.state["held_out"]
        for i in range(len(self.names)):
            known = ring[np.isfinite(ring[:, i]), i]
            if len(known) == len(ring) and known.mean() > self.state["peak"][i]:
                self.state["peak"][i], self.state["deviation"][i] = known.mean(), known.std()

    def _push(self, name: str, rows: np.ndarray) -> None:
        self.state[name] = np.concatenate([self.state[name], rows])[len(rows) :]

    def summary(self) -> dict[str, float]:
        """`reward_fresh_correlation`, and per held-out reward its fall in deviations; of this process."""
        pairs = self.state["pairs"]
        pairs = pairs[np.isfinite(pairs).all(1)]
        values = {}
        if len(pairs) > 2 and pairs.std(0).min() > 0:
            values["reward_fresh_correlation"] = float(np.corrcoef(pairs.T)[0, 1])
        for i, name in enumerate(self.names):
            known = self.state["held_out"][:, i]
            known = known[np.isfinite(known)]
            peak, deviation = self.state["peak"][i], self.state["deviation"][i]
            if len(known) and np.isfinite(peak):
                floor = 1e-6 * abs(peak) + 1e-12  # of rewards that hardly vary
                values[f"reward_{name}_fall"] = float((peak - known.mean()) / max(deviation, floor))
        return values

    def hacked(self, guard: RewardGuard) -> str | None:
        """The reason to stop, in words, or None. Every process has the same samples, and decides alike."""
        own = self.summary()
        correlation = own.get("reward_fresh_correlation", np.nan)
        if not np.isfinite(self.state["pairs"]).all():  # too few for a verdict
            correlation = np.nan
        if guard.min_correlation is not None and correlation < guard.min_correlation:
            least = f"config.reward.guard.min_correlation {guard.min_correlation:g}"
            return f"latent and true reward correlate by {correlation:.3f} on fresh samples, less than {least}"
        for name in self.names:
            fall = own.get(f"reward_{name}_fall", np.nan)
            if guard.max_fall is not None and fall > guard.max_fall:
                most = f"more than config.reward.guard.max_fall {guard.max_fall:g}"
                return f"the held-out reward {name!r} has fallen by {fall:.2f} of its standard deviations, {most}"
        return None
