"""The Vendi score: how many different samples there are (Friedman & Dieng, arXiv 2210.02410)."""

import numpy as np

from dollar_jax.video import unit_range


def vendi_score(features: np.ndarray) -> float:
    """exp of the von Neumann entropy of K / n, where K is the cosine similarity of finite features [n >= 1, d]. 1 when
    all samples are the same, n when all are orthogonal. Samples whose features are all zero have no direction: they
    count as equal to one another and orthogonal to all others, so that an output collapsed to zero scores 1."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"the Vendi score needs features [n, d], not shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("the Vendi score needs finite features, but some are NaN or infinite")
    largest = np.abs(x).max(1, keepdims=True)
    zero = largest == 0
    x = x / np.where(zero, 1, largest)  # the squares in the norm then neither over- nor underflow
    x = x / np.where(zero, 1, np.linalg.norm(x, axis=1, keepdims=True))
    if zero.any():
        x = np.concatenate([x, zero], axis=1)
    n, d = x.shape
    # x xᵀ and xᵀ x have the same eigenvalues but for zeros: take the smaller.
    gram = x @ x.T if n <= d else x.T @ x
    p = np.linalg.eigvalsh(gram / n)
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def pixel_features(videos: np.ndarray, centred: bool = True) -> np.ndarray:
    """Pixels as Vendi features: [..., t, h, w, c], uint8 or floats in [0, 1], to [..., t h w c]. Mid-grey, 0.5, is
    subtracted if `centred`. Raw pixels are never negative, so the cosine of any two videos is near 1 (0.75 for
    independent uniform noise), and so the score; about mid-grey, unrelated videos are near orthogonal."""
    x = unit_range(videos)
    if x.ndim < 4:
        raise ValueError(f"videos must be [..., t, h, w, c], not of shape {x.shape}")
    return (x - 0.5 if centred else x).reshape(*x.shape[:-4], -1)
