"""Batches on the devices before the step asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grain
import jax

from dollar_jax.config import DistillConfig


def read_ahead(
    batches: grain.IterDataset, config: DistillConfig, sharding: Mapping[str, Any] | None
) -> grain.IterDataset:
    """Batches whose arrays a thread also puts on the devices, `config.data.prefetch` batches ahead of the step.

    The position that is checkpointed is that of the last batch taken, not of the last one put there.
    """
    if sharding is None:
        return batches

    def place(rows: dict[str, Any]) -> dict[str, Any]:
        arrays = {
            name: jax.make_array_from_process_local_data(sharding[name], rows[name]) for name in ("latent", "text")
        }
        return {**rows, "on_device": arrays}

    return grain.experimental.ThreadPrefetchIterDataset(
        batches.map(place), prefetch_buffer_size=config.data.prefetch
    )
