"""Any bytes in the place of a file of ours end in a ValueError or an OSError, which the commands say in a sentence.

CORPUS is what was found once, and what is known to break readers; it runs with every suite. `pytest -m slow` has
hypothesis look for more."""

import json
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dollar_jax.config import distill_config
from dollar_jax.evaluate.vbench import aggregate, read_intervals, read_results
from dollar_jax.prepare.sources import list_source, read_caption
from dollar_jax.prepare.videos import Unusable
from dollar_jax.run import read_config, read_history, truncate_history
from dollar_jax.weights.pipeline import read_architecture
from dollar_jax.weights.safetensors_io import list_tensors, read_tensors

LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(LEAF, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4))
BYTES = st.binary(max_size=300) | JSON.map(lambda x: json.dumps(x).encode())


def run_folder(folder, data):
    (folder / "config.json").write_bytes(data)
    (folder / "history.jsonl").write_bytes(data)
    expected(read_config, folder)
    expected(read_history, folder)
    expected(truncate_history, folder, 3)


def results(folder, data):
    (folder / "r.json").write_bytes(data)
    expected(lambda path: aggregate(read_results([path]), True), folder / "r.json")
    expected(lambda path: read_intervals([path]), folder / "r.json")


def manifest(folder, data):
    for name in ("metadata.csv", "metadata.jsonl"):
        (folder / name).write_bytes(data)
        expected(captions, str(folder / name))


def captions(source):
    for item in list_source(source):
        expected(read_caption, item)


def tensors(folder, data):
    path = folder / "model.safetensors"
    for content in (data, struct.pack("<Q", len(data)) + data + b"\0" * 64):
        path.write_bytes(content)
        expected(list_tensors, folder)
        expected(lambda folder: list(read_tensors(folder)), folder)


def pipeline(folder, data):
    index = {name: ["x", kind] for name, kind in PARTS.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in PARTS:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_bytes(data)
    expected(read_architecture, folder)
    (folder / "model_index.json").write_bytes(data)
    expected(read_architecture, folder)


def settings_of(folder, data):
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(fields, dict):
        expected(distill_config, fields)
        expected(distill_config, {"teacher": "t", "data": {"name": "d"}} | fields)


PARTS = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel"}
READERS = [run_folder, results, manifest, tensors, pipeline, settings_of]


def expected(read, *arguments):
    try:
        read(*arguments)
    except (ValueError, OSError, Unusable) as error:
        assert str(error)


CORPUS = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"null",
    b"[]",
    b"[[]]",
    b"{}",
    b"3",
    b'"text"',
    b"NaN",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a": 1e999}',
    b'{"color": [[0.5]]}',
    b'{"color": []}',
    b'{"color": [0.5, [{"video_path": 3, "video_results": "x"}]]}',
    b'{"color": [0.5, [{"video_results": 1e308}, {"video_path": "b", "video_results": 1e308}]]}',
    b'{"dimensions": {"color": null}}',
    b'{"step": "a"}\n{"step": 3}\n[]\n',
    b'video,caption\n\x00,\n"',
    b'{"video": ["x"], "caption": {"path": "/dev/zero"}}',
    b'{"video": 3, "caption": [[[]]]}',
    b'{"__metadata__": 3}',
    b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 18446744073709551615]}}',
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}}',
    b'{"student": {"timesteps": {}}}',
    b'{"student": {"timesteps": [{"a": 1}]}, "lora": {"targets": [3]}}',
    b'{"reward": {"rewards": [3]}}',
    b'{"vsd": {"normalisation": ["dmd"]}}',
    b'{"vsd": {"normalisation": {}}}',
    b'{"pretrain": {"vae": [], "vae_phases": {}}}',
    b'{"num_layers": {}, "patch_size": [1, "a", 2]}',
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("data", CORPUS, ids=range(len(CORPUS)))
def test_known_trouble_is_refused(tmp_path, read, data):
    read(tmp_path, data)


@pytest.mark.slow
@pytest.mark.parametrize("read", READERS)
def test_whatever_is_read_is_refused_or_understood(tmp_path, read):
    numbers = iter(range(10**9))

    @settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(BYTES)
    def search(data):
        folder = Path(tmp_path, str(next(numbers)))
        folder.mkdir()
        read(folder, data)

    search()
