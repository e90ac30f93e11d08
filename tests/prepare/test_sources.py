"""Lists of videos: folders, manifests, tar files, TFDS; what is wrong with one entry never stops the rest."""

import io
import json
import tarfile
import tracemalloc

import pytest

from dollar_jax.data.moving_shapes import MovingShapes
from dollar_jax.prepare.sources import Dataset, list_manifest, list_source, open_video, read_caption
from dollar_jax.prepare.videos import Unusable


def outcome(item):
    """What becomes of an item: its caption and what would be decoded, or why it is unusable."""
    try:
        caption = read_caption(item)
        video = open_video(item)
    except Unusable as reason:
        return item["name"], str(reason)
    return item["name"], caption, video.getvalue() if isinstance(video, io.BytesIO) else video


def outcomes(source):
    return [outcome(item) for item in list_source(str(source))]


def test_a_folder_with_text_beside_the_videos(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("c.mp4", "b/z.MOV", "b/y.webm", "a.mkv", "a.jpg", "empty.mp4"):
        (tmp_path / name).write_text("" if "empty" in name else "video")
    for name, text in {"a": " a cat \n", "b/y": "", "b/z": "täglich", "empty": "nothing"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    assert outcomes(tmp_path) == [
        ("a.mkv", "a cat", str(tmp_path / "a.mkv")),
        ("b/y.webm", "has no caption"),
        ("b/z.MOV", "täglich", str(tmp_path / "b/z.MOV")),
        ("c.mp4", "has no caption: there is no c.txt"),
        ("empty.mp4", "is empty"),
    ]


def test_manifests(tmp_path):
    (tmp_path / "one.mp4").write_text("video")
    one = str(tmp_path / "one.mp4")
    (tmp_path / "metadata.csv").write_text(
        '\ufefffile_name,text\none.mp4,"a dog, running"\ntwo.mp4,a cat\none.mp4,\n,a bird\n', encoding="utf-8"
    )
    csv = [
        ("one.mp4", "a dog, running", one),
        ("two.mp4", "does not exist"),
        ("one.mp4", "has no caption"),
        ("metadata.csv:5", "names no video: a row needs video or file_name or path"),
    ]
    assert outcomes(tmp_path) == outcomes(tmp_path / "metadata.csv") == csv
    lines = ['{"video": "one.mp4", "caption": "a dog"}', "{broken", "", "[1]", '{"video": "one.mp4"}']
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    assert outcomes(tmp_path / "list.jsonl") == [
        ("one.mp4", "a dog", one),
        ("list.jsonl:2", "is no JSON object"),
        ("list.jsonl:4", "is no JSON object"),
        ("one.mp4", "has no caption"),
    ]


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_tar_files(tmp_path):
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name, data in {
            "k/1.mp4": b"one",
            "k/1.txt": b"first",
            "2.json": json.dumps({"caption": "second"}).encode(),
            "2.mp4": b"two",
            "3.mp4": b"three",
            "4.txt": b"no video",
            "5.mp4": b"",
            "5.txt": b"five",
            "6.meta.json": b"{}",
            "6.mp4": b"six",
            "6.json": b"nonsense",
        }.items():
            add(tar, name, data)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x.mp4", b"X" * 5000)
        add(tar, "x.txt", b"last")
        add(tar, "y.mp4", b"Y" * 50_000)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:20_000])  # ends within y
    first, cut, *rest = outcomes(tmp_path)
    assert first == ("a.tar/x", "last", b"X" * 5000)
    assert cut[0] == "a.tar/y" and cut[1] == "has no caption"
    assert rest[0][0] == "a.tar" and rest[0][1].startswith("cannot be read further: unexpected end of data")
    assert rest[1:] == [
        ("b.tar/k/1", "first", b"one"),
        ("b.tar/2", "second", b"two"),
        ("b.tar/3", "has no caption"),
        ("b.tar/5", "is empty"),
        ("b.tar/6", "has a caption that is no JSON"),
    ]


