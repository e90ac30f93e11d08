"""An example of a black box on the host that needs a package of its own: `pip install dollar_jax[rewards]`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dollar_jax.rewards.reward import Reward
from dollar_jax.video import to_uint8


def onnx_classifier(folder: Path) -> Reward:
    """The one output, or the last class's probability, of an image classifier `folder`/model.onnx. Its input is float32
    [n, h, w, 3] or [n, 3, h, w] of fixed h and w; it gets frames in [0, 1], resized. A clip's reward is their mean."""
    if not (path := folder / "model.onnx").is_file():
        raise FileNotFoundError(f"{path} does not exist; an ONNX reward is read from there")
    try:
        import onnxruntime  # optional
    except ImportError as error:
        lack = "needs the package onnxruntime, which is not installed"
        raise ValueError(f"the reward 'onnx' {lack}: pip install 'dollar_jax[rewards]'") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
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
        values = [np.ravel(np.asarray(session.run(None, {given.name: row[None]})[0]))[-1] for row in x]
        return np.reshape(values, frames.shape[:2]).mean(1)

    return Reward(score, f"what the classifier {path} says")
