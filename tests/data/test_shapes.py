"""The domain's renderer and its verifier, each against the other and against what fools neither."""

import itertools
from collections import Counter

import numpy as np
import pytest

from dollar_jax.data import shapes
from dollar_jax.data.shapes import ATTRIBUTES, Caption

SEED = 7
CAPTION = Caption("large", "red", "circle", "right", "quickly")


def examples(count, splits=("train", "held_out")):
    return [shapes.example(SEED, split, i) for split in splits for i in range(count // len(splits))]


def blurred(x, axis):
    return (np.roll(x, -1, axis) + 2 * x + np.roll(x, 1, axis)) / 4


@pytest.fixture(scope="module")
def some():
    return examples(200)


def videos_of(pairs):
    return np.stack([video for video, _ in pairs]), [caption for _, caption in pairs]


def noisy(video, std, seed=0):
    x = video / 255 + np.random.default_rng(seed).normal(0, std, video.shape)
    return np.clip(x, 0, 1).astype(np.float32)


def test_clean_videos_are_read_without_a_mistake(some):
    videos, captions = videos_of(some)
    scores = shapes.alignment(videos, captions)
    assert scores.keys() == {"alignment", "alignment_strict", *(f"alignment_{n}" for n in ATTRIBUTES)}
    assert set(scores.values()) == {1.0}


def test_reading_finds_the_object():
    radius = 4.0
    mask = shapes.coverage("square", np.array([10.25]), np.array([21.5]), np.array([radius]))
    video = np.where(mask[..., None] > 0, mask[..., None] * np.array([0.0, 0.9, 0.0]), 0.0)
    reading = shapes.verify(np.repeat(video, 5, 0))
    found = [reading.x[0], reading.y[0], reading.radius[0]]
    np.testing.assert_allclose(found, [10.25, 21.5, radius], atol=0.25)
    assert reading.overlap[0] > 0.9
    assert ATTRIBUTES["shape"][reading.shape[0]] == "square"
    assert ATTRIBUTES["colour"][reading.colour[0]] == "green"


def test_noise_and_blur_change_little(some):
    videos, captions = videos_of(some[::4])
    shaken = np.stack([noisy(v, 8 / 255, i) for i, v in enumerate(videos)])
    assert shapes.alignment(shaken, captions)["alignment"] > 0.98
    soft = blurred(blurred(videos / 255.0, 2), 3).astype(np.float32)
    assert shapes.alignment(soft, captions)["alignment"] > 0.98


def test_floats_and_bytes_are_read_alike(some):
    video = some[0][0]
    ours, theirs = shapes.verify(video), shapes.verify(video / 255.0)
    np.testing.assert_allclose(ours.x, theirs.x, atol=1e-3)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_wrong_word_fails_that_attribute_alone(some, name):
    for video, caption in some[::20]:
        values = ATTRIBUTES[name]
        other = values[(values.index(getattr(caption, name)) + 1) % len(values)]
        wrong = Caption(**{**vars(caption), name: other})
        scores = shapes.alignment(video[None], [wrong])
        assert scores["alignment"] == 0.8
        assert scores["alignment_strict"] == scores[f"alignment_{name}"] == 0.0


def test_shuffled_captions_score_at_chance(some):
    videos, captions = videos_of(some[::4])
    chance = np.mean([1 / len(values) for values in ATTRIBUTES.values()])
    score = shapes.alignment(videos, captions[1:] + captions[:1])["alignment"]
    assert abs(score - chance) < 0.12


def blank():
    return np.full((shapes.FRAMES, shapes.SIZE, shapes.SIZE, 3), 128, np.uint8)


def striped():
    wave = 0.5 + 0.15 * np.sin(np.arange(shapes.SIZE) / 2)
    return np.broadcast_to(wave[:, None], (shapes.FRAMES, shapes.SIZE, shapes.SIZE))[..., None].repeat(3, -1)


def uniform_noise():
    return np.random.default_rng(0).uniform(0, 1, blank().shape).astype(np.float32)


@pytest.mark.parametrize("make", [blank, striped, uniform_noise])
def test_no_object_reads_as_none(make):
    video = make()
    reading = shapes.verify(video)
    for name in ATTRIBUTES:
        np.testing.assert_array_equal(getattr(reading, name), -1, err_msg=name)
    assert shapes.alignment(video[None], [CAPTION])["alignment"] == 0


def test_an_object_that_stands_still_has_no_speed():
    video = shapes.render(CAPTION, np.random.default_rng(0))
    still = np.repeat(video[8:9], len(video), 0)
    reading = shapes.verify(still)
    correct = reading.correct(CAPTION).mean(0)
    named = dict(zip(ATTRIBUTES, correct, strict=True))
    assert named["size"] == named["colour"] == named["shape"] == 1
    assert named["direction"] == named["speed"] == 0
    for direction, speed in itertools.product(shapes.DIRECTIONS, shapes.SPEEDS):
        claim = Caption(**{**vars(CAPTION), "direction": direction, "speed": speed})
        assert not reading.correct(claim)[:, 3:].any(), f"a still object passes for {claim}"


def test_backwards_is_the_other_direction():
    video = shapes.render(CAPTION, np.random.default_rng(0))
    reading = shapes.verify(video[::-1])
    assert {shapes.DIRECTIONS[d] for d in reading.direction} == {"left"}


def test_flicker_costs_the_frames_it_is_in():
    video = shapes.render(CAPTION, np.random.default_rng(1))
    other = shapes.render(Caption(**{**vars(CAPTION), "shape": "triangle"}), np.random.default_rng(1))
    mixed = np.where(np.arange(len(video))[:, None, None, None] % 2, other, video)
    correct = shapes.verify(mixed).correct(CAPTION)
    np.testing.assert_array_equal(correct[:, 2], np.arange(len(video)) % 2 == 0)
    assert correct[:, [0, 1, 3, 4]].all()

    gone = video.copy()
    gone[5:8] = np.median(video, (1, 2), keepdims=True)[5:8]
    correct = shapes.verify(gone).correct(CAPTION)
    assert not correct[5:8].any()
    assert correct[:3].all() and correct[10:].all()


def test_captions_are_read_back():
    for caption in shapes.all_captions():
        assert Caption.parse(str(caption)) == caption
    assert Caption.parse("  Quickly a RED large circle moving right ") == CAPTION
    words = {word for caption in shapes.all_captions() for word in str(caption).split()}
    assert words == set(shapes.VOCABULARY)
    assert len(shapes.VOCABULARY) == len(set(shapes.VOCABULARY))


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("a red circle moving left slowly", "size"),
        ("a small pink circle moving left slowly", "colour"),
        ("a small red circle square moving left slowly", "shape"),
        ("a small red circle", "direction"),
        ("", "size"),
    ],
)
def test_prompts_that_lack_an_attribute_are_refused(prompt, name):
    with pytest.raises(ValueError, match=f"exactly one {name} out of"):
        Caption.parse(prompt)