def test_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n a dog \n")
    items = list(list_manifest(tmp_path / "p.txt", prompts=True))
    assert [(item["name"], read_caption(item)) for item in items] == [("p.txt:1", "a cat"), ("p.txt:3", "a dog")]
    (tmp_path / "p.csv").write_text("id,prompt\n7,a cat\n")
    assert [item["caption"] for item in list_manifest(tmp_path / "p.csv", prompts=True)] == ["a cat"]


def test_a_long_list_takes_no_memory(tmp_path):
    """Twenty thousand rows, 2 MB of manifest, in less than 100 kB."""
    path = tmp_path / "list.jsonl"
    with path.open("w") as file:
        for i in range(20_000):
            file.write(json.dumps({"video": f"videos/{i:08d}.mp4", "caption": f"{i} " + "word " * 8}) + "\n")
    tracemalloc.start()
    assert sum(1 for _ in list_source(str(path))) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e5


def test_a_tfds_data_set(tmp_path):
    builder = MovingShapes(sizes={"train": 3}, data_dir=tmp_path)
    builder.download_and_prepare()
    dataset = Dataset(str(builder.data_path), "train")
    assert [item["video"]["record"] for item in dataset.items()] == [0, 1, 2]
    record = builder.as_data_source(split="train")[1]
    video, caption = dataset.read(1)
    assert (video == record["video"]).all() and caption == record["caption"].decode()
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        Dataset(str(builder.data_path), "test")


@pytest.mark.parametrize(
    "files, source, message",
    [
        ({}, "nowhere", "nowhere does not exist"),
        ({"a.zip": ""}, "a.zip", r"a.zip must be a .csv, .jsonl, .tar or a folder"),
        ({"a.csv": "name,words\n1,2\n"}, "a.csv", "has no column video or file_name or path; its"),
        ({"metadata.csv": "", "captions.jsonl": ""}, "", "several manifests, metadata.csv, captions.jsonl"),
    ],
)
def test_bad_sources(tmp_path, files, source, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, OSError), match=message):
        list_source(str(tmp_path / source))


def test_bad_tfds_names():
    with pytest.raises(ValueError, match="TFDS knows no data set 'no_such_set'"):
        Dataset("no_such_set", "train")


def test_captions_are_text_or_rejected(tmp_path):
    values = ['["first", "second"]', '{"en": "a", "zh": "b"}', "NaN", "null", "7", "[]", "[3]"]
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"video": "a.mp4", "caption": {v}}}' for v in values))
    (tmp_path / "a.mp4").write_text("video")
    assert [one[1] for one in outcomes(tmp_path / "a.jsonl")] == [
        "first",
        'has a caption that is no text: {"en": "a", "zh": "b"}',
        "has no caption",
        "has no caption",
        "has a caption that is no text: 7",
        "has no caption",
        "has a caption that is no text: 3",
    ]


def test_a_tar_made_on_macos_and_captions_in_json_lists(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [("._1.mp4", b"?"), ("1.mp4", b"one"), ("._1.txt", b"?"), ("1.txt", b"first")]:
            add(tar, f"./{name}", data)
        add(tar, "2.mp4", b"two")
        add(tar, "2.json", b'{"caption": ["second", "other"]}')
    assert [one[1:] for one in outcomes(tmp_path / "a.tar")] == [("first", b"one"), ("second", b"two")]


def test_an_unbalanced_quote_is_rejected_with_its_line(tmp_path):
    (tmp_path / "a.csv").write_text('video,caption\na.mp4,fine\na.mp4,"open\n' + "a.mp4,x\n" * 20_000)
    (tmp_path / "a.mp4").write_text("video")
    first, last = outcomes(tmp_path / "a.csv")
    assert first[1] == "fine"
    assert last[0].startswith("a.csv:") and "is a quote not closed?" in last[1]
