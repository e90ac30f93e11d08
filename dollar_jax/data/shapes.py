"""The default domain: captioned videos of one shape moving over a plain background. A caption names five attributes, "a
small red circle moving left slowly". Everything else varies without a caption and is what diversity measures: position,
exact radius, speed and colour, the background's grey and its tint. `verify` reads the attributes off every frame."""

import colorsys
import dataclasses
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from dollar_jax.video import to_uint8, unit_range

FRAMES = 17
SIZE = 32
FPS = 8
SEED = 20_241_220  # of the videos that are trained on and measured against

SIZES = ("small", "large")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "quickly")
ATTRIBUTES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS, "speed": SPEEDS}
VOCABULARY = ("a", "moving", *itertools.chain.from_iterable(ATTRIBUTES.values()))

# Radius of the disc of equal area, in pixels; speed in pixels per frame.
RADII = {"small": (5.0, 5.6), "large": (7.2, 8.0)}
RADIUS_THRESHOLD = 6.4
PACES = {"slowly": (0.25, 0.40), "quickly": (0.70, 0.85)}
PACE_THRESHOLD = 0.55
HUES = {colour: 60.0 * i for i, colour in enumerate(COLOURS)}  # degrees
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y points down


@dataclasses.dataclass(frozen=True)
class Caption:
    """The five captioned attributes of a video."""

    size: str
    colour: str
    shape: str
    direction: str
    speed: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} moving {self.direction} {self.speed}"

    @staticmethod
    def parse(text: str) -> "Caption":
        """The caption a prompt spells; raises ValueError naming the first attribute it lacks."""
        words = text.lower().split()
        found = {}
        for name, values in ATTRIBUTES.items():
            if len(hits := [word for word in words if word in values]) != 1:
                raise ValueError(f"the prompt {text!r} must name exactly one {name} out of {', '.join(values)}")
            found[name] = hits[0]
        return Caption(**found)

    @property
    def held_out(self) -> bool:
        """True for the 24 of 288 captions whose (colour, shape, direction) is never trained on."""
        colour, shape = COLOURS.index(self.colour), SHAPES.index(self.shape)
        return shape == colour % len(SHAPES) and self.direction == DIRECTIONS[colour % len(DIRECTIONS)]


def all_captions() -> list[Caption]:
    """All 288 captions, in a fixed order."""
    return [Caption(*values) for values in itertools.product(*ATTRIBUTES.values())]


def covering_captions() -> list[Caption]:
    """72 captions: every (colour, shape, direction) once, with the four (size, speed) pairs in balance."""
    captions = []
    for c, s, d in np.ndindex(len(COLOURS), len(SHAPES), len(DIRECTIONS)):
        size, speed = divmod((c + s + d) % 4, 2)
        captions.append(Caption(SIZES[size], COLOURS[c], SHAPES[s], DIRECTIONS[d], SPEEDS[speed]))
    return captions


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to the outline of `shape` centred at 0 (negative inside). `radius` is that of the disc
    of equal area, so that size and shape are independent."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.sqrt(np.pi) / 2 * radius
    if shape == "triangle":  # equilateral, pointing up, the centroid at 0
        inradius = np.sqrt(np.pi / np.sqrt(27.0)) * radius
        slanted = np.sqrt(0.75) * np.abs(x) - 0.5 * y
        return np.maximum(slanted, y) - inradius
    raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")