def test_held_out_captions_are_24_and_every_pair_of_words_is_trained():
    everything = shapes.all_captions()
    held = [caption for caption in everything if caption.held_out]
    trained = [caption for caption in everything if not caption.held_out]
    assert (len(everything), len(set(everything)), len(held)) == (288, 288, 24)
    triples = {(c.colour, c.shape, c.direction) for c in held}
    assert not triples & {(c.colour, c.shape, c.direction) for c in trained}
    for one, two in itertools.combinations(ATTRIBUTES, 2):
        seen = {(getattr(c, one), getattr(c, two)) for c in trained}
        assert seen == set(itertools.product(ATTRIBUTES[one], ATTRIBUTES[two])), (one, two)


def test_splits_keep_to_their_captions():
    captions = {split: [shapes.example(SEED, split, i)[1] for i in range(60)] for split in shapes.SPLITS}
    assert not any(c.held_out for split in ("train", "validation") for c in captions[split])
    assert all(c.held_out for c in captions["held_out"])
    assert captions["train"] != captions["validation"]


def test_covering_captions_are_balanced():
    captions = shapes.covering_captions()
    triples = Counter((c.colour, c.shape, c.direction) for c in captions)
    assert len(triples) == len(captions) == 72 == 6 * 3 * 4
    assert set(Counter((c.size, c.speed) for c in captions).values()) == {18}
    for one, two in itertools.combinations(ATTRIBUTES, 2):
        counts = Counter((getattr(c, one), getattr(c, two)) for c in captions)
        assert len(counts) == len(ATTRIBUTES[one]) * len(ATTRIBUTES[two])
        assert max(counts.values()) - min(counts.values()) <= 2, (one, two)


def test_examples_depend_on_seed_split_and_index_alone():
    first, caption = shapes.example(SEED, "train", 5)
    for i in (9, 2):
        shapes.example(SEED, "train", i)
    again, same = shapes.example(SEED, "train", 5)
    np.testing.assert_array_equal(first, again)
    assert caption == same
    for other in [(SEED + 1, "train", 5), (SEED, "validation", 5), (SEED, "train", 6)]:
        assert np.any(shapes.example(*other)[0] != first), other


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_size_is_the_area_of_the_disc(shape):
    rng = np.random.default_rng(0)
    radius = rng.uniform(3.2, 6.0, 40)
    x, y = rng.uniform(14, 18, (2, 40))
    area = shapes.coverage(shape, x, y, radius).sum((1, 2))
    np.testing.assert_allclose(area, np.pi * radius**2, rtol=0.02)


def test_outlines_are_where_geometry_says():
    assert shapes.signed_distance("circle", np.float32(3), np.float32(4), np.float32(5)) == 0
    side = np.sqrt(np.pi) * 5  # a square of a disc's area
    assert abs(shapes.signed_distance("square", side / 2, 0.0, 5.0)) < 1e-6
    # An equilateral triangle of that area: its corners at two thirds of its height from the centre.
    edge = np.sqrt(4 * np.pi * 25 / np.sqrt(3))
    height = np.sqrt(0.75) * edge
    for x, y in [(0, -2 * height / 3), (edge / 2, height / 3), (-edge / 2, height / 3)]:
        assert abs(shapes.signed_distance("triangle", x, y, 5.0)) < 1e-6
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        shapes.signed_distance("star", 0.0, 0.0, 1.0)


def test_objects_stay_in_the_frame_and_move_evenly(some):
    for video, caption in some[::5]:
        assert video.dtype == np.uint8
        assert video.shape == (shapes.FRAMES, shapes.SIZE, shapes.SIZE, 3)
        reading = shapes.verify(video)
        for centre in (reading.x, reading.y):
            assert centre.min() >= reading.radius.min() - 0.5
            assert centre.max() <= shapes.SIZE - reading.radius.min() + 0.5
        track = reading.x if caption.direction in ("left", "right") else reading.y
        sign = 1 if caption.direction in ("right", "down") else -1
        low, high = shapes.PACES[caption.speed]
        assert low - 0.1 < sign * (track[-1] - track[0]) / (len(track) - 1) < high + 0.1
        low, high = shapes.RADII[caption.size]
        assert low - 0.3 < np.median(reading.radius) < high + 0.3
