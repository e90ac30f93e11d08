"""The one place that computes attention."""

from __future__ import annotations

from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float


def attention(
    q: Float[Array, "b n heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    *,
    mask: Bool[Array, "#b #heads #n m"] | None = None,
    bias: Float[Array, "#b heads n m"] | None = None,
    scale: float | None = None,
    implementation: Literal["xla", "cudnn"] = "xla",
) -> Float[Array, "b n heads d"]:
    """softmax(q kᵀ · scale + bias) v with the softmax in fp32; `scale` is 1/√d unless given.

    Keys where `mask` is False get no weight; a query without any key averages all of them.
    """
    out = jax.nn.dot_product_attention(
        q, k, v, bias=bias, mask=mask, scale=scale, implementation=implementation
    )
    # The name lets a rematerialisation policy keep this, the dearest value to recompute.
    return checkpoint_name(out, "attention")
