"""The reader of torch's files, which runs nothing in them, against torch's own; and files made to harm."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from dollar_jax.weights.torch_file import read_torch


def test_tensors_are_those_of_torch(tmp_path):
    torch.manual_seed(0)
    whole = torch.randn(6, 5)
    state = OrderedDict(
        half=whole.half(),
        bfloat16=whole.bfloat16(),
        double=whole.double(),
        number=torch.tensor(2.5),
        long=torch.arange(7),
        int=torch.arange(3, dtype=torch.int32),
        transposed=whole.T,
        part=whole[2:5, 1::2],
        none=torch.zeros(0, 4),
        **{f"many.{i}": torch.full((2,), float(i)) for i in range(1500)},
    )
    state._metadata = OrderedDict({"": {"version": 1}})
    for wrapped in (state, {"epoch": 2, "state_dict": state, "args": [1, None, True, 2**70], "lr": 1e-3}):
        torch.save(wrapped, tmp_path / "file.pt")
        found = dict(read_torch(tmp_path / "file.pt"))
        assert list(found) == list(state)
        for name, tensor in state.items():
            np.testing.assert_array_equal(found[name].astype(np.float64), tensor.double().numpy(), err_msg=name)


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_file_is_named_and_not_run(tmp_path, protocol):
    torch.save({"a": torch.zeros(2), "b": Harm(tmp_path / "harmed")}, tmp_path / "bad.pt", pickle_protocol=protocol)
    with pytest.raises(ValueError, match="posix system|opcode FRAME"):
        list(read_torch(tmp_path / "bad.pt"))
    assert not (tmp_path / "harmed").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)  # it would have been
    assert (tmp_path / "harmed").exists()


def archive(data, records=None, **how):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **how) as written:
        written.writestr("x/data.pkl", data)
        for name, value in ({"0": b"1234" * 4} if records is None else records).items():
            written.writestr(f"x/data/{name}", value)
    return file.getvalue()


def pickled(shape=(2, 2), strides=(2, 1), offset=0, count=4, key="0", kind="FloatStorage", head=b""):
    """A dictionary of one tensor as torch pickles it."""

    def plain(value):
        return pickle.dumps(value, 2)[2:-1]

    storage = plain("storage") + f"ctorch\n{kind}\n".encode() + plain(key) + plain("cpu") + plain(count)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQ" + plain(offset) + plain(shape) + plain(strides)
    return b"\x80\x02" + head + b"}" + plain("w") + tensor + b"\x89ccollections\nOrderedDict\n)RtRs."


def test_what_is_made_here_is_read(tmp_path):
    (tmp_path / "a.pt").write_bytes(archive(pickled()))
    ((name, found),) = read_torch(tmp_path / "a.pt")
    assert name == "w" and found.tobytes() == b"1234" * 4


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (archive(pickled(shape=(3, 2))), "has 16 bytes, and not 4 elements, or not ("),
        (archive(pickled(shape=(2**40, 2**40), strides=(0, 0))), "has 16 bytes, and not 4 elements, or not ("),
        (archive(pickled(strides=(2, 3))), "strides"),
        (archive(pickled(strides=(-2, -1))), "strides"),
        (archive(pickled(offset=1)), "file.pt"),
        (archive(pickled(offset=-1)), "strides"),
        (archive(pickled(count=5)), "16 bytes, and not 5 elements"),
        (archive(pickled(count=2**62)), "16 bytes"),
        (archive(pickled(shape=(2, "x"))), "invalid literal"),
        (archive(pickled(key="1")), "no item named"),
        (archive(pickled(kind="LegacyStorage")), "'torch LegacyStorage', which no tensor needs"),
        (archive(pickled(head=b"cbuiltins\neval\n0")), "'builtins eval', which no tensor needs"),
        (archive(pickled(head=b"r\xff\xff\xff\x7f")), "file.pt"),
        (archive(pickled(head=b"(i__main__\nHarm\n0")), "opcode INST"),
        (archive(pickled(head=b"(" * 100)[:-1]), "pickle exhausted"),
        (archive(b"\x80\x02" + b")" + b"\x85" * 100_000 + b"}\x86R."), "REDUCE"),
        (archive(pickled() + b" " * 2**24), "more than"),
        (archive(pickled(), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (archive(b"\x80\x02]."), "file.pt"),
        (archive(pickled())[:-40], "not a zip file"),
        (archive(pickled()).replace(b"1234" * 4, b"4321" * 4), "Bad CRC"),
        (b"\x80\x02}q\x00.", "not a zip file"),
        (b"", "not a zip file"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, data, says):
    (tmp_path / "file.pt").write_bytes(data)
    with pytest.raises(ValueError, match="no whole file of torch.save with tensors alone") as refused:
        list(read_torch(tmp_path / "file.pt"))
    assert says in str(refused.value)
