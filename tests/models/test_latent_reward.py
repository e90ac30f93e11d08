import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dollar_jax.config import LatentRewardSettings
from dollar_jax.models.latent_reward import FeatureHead, LatentRewardModel
from dollar_jax.models.network import make_network


def network(text_dim=None, dtype="float32", **fields):
    settings = LatentRewardSettings(**fields)
    return make_network(lambda rngs: LatentRewardModel(settings, 12, text_dim, rngs, dtype))


def count(network):
    return sum(leaf.size for leaf in jax.tree.leaves(network.shapes))


@pytest.fixture(scope="module")
def with_text():
    net = network(text_dim=16)
    latent, text = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, 12, 20, 12), (2, 6, 16)])
    )
    return net, jax.jit(net.init)(jax.random.key(2)), latent, text.at[:, 4:].set(0)


def test_parameter_counts_are_the_papers():
    assert count(network()) == 189_441
    assert count(network(group_norm=False)) == 189_441 - 512
    assert count(network(text_dim=4096, group_norm=False)) == 763_009
    assert count(network(text_dim=4096)) == 763_009 + 512


def test_convolving_over_time_adds_its_taps_alone():
    taps = 12 * 128 * 4 * 4, 128 * 128 * 3 * 3
    assert count(network(temporal_kernel=3)) == 189_441 + 2 * sum(taps)
    assert count(network(temporal_kernel=3, text_dim=4096, group_norm=False)) == 763_009 + 2 * sum(taps)


@pytest.mark.parametrize("text_dim", [None, 16], ids=["video", "text-video"])
def test_a_temporal_model_sees_the_order_of_the_frames(text_dim):
    latent = jax.random.normal(jax.random.key(1), (2, 4, 12, 20, 12))
    text = None if text_dim is None else jax.random.normal(jax.random.key(2), (2, 3, text_dim))

    def effect(kernel):
        net = network(temporal_kernel=kernel, text_dim=text_dim)
        params = jax.jit(net.init)(jax.random.key(0))
        score = jax.jit(lambda x: net.apply(params, x, text))
        gradient = jax.jit(jax.grad(lambda x: net.apply(params, x, text).sum()))(latent)
        assert jnp.all(jnp.abs(gradient).max(axis=(2, 3, 4)) > 1e-7)  # of every frame
        return jnp.abs(score(latent) - score(latent[:, ::-1])).max()

    assert effect(3) > 1e-4 and effect(1) < 1e-5


def test_image_score_averages_the_frames():
    net = network()
    params, apply = jax.jit(net.init)(jax.random.key(0)), jax.jit(net.apply)
    latent = jax.random.normal(jax.random.key(1), (2, 3, 24, 40, 12))
    each = jnp.stack([apply(params, latent[:, i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(apply(params, latent), each.mean(0), rtol=1e-5, atol=1e-6)


def test_gradient_reaches_every_latent_frame_and_every_parameter_through_the_text(with_text):
    net, params, latent, text = with_text
    score = jax.jit(jax.grad(lambda p, x: net.apply(p, x, text).sum(), argnums=(0, 1)))
    of_params, of_latent = score(params, latent)
    assert jnp.all(jnp.abs(of_latent).max(axis=(2, 3, 4)) > 1e-6)
    for path, gradient in jax.tree_util.tree_leaves_with_path(of_params):
        if jax.tree_util.keystr(path) == "['to_k']['bias']":
            continue  # a constant added to every score of a softmax: no gradient by nature
        assert jnp.abs(gradient).max() > 1e-7, path


def test_the_text_is_looked_at_through_the_latent(with_text):
    """The trap: attention whose output is the same for every latent."""
    net, params, latent, text = with_text

    @jax.jit
    def effect_of_prompt(latent):
        return net.apply(params, latent, text) - net.apply(params, latent, text[::-1])

    other = jax.random.normal(jax.random.key(3), latent.shape)
    assert jnp.abs(effect_of_prompt(latent)).min() > 1e-4
    assert jnp.abs(effect_of_prompt(latent) - effect_of_prompt(other)).min() > 1e-5


def test_padding_does_not_matter(with_text):
    net, params, latent, text = with_text
    score = net.apply(params, latent, text)
    for other in (jnp.pad(text, ((0, 0), (0, 5), (0, 0))), text[:, :4]):
        np.testing.assert_allclose(net.apply(params, latent, other), score, rtol=1e-5, atol=1e-6)


def test_empty_prompt_has_a_finite_score_and_gradient(with_text):
    net, params, latent, text = with_text
    score = jax.jit(jax.value_and_grad(lambda x: net.apply(params, x, 0 * text).sum()))
    value, gradient = score(latent)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))


def test_bf16_returns_fp32_scores():
    net = network(dtype="bfloat16")
    params = jax.jit(net.init)(jax.random.key(0))
    score = jax.jit(net.apply)(params, jnp.ones((2, 3, 8, 8, 12)))
    assert score.dtype == jnp.float32 and score.shape == (2,)


def test_misuse_is_refused(with_text):
    net, params, latent, text = with_text
    with pytest.raises(ValueError, match="got no text; text_dim is 16"):
        net.apply(params, latent)
    with pytest.raises(ValueError, match="got text; text_dim is None"):
        jax.eval_shape(network().apply, network().shapes, latent, text)
    with pytest.raises(ValueError, match="too small"):
        net.apply(params, latent[:, :, :1, :1], text)
    with pytest.raises(ValueError, match="temporal_kernel must be odd and positive, not 2"):
        LatentRewardSettings(temporal_kernel=2)
    with pytest.raises(ValueError, match="groups"):
        LatentRewardSettings(width=100)


def test_the_head_is_attention_by_learned_queries_and_an_mlp():
    head = make_network(lambda rngs: FeatureHead(12, 8, rngs))
    tokens = 2 + 3 * jax.random.normal(jax.random.key(1), (2, 30, 12))
    params = head.init(jax.random.key(0))
    np.testing.assert_array_equal(head.apply(params, tokens), np.zeros(2))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, "float32"), params)
    p = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), params)

    def dense(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    x = F.layer_norm(torch.tensor(np.asarray(tokens)), (12,), eps=1e-6)
    found = F.scaled_dot_product_attention(p["queries"].expand(2, -1, -1), dense("to_k", x), dense("to_v", x))
    theirs = dense("score", F.silu(dense("hidden", found.reshape(2, -1))))[:, 0]
    np.testing.assert_allclose(head.apply(params, tokens), theirs, rtol=1e-5, atol=1e-5)
