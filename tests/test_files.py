"""Files and folders that are there whole or not at all."""

import os

import pytest

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
