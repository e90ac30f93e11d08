"""The default domain as latents, its tokenizer, and the shuffled batches that training reads."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import grain
import numpy as np
import pytest

from dollar_jax.data import shapes
from dollar_jax.data.latents import EncodedVideos, load_data
from dollar_jax.data.vocabulary import SPECIAL, build_tokenizer
from dollar_jax.weights.pipeline import load_tokenizer, tokenize


def test_the_default_domain_is_rendered_and_encoded_once(tmp_path, monkeypatch):
    def encode(frames):
        assert frames.dtype == np.uint8
        return frames.mean((1, 2, 3))[:, None, None, None]

    generator: Any = SimpleNamespace(
        encode=encode, text=lambda captions: np.zeros((len(captions), 2, 5)), clip=(17, 32, 32)
    )
    generator.pipeline = SimpleNamespace(family=SimpleNamespace(conditioned=False))
    made_of = SimpleNamespace(name="moving_shapes", train_videos=40, max_text_length=2)
    c: Any = SimpleNamespace(data=made_of, teacher="a teacher")
    data = load_data(c, generator, tmp_path)
    for i, index in enumerate([39, 28, 6, 33, 16, 19, 12, 14, 25, 18]):  # as TFDS 4.9.10 shuffles 40 records
        video, caption = shapes.example(shapes.SEED, "train", index)
        assert data.captions[i] == str(caption) and not caption.held_out
        np.testing.assert_allclose(data.latent[i, 0, 0, 0], video.mean((0, 1, 2)))
    assert len(data) == 40
    monkeypatch.setattr(shapes, "example", None)  # rendered once
    np.testing.assert_array_equal(load_data(c, generator, tmp_path).latent, data.latent)


# --- the tokenizer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(shapes.VOCABULARY)


def test_captions_survive_tokenizer_and_file(tokenizer, tmp_path):
    captions = [str(c) for c in shapes.all_captions()]
    ids, mask = tokenize(tokenizer, captions, 12)
    assert ids.dtype == mask.dtype == np.int32
    assert ids.shape == mask.shape == (288, 12)
    np.testing.assert_array_equal(mask, [[1] * 8 + [0] * 4] * 288)  # seven words and </s>
    np.testing.assert_array_equal(ids[:, 7], SPECIAL.index("</s>"))
    np.testing.assert_array_equal(ids[:, 8:], SPECIAL.index("<pad>"))
    assert len(np.unique(ids, axis=0)) == 288
    assert ids[:, :7].min() >= len(SPECIAL)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == captions

    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    for prompts in (captions, ["", "a GREEN dog"]):
        for ours, theirs in zip(tokenize(again, prompts, 12), tokenize(tokenizer, prompts, 12), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_unknown_words_capitals_padding_and_cuts(tokenizer):
    unknown, end = SPECIAL.index("<unk>"), SPECIAL.index("</s>")
    red = len(SPECIAL) + shapes.VOCABULARY.index("red")
    ids, mask = tokenize(tokenizer, ["RED dog", "", "red red red red"], 4)
    np.testing.assert_array_equal(ids[0], [red, unknown, end, 0])
    np.testing.assert_array_equal(ids[1], [end, 0, 0, 0])
    np.testing.assert_array_equal(ids[2], [red, red, red, end])
    np.testing.assert_array_equal(mask.sum(1), [3, 1, 4])


# --- batches --------------------------------------------------------------------------------------


def videos(count):
    index = np.arange(count, dtype=np.float32)
    latent = np.broadcast_to(index[:, None, None, None, None], (count, 1, 2, 2, 3)).copy()
    text = np.broadcast_to(-index[:, None, None], (count, 2, 5)).copy()
    return EncodedVideos(latent, text, [f"caption {i}" for i in range(count)])


def config(batch_size=4, seed=0) -> Any:
    return SimpleNamespace(batch_size=batch_size, seed=seed)


ALL = np.arange(4)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def indices(batches):
    return np.stack([batch["latent"][:, 0, 0, 0, 0] for batch in batches]).astype(int)


def test_batches_hold_matching_rows_and_every_video_once_per_epoch():
    data = videos(12)
    batches = take(data.batches(config(), ALL), 6)
    for batch in batches:
        assert batch["latent"].shape == (4, 1, 2, 2, 3)
        assert batch["text"].shape == (4, 2, 5)
        index = batch["latent"][:, 0, 0, 0, 0]
        np.testing.assert_array_equal(batch["text"][:, 0, 0], -index)
        assert batch["caption"].tolist() == [f"caption {i:.0f}" for i in index]
        assert batch["name"].tolist() == [f"video {i:.0f}" for i in index]
    first, second = indices(batches).reshape(2, 12)
    np.testing.assert_array_equal(np.sort(first), np.arange(12))
    np.testing.assert_array_equal(np.sort(second), np.arange(12))
    assert np.any(first != np.arange(12)), "not shuffled"
    assert np.any(first != second), "every epoch has the same order"


def test_batches_depend_on_the_seed_alone():
    one, again, other = (indices(take(videos(12).batches(config(seed=seed), ALL), 5)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)


def test_batches_go_on_from_a_saved_position():
    data = videos(10)  # an epoch ends within a batch
    iterator = data.batches(config(), ALL)
    assert isinstance(iterator, grain.DatasetIterator)
    take(iterator, 4)
    state = iterator.get_state()
    rest = indices(take(iterator, 5))
    resumed = data.batches(config(), ALL)
    resumed.set_state(state)
    np.testing.assert_array_equal(indices(take(resumed, 5)), rest)


def test_processes_share_the_very_batches_of_one():
    data = videos(10)
    whole = indices(take(data.batches(config(), ALL), 5))
    for rows in ([0, 1], [2, 3], [1, 3]):
        part = take(data.batches(config(), np.array(rows)), 5)
        np.testing.assert_array_equal(indices(part), whole[:, rows])
        np.testing.assert_array_equal(part[0]["latent"][:, 0, 0, 0, 0], whole[0, rows])


def test_fewer_videos_than_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"3 training videos, fewer than config.batch_size 4"):
        videos(3).batches(config(), ALL)


def test_encoded_videos_are_immutable_rows():
    data = videos(3)
    assert len(data) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.latent = data.text  # pyright: ignore[reportAttributeAccessIssue]