_GRID_X = np.arange(SIZE, dtype=np.float32) + 0.5
_GRID_Y = _GRID_X[:, None]


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Anti-aliased mask [..., SIZE, SIZE] in [0, 1] of the shape centred at pixel (x, y), arrays [...]."""
    x, y, radius = (np.asarray(a, np.float32)[..., None, None] for a in (x, y, radius))
    return np.clip(0.5 - signed_distance(shape, _GRID_X - x, _GRID_Y - y, radius), 0, 1)


def render(caption: Caption, rng: np.random.Generator) -> np.ndarray:
    """One video of the caption, uint8 [17, 32, 32, 3]; what the caption leaves open is drawn from `rng`."""
    radius = rng.uniform(*RADII[caption.size])
    pace = rng.uniform(*PACES[caption.speed])
    time = np.arange(FRAMES)
    tracks = []
    for step in STEPS[caption.direction]:
        travel = step * pace * (FRAMES - 1)
        low, high = radius - min(travel, 0), SIZE - radius - max(travel, 0)
        tracks.append(rng.uniform(low, high) + step * pace * time)
    x, y = tracks
    mask = coverage(caption.shape, x, y, np.full(FRAMES, radius))[..., None]
    hue = HUES[caption.colour] + rng.uniform(-10, 10)
    saturation, value = rng.uniform(0.5, 1), rng.uniform(0.6, 1)
    colour = np.array(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value))
    tint = rng.normal(size=3)
    tint = 0.05 * rng.uniform() * (tint - tint.mean()) / np.linalg.norm(tint - tint.mean())
    background = rng.uniform(0.2, 0.8) + tint
    return to_uint8(background * (1 - mask) + colour * mask)


SPLITS = ("train", "validation", "held_out")


def example(seed: int, split: str, index: int) -> tuple[np.ndarray, Caption]:
    """The `index`-th (video, caption) of a split; depends on nothing else."""
    captions = [caption for caption in all_captions() if caption.held_out == (split == "held_out")]
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    caption = captions[rng.integers(len(captions))]
    return render(caption, rng), caption


def first_frames(seed: int, captions: Sequence[Caption]) -> np.ndarray:
    """The first frames of a clip of each caption, uint8 [n, 32, 32, 3]."""
    return np.stack([render(caption, np.random.default_rng([seed, i]))[0] for i, caption in enumerate(captions)])


class Reading(NamedTuple):
    """What the verifier reads off one video, each [t]; an index into ATTRIBUTES' values, -1 for none."""

    size: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    direction: np.ndarray
    speed: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    overlap: np.ndarray  # intersection over union of the object and the ideal shape of its kind

    def correct(self, caption: Caption) -> np.ndarray:
        """Bool [t, 5]: whether each frame shows each captioned attribute, in ATTRIBUTES' order."""
        wanted = [values.index(getattr(caption, n)) for n, values in ATTRIBUTES.items()]
        return np.stack([getattr(self, name) for name in ATTRIBUTES], -1) == np.array(wanted)


MINIMUM_CHROMA = 0.12  # an object's distance from the background in colour, of at most 0.82
MINIMUM_OVERLAP = 0.6  # below it a blob is no shape at all
MINIMUM_PACE = 0.05  # pixels per frame; below it an object stands still


