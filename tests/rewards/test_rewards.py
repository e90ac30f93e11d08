"""Pixel rewards against numbers worked out here, and the ring that keeps what they scored."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dollar_jax.config import RewardTerm
from dollar_jax.distillation import RewardSamples
from dollar_jax.rewards import REWARDS, JaxReward, Reward, get_reward, load_rewards, weighted_sum
from dollar_jax.rewards.builtin import QUALITY, SHARE, compressibility, vivid, vividness
from dollar_jax.rewards.methods.lrm import Replay, ScoredLatents


def frames(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, shape).astype(np.float32)


# --- compressibility ------------------------------------------------------------------------------


def test_plain_clips_compress_better_than_noise():
    flat = np.full((1, 3, 16, 16, 3), 0.5, np.float32)
    both = np.concatenate([flat, frames(1, 3, 16, 16, 3)])
    plain, noise = get_reward("compressibility")(both, ["", ""])
    assert noise < -8 < plain < 0


def test_fainter_stripes_compress_better():
    wave = np.sin(2 * np.pi * np.arange(32) / 7)[:, None, None]
    clips = [np.broadcast_to(0.5 + a * wave, (2, 32, 32, 3)) for a in (0.0, 0.02, 0.05, 0.1, 0.3)]
    rewards = compressibility(np.stack(clips), [""] * len(clips))
    assert np.all(np.diff(rewards) < 0), rewards


def test_bits_per_pixel_are_those_of_one_jpeg_per_clip():
    clips = frames(2, 3, 8, 16, 3)
    for clip, reward in zip(clips, compressibility(clips, ["", ""]), strict=True):
        picture = np.hstack(np.uint8(np.rint(clip * 255)))
        assert picture.shape == (8, 3 * 16, 3)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="JPEG", quality=95, subsampling="4:4:4")
        bits = 8 * len(file.getvalue())
        np.testing.assert_allclose(reward, -bits / (3 * 8 * 16), rtol=1e-6)
    assert QUALITY == 95


def test_values_out_of_range_are_clipped():
    clips = np.array([-0.5, 1.5], np.float32).reshape(2, 1, 1, 1, 1) * np.ones((2, 2, 8, 8, 3), np.float32)
    inside = np.clip(clips, 0, 1)
    np.testing.assert_array_equal(compressibility(clips, ["", ""]), compressibility(inside, ["", ""]))


# --- vividness ------------------------------------------------------------------------------------


def test_vividness_is_the_chroma_of_the_most_coloured_pixels():
    clip = np.full((1, 2, 10, 10, 3), 0.4, np.float32)  # 3% of 100 pixels are 3
    assert round(SHARE * 100) == 3
    clip[0, 0, 0, :4] = [[0.9, 0.1, 0.3], [0.5, 0.5, 0.2], [0.1, 0.6, 0.2], [0.4, 0.4, 0.3]]
    clip[0, 1, 5, 5] = [1.0, 0.0, 0.0]
    by_hand = ((0.8 + 0.5 + 0.3) / 3 + (1.0 + 0 + 0) / 3) / 2
    np.testing.assert_allclose(get_reward("vividness")(clip, [""]), [by_hand], rtol=1e-6)


def test_vividness_has_the_gradient_of_its_definition():
    clip = jnp.asarray(frames(2, 2, 5, 5, 3))
    assert isinstance(REWARDS["vividness"], JaxReward)
    gradient = np.asarray(jax.grad(lambda x: vividness(x).sum())(clip))
    assert np.isfinite(gradient).all()
    # One pixel per frame: +1/2 on its largest channel, -1/2 on its smallest, for two frames.
    np.testing.assert_allclose(np.sort(gradient.reshape(4, -1), axis=1)[:, [0, 1, -2, -1]], [[-0.5, 0, 0, 0.5]] * 4)


# --- vivid ----------------------------------------------------------------------------------------


def test_vivid_is_the_share_of_coloured_pixels_that_are_bright_and_saturated():
    clip = np.full((2, 2, 4, 4, 3), 0.5, np.float32)  # grey counts for nothing
    clip[0, 0, 0, 0] = [0.95, 0.05, 0.05]  # vivid
    clip[0, 1, 2] = [[0.05, 0.05, 0.9], [0.6, 0.05, 0.05], [0.95, 0.5, 0.5], [0.5, 0.45, 0.45]]
    # That is vivid; dark; pale; and too pale to be coloured: two of four.
    np.testing.assert_array_equal(vivid(clip, ["", ""]), [0.5, 0.0])


# --- the protocol ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_gives_one_number_per_clip(name):
    clips = frames(3, 3, 16, 8, 3) * np.array([1, 0.5, 0.2]).reshape(3, 1, 1, 1, 1)
    rewards = get_reward(name)(clips, ["a", "b", "c"])
    assert rewards.dtype == np.float32
    assert rewards.shape == (3,)
    assert len(set(rewards.tolist())) > 1
    assert get_reward(name).meaning


def test_bad_answers_are_refused():
    for answer in (0.0, np.zeros((2, 1)), np.zeros(3)):
        reward = Reward(lambda frames, prompts, answer=answer: answer, "")
        with pytest.raises(ValueError, match=r"gave shape .* for 2 videos; it must give one number per"):
            reward(frames(2, 1, 8, 8, 3), ["", ""])


def test_rewards_get_frames_and_prompts_as_they_are():
    reward = Reward(lambda frames, prompts: [float(p) + f.sum() for f, p in zip(frames, prompts, strict=True)], "")
    np.testing.assert_array_equal(reward(np.ones((2, 1, 2, 2, 3)), ["1", "2"]), [13.0, 14.0])


def test_unknown_rewards_are_refused():
    with pytest.raises(ValueError, match="there is no reward 'beauty'; there are .*compressibility, vividness"):
        get_reward("beauty")


MINE = """
import numpy as np
from dollar_jax.rewards import JaxReward

