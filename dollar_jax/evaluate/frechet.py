"""The Fréchet distance between two sets of features (Heusel et al., arXiv 1706.08500)."""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) of Gaussians with the moments of a [n >= 2, d] and b [m >= 2, d].

    Biased upwards for few samples, the more so the more features there are: compare only distances of equally many
    samples to the same reference. Raises ValueError for other shapes, or values that are not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"the Fréchet distance needs features [n >= 2, d] twice, not shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("the Fréchet distance needs finite features, but some are NaN or infinite")
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    # tr (Σ_a Σ_b)^½ through the symmetric Σ_a^½ Σ_b Σ_a^½, which has the same eigenvalues.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * shared
    return float(max(distance, 0.0))
