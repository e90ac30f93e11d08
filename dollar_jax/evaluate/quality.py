"""Measures of videos, uint8 or floating point in [0, 1], and of their features, without captions and networks."""

import jax.numpy as jnp
import numpy as np

from dollar_jax.rewards.builtin import flicker
from dollar_jax.video import unit_range


def temporal_flicker(videos: np.ndarray) -> np.ndarray:
    """VBench's temporal flickering of videos [..., t >= 2, h, w, c]: (255 - mean |f_{t+1} - f_t|) / 255, [...]. 1 is a
    frozen video: the score rewards stillness, so read it against the teacher's and not as the higher the better.
    VBench's own number is the mean over videos of static scenes, which it picks, and of 8-bit frames."""
    videos = np.asarray(videos)
    if videos.ndim < 4 or videos.shape[-4] < 2:
        raise ValueError(f"flicker needs videos [..., t >= 2, h, w, c], not shape {videos.shape}")
    return np.asarray(flicker(jnp.asarray(unit_range(videos))))


def net_change(videos: np.ndarray) -> np.ndarray:
    """How much further apart frames half a video away are than neighbours, as mean absolute difference. What moves
    leaves its place ever more; what only flickers differs from its neighbour as much as from any other frame. 0 for a
    frozen video and for independent noise; videos [..., t >= 3, h, w, c] give [...], at most 1."""
    videos = np.asarray(videos)
    if videos.ndim < 4 or videos.shape[-4] < 3:
        raise ValueError(f"net change needs videos [..., t >= 3, h, w, c], not shape {videos.shape}")
    x = np.moveaxis(unit_range(videos), -4, 0)
    half = max(len(x) // 2, 2)
    far, near = np.abs(x[half:] - x[:-half]), np.abs(x[1:] - x[:-1])
    axes = (0, -3, -2, -1)
    return far.mean(axes, dtype=np.float64) - near.mean(axes, dtype=np.float64)


def diversity(videos: np.ndarray) -> float:
    """Mean over the pairs of videos [n >= 2, t, h, w, c] of their root mean squared difference, in [0, 1]."""
    videos = np.asarray(videos)
    if videos.ndim != 5 or len(videos) < 2:
        raise ValueError(f"diversity needs videos [n >= 2, t, h, w, c], not shape {videos.shape}")
    x = unit_range(videos)
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    return float(np.mean([np.sqrt(np.mean((x[i] - x[j]) ** 2, dtype=np.float64)) for i, j in pairs]))


def vendi_score(features: np.ndarray) -> float:
    """How many different samples there are (Friedman & Dieng, arXiv 2210.02410): exp of the von Neumann entropy of
    K / n, where K is the cosine similarity of finite features [n >= 1, d]. 1 when all samples are the same, n when all
    are orthogonal. Samples whose features are all zero have no direction: they count as equal to one another and
    orthogonal to all others, so that an output collapsed to zero scores 1."""
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
    p = np.linalg.eigvalsh((x @ x.T if n <= d else x.T @ x) / n)
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


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance between two sets of features (Heusel et al., arXiv 1706.08500):
    |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) of Gaussians with the moments of a [n >= 2, d] and b [m >= 2, d].

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