def brightness(frames, prompts):
    '''Mean brightness.

    More words.'''
    return frames.mean((1, 2, 3, 4))

redness = JaxReward(lambda params, frames, tokens: params["gain"] * frames[..., 0].mean((1, 2, 3)), "red",
                    {"gain": np.float32(2.0)})
number = 3
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_rewards_of_ones_own_are_found_in_files_and_modules(mine, monkeypatch):
    clips = frames(2, 2, 4, 4, 3)
    host, traced = get_reward(f"{mine}:brightness"), get_reward(f"{mine}:redness")
    assert isinstance(host, Reward) and isinstance(traced, JaxReward)
    assert host.meaning == "Mean brightness."
    np.testing.assert_allclose(host(clips, ["", ""]), clips.mean((1, 2, 3, 4)), rtol=1e-6)
    np.testing.assert_allclose(traced(clips, ["", ""]), 2 * clips[..., 0].mean((1, 2, 3)), rtol=1e-6)
    monkeypatch.syspath_prepend(mine.parent)
    np.testing.assert_array_equal(get_reward("mine:brightness")(clips, ["", ""]), host(clips, ["", ""]))


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("MINE:absent", None, "has no function 'absent'"),
        ("MINE:number", None, "has no function 'number'"),
        ("nowhere.py:f", None, "cannot be imported: FileNotFoundError: there is no file nowhere.py"),
        ("no_such_module:f", None, "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("vivid", "weights", "'vivid' has no weights to read; set its `folder` to None"),
    ],
)
def test_unusable_rewards_are_refused(mine, name, folder, message):
    with pytest.raises(ValueError, match=message):
        get_reward(name.replace("MINE", str(mine)), folder)


