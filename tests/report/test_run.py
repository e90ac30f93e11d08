import base64
import io
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from dollar_jax.data import shapes
from dollar_jax.report import clips as clips_module
from dollar_jax.report.charts import HEIGHT, WIDTH
from dollar_jax.report.run import sampler_rows, write_report

PROMPTS = ["a small red circle moving left slowly", 'a <b>"bold"</b> & quick prompt']
SAMPLERS = ("teacher_50", "student_4", "student_1", "undistilled_1")
VOID = {"meta", "img", "br", "hr", "link", "input", "source"}


def sampler(alignment, **more):
    return {
        "alignment": alignment,
        "reward": -0.25,
        "vendi": 3.5,
        "flicker": 0.97,
        "nfe": 4,
        "diffusion_seconds": 0.2,
        "total_seconds": 0.5,
    } | more


METRICS = {
    "teacher_50": sampler(0.981, nfe=100, diffusion_seconds=4.0, vendi=4.0),
    "student_4": sampler(0.972, reward=0.125),
    "student_1": sampler(0.9, alignment_colour=0.625, reward=0.0),
    "undistilled_1": {"alignment": 0.123},
    "speedup_4": 20.0,
    "speedup_1": 83.21,
    "seconds": 301.0,
    "config": {"name": "demo"},
}


@pytest.fixture(scope="module")
def videos():
    return {
        key: np.stack([shapes.example(i, "train", j)[0] for j in range(len(PROMPTS))]) for i, key in enumerate(SAMPLERS)
    }


