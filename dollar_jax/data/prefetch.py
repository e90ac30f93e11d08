"""Batches on the devices before the step asks for them."""

from collections.abc import Mapping
from typing import Any

import grain
import jax
import numpy as np

from dollar_jax.config import DistillConfig
from dollar_jax.sharding import make_global_rows


def prefetch(
    batches: grain.IterDataset, config: DistillConfig, rows: np.ndarray, sharding: Mapping[str, Any] | None
) -> grain.IterDataset:
    """Batches whose arrays a thread also puts on the devices, `config.data.prefetch` batches ahead of the step. They
    hold this process's `rows` of the step's batch. The position in checkpoints is that of the last batch taken."""
    if sharding is None:
        return batches

    def place(batch: dict[str, Any]) -> dict[str, Any]:
        where = {name: sharding[name] for name in ("latent", "text", "image") if sharding.get(name)}
        arrays = {name: batch[name] for name in where}
        arrays = jax.tree.map(lambda x, s: make_global_rows(x, rows, s, config.batch_size), arrays, where)
        return {**batch, "on_device": arrays}

    return grain.experimental.ThreadPrefetchIterDataset(batches.map(place), prefetch_buffer_size=config.data.prefetch)