def test_a_weighted_sum_leaves_out_what_is_held_out(mine):
    terms = [
        RewardTerm(f"{mine}:brightness", 2.0, None),
        RewardTerm("vividness", -1.0, None),
        RewardTerm("compressibility", 0.0, None),
    ]
    clips = frames(2, 2, 8, 8, 3)
    total = weighted_sum(terms, load_rewards(terms))
    expected = 2 * clips.mean((1, 2, 3, 4)) - np.asarray(vividness(clips))
    np.testing.assert_allclose(total(clips, ["", ""]), expected, rtol=1e-5)
    assert weighted_sum(terms[2:], load_rewards(terms[2:])) is None


# --- replay ---------------------------------------------------------------------------------------


def rows(values):
    values = np.asarray(values, np.float32)
    latent = np.broadcast_to(values[:, None, None], (len(values), 2, 3))
    return latent, -latent[:, 0, :1], 10 * values


def make_replay(capacity):
    shapes = (1, 1, 2, 3), (1, 1, 1), (1, 1, 1), (1, 1)
    return Replay(capacity, ScoredLatents(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)), 0)


def add(replay, latent, text, reward):
    """Rows of one latent and one reward each."""
    replay.add(RewardSamples(latent[:, None], None, None), text, reward[:, None, None])


def draw(replay, updates, batch, seed, step=0):
    replay.drawn, replay.seed = (updates, batch), seed
    return replay.take(step)


def kept(replay):
    return set(replay.state["reward"][replay.state["weight"] > 0].ravel().tolist())


def test_replay_overwrites_the_oldest_rows():
    replay = make_replay(4)
    add(replay, *rows([1, 2, 3]))
    assert kept(replay) == {10, 20, 30}
    add(replay, *rows([4, 5]))
    assert kept(replay) == {20, 30, 40, 50}
    add(replay, *rows([6, 7, 8]))
    assert kept(replay) == {50, 60, 70, 80}
    assert replay.state["added"] == 8
    drawn = draw(replay, 3, 50, 0)
    assert drawn.latent.shape == (3, 50, 2, 3)
    assert set(np.unique(drawn.reward)) == {50, 60, 70, 80}
    # A row's parts stay together.
    np.testing.assert_array_equal(10 * drawn.latent[..., 0, 0], drawn.reward[..., 0])
    np.testing.assert_array_equal(-drawn.text[..., 0], drawn.latent[..., 1, 2])
    assert (drawn.weight == 1).all()


def test_a_batch_larger_than_the_ring_leaves_its_end():
    replay = make_replay(4)
    add(replay, *rows(range(10)))
    assert kept(replay) == {60, 70, 80, 90}


def test_an_empty_replay_has_no_weight():
    drawn = draw(make_replay(4), 2, 3, 0)
    assert drawn.weight.shape == (2, 3)
    assert not drawn.weight.any()
    assert np.isfinite(drawn.latent).all()


def test_a_half_full_replay_draws_only_what_it_has():
    replay = make_replay(100)
    add(replay, *rows([1, 2]))
    drawn = draw(replay, 4, 8, 0)
    assert set(np.unique(drawn.reward)) == {10, 20}
    assert drawn.weight.all()


def test_rewards_that_are_not_finite_are_left_out():
    replay = make_replay(4)
    latent, text, reward = rows([1, 2, 3, 4])
    add(replay, latent, text, np.array([10, np.nan, np.inf, 40], np.float32))
    assert kept(replay) == {10, 40}
    assert replay.state["added"] == 2
    add(replay, latent[:1], text[:1], np.array([np.nan], np.float32))
    assert replay.state["added"] == 2


def test_draws_depend_on_the_seed_and_the_content():
    one, two = make_replay(8), make_replay(8)
    add(one, *rows([1, 2, 3, 4]))
    add(two, *rows([1, 2]))
    add(two, *rows([3, 4]))
    a, b, other = draw(one, 2, 16, 0, 5), draw(two, 2, 16, 0, 5), draw(one, 2, 16, 0, 6)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert np.any(a.reward != other.reward)
