"""Lists of videos: folders, manifests, tar files, TFDS; what is wrong with one entry never stops the rest."""

import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tensorflow_datasets as tfds
from pyarrow import parquet

from dollar_jax.prepare.manifests import list_manifest
from dollar_jax.prepare.sources import Dataset, list_source, open_video, read_caption
from dollar_jax.prepare.videos import Unusable

CASES = Path(__file__).parent / "cases"


def outcome(item, **options):
    """What becomes of an item: its caption and what would be decoded, or why it is unusable."""
    try:
        caption = read_caption(item, **options)
        video = open_video(item)
    except Unusable as reason:
        return item["name"], str(reason)
    return item["name"], caption, video.getvalue() if isinstance(video, io.BytesIO) else video


def outcomes(source, **options):
    return [outcome(item, **options) for item in list_source(str(source))]


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


class Clips(tfds.core.GeneratorBasedBuilder):
    """Three captioned videos."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        video = tfds.features.Tensor(shape=(2, 4, 4, 3), dtype=np.uint8, encoding="zlib")
        features = tfds.features.FeaturesDict({"video": video, "caption": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            yield i, {"video": np.full((2, 4, 4, 3), i, np.uint8), "caption": f"clip {i}"}


def test_a_tfds_data_set(tmp_path):
    builder = Clips(data_dir=tmp_path, file_format="array_record")
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
        ({"a.zip": ""}, "a.zip", r"a.zip must be a .csv, .tsv, .jsonl, .json, .tar, .parquet or a folder"),
        ({"metadata.csv": "name,words\n1,2\n"}, "", "has no column video or file_name or path; its"),
        ({"videos.txt": "1\n2\n", "prompts.txt": "one\n\n"}, "", "different numbers of lines"),
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
        'has a caption that is no text: {"en": "a", "zh": "b"}; --language takes one of an object\'s',
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


def test_an_unbalanced_quote_costs_its_own_row(tmp_path):
    rows = ["red.mp4,a red circle\n"] * 1250
    (tmp_path / "a.csv").write_text('video,caption\nred.mp4,"unfinished\n' + "".join(rows) + 'red.mp4,"two\nlines"\n')
    (tmp_path / "red.mp4").write_text("video")
    first, *rest = outcomes(tmp_path / "a.csv")
    assert first[0] == "a.csv:2" and "is a quote not closed?" in first[1]
    assert [caption for _, caption, _ in rest] == ["a red circle"] * 1250 + ["two\nlines"]
    (tmp_path / "b.csv").write_text('video,caption\nred.mp4,fine\nred.mp4,"at the end')
    assert outcomes(tmp_path / "b.csv")[1][0] == "b.csv:3"
    (tmp_path / "c.csv").write_text("video,caption,caption\nred.mp4,a,b\n")
    with pytest.raises(ValueError, match="c.csv has two columns 'caption'"):
        list_source(str(tmp_path / "c.csv"))


FINE = [("a.mp4", "täglich, ein Ball")]


@pytest.mark.parametrize(
    "kind, text, found",
    [
        ("csv", 'video,caption\na.mp4,"täglich, ein Ball"\n', FINE),
        ("csv", 'video,caption,,\r\na.mp4,"täglich, ein Ball",,\r\n\r\n', FINE),
        ("csv", ' Video , Caption \ra.mp4, "täglich, ein Ball"', FINE),
        ("csv", "id;caption;file_name\n1;täglich, ein Ball;a.mp4\n", FINE),
        ("tsv", "path\ttext\n a.mp4\ttäglich, ein Ball\n", FINE),
        ("csv", "video,caption\na.mp4,täglich, ein Ball\na.mp4,b\n", ["csv:2", ("a.mp4", "b")]),
        ("csv", "video,caption\na.mp4,nan\na.mp4,None\na.mp4,\xad \na.mp4,a\0b\n", ["a.mp4"] * 4),
        ("csv", "video,caption\n" + 'a.mp4,"a 12" vinyl"\n' * 3000 + "a.mp4,b\n", ["csv"] * 3000 + [("a.mp4", "b")]),
        ("jsonl", '{"video": "a.mp4", "caption": "täglich, ein Ball"}\r\n\r\n', FINE),
        (
            "jsonl",
            '{"video": "\\ud83d.mp4", "caption": "x"}\n{"video": "a.mp4", "caption": "b"}',
            ["\ufffd", ("a.mp4", "b")],
        ),
        ("jsonl", '{"video": "a.mp4", "caption": "a\\ufffdb"}\n{"video": 5, "caption": "b"}', ["a.mp4", "5"]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_manifests_of_other_programs(tmp_path, kind, text, found, encoding):
    """Rows are read, or rejected one by one under a name that begins so; in an encoding that is not told, all are."""
    (tmp_path / "a.mp4").write_text("video")
    path = tmp_path / f"metadata.{kind}"
    path.write_bytes(text.encode(encoding, "replace"))
    if encoding == "latin-1" and found is FINE:
        assert outcomes(path) == [("a.mp4", "has a caption that is not in UTF-8: 't\ufffdglich, ein Ball'")]
        return
    for one, wanted in zip(outcomes(path), found, strict=True):
        if isinstance(wanted, str):
            assert len(one) == 2 and one[0].removeprefix("metadata.").startswith(wanted)
        else:
            assert one[:2] == wanted and len(one) == 3


def test_captions_by_choice_and_by_language(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "\n".join(
            json.dumps({"video": "a.mp4", "caption": caption})
            for caption in ({"en": "a cat", "zh": "猫"}, {"zh": ["狗"]}, list("abcdefgh"), "\ud83d lone")
        )
    )
    (tmp_path / "a.mp4").write_text("video")
    found = [one[1] for one in outcomes(tmp_path / "a.jsonl", language="en")]
    assert found[0] == "a cat" and found[1].startswith("has a caption that is no text") and found[2] == "a"
    assert found[3] == "has a caption that is not in UTF-8: '\ufffd lone'"  # half of a character
    drawn = {outcomes(tmp_path / "a.jsonl", rng=np.random.default_rng(i))[2][1] for i in range(20)}
    assert len(drawn) > 3
    assert outcomes(CASES / "odd_captions.jsonl")[0][1] == "does not exist"  # its text stands in for a null caption


def test_a_prompt_list_from_windows():
    items = list(list_manifest(CASES / "prompts_bom.txt", prompts=True))
    assert [read_caption(item) for item in items][0] == "a large red circle moving left slowly"
    assert all(read_caption(item).isascii() and "\r" not in read_caption(item) for item in items)


def test_manifests_below_the_root_and_of_other_tools(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "hub" / split).mkdir(parents=True)
        (tmp_path / "hub" / split / "1.mp4").write_text("video")
        (tmp_path / "hub" / split / "metadata.csv").write_text(f"file_name,text\n1.mp4,in {split}\n")
    assert [one[:2] for one in outcomes(tmp_path / "hub")] == [("test/1.mp4", "in test"), ("train/1.mp4", "in train")]
    fast = tmp_path / "fastvideo"
    (fast / "videos").mkdir(parents=True)
    (fast / "videos" / "x.mp4").write_text("video")
    (fast / "videos2caption.json").write_text(json.dumps([{"path": "x.mp4", "cap": ["first", "second"]}, 3]))
    assert outcomes(fast) == [
        ("x.mp4", "first", str(fast / "videos" / "x.mp4")),
        ("videos2caption.json:2", "is no JSON object"),
    ]
    tune = tmp_path / "finetrainers"
    (tune / "videos").mkdir(parents=True)
    (tune / "videos" / "x.mp4").write_text("video")
    (tune / "videos.txt").write_text("videos/x.mp4\n")
    (tune / "prompts.txt").write_text("a prompt\n")
    assert outcomes(tune) == [("videos/x.mp4", "a prompt", str(tune / "videos" / "x.mp4"))]
    windows = tmp_path / "windows"
    (windows / "clips").mkdir(parents=True)
    (windows / "clips" / "x.mp4").write_text("video")
    (windows / "metadata.csv").write_text("video,caption\nclips\\x.mp4,a cat\n")
    assert outcomes(windows) == [("clips\\x.mp4", "a cat", str(windows / "clips" / "x.mp4"))]


def test_links_are_followed_once(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside, root / "b"):
        folder.mkdir(parents=True)
        (folder / "1.mp4").write_text("video")
        (folder / "1.txt").write_text(folder.name)
    (root / "b" / "loop").symlink_to(root)
    (root / "a").symlink_to(root / "b")
    (root / "b" / "2.mp4").symlink_to(root / "b" / "1.mp4")
    (root / "c").symlink_to(outside)
    (root / "d").symlink_to(outside)
    assert [one[:2] for one in outcomes(root)] == [("b/1.mp4", "b"), ("c/1.mp4", "outside")]


def test_links_that_lead_nowhere_round_and_into_what_is_hidden(tmp_path):
    for name in (".git/annex/k.mp4", ".hidden.mp4", "._1.mp4", "1.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name, leads_to in {
        "2.mp4": "2.mp4",
        "3.mp4": "no.mp4",
        "4.mp4": ".git/annex/k.mp4",
        "5": "6",
        "6": "5",
    }.items():
        (tmp_path / name).symlink_to(leads_to)
    for i in range(1, 5):
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    assert outcomes(tmp_path) == [
        ("1.mp4", "caption 1", str(tmp_path / "1.mp4")),
        ("2.mp4", "does not exist"),
        ("3.mp4", "does not exist"),
        ("4.mp4", "caption 4", str(tmp_path / "4.mp4")),
    ]


def test_what_is_wrong_in_one_folder_stops_no_other(tmp_path):
    files = {
        "a/metadata.csv": "name,words\n1,2\n",
        "b/x.parquet": "PAR1",
        "c/videos2caption.json": "{",
        "d/videos.txt": "1.mp4\n",
        "e/1.TAR.gz": "?",
        "e/2.MTS": "video",
        "e/2.txt": "fine",
        "f/captions.csv": "",
        "f/metadata.csv": "",
        "g/._1.tar": "?",
        "g/1.TAR": "?" * 1024,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    reasons = {name: reason for name, reason, *_ in outcomes(tmp_path)}
    parts = {
        "a/metadata.csv": "has no column video",
        "b/x.parquet": "cannot be read: Parquet",
        "c/videos2caption.json": "is not valid JSON",
        "d/videos.txt": "there is no prompts.txt",
        "e/1.TAR.gz": "is compressed: unpack it",
        "e/2.MTS": "fine",
        "f/": "several manifests",
        "g/1.TAR": "cannot be read further",
    }
    assert reasons.keys() == parts.keys()
    for name, part in parts.items():
        assert part in reasons[name]


def test_names_of_any_bytes(tmp_path):
    path = tmp_path / "1:\udcff.mp4"
    path.write_text("video")
    path.with_suffix(".json").write_text('{"caption": "from the side"}')
    path.with_suffix(".txt").write_text("")
    (tmp_path / "metadata.csv").write_bytes(b"video,caption\n1:\xff.mp4,by a row\n")
    assert outcomes(tmp_path) == [("1:\ufffd.mp4", "by a row", str(path))]
    (tmp_path / "metadata.csv").unlink()
    assert outcomes(tmp_path) == [("1:\ufffd.mp4", "from the side", str(path))]


def test_tar_members_need_not_be_neighbours_and_pickles_stay_shut(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [
            ("1.mp4", b"one"),
            ("2.v1.MP4", b"two"),
            ("2.v1.TXT", b"second"),
            ("1.json", b'{"text": "first"}'),
        ]:
            add(tar, name, data)
        add(tar, "1.txt", b"")
        add(tar, "3.state.pth", b"?")
        add(tar, "4.latent.npy", b"?")
        link = tarfile.TarInfo("5.mp4")
        link.type, link.linkname = tarfile.LNKTYPE, "1.mp4"
        tar.addfile(link)
        add(tar, "6.mp4", b"six")
    found = [
        ("a.tar/1", "first", b"one"),
        ("a.tar/2.v1", "second", b"two"),
        ("a.tar/3.state", "holds a .pth and no video: what is pickled can run code and is not read"),
        ("a.tar/4.latent", "holds a .npy and no video: it does not say which VAE made it, nor how it is scaled"),
        ("a.tar/5", "is a link inside a tar file"),
    ]
    assert outcomes(tmp_path / "a.tar") == [*found, ("a.tar/6", "has no caption")]
    data = bytearray((tmp_path / "a.tar").read_bytes())
    at = data.index(b"6.mp4")
    data[at : at + 512] = b"?" * 512
    (tmp_path / "a.tar").write_bytes(data)
    assert outcomes(tmp_path / "a.tar") == [*found, ("a.tar", f"cannot be read further: no header at byte {at}")]


def test_parquet_files(tmp_path):
    (tmp_path / "far.mp4").write_text("far")
    videos = [{"bytes": b"one", "path": "1.mp4"}, {"bytes": None, "path": "far.mp4"}, None]
    table = pyarrow.table({"video": videos, "caption": ["first", "second", "third"]})
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=2)
    assert outcomes(tmp_path) == [
        ("data.parquet:0", "first", b"one"),
        ("data.parquet:1", "second", str(tmp_path / "far.mp4")),
        ("data.parquet:2", "is empty"),
    ]


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """Its files are downloaded once, of a revision if one is named; a hub that gives nothing is named."""
    asked = []
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.mp4").write_text("video")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\n1.mp4,first\n")

    def snapshot_download(name, **options):
        asked.append((name, options))
        if name == "no/where":
            raise OSError("no network\nmore")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for _ in range(2):
        assert outcomes("hf:some/set") == [("data/1.mp4", "first", str(tmp_path / "data" / "1.mp4"))]
    assert outcomes("hf:some/set@v1")
    plain = {"repo_type": "dataset", "revision": None}
    assert asked == [("some/set", plain), ("some/set", {**plain, "revision": "v1"})]
    with pytest.raises(
        FileNotFoundError, match=r"did not give the data set no/where \(OSError: no network\); download"
    ):
        list_source("hf:no/where")


def test_captions_that_are_no_files(tmp_path):
    import os

    (tmp_path / "1.mp4").write_text("video")
    os.mkfifo(tmp_path / "1.txt")
    (tmp_path / "2.mp4").write_text("video")
    (tmp_path / "2.txt").symlink_to("/dev/zero")
    assert [one[1] for one in outcomes(tmp_path)] == [
        "has a caption that is no small file: 1.txt",
        "has a caption that is no small file: 2.txt",
    ]
