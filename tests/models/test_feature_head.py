"""The head on a transformer's tokens against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from dollar_jax.models.feature_head import FeatureHead
from dollar_jax.models.network import make_network


def test_the_head_is_attention_by_learned_queries_and_an_mlp():
    network = make_network(lambda rngs: FeatureHead(12, 8, rngs))
    tokens = 2 + 3 * jax.random.normal(jax.random.key(1), (2, 30, 12))
    params = network.init(jax.random.key(0))
    np.testing.assert_array_equal(network.apply(params, tokens), np.zeros(2))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, "float32"), params)
    p = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), params)

    def dense(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    x = F.layer_norm(torch.tensor(np.asarray(tokens)), (12,), eps=1e-6)
    found = F.scaled_dot_product_attention(p["queries"].expand(2, -1, -1), dense("to_k", x), dense("to_v", x))
    theirs = dense("score", F.silu(dense("hidden", found.reshape(2, -1))))[:, 0]
    np.testing.assert_allclose(network.apply(params, tokens), theirs, rtol=1e-5, atol=1e-5)