def verify(video: np.ndarray) -> Reading:
    """Reads the attributes off every frame of a video [t, 32, 32, 3], uint8 or float in [0, 1]. The object is what
    differs in chroma from the background (which varies in luma only). Each frame's soft mask is fitted with every shape
    over position and radius; the best overlap names the shape. Direction and speed come from the fitted positions of
    the nearest five frames; an object that stands still has neither."""
    frames = unit_range(video).astype(np.float32)
    chroma = frames - frames.mean(-1, keepdims=True)
    chroma = chroma - np.median(chroma, (0, 1, 2))
    distance = np.linalg.norm(chroma, axis=-1)
    # The object's chroma: the mean over the frame's most coloured pixels (the smallest object has 32).
    flat = chroma.reshape(len(frames), -1, 3)
    order = np.argsort(-distance.reshape(len(frames), -1), axis=1)[:, :20]
    colour = np.take_along_axis(flat, order[..., None], 1).mean(1)  # [t, 3]
    strength = np.linalg.norm(colour, axis=-1)
    mask = np.einsum("thwc,tc->thw", chroma, colour) / np.maximum(strength, 1e-6)[:, None, None] ** 2
    mask = np.clip(2 * mask - 0.5, 0, 1)  # keeps the area of an edge, drops the noise of flat parts
    fits = [_fit(shape, mask) for shape in SHAPES]
    overlaps = np.stack([fit[3] for fit in fits])  # [shapes, t]
    shape = overlaps.argmax(0)
    x, y, radius, overlap = (np.choose(shape, column) for column in zip(*fits, strict=True))
    red, green, blue = colour.T
    hue = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))
    # As long a window at the ends as in the middle: two frames alone place an object too roughly.
    before = np.clip(np.arange(len(frames)) - 2, 0, max(len(frames) - 5, 0))
    after = np.minimum(before + 4, len(frames) - 1)
    dx, dy = ((a[after] - a[before]) / np.maximum(after - before, 1) for a in (x, y))
    sideways = np.abs(dx) >= np.abs(dy)
    direction = np.where(sideways, (dx > 0).astype(int), 2 + (dy > 0).astype(int))
    pace = np.maximum(np.abs(dx), np.abs(dy))
    present = (strength > MINIMUM_CHROMA) & (overlap > MINIMUM_OVERLAP)
    moving = present & (pace > MINIMUM_PACE)
    size = np.where(present, radius > RADIUS_THRESHOLD, -1)
    colour = np.where(present, np.round(hue / 60).astype(int) % 6, -1)
    shape = np.where(present, shape, -1)
    direction = np.where(moving, direction, -1)
    speed = np.where(moving, pace > PACE_THRESHOLD, -1)
    return Reading(size, colour, shape, direction, speed, x, y, radius, overlap)


def _fit(shape: str, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Centre x, y, radius and soft intersection over union, each [t], of the best `shape` for masks [t, h, w]."""
    area = np.maximum(mask.sum((1, 2)), 1e-6)
    x = (mask * _GRID_X).sum((1, 2)) / area
    y = (mask * _GRID_Y).sum((1, 2)) / area
    radius = np.maximum(np.sqrt(area / np.pi), 1.0)
    # The moments are off where the object leaves the frame: search around them, ever finer.
    for reach in (1.0, 0.4):
        offsets = np.array((-1, 0, 1), np.float32) * reach
        xs, ys = x[:, None] + offsets, y[:, None] + offsets
        radii = np.maximum(radius[:, None] + 0.7 * offsets, 0.5)
        ideal = coverage(shape, xs[:, :, None, None], ys[:, None, :, None], radii[:, None, None])  # [t x y r h w]
        # min(a, b) = (a + b - |a - b|) / 2, and likewise max: the soft intersection and union.
        total = ideal.sum((-2, -1)) + area[:, None, None, None]
        ideal -= mask[:, None, None, None]
        apart = np.abs(ideal, out=ideal).sum((-2, -1))
        overlap = ((total - apart) / (total + apart)).reshape(len(mask), -1)
        best = overlap.max(1)
        picks = np.unravel_index(overlap.argmax(1), (3, 3, 3))
        x, y, radius = (a[np.arange(len(a)), pick] for a, pick in zip((xs, ys, radii), picks, strict=True))
    return x, y, radius, best


def alignment(videos: np.ndarray, captions: list[Caption]) -> dict[str, float]:
    """Mean accuracy of videos [n, t, 32, 32, 3] against their captions: `alignment` over frames and attributes,
    `alignment_strict` (frames in which all five are right) and one for each attribute."""
    with ThreadPoolExecutor() as pool:  # NumPy computes beside Python
        return accuracies(np.stack([r.correct(c) for r, c in zip(pool.map(verify, videos), captions, strict=True)]))


def accuracies(correct: np.ndarray) -> dict[str, float]:
    """The measures of `alignment` from what `Reading.correct` says of every video, bool [n, t, 5]."""
    each = {f"alignment_{name}": float(correct[..., i].mean()) for i, name in enumerate(ATTRIBUTES)}
    return {"alignment": float(correct.mean()), "alignment_strict": float(correct.all(-1).mean()), **each}
