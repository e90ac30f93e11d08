"""VideoAlign's three attributes from a scorer behind HTTP, one request for each batch of videos.

    PYTHONPATH=docs SCORER=http://HOST:8000/score dollar train --workdir=runs/mine
        --config=wan_1_3b:vsd+cd+lrm,http_reward:videoalign.quality,http_reward:videoalign.motion,http_reward:videoalign.text

The scorer gets the bytes of an .npz with `frames`, uint8 [b t h w 3], `fps` and `prompts`, and answers JSON with a list
of b numbers for VQ, MQ and TA each. VideoAlign's server (KwaiVGI/VideoAlign, a Qwen2-VL-2B) would write the clips to
files and answer what its `reward(paths, prompts)` gives. Whatever it does, raise, hang or answer nonsense, the run goes
on: `config.reward.timeout` and `retries`. Each attribute is a reward of its own, standardised and weighted; what is not
named is not learned from.
"""

import io
import json
import os
import urllib.error
import urllib.request

import numpy as np

FPS = float(os.environ.get("SCORER_FPS", 16))
TIMEOUT = 300  # seconds; the run's own is config.reward.timeout
NAMES = {"VQ": "quality", "MQ": "motion", "TA": "text"}


def videoalign(frames: np.ndarray, prompts: list[str]) -> dict[str, list[float]]:
    """what VideoAlign says of the video"""
    file = io.BytesIO()
    pixels = np.round(255 * np.clip(frames, 0, 1)).astype(np.uint8)
    np.savez(file, frames=pixels, fps=FPS, prompts=np.array(prompts))
    kind = {"Content-Type": "application/octet-stream"}
    request = urllib.request.Request(os.environ["SCORER"], file.getvalue(), kind)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            scores = json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        raise
    return {name: scores[theirs] for theirs, name in NAMES.items()}
