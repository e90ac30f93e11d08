import av
import numpy as np
import pytest

from dollar_jax import generate
from dollar_jax.evaluate import files
from dollar_jax.evaluate.files import check_output, draw_missing, file_name, read_prompts, video_name

PROMPTS = ["a red ball", "a blue cube"]


@pytest.fixture(scope="module")
def videos():
    """Two samplers' videos [prompts, n, t, h, w, 3], each of one grey of its own."""
    grey = np.arange(2 * 2 * 3).reshape(2, 2, 3) * 20
    return [np.broadcast_to(g[..., None, None, None, None], (2, 3, 4, 8, 8, 3)).astype(np.uint8) for g in grey]


def frames(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        return shown, stream.codec_context.name, float(stream.average_rate or 0)


class Drawers:
    """A generator and samplers that draw the given videos, each by its prompt's place in PROMPTS and its noise."""

    clip = (4, 8, 8)

    def samples_at_once(self, total):
        return total

    def __init__(self, monkeypatch, videos):
        self.drawn = []

        def draw(generator, sampler, params, prompts, keys, batch):
            for prompt, key in zip(prompts, keys, strict=True):
                self.drawn.append((prompt, int(key)))
                yield videos[params][PROMPTS.index(prompt), int(key)][None]

        monkeypatch.setattr(generate, "draw_videos", draw)
        self.samplers = [(None, i) for i in range(len(videos))]


def rows(num=3):
    return [(file_name(prompt, i), prompt, i) for prompt in PROMPTS for i in range(num)]


def keys():
    return np.arange(3)


def test_a_folder_gets_a_file_per_video_named_as_vbench_wants(videos, tmp_path, monkeypatch):
    drawers = Drawers(monkeypatch, videos[:1])
    assert draw_missing(tmp_path / "out", rows(), keys, drawers, drawers.samplers, None, 8) == 6
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(3)}
    shown, _, _ = frames(tmp_path / "out" / "a blue cube-2.mp4")
    assert shown.shape == (4, 8, 8, 3)
    assert abs(int(shown[0, 4, 4, 0]) - int(videos[0][1, 2, 0, 0, 0, 0])) <= 3


def test_pairs_lie_beside_each_other(videos, tmp_path, monkeypatch):
    drawers = Drawers(monkeypatch, videos)
    draw_missing(tmp_path / "new", rows(), keys, drawers, drawers.samplers, None, 12, 2)
    for p, k, s in np.ndindex(2, 3, 2):
        shown, codec, rate = frames(tmp_path / "new" / file_name(PROMPTS[p], k))
        assert (codec, rate) == ("h264", 12) and shown.shape == (4, 16, 36, 3)
        assert abs(int(shown[0, 8, 2 * (10 * s + 4), 0]) - int(videos[s][p, k, 0, 0, 0, 0])) <= 3


def test_each_video_is_on_disk_before_the_next_is_drawn_and_a_second_start_draws_what_is_missing(
    videos, tmp_path, monkeypatch
):
    drawers = Drawers(monkeypatch, videos[:1])
    write, seen = files.write_video, []

    def until_killed(path, *rest):
        seen.append(len(drawers.drawn))
        if len(seen) == 3:
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(files, "write_video", until_killed)
    with pytest.raises(KeyboardInterrupt):
        draw_missing(tmp_path, rows(), keys, drawers, drawers.samplers, None, 8)
    assert seen == [1, 2, 3]
    monkeypatch.setattr(files, "write_video", write)
    drawers.drawn.clear()
    assert draw_missing(tmp_path, rows(), keys, drawers, drawers.samplers, None, 8) == 4
    assert drawers.drawn == [(prompt, i) for _, prompt, i in rows()[2:]]


def test_prompts_are_the_lines_that_say_something(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red ball\n\n  a blue cube  \na red ball\n")
    assert read_prompts(path) == PROMPTS
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="prompts.txt holds no prompt"):
        read_prompts(path)
    with pytest.raises(FileNotFoundError, match="no.txt does not exist"):
        read_prompts(tmp_path / "no.txt")


@pytest.mark.parametrize("prompt", ["either/or", "x" * 250, "é" * 130, ".hidden", "nul\0"])
def test_any_prompt_names_a_file_of_its_own_in_a_folder_of_samples(prompt, tmp_path):
    name = file_name(prompt, 3)
    (tmp_path / name).touch()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert name.endswith("-3.mp4") and not name.startswith(".")
    assert name != file_name(prompt.replace("/", "_") + "x", 3)
    assert file_name("a red ball", 0) == video_name("a red ball", 0)


@pytest.mark.parametrize("prompt", ["either/or", "x" * 250, "é" * 130])
def test_a_prompt_that_names_no_file(prompt):
    assert video_name("fine", 3) == "fine-3.mp4"
    with pytest.raises(ValueError, match="no file can be named by the prompt"):
        video_name(prompt, 0)


def test_an_output_of_another_kind(tmp_path):
    (tmp_path / "v1.0").mkdir()
    for fine in ("a.mp4", "a.GIF", "folder", "v1.0"):
        check_output(tmp_path / fine)
    with pytest.raises(ValueError, match=r"a\.avi must end in \.mp4 or \.gif"):
        check_output(tmp_path / "a.avi")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is a file: give a folder"):
        check_output(tmp_path / "file")
    with pytest.raises(PermissionError, match="file is no folder one may write to"):
        check_output(tmp_path / "file" / "a.mp4")
