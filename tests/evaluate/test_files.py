import av
import numpy as np
import pytest
from PIL import Image

from dollar_jax.evaluate.files import check_output, read_prompts, video_name, write_samples

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


def test_a_grid_has_a_row_per_prompt_and_pairs_beside_each_other(videos, tmp_path):
    write_samples(tmp_path / "new" / "grid.mp4", PROMPTS, videos, fps=12, scale=2)
    shown, codec, rate = frames(tmp_path / "new" / "grid.mp4")
    assert (codec, rate) == ("h264", 12)
    assert shown.shape == (4, 2 * (8 + 6 + 8), 2 * (3 * 18 + 2 * 6), 3)
    for p, k, s in np.ndindex(2, 3, 2):
        y, x = 2 * (14 * p + 4), 2 * (24 * k + 10 * s + 4)
        assert abs(int(shown[0, y, x, 0]) - int(videos[s][p, k, 0, 0, 0, 0])) <= 3


def test_a_folder_gets_a_file_per_video_named_as_vbench_wants(videos, tmp_path):
    write_samples(tmp_path / "out", PROMPTS, videos[:1], fps=8, scale=1)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(3)}
    shown, _, _ = frames(tmp_path / "out" / "a blue cube-2.mp4")
    assert shown.shape == (4, 8, 8, 3)
    assert abs(int(shown[0, 4, 4, 0]) - int(videos[0][1, 2, 0, 0, 0, 0])) <= 3


def test_a_gif_moves(videos, tmp_path):
    moving = videos[0].copy()
    moving[:, :, 2] += 50
    write_samples(tmp_path / "a.gif", PROMPTS, [moving], fps=8, scale=1)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.format == "GIF" and getattr(image, "n_frames", 1) > 1


def test_prompts_are_the_lines_that_say_something(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red ball\n\n  a blue cube  \na red ball\n")
    assert read_prompts(path) == PROMPTS
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="prompts.txt holds no prompt"):
        read_prompts(path)
    with pytest.raises(FileNotFoundError, match="no.txt does not exist"):
        read_prompts(tmp_path / "no.txt")


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
