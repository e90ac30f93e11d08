"""The documented adapter of a scorer behind HTTP, against a server on this machine."""

import http.server
import io
import json
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dollar_jax.config import RewardTerm
from dollar_jax.distillation import RewardSamples
from dollar_jax.rewards import WrongShape, get_reward, load_rewards, weighted_sum
from dollar_jax.rewards.host import HostScorer
from dollar_jax.rewards.reward import calls
from dollar_jax.rewards.scorer import Scorer

NAMES = ("VQ", "MQ", "TA")


@pytest.fixture
def scorer(monkeypatch):
    """The requests it got, as (frames, prompts); while `broken` is set it answers with an error."""
    requests, broken = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got = np.load(io.BytesIO(self.rfile.read(int(self.headers["Content-Length"]))))
            frames, prompts = got["frames"], got["prompts"].tolist()
            requests.append((frames, prompts))
            self.send_response(500 if broken.is_set() else 200)
            self.end_headers()
            mean = frames.mean((1, 2, 3, 4)) / 255
            values = mean.tolist(), (-mean).tolist(), [len(p) for p in prompts]
            self.wfile.write(json.dumps(dict(zip(NAMES, values, strict=True))).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SCORER", f"http://127.0.0.1:{server.server_port}/score")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "docs")
    yield requests, broken
    server.shutdown()
    server.server_close()


def test_three_rewards_of_one_request_and_a_scorer_that_fails(scorer):
    """Each attribute has its own column, weight and scale; two are trained on and one is held out."""
    requests, broken = scorer
    weights = {"quality": 2.0, "motion": 0.0, "text": -0.5}
    terms = tuple(RewardTerm(f"http_reward:videoalign.{name}", weight) for name, weight in weights.items())
    rewards = load_rewards(terms)
    host = HostScorer("videoalign", *calls(rewards).values(), timeout=20, retries=0)

    def score(frames, prompts):
        host.submit(frames, prompts)
        return host.collect().T

    frames = np.random.default_rng(0).uniform(size=(3, 2, 4, 4, 3)).astype(np.float32)
    prompts = ["a", "bb", "ccc"]
    found = score(frames, prompts)
    mean = np.round(255 * frames).mean((1, 2, 3, 4)) / 255
    np.testing.assert_allclose(found, [mean, -mean, [1, 2, 3]], rtol=1e-5)
    assert len(requests) == 1 and requests[0][1] == prompts
    total = weighted_sum(terms, rewards)
    np.testing.assert_allclose(total(frames, prompts), 2 * mean - 0.5 * np.array([1, 2, 3]), rtol=1e-5)
    assert len(requests) == 2 and total.meaning.startswith("2 × (quality, what VideoAlign says")
    np.testing.assert_allclose(get_reward("http_reward:videoalign.text")(frames, prompts), [1, 2, 3])
    broken.set()
    with pytest.warns(RuntimeWarning, match="HTTP Error 500"):
        assert np.isnan(score(frames[::-1], ["a", "b", "c"])).all()
    broken.clear()
    assert np.isfinite(score(frames[::-1], ["a", "b", "c"])).all()


def test_columns_of_a_run_come_from_one_call(scorer, make_config):
    """Through the package's scorer, between other rewards; a run with a call that failed has no number of it."""
    requests, broken = scorer
    names = [f"http_reward:videoalign.{name}" for name in ("text", "quality")]
    terms = [(names[0], 1.0), ("vivid", 0.0), (names[1], 0.5)]
    settings = {"batch_size": 4, "reward.samples": 2, "reward.guard.window": 2, "reward.replay": 8}
    config = make_config(
        settings | {"reward.rewards": tuple({"name": n, "weight": w, "folder": None} for n, w in terms)}
    )
    rewards = load_rewards(config.reward.rewards)
    run = Scorer(config, rewards, None, lambda p, x: p + x, np.float32(0), [(2, 4, 4, 3)], (1, 2))
    latent = np.random.default_rng(1).uniform(size=(2, 1, 2, 4, 4, 3)).astype(np.float32)
    batch = {"latent": np.zeros((4, 2, 4, 4, 3), np.float32), "text": np.zeros((4, 1, 2), np.float32)}
    nothing = np.full((2, 1, 3), np.nan, np.float32)

    def step():
        samples = RewardSamples(*map(jnp.asarray, (latent, nothing, nothing[..., 0])))
        run.submit(samples, batch, ["a", "bb", "ccc", "dddd"])
        run.collect()
        return run.latest

    latest = step()
    mean = np.round(255 * latent).mean() / 255
    assert len(requests) == 1 and requests[0][1] == ["a", "ccc"]
    assert latest["reward_videoalign.text_generated"] == pytest.approx(2)
    assert latest["reward_videoalign.quality_generated"] == pytest.approx(mean, rel=1e-5)
    assert latest["reward_generated"] == pytest.approx(2 + 0.5 * mean, rel=1e-5)
    (memory,) = run.memories.values()
    values = [[len(p), np.round(255 * row).mean() / 255] for p, row in zip(("a", "ccc"), latent, strict=True)]
    np.testing.assert_allclose(memory.state["reward"][:2], values, rtol=1e-5)
    broken.set()
    with pytest.warns(RuntimeWarning, match="HTTP Error 500"):
        latest = step()
    assert "reward_generated" not in latest and "reward_vivid_generated" in latest
    assert latest["faults_videoalign_raised"] == 2 and memory.state["added"] == 2


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("{'a': frames.mean((1, 2, 3, 4))}", r"gave \{'a': array.*; it must give a and b by name"),
        ("frames.mean((1, 2, 3, 4))", r"gave \[0. 0.\]; it must give a and b"),
        ("{'a': [0.0], 'b': [0.0]}", r"gave shape \(1,\) for 2 videos"),
    ],
)
def test_a_wrong_answer_is_named(tmp_path, answer, says):
    path = tmp_path / "mine.py"
    path.write_text(f"def score(frames, prompts):\n    return {answer}\n")
    terms = [RewardTerm(f"{path}:score.{part}") for part in "ab"]
    (reward,) = calls(load_rewards(terms)).values()
    with pytest.raises(WrongShape, match=says):
        reward(np.zeros((2, 1, 2, 2, 3), np.float32), ["", ""])


def test_parts_are_of_functions_alone():
    with pytest.raises(ValueError, match=r"has no function 'REWARDS'"):
        get_reward("dollar_jax.rewards.builtin:REWARDS.vivid")
