"""Operations counted against closed forms."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dollar_jax.config import MeshConfig
from dollar_jax.flops import Throughput, count_flops
from dollar_jax.models import activation_sharding
from dollar_jax.models.attention import attention
from dollar_jax.sharding import make_mesh


def test_flops_are_those_of_products_convolutions_and_loops():
    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))

    def body(x, _):
        return jax.checkpoint(lambda y: y @ jnp.ones((4, 4)))(x), None

    def f(x):
        x = jax.jit(jnp.matmul)(x, b)[0].T  # 2 · 3·4·5·6; then [6, 4]
        x, _ = jax.lax.scan(body, x, None, length=7)  # 7 · 2 · 6·4·4
        x = jax.lax.cond(x[0, 0] > 0, lambda y: y @ y.T, lambda y: jnp.zeros((6, 6)), x)  # 2 · 6·4·6
        image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
        conv = jax.lax.conv_general_dilated(  # 2 · (2·6·6·5) · (3·3·3)
            image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x.sum() + conv.sum()

    expected = 2 * 3 * 4 * 5 * 6 + 7 * 2 * 6 * 16 + 2 * 6 * 4 * 6 + 2 * 360 * 27
    assert count_flops(jax.make_jaxpr(f)(a).jaxpr) == expected


@pytest.mark.parametrize(("queries", "keys"), [(256, 512), (2048, 1024)])
@pytest.mark.parametrize("implementation", ["splash", "xla"])
def test_attention_counts_by_its_definition(queries, keys, implementation, monkeypatch):
    """Two products forward; four backward, although some of them are made again."""
    monkeypatch.setattr(activation_sharding, "platform", lambda: "tpu")
    q, k = jnp.ones((2, queries, 3, 64)), jnp.ones((2, keys, 3, 64))

    def attend(q, k, v):
        return attention(q, k, v, implementation=implementation).sum()

    forward = 2 * 3 * 2 * (2 * queries * keys * 64)
    assert count_flops(jax.make_jaxpr(attend)(q, k, k).jaxpr) == forward
    both = count_flops(jax.make_jaxpr(jax.grad(attend, (0, 1, 2)))(q, k, k).jaxpr)
    assert both == pytest.approx(3 * forward, rel=2e-3)


def test_what_is_mapped_over_shards_counts_on_every_device():
    mesh = make_mesh(MeshConfig(8, 1, 1, 1))
    a, b = jnp.ones((16, 5)), jnp.ones((5, 6))
    f = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert count_flops(jax.make_jaxpr(f)(a, b).jaxpr) == 2 * 16 * 5 * 6


def test_throughput_and_its_share_of_the_peak():
    assert Throughput(32, None, None)(0.5) == {"videos_per_second": 64}
    rates = Throughput(32, 2e12, 8e12)(0.5)
    assert rates == {"videos_per_second": 64, "tflops_per_second": 4, "mfu": 0.5}
