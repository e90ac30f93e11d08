import numpy as np
import pytest
import scipy.linalg

from dollar_jax.evaluate.quality import frechet_distance


def samples(seed, n=400, d=6):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def test_agrees_with_the_formula_by_scipys_matrix_root():
    a, b = samples(0), samples(1, n=300)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.asarray(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_one_dimension_has_the_closed_form():
    a, b = samples(2, d=1), samples(3, d=1)
    gap, spread = a.mean() - b.mean(), a.std(ddof=1) - b.std(ddof=1)
    assert frechet_distance(a, b) == pytest.approx(gap**2 + spread**2)


def test_a_shift_counts_squared_and_the_same_set_is_at_no_distance():
    a = samples(4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, a + 2.0) == pytest.approx(6 * 4)


def test_fewer_samples_than_features_are_no_trouble():
    a = samples(5, n=4, d=12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(frechet_distance(a, samples(6, n=3, d=12)))


@pytest.mark.parametrize("a, b", [((1, 3), (5, 3)), ((5, 3), (5, 4)), ((5,), (5,))])
def test_wrong_shapes_are_named(a, b):
    with pytest.raises(ValueError, match="features"):
        frechet_distance(np.zeros(a), np.zeros(b))


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(np.full((3, 2), np.nan), np.zeros((3, 2)))
