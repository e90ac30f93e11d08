"""Host rewards from packages of their own, which are not always installed."""

import sys

import numpy as np
import pytest

from dollar_jax.rewards import get_reward


def message(number, payload):
    """A length-delimited field of a protobuf."""
    payload = payload.encode() if isinstance(payload, str) else payload
    return bytes([number << 3 | 2]) + varint(len(payload)) + payload


def integer(number, value):
    return bytes([number << 3]) + varint(value)


def varint(value):
    out = []
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def tensor(name, shape):
    dims = b"".join(message(1, integer(1, size)) for size in shape)
    return message(1, name) + message(2, message(1, integer(1, 1) + message(2, dims)))


def onnx_mean(shape):
    """The bytes of an ONNX model that averages an image."""
    node = message(1, "x") + message(2, "y") + message(4, "ReduceMean")
    graph = message(1, node) + message(2, "mean") + message(11, tensor("x", shape))
    graph += message(12, tensor("y", [1] * len(shape)))
    return integer(1, 8) + message(7, graph) + message(8, integer(2, 13))


@pytest.mark.parametrize("shape", [(1, 8, 12, 3), (1, 3, 8, 12)], ids=["channels last", "channels first"])
def test_an_onnx_model_scores_every_frame(tmp_path, shape):
    (tmp_path / "model.onnx").write_bytes(onnx_mean(shape))
    levels = np.array([[0.2, 0.4], [0.6, 1.0]], np.float32)
    frames = levels.reshape(2, 2, 1, 1, 1) * np.ones((2, 2, 16, 24, 3), np.float32)
    found = get_reward("onnx", str(tmp_path))(frames, ["", ""])
    np.testing.assert_allclose(found, levels.mean(1), atol=1e-6)


def test_a_missing_package_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="needs the package onnxruntime, which is not installed: pip install"):
        get_reward("onnx", str(tmp_path))


def test_a_missing_model_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.onnx does not exist"):
        get_reward("onnx", str(tmp_path))
