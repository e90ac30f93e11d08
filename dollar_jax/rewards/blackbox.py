"""Examples of black boxes on the host that need packages of their own: `pip install dollar_jax[rewards]`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dollar_jax.frames import to_uint8
from dollar_jax.rewards import Reward


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"this reward needs the package {name}, which is not installed: pip install 'dollar_jax[rewards]'"
        ) from error


def brisque() -> Reward:
    """Minus the BRISQUE score (Mittal et al. 2012) of a clip's first, middle and last frame, averaged.

    The score, about 0 for good and 100 for bad, knows the statistics of photographs.
    """
    model = _package("brisque").BRISQUE(url=False)

    def score(frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        last = frames.shape[1] - 1
        chosen = to_uint8(frames[:, sorted({0, last // 2, last})])
        return np.array([-np.mean([model.score(frame) for frame in clip]) for clip in chosen], np.float32)

    return Reward(score, "how natural the picture is (BRISQUE)")


def onnx_classifier(folder: Path) -> Reward:
    """The one output, or the last class's probability, of an image classifier `folder`/model.onnx.

    Its input is float32 [n, h, w, 3] or [n, 3, h, w] of fixed h and w; it gets frames in [0, 1], resized.
    A clip's reward is the mean over its frames.
    """
    path = folder / "model.onnx"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; an ONNX reward is read from there")
    session = _package("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    first = given.shape[1] == 3
    height, width = given.shape[2:] if first else given.shape[1:3]
    if not (isinstance(height, int) and isinstance(width, int)):
        raise ValueError(f"{path} takes an input of shape {given.shape}; height and width must be fixed")

    def score(frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        flat = to_uint8(frames.reshape(-1, *frames.shape[2:]))
        sized = [Image.fromarray(f).resize((width, height), Image.Resampling.BILINEAR) for f in flat]
        x = np.stack([np.asarray(image, np.float32) / 255 for image in sized])
        x = x.transpose(0, 3, 1, 2) if first else x
        # One at a time: many exported models have a batch of 1 built in.
        values = [np.ravel(session.run(None, {given.name: row[None]})[0])[-1] for row in x]
        return np.reshape(values, frames.shape[:2]).mean(1)

    return Reward(score, f"what the classifier {path} says")
