"""What the networks' parity tests have in common."""

import jax
import numpy as np
import pytest


@pytest.fixture
def assert_tapped():
    """Of a transformer at x, t and text: its features at a tap of 0.7 are `theirs`, alone as beside the prediction,
    which is that without a tap."""

    def check(network, params, inputs, theirs):
        x, t, text = inputs

        @jax.jit
        def run(x):
            taps = network.apply(params, x, t, text, tap=0.7), network.apply(params, x, t, text, tap=0.7, early=True)
            return *taps, network.apply(params, x, t, text)

        (prediction, features), alone, plain = run(x)
        assert features.shape == theirs.shape
        assert np.abs(np.asarray(features) - theirs).max() / np.abs(theirs).max() < 1e-4
        np.testing.assert_array_equal(features, alone)
        np.testing.assert_allclose(prediction, plain, rtol=1e-5, atol=1e-6)

    return check
