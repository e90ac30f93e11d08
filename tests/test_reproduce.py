"""The ablation: which cells run, what a second start does, and what the page and tables say."""

import csv
import functools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from dollar_jax import reproduce as module
from dollar_jax.config import changed, distill_config
from dollar_jax.data import shapes
from dollar_jax.data.latents import EncodedVideos
from dollar_jax.evaluate.measure import SamplePlan
from dollar_jax.report.ablation import Result, paper_claims, summary
from dollar_jax.reproduce import METHODS, reproduce

# By method: alignment of the student in 4 steps with seed 0.
LEVELS = {"vsd": 0.5, "cd": 0.4, "vsd_cd": 0.6, "vsd_cd_lrm": 0.61, "vsd_cd_ddpo": 0.6, "cd_m1": 0.3, "cd_m5": 0.35}


def rows(method, seed):
    """Made-up measures of a cell."""
    if method == "teacher":
        counts, prefix, level = (50, 4, 1), "teacher", 0.62
    else:
        counts, prefix, level = (4, 2, 1), "student", LEVELS[method]
    return {
        f"{prefix}_{n}": {
            "alignment": level + 0.01 * seed - 0.001 * (n == 1),
            "reward": level / 2,
            "vendi": 3 + level,
            "vendi_network": 2 + level,
            "frechet": 1 - level,
            "flicker": 0.98,
            "net_change": 0.05,
            "nfe": 2 * n if prefix == "teacher" else n,
        }
        for n in counts
    }


SPEED = {
    "teacher_50": {"nfe": 100, "diffusion": [0.5, 0.6, 0.4], "total": [0.7, 0.8, 0.6]},
    "student_4": {"nfe": 4, "diffusion": [0.04, 0.04, 0.04], "total": [0.14, 0.15, 0.13]},
    "student_1": {"nfe": 1, "diffusion": [0.01, 0.02, 0.01], "total": [0.11, 0.11, 0.11]},
}


class FakeLab:
    """Stands for hours of training."""

    ran: list[tuple[str, int]] = []

    def __init__(self, workdir, generator, base, quick):
        self.workdir, self.quick = workdir, quick

    def shown(self, seed):
        return ["a red ball", "a <blue> cube"]

    def run(self, key, seed, config):
        self.ran.append((key, seed))
        folder = self.workdir / "cells"
        folder.mkdir(parents=True, exist_ok=True)
        found = rows(key, seed)
        clips = np.random.default_rng(0).integers(0, 255, (2, 3, 8, 8, 3), np.uint8)
        np.savez(folder / f"{key}.npz", **dict.fromkeys(found, clips))
        settings = module._settings(module.dataclasses.replace(config, seed=seed), self.quick)
        cell = {"settings": settings, "rows": found}
        module._path(self.workdir, key, seed).write_text(json.dumps(cell))
        return found

    def time(self, key, config):
        assert key == "vsd"
        return SPEED


@pytest.fixture
def run(monkeypatch, get_config):
    """`reproduce` with made-up cells, and what it has run."""
    monkeypatch.setattr(module, "Lab", FakeLab)
    monkeypatch.setattr(module, "make_generator", lambda config, **more: None)
    monkeypatch.setattr(FakeLab, "ran", [])
    experiment = functools.partial(experiment_of, get_config)
    return functools.partial(reproduce, experiment), FakeLab.ran


def experiment_of(get_config, losses):
    return distill_config(get_config(losses))


