"""Files and folders that are there whole or not at all."""

import os
import re

import numpy as np
import pytest

from dollar_jax import files
from dollar_jax.files import new_file, new_folder, write_file


def test_a_written_file_is_all_there_is(tmp_path):
    path = tmp_path / "new" / ("ä" * 127)  # 254 bytes, of 255
    write_file(path, b"bytes")
    write_file(path, "text ü")
    assert path.read_text(encoding="utf-8") == "text ü" and os.listdir(path.parent) == [path.name]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_file(path, b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_failed_block_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="stop"), new_file(tmp_path / "a") as draft:
        draft.write_bytes(b"half")
        raise ValueError("stop")
    assert not os.listdir(tmp_path)


def test_drafts_may_lie_elsewhere(tmp_path):
    drafts = tmp_path / "drafts"
    drafts.mkdir()
    with new_file(tmp_path / "a", drafts) as draft:
        draft.write_bytes(b"1")
        assert draft.parent == drafts and not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"1" and not os.listdir(drafts)


def test_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """Otherwise a crash of the machine can leave the new name with no content."""
    calls = []
    sync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd))
    monkeypatch.setattr("pathlib.Path.replace", lambda *a: calls.append("replace") or replace(*a))
    write_file(tmp_path / "a", b"1")
    assert calls[0].endswith(".partial") and calls[1:] == ["replace", str(tmp_path)]


def test_a_folder_appears_whole_and_only_once(tmp_path):
    path = tmp_path / "deep" / "folder"
    with pytest.raises(ValueError, match="stop"), new_folder(path) as draft:
        (draft / "left").write_text("by an interrupted one")
        raise ValueError("stop")
    assert not path.exists()
    with new_folder(path) as draft:
        (draft / "sub").mkdir()
        (draft / "sub" / "a").write_text("1")
        assert not path.exists()
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        "deep",
        "deep/folder",
        "deep/folder/sub",
        "deep/folder/sub/a",
    ]
    with pytest.raises(FileExistsError, match="there already"), new_folder(path):
        pass


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"{", "is not valid JSON: Expecting"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "it says 'c' twice"),
        (b'["\xff"]', "is no UTF-8 text: its byte 2 is 0xff"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"[" * 100 + b"]" * 100, "is nested more than 64 levels deep"),
        (b'{"a":' * 90 + b"1" + b"}" * 90, "is nested more than 64 levels deep"),
        (b"[1]", r"must hold a JSON object, not \[1\]"),
        (b"9" * 5000, "is not valid JSON"),
    ],
)
def test_json_that_is_refused_names_its_file(tmp_path, content, message):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} {message}|{re.escape(str(path))} .*{message}"):
        files.read_json(path)


def test_json_is_read(tmp_path):
    path = tmp_path / "some.json"
    path.write_text('\ufeff{"a": [1, {"b": null}]}')
    assert files.read_json(path) == {"a": [1, {"b": None}]}
    assert files.parse_json("[" * 60 + "]" * 60, path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling link", "nothing"])
def test_only_regular_files_are_read_and_nothing_is_waited_for(tmp_path, kind):
    path = tmp_path / "some.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "gone")
    for read in (files.read_text, files.read_json, files.read_arrays):
        with pytest.raises((ValueError, OSError), match="some.json"):
            read(path)


def test_a_file_that_is_too_large_is_refused(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("a" * 11)
    with pytest.raises(ValueError, match=r"some\.txt is larger than 10 bytes"):
        files.read_text(path, 10)


@pytest.mark.parametrize("damage", ["cut", "flip", "pickle", "other"])
def test_damaged_arrays_name_their_file(tmp_path, damage):
    path = tmp_path / "some.npz"
    np.savez(path, a=np.arange(500), b=np.array([{}]) if damage == "pickle" else np.ones(3))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[300] ^= 1
    path.write_bytes({"cut": data[:200], "other": b"hello"}.get(damage, data))
    with pytest.raises(ValueError, match=r"some\.npz is damaged"):
        files.read_arrays(path)


@pytest.mark.parametrize(
    ("said", "line"), [("", "OSError"), (" \n", "OSError"), ("one\ntwo", "one"), ("\none", "one")], ids=repr
)
def test_the_first_line_of_an_error(said, line):
    assert files.first_line(OSError(said)) == line
