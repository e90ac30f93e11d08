"""`dollar serve` as its users meet it: the command, its API over HTTP, its page in Chromium."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from dollar_jax.checkpoint import Checkpoints
from dollar_jax.cli import main
from dollar_jax.run import CHECKPOINTS, record_config
from dollar_jax.video import read_video
from dollar_jax.weights.pipeline import load_pipeline

pytestmark = pytest.mark.multiprocess
PROMPT = "a small red circle moving left slowly"


@pytest.fixture(scope="module")
def url(request, wan_folder, save_wan, make_config, tmp_path_factory):
    """Of a student from text, or of one told of an "image"."""
    workdir, teacher = tmp_path_factory.mktemp("served"), wan_folder
    if hasattr(request, "param"):
        teacher = tmp_path_factory.mktemp("i2v")
        save_wan(teacher, pipeline="WanImageToVideoPipeline", transformer={"in_channels": 12})
    record_config(make_config({"teacher": str(teacher)}), workdir)
    params = jax.tree.map(jnp.asarray, load_pipeline(teacher).transformer.params)
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        checkpoints.save(7, {"ema": {"ema": params}})
    drafts = tmp_path_factory.mktemp("drafts")
    command = [sys.executable, "-m", "dollar_jax", "serve", f"--workdir={workdir}", "--port=0", "--queue=1"]
    cache = jax.config.jax_compilation_cache_dir
    env = os.environ | {"TMPDIR": str(drafts)} | ({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {})
    with (workdir / "stderr").open("w") as stderr:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)
    assert server.stdout is not None
    lines = iter(server.stdout.readline, "")
    yield next(found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
    server.terminate()
    code = server.wait(60)
    server.stdout.close()
    assert code == 0 and not list(drafts.iterdir())
    assert "Traceback" not in (workdir / "stderr").read_text()


def post(url, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(url + "/api", data) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def video(url, answer, tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(urllib.request.urlopen(url + answer["video"]).read())
    return read_video(path)


def test_the_student_and_the_teacher_are_drawn_from_a_seed(url, tmp_path):
    with urllib.request.urlopen(url + "/api") as answer:
        assert json.load(answer) == {"prompt": "", "steps": 3, "seed": 0, "teacher": False, "clip": [17, 32, 32]}
    status, first = post(url, {"prompt": PROMPT, "teacher": True})
    assert status == 200 and first.keys() == {"student", "teacher"} and first["student"]["seconds"] > 0
    student, teacher = (video(url, first[name], tmp_path) for name in ("student", "teacher"))
    assert student.shape == teacher.shape == (17, 256, 256, 3)
    assert np.abs(student.astype(int) - teacher).mean() > 1
    _, again = post(url, {"prompt": PROMPT})
    _, other = post(url, {"prompt": PROMPT, "seed": 1, "clip": [5, 16, 32]})
    np.testing.assert_array_equal(video(url, again["student"], tmp_path), student)
    assert video(url, other["student"], tmp_path).shape == (5, 128, 256, 3)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"not JSON", "the request is not valid JSON: Expecting value"),
        (b"[" * 30_000, "the request is not valid JSON: it is nested too deeply"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        (b'{"prompt": "a", "prompt": "b"}', "says 'prompt' twice"),
        ([1], "must be a JSON object with some of prompt"),
        ({"prompt": " "}, "prompt must be a text of 1 to 1000 characters"),
        ({"prompt": "a" * 10_000}, "prompt must be a text of 1 to 1000 characters"),
        ({"prompt": "a" * 100_000}, "post at most 65536 bytes of JSON"),
        ({"prompt": PROMPT, "steps": 0}, "steps must be a whole number from 1 to 50"),
        ({"prompt": PROMPT, "seed": "0"}, "seed must be a whole number"),
        ({"prompt": PROMPT, "seed": 2**31}, "seed must be a whole number from 0 to 2147483647"),
        ({"prompt": "\ud800"}, "which is no text"),
        ({"prompt": PROMPT, "teacher": "yes"}, "teacher must be true or false"),
        ({"prompt": PROMPT, "clip": [17, 320, 320]}, "at most 4 times the run's (17, 32, 32)"),
        ({"prompt": PROMPT, "clip": [16, 32, 32]}, "frames must be 1 + a multiple of 4"),
        ({"prompt": PROMPT, "size": 3}, "some of prompt, steps, seed, teacher, clip"),
        ({"prompt": PROMPT, "image": ""}, "some of prompt, steps, seed, teacher, clip"),
    ],
)
def test_bad_requests_are_told_why(url, body, message):
    status, answer = post(url, body)
    assert status == 400 and message in answer["error"]


def test_too_many_at_once_are_turned_away(url):
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda seed: post(url, {"prompt": PROMPT, "teacher": True, "seed": seed}), range(6)))
    turned_away = [answer for status, answer in answers if status == 503]
    assert turned_away and all("too many are waiting" in answer["error"] for answer in turned_away)
    assert sum(status == 200 for status, _ in answers) == 6 - len(turned_away) >= 2


def test_who_goes_away_disturbs_nobody(url):
    with socket.create_connection(url.removeprefix("http://").split(":")) as client:
        body = json.dumps({"prompt": PROMPT, "teacher": True}).encode()
        client.sendall(b"POST /api HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    assert post(url, {"prompt": PROMPT})[0] == 200


@pytest.mark.parametrize("where", [{}, {"host": "no.such.host.invalid"}])
def test_an_address_that_cannot_be_had_is_named(url, capsys, where):
    given = {"host": "127.0.0.1", "port": url.rpartition(":")[2]} | where
    flags = [f"--{name}={value}" for name, value in given.items()]
    assert main(["serve", "--workdir=nowhere", *flags]) == 2
    err = capsys.readouterr().err
    assert f"{' '.join(flags)}: " in err and "--port=0 takes a free one" in err


@pytest.fixture
def open_page():
    """Opens a page of a URL in Chromium, ready to draw; in the end none has had an error."""
    browsers, errors = filter(None, map(shutil.which, ("chromium", "google-chrome"))), []
    with sync_playwright() as playwright:
        chromium = Path(next(browsers, playwright.chromium.executable_path))
        if not chromium.exists():
            pytest.skip("neither Chromium nor Chrome is installed; or: playwright install chromium")
        browser = playwright.chromium.launch(executable_path=chromium)

        def ready(url):
            page = browser.new_page()
            page.on("pageerror", lambda error: errors.append(error))
            page.goto(url)
            page.wait_for_function("document.forms[0].steps.value === '3'")
            page.fill("[name=prompt]", PROMPT)
            return page

        yield ready
        browser.close()
    assert not errors


def assert_plays(page, videos):
    page.wait_for_function(f"document.querySelectorAll('video').length === {videos}")
    page.wait_for_function("[...document.querySelectorAll('video')].every(v => v.currentTime > 0)")
    assert PROMPT in page.inner_text("article")


@pytest.mark.slow
def test_the_page_in_a_browser(url, open_page, tmp_path):
    """Two people at once type a prompt and see a video play; a prompt that is too long is a sentence."""
    pages = [open_page(url), open_page(url)]
    assert not pages[0].is_visible("[name=image]")
    pages[1].check("[name=teacher]")
    for page in pages:
        page.click("button")
    for page, count in zip(pages, (1, 2), strict=True):
        assert_plays(page, count)
    pages[0].fill("[name=prompt]", "a" * 10_000)
    pages[0].click("button")
    pages[0].wait_for_selector("#status.error")
    assert "1 to 1000 characters" in pages[0].inner_text("#status")
    pages[1].screenshot(path=os.environ.get("SCREENSHOT", tmp_path / "page.png"))


@pytest.mark.slow
@pytest.mark.parametrize("url", ["image"], indirect=True)
def test_an_image_is_continued(url, open_page, picture, tmp_path):
    """Over HTTP the file's bytes in base64, on the page a file that is chosen."""
    with urllib.request.urlopen(url + "/api") as answer:
        assert json.load(answer)["image"] == ""
    Image.new("RGB", (300, 200), "white").save(tmp_path / "white.jpg")
    images = [base64.b64encode(path.read_bytes()).decode() for path in (picture, picture, tmp_path / "white.jpg")]
    answers = [post(url, {"prompt": PROMPT, "teacher": True, "image": image}) for image in images]
    assert [status for status, _ in answers] == [200] * 3
    for name in ("student", "teacher"):
        one, same, other = (video(url, answer[name], tmp_path).astype(int) for _, answer in answers)
        np.testing.assert_array_equal(one, same)
        assert np.abs(one - other).mean() > 1
    for wrong in ("", "no base64", images[0][:200], 3, "A" * 2**24):
        status, answer = post(url, {"prompt": PROMPT, "image": wrong})
        assert status == 400 and "image must be an image file's bytes" in answer["error"]
    page = open_page(url)
    page.click("button")
    assert page.evaluate("document.forms[0].image.validity.valueMissing")
    page.set_input_files("[name=image]", picture)
    page.click("button")
    assert_plays(page, 1)
