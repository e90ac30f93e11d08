"""The documented adapter of a scorer behind HTTP, against a server on this machine."""

import http.server
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from dollar_jax.rewards import get_reward
from dollar_jax.rewards.host import HostScorer

NAMES = ("quality", "motion", "alignment")


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
    requests, broken = scorer
    hosts = [HostScorer(name, get_reward(f"http_reward:{name}"), timeout=20, retries=0) for name in NAMES]

    def score(frames, prompts):
        for host in hosts:
            host.submit(frames, prompts)
        return [host.collect() for host in hosts]

    frames = np.random.default_rng(0).uniform(size=(3, 2, 4, 4, 3)).astype(np.float32)
    found = score(frames, ["a", "bb", "ccc"])
    mean = np.round(255 * frames).mean((1, 2, 3, 4)) / 255
    np.testing.assert_allclose(found, [mean, -mean, [1, 2, 3]], rtol=1e-5)
    assert len(requests) == 1 and requests[0][1] == ["a", "bb", "ccc"]
    score(frames, ["a", "bb", "dddd"])
    assert len(requests) == 2
    broken.set()
    with pytest.warns(RuntimeWarning, match="HTTP Error 500"):
        assert np.isnan(score(frames[::-1], ["a", "b", "c"])).all()
    broken.clear()
    assert np.isfinite(score(frames[::-1], ["a", "b", "c"])).all()
