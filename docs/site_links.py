"""A hook of MkDocs: files of the repository that the pages link to come with the site, and a page of all settings."""

import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)")


def in_site(path: str) -> str:
    """Where a file of the repository lies in the site: its pages at the top, anything else in source/."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"


def in_repository(page: str) -> str:
    return page.removeprefix("source/") if page.startswith("source/") else f"docs/{page}"


def target(page: str, link: str) -> str | None:
    """The file of the repository that a page of it links to, of a folder its README.md."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    path = posixpath.join(path, "README.md") if (ROOT / path).is_dir() else path
    return path if (ROOT / path).is_file() else None


def settings() -> str:
    """What `dollar config` says, as a page."""
    command = ["dollar", "config", "--config=wan_1_3b"]
    said = subprocess.run(
        [sys.executable, "-m", "dollar_jax", *command[1:]], check=True, capture_output=True, text=True
    )
    return f"# Every setting\n\nWhat `{' '.join(command)}` prints:\n\n```text\n{said.stdout.strip()}\n```\n"


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "configuration.md", content=settings()))
    todo = [in_repository(file.src_uri) for file in files if file.src_uri.endswith(".md") and not file.generated_by]
    while todo:
        page = todo.pop()
        for path in filter(None, (target(page, link) for link in LINK.findall((ROOT / page).read_text()))):
            if files.get_file_from_path(in_site(path)) is None:
                files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
                todo += [path] * path.endswith(".md")
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    where, repository = page.file.src_uri, in_repository(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        path = target(repository, match[0])
        return match[0] if path is None else posixpath.relpath(in_site(path), posixpath.dirname(where))

    return LINK.sub(replaced, markdown)
