"""Scored latents, kept for the latent reward model to learn from."""

from __future__ import annotations

import numpy as np


class Replay:
    """A ring of (latent, text, reward). What `sample` draws depends only on the content and the seed.

    A row's `reward` may hold several rewards; `rewards` is its shape.
    """

    def __init__(self, capacity: int, latent: tuple[int, ...], text: tuple[int, ...], rewards: tuple[int, ...] = ()):
        self.state = {
            "latent": np.zeros((capacity, *latent), np.float32),
            "text": np.zeros((capacity, *text), np.float32),
            "reward": np.zeros((capacity, *rewards), np.float32),
            "weight": np.zeros((capacity,), np.float32),
            "added": np.zeros((), np.int64),
        }

    def add(self, latent: np.ndarray, text: np.ndarray, reward: np.ndarray) -> None:
        """Adds rows, over the oldest ones; rows of which a reward is not finite are left out."""
        good = np.isfinite(reward).all(axis=tuple(range(1, reward.ndim)))
        rows = {"latent": latent[good], "text": text[good], "reward": reward[good]}
        rows["weight"] = np.ones(good.sum(), np.float32)
        slots = (int(self.state["added"]) + np.arange(good.sum())) % len(self.state["weight"])
        for name, values in rows.items():
            self.state[name][slots] = values
        self.state["added"] = self.state["added"] + good.sum()

    def sample(self, updates: int, batch: int, seed: list[int]) -> dict[str, np.ndarray]:
        """`updates` batches of rows, with replacement; weight 0 throughout while the ring is empty."""
        size = min(int(self.state["added"]), len(self.state["weight"]))
        rows = np.random.default_rng(seed).integers(max(size, 1), size=(updates, batch))
        names = ("latent", "text", "reward", "weight")
        return {f"scored_{name}": self.state[name][rows] for name in names}