class Page(HTMLParser):
    """The page's elements, text and images; fails on tags that do not nest."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.tags, self.text, self.media, self.links = [], [], "", [], []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href", "srcset", "data") if name in attrs]
        if tag in ("img", "video"):
            self.media.append((attrs.get("alt") or attrs.get("aria-label"), attrs["src"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def decoded(uri):
    head, data = uri.split(",")
    assert re.fullmatch(r"data:[a-z0-9/]+;base64", head)
    data = io.BytesIO(base64.b64decode(data, validate=True))
    if "video/mp4" in head:
        with av.open(data, "r") as container:
            return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    with Image.open(data) as image:
        return np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)])


@pytest.fixture(scope="module")
def page(tmp_path_factory, videos):
    path = tmp_path_factory.mktemp("report") / "report.html"
    history = [
        {"step": i, "student_loss": 10.0 ** -(i / 9), "reward_mean": i / 10, "latent_std": 1.0} for i in range(30)
    ]
    history[3]["student_loss"] = float("nan")
    history[4]["reward_mean"] = float("inf")
    write_report(
        path,
        metrics=METRICS,
        prompts=PROMPTS,
        videos=videos,
        history=history,
        timings={"compiling": 62.0, "<sampling>": 0.25},
        config_text="lr: 2e-6  # <&>",
        notes=["One <note>."],
    )
    return Page(path)


def test_one_file_without_requests(page):
    assert len(page.source) < 6e6
    assert all(link.startswith("data:") for link in page.links)
    assert not re.search(r"https?:|@import|url\(|<script|<link", page.source)
    assert page.tags.count("h1") == 1


def test_every_text_is_there_and_escaped(page):
    rows = sampler_rows(SAMPLERS)
    expected = [*PROMPTS, *(row.label for row in rows), "One <note>.", "lr: 2e-6  # <&>"]
    for text in [*expected, "20.0×", "83.2×", "5 min 1 s", "1 min 2 s", "<sampling>", "0.625"]:
        assert text in page.text
    assert not {"note", "sampling"} & set(page.tags)
    assert '<b>"bold"' not in page.source and "<note>" not in page.source


def test_table_compares_and_marks_in_words(page):
    text = page.text
    for figure in ("0.981", "\u22120.009", "+0.375", "88%", "20.0× faster", "200 ms", "4.00 s"):
        assert figure in text
    assert text.count("▲ best") == 2 and text.count("▼ worst") == 2
    assert "not measured" in text and "nan" not in text.lower().split()


def test_each_prompt_and_sampler_has_its_video(page, videos):
    names = [f"{row.label}: {prompt}" for prompt in PROMPTS for row in sampler_rows(SAMPLERS)]
    assert [name for name, _ in page.media] == names
    clips = [videos[row.key][i] for i in range(len(PROMPTS)) for row in sampler_rows(SAMPLERS)]
    for (_, uri), clip in zip(page.media, clips, strict=True):
        np.testing.assert_array_equal(decoded(uri), clip)


def test_curves(page):
    assert page.tags.count("svg") == 3
    assert "Student, total loss" in page.text and "log scale" in page.text
    points = re.findall(r'points="([^"]+)"', page.source)
    assert points and not re.search("nan|inf", " ".join(points))
    numbers = np.array([[float(n) for n in p.split(",")] for line in points for p in line.split()])
    assert numbers.min() >= 0 and (numbers <= [WIDTH, HEIGHT]).all()


def test_the_true_reward_of_the_student_is_open_to_see_and_that_of_the_data_is_not(tmp_path):
    history = [{"step": i, "generated_rate": 1.0, "reward_real": 0.0, "reward_a_generated": i / 9} for i in range(3)]
    history[1]["reward_generated"] = 0.5
    write_report(tmp_path / "a.html", metrics={}, prompts=[], videos={}, history=history)
    shown, _, folded = Page(tmp_path / "a.html").text.partition("More curves")
    assert shown.index("Reward of the student’s samples") < shown.index("Reward of the student’s samples, a")
    assert "Reward of the data’s videos" in folded and "Generated rate" in folded


def test_larger_videos_become_mp4(tmp_path):
    clips = np.random.default_rng(0).integers(0, 256, (1, 3, 130, 136, 3), np.uint8)
    write_report(tmp_path / "a.html", metrics={}, prompts=["x"], videos={"student_4": clips})
    ((_, uri),) = Page(tmp_path / "a.html").media
    assert uri.startswith("data:video/mp4") and decoded(uri).shape == clips.shape[1:]


def test_too_many_videos_leave_prompts_out(tmp_path, monkeypatch, videos):
    monkeypatch.setattr(clips_module, "VIDEO_LIMIT", 6_000)
    clips = np.random.default_rng(0).integers(0, 256, (4, 5, 32, 32, 3), np.uint8)
    write_report(tmp_path / "a.html", metrics={}, prompts=list("abcd"), videos={"s_4": clips})
    page = Page(tmp_path / "a.html")
    assert sum(len(uri) for _, uri in page.media) <= 6_400
    assert f"{4 - len(page.media)} more prompts are left out" in page.text


def test_nearly_empty_run_still_gives_a_page(tmp_path):
    history = [{"step": 7, "loss": 0.5}]
    write_report(tmp_path / "a.html", metrics={}, prompts=[], videos={}, history=history)
    page = Page(tmp_path / "a.html")
    assert "table" not in page.tags and "circle" in page.tags


@pytest.mark.parametrize("change", [lambda v: v[:1], lambda v: v / 255, lambda v: v[0]])
def test_wrong_videos_are_named(tmp_path, videos, change):
    wrong = videos | {"student_1": change(videos["student_1"])}
    with pytest.raises(ValueError, match="videos of student_1 must be uint8"):
        write_report(tmp_path / "a.html", metrics=METRICS, prompts=PROMPTS, videos=wrong)
    assert not list(tmp_path.iterdir())


def test_sampler_rows_are_in_order_and_no_two_read_alike():
    keys = ["student_1", "undistilled_1", "teacher_4", "other", "student_4", "teacher_50"]
    rows = sampler_rows(keys)
    assert [row.key for row in rows] == ["teacher_50", "student_4", "student_1", "teacher_4", "undistilled_1", "other"]
    assert [row.label for row in rows] == [
        "Teacher, 50 steps",
        "Student, 4 steps",
        "Student, 1 step",
        "Teacher, 4 steps",
        "Undistilled, 1 step",
        "Other",
    ]
