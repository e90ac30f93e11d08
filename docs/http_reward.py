"""Rewards of a scorer behind HTTP, such as VideoAlign's three attributes, from one request for each batch of videos.

    PYTHONPATH=docs SCORER=http://HOST:8000/score dollar train --workdir=runs/mine
        --config=wan_1_3b:vsd+cd+lrm,http_reward:quality,http_reward:motion,http_reward:alignment

The scorer gets the bytes of an .npz with `frames`, uint8 [b t h w 3], `fps` and `prompts`, and answers JSON with a list
of b numbers for each attribute. VideoAlign's server (KwaiVGI/VideoAlign, a Qwen2-VL-2B) would write clips to files,
call its `reward(paths, prompts)` and answer VQ, MQ and TA under these names. Whatever it does, raise, hang or answer
nonsense, the run goes on: `config.reward.timeout` and `retries`. Each reward is standardised and weighted on its own.
"""

import hashlib
import io
import json
import os
import threading
import urllib.error
import urllib.request

import numpy as np

FPS = float(os.environ.get("SCORER_FPS", 16))
TIMEOUT = 300  # seconds; the run's own is config.reward.timeout

_lock = threading.Lock()
_last = ("", {})  # of the last batch: its digest, and the attributes


def _scores(frames: np.ndarray, prompts: list[str]) -> dict[str, list[float]]:
    """All attributes; rewards that run side by side wait for the first one's request."""
    global _last
    file = io.BytesIO()
    pixels = np.round(255 * np.clip(frames, 0, 1)).astype(np.uint8)
    np.savez(file, frames=pixels, fps=FPS, prompts=np.array(prompts))
    digest = hashlib.sha256(pixels.tobytes() + "\0".join(prompts).encode()).hexdigest()
    with _lock:
        if _last[0] != digest:
            kind = {"Content-Type": "application/octet-stream"}
            request = urllib.request.Request(os.environ["SCORER"], file.getvalue(), kind)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    _last = (digest, json.load(answer))
            except urllib.error.HTTPError as error:
                error.close()
                raise
        return _last[1]


def quality(frames: np.ndarray, prompts: list[str]) -> np.ndarray:
    """visual quality"""
    return np.array(_scores(frames, prompts)["quality"], np.float32)


def motion(frames: np.ndarray, prompts: list[str]) -> np.ndarray:
    """motion quality"""
    return np.array(_scores(frames, prompts)["motion"], np.float32)


def alignment(frames: np.ndarray, prompts: list[str]) -> np.ndarray:
    """agreement of video and prompt"""
    return np.array(_scores(frames, prompts)["alignment"], np.float32)