class Text(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.source, self.text = path.read_text(), ""
        self.feed(self.source)

    def handle_data(self, data):
        self.text += data + " "


def test_every_method_runs_with_every_seed_and_leaves_a_page(run, tmp_path):
    start, ran = run
    page = start(tmp_path, quick=False)
    assert len(ran) == len(set(ran)) == 3 * (1 + len(METHODS))
    assert {seed for _, seed in ran} == {0, 1, 2} and ran[0] == ("teacher", 0)
    found = Text(page)
    assert not re.search(r"https?:|@import|url\(|<script|<link", found.source)
    for text in (*(m.label for m in METHODS), "VSD, 4 steps", "Teacher, 50 steps", "a <blue> cube", "3 seeds"):
        assert text in found.text
    assert "0.510 ± 0.010" in found.text  # 0.50, 0.51, 0.52
    assert found.source.count("<img") == 2 * (1 + len(METHODS))
    assert "dollar train --config=configs/demo.py:cd --workdir=runs/cd_m5-seed2" in found.text
    assert "--config.consistency.skip=5 --config.seed=2" in found.text
    with page.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 3 * (1 + len(METHODS))
    chosen = [r for r in lines if (r["method"], r["seed"], r["sampler"]) == ("vsd_cd", "1", "student_2")]
    assert float(chosen[0]["alignment"]) == pytest.approx(0.61)
    assert "| VSD, 4 steps | 0.510 ± 0.010 |" in page.with_suffix(".md").read_text()
    assert "| Student, 4 steps | 4 | 0.0400 | ×12.5 | 0.1400 | 20.0 |" in page.with_suffix(".md").read_text()


def test_a_second_start_runs_only_what_is_missing(run, tmp_path):
    start, ran = run
    start(tmp_path, quick=True)
    assert {seed for _, seed in ran} == {0, 1}
    before = Text(tmp_path / "reproduction.html").text
    (tmp_path / "cells" / "cd_m1-seed1.json").unlink()
    ran.clear()
    start(tmp_path, quick=True)
    assert ran == [("cd_m1", 1)]
    drop = re.compile(r"[\d.]+ (ms|s)\b")
    assert drop.sub("", Text(tmp_path / "reproduction.html").text) == drop.sub("", before)


def test_a_cell_that_knows_no_newer_setting_is_read_with_its_default(run, tmp_path):
    start, ran = run
    start(tmp_path, quick=True, seeds=1)
    path = tmp_path / "cells" / "cd-seed0.json"
    cell = json.loads(path.read_text())
    del cell["settings"]["sampling"]["solver"]
    path.write_text(json.dumps(cell))
    ran.clear()
    start(tmp_path, quick=True, seeds=1)
    assert not ran


def test_a_cell_of_other_settings_is_refused_before_any_work(run, tmp_path):
    start, ran = run
    start(tmp_path, quick=True, seeds=1)
    ran.clear()
    with pytest.raises(ValueError, match=r"teacher-seed0\.json is of other settings"):
        start(tmp_path, quick=True, seeds=1, steps=7)
    assert not ran


def test_the_commands_are_the_cells(get_config):
    """What a command's flags make of the experiment is what the cell was trained with."""
    for method in METHODS:
        config = changed(experiment_of(get_config, method.losses), method.changes)
        assert (config.vsd.weight > 0) == ("vsd" in method.losses)
        assert (config.consistency.weight > 0) == ("cd" in method.losses)
        assert bool(config.reward.rewards) == ("lrm" in method.losses)
    grid = changed(experiment_of(get_config, "cd"), dict(METHODS[-1].changes))
    assert (grid.consistency.times, grid.consistency.skip) == ("grid", 5)
    with pytest.raises(ValueError, match=r"config\.consistency has no field 'm'"):
        changed(grid, {"consistency.m": 5})


def cells(seeds, change=lambda method, seed, found: found):
    return [Result(m, s, change(m, s, rows(m, s))) for s in range(seeds) for m in ("teacher", *LEVELS)]


def test_means_and_deviations_are_over_the_seeds():
    table = summary(cells(3), {"teacher": "T", "vsd": "V"})
    assert list(table)[0] == ("teacher", "teacher_50") and len(table) == 6
    mean, spread = table["vsd", "student_4"]["alignment"]
    assert mean == pytest.approx(0.51) and spread == pytest.approx(0.01)
    assert summary(cells(1), {"vsd": "V"})["vsd", "student_1"]["alignment"][1] == 0


def test_claims_hold_with_every_seed_on_average_or_not():
    claims = paper_claims(cells(3), SPEED)
    verdicts = {claim.sentence.split(":")[0]: claim.verdict for claim in claims}
    assert verdicts["VSD + CD is more diverse than VSD"] == "yes"
    assert verdicts["CD with m = 5 no worse than with m = 1"] == "yes"
    assert verdicts["The latent reward model takes the reward beyond the teacher’s"] == "no"
    faster = next(claim for claim in claims if "4-step diffusion" in claim.sentence)
    assert faster.values == pytest.approx([12.5, 15, 10]) and faster.verdict == "on average"

    def mixed(method, seed, found):
        if method == "vsd_cd" and seed == 1:
            found["student_4"]["vendi"] = 3.45  # below VSD's 3.5 with one seed of three
        return found

    claim = paper_claims(cells(3, mixed), SPEED)[0]
    assert claim.verdict == "on average" and claim.values == pytest.approx([0.1, -0.05, 0.1])


@pytest.mark.slow
def test_two_methods_are_trained_and_measured(toy_generator, make_config, monkeypatch, tmp_path):
    """The whole way with a toy pipeline: two trainings, their samples, the page."""
    captions = [f"{'a' * (1 + i % 5)} {'b' * (1 + i % 7)}" for i in range(24)]
    latent = np.random.default_rng(0).normal(size=(24, *toy_generator.latent_shape)).astype(np.float32)
    data = EncodedVideos(latent, toy_generator.text(captions), captions)
    some = shapes.covering_captions()[:4]
    monkeypatch.setattr(module, "make_generator", lambda config, **more: toy_generator)
    monkeypatch.setattr(module, "load_data", lambda *_: data)
    monkeypatch.setattr(module, "default_plan", lambda seed, quick: SamplePlan(some, some[:2], 2, 8, seed))
    monkeypatch.setattr(module, "METHODS", METHODS[:1] + METHODS[-1:])

    def experiment(losses):
        return make_config(
            {
                "vsd.weight": float("vsd" in losses),
                "consistency.weight": 0.5 * ("cd" in losses),
                "reward.rewards": ({"name": "compressibility", "weight": 1.0, "folder": None},) * ("lrm" in losses),
                "student.timesteps": (1000.0, 700.0, 400.0, 200.0),
                "batch_size": 8,
                "mesh.data": 8,
            }
        )

    page = reproduce(experiment, tmp_path, quick=True, seeds=2, steps=2)
    assert "CD, grid, m = 5, 1 step" in Text(page).text
    found = json.loads((tmp_path / "cells" / "vsd-seed1.json").read_text())["rows"]
    assert set(found) == {"student_4", "student_2", "student_1"}
    assert {"alignment", "vendi_network", "frechet", "net_change", "nfe"} <= set(found["student_4"])
    speed = json.loads((tmp_path / "cells" / "speed-seed0.json").read_text())["rows"]
    assert {"teacher_4", "teacher_1", "student_4", "student_2", "student_1"} < set(speed)
    for row in speed.values():
        assert len(row["total"]) == module.ROUNDS and all(np.greater(row["total"], row["diffusion"]))
    assert (tmp_path / "runs" / "vsd-seed0" / "checkpoints").exists()
    assert not (tmp_path / "runs" / "vsd-seed1" / "checkpoints").exists()


def test_the_page_in_a_browser(run, tmp_path):
    browsers = filter(None, map(shutil.which, ("chromium", "google-chrome")))
    with sync_playwright() as playwright:
        chromium = Path(next(browsers, playwright.chromium.executable_path))
        if not chromium.exists():
            pytest.skip("neither Chromium nor Chrome is installed; or: playwright install chromium")
        start, _ = run
        page_file = start(tmp_path, quick=False)
        browser = playwright.chromium.launch(executable_path=chromium)
        for width in (1280, 390):
            page = browser.new_page(viewport={"width": width, "height": 900})
            requests, errors = [], []
            page.on("request", lambda request, seen=requests: seen.append(request.url))
            page.on("pageerror", lambda error, seen=errors: seen.append(error))
            page.goto(page_file.as_uri())
            loaded = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
            assert page.evaluate(loaded) and page.evaluate("document.images.length") == 2 * (1 + len(METHODS))
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert all(url.startswith(("file:", "data:")) for url in requests) and not errors
            charts = "[...document.querySelectorAll('svg')]"
            assert page.evaluate(f"{charts}.length && {charts}.every(s => s.clientWidth > 100)")
        browser.close()
