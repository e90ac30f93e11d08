import numpy as np
import pytest

from dollar_jax.evaluate.quality import pixel_features, vendi_score


def features(n, d):
    return np.sin(np.arange(n * d) ** 2).reshape(n, d)


@pytest.mark.parametrize("d", [2, 40])
def test_the_same_sample_over_and_over_is_one(d):
    assert vendi_score(np.tile(features(1, d), (6, 1))) == pytest.approx(1)


@pytest.mark.parametrize("d", [7, 30])
def test_orthogonal_samples_all_count(d):
    assert vendi_score(np.diag(np.arange(1.0, d + 1))[:7]) == pytest.approx(7)


@pytest.mark.parametrize("angle", [0.3, 1.0, 1.5, 2.5])
@pytest.mark.parametrize("padding", [0, 5])
def test_two_samples_have_the_closed_form(angle, padding):
    cosine = np.cos(angle)
    p = np.array([1 + cosine, 1 - cosine]) / 2  # the eigenvalues of [[1, cos], [cos, 1]] / 2
    x = np.zeros((2, 2 + padding))
    x[:, :2] = [[3, 0], [0.2 * np.cos(angle), 0.2 * np.sin(angle)]]
    assert vendi_score(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


# Made with vendi_score.vendi.score_X and score_dual of the PyPI package vendi-score 0.0.3 on these
# features; the two agree to 1e-13.
@pytest.mark.parametrize(
    ("x", "expected"),
    [(features(6, 4), 3.57618830915637), (features(5, 40), 4.82889483539516), (features(6, 4) ** 2, 2.57786023441476)],
)
def test_agrees_with_the_authors_package(x, expected):
    assert vendi_score(x) == pytest.approx(expected, rel=1e-10)


def test_scale_order_and_precision_of_features_do_not_matter():
    x = features(6, 4)
    scales = np.array([1e-200, 1e-3, 1, 10, 1e5, 1e200])[:, None]
    assert vendi_score(x * scales) == pytest.approx(vendi_score(x))
    assert vendi_score(x[::-1]) == pytest.approx(vendi_score(x))
    assert vendi_score(x.astype(np.float32)) == pytest.approx(vendi_score(x), rel=1e-5)


@pytest.mark.parametrize("d", [3, 40])
def test_zero_vectors_are_one_more_kind_of_sample(d):
    assert vendi_score(np.zeros((5, d))) == pytest.approx(1)
    two_kinds = np.zeros((4, d))
    two_kinds[:2, 0] = 1
    assert vendi_score(two_kinds) == pytest.approx(2)


@pytest.mark.parametrize("x", [np.zeros((0, 3)), np.zeros(3), np.zeros((2, 3, 4))])
def test_other_shapes_are_refused(x):
    with pytest.raises(ValueError, match="n, d"):
        vendi_score(x)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        vendi_score(np.array([[1.0, np.nan]]))


def test_pixels_are_centred_so_that_noise_is_diverse():
    videos = np.random.default_rng(0).uniform(size=(2, 5, 3, 8, 8, 3))
    x = pixel_features(videos)
    assert x.shape == (2, 5, 3 * 8 * 8 * 3)
    assert min(map(vendi_score, x)) > 4.9
    assert max(map(vendi_score, pixel_features(videos, centred=False))) < 2.7
    eight_bit = np.round(255 * videos).astype(np.uint8)
    np.testing.assert_allclose(pixel_features(eight_bit), x, atol=0.003)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its imports from SciPy
@pytest.mark.parametrize("n, d", [(9, 4), (5, 60)])
def test_agrees_with_both_of_the_authors_forms(n, d):
    from vendi_score import vendi

    x = np.random.default_rng(n).normal(size=(n, d)) + 0.7
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert vendi_score(x) == pytest.approx(vendi.score_K(unit @ unit.T), rel=1e-9)
    assert vendi_score(x) == pytest.approx(vendi.score_dual(x, normalize=True), rel=1e-9)
