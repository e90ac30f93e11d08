"""Operations counted against closed forms."""

import jax
import jax.numpy as jnp

from dollar_jax.flops import Throughput, count_flops


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


def test_throughput_and_its_share_of_the_peak():
    assert Throughput(32, None, None)(0.5) == {"videos_per_second": 64}
    rates = Throughput(32, 2e12, 8e12)(0.5)
    assert rates == {"videos_per_second": 64, "tflops_per_second": 4, "mfu": 0.5}
