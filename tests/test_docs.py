"""The documentation: links that lead somewhere, a site that builds, a notebook that runs."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def slugs(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http", "mailto")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in slugs(found), f"{page.name} links to {target}"


def test_every_page_is_in_the_site():
    listed = re.findall(r"- (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = [page.name for page in (ROOT / "docs").glob("*.md")]
    assert sorted(listed) == sorted([*pages, "configuration.md"])  # which site_links.py makes


def test_the_front_page_is_short_and_its_picture_small():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 80 and "pip install -e . && dollar demo" in text
    assert (ROOT / "docs" / "demo.gif").stat().st_size < 1.5e6


@pytest.mark.multiprocess
@pytest.mark.skipif(find_spec("material") is None, reason="pip install -e '.[docs]'")
def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    pages = list(site.rglob("index.html"))
    assert site / "guide" / "index.html" in pages
    for page in pages:
        for link in re.findall(r'(?:href|src)="([^"#:?]+)["#?]', page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(site)} links to {link}"
    assert "student.optimiser.learning_rate = " in (site / "configuration" / "index.html").read_text()
    assert (site / "source" / "dollar_jax" / "step.py").read_bytes() == (ROOT / "dollar_jax" / "step.py").read_bytes()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    shutil.copy(ROOT / "docs" / "demo.ipynb", tmp_path)
    notebook = nbformat.read(tmp_path / "demo.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    results = notebook.cells[3].outputs[0]["data"]["text/plain"]
    assert "teacher_50" in results and "student_4" in results
    assert "video" in notebook.cells[5].outputs[0]["data"]["text/html"]
