"""The videos that VBench (Huang et al., arXiv 2311.17982) asks for."""

from collections.abc import Mapping
from pathlib import Path

from dollar_jax.evaluate.files import read_lines, read_prompts, video_name
from dollar_jax.files import read_json


def read_vbench_prompts(path: Path, num: int) -> dict[str, int]:
    """How many videos each prompt of a list needs: `num`, and five times as many for temporal flickering. The list is
    VBench's `VBench_full_info.json`, which says what each prompt is for, or a text file with a prompt per line, which
    does not. Raises FileNotFoundError, or ValueError naming what is wrong in the file."""
    if path.suffix != ".json":
        return dict.fromkeys(read_prompts(path), num)
    counts: dict[str, int] = {}
    for prompt, dimensions in _full_info(path):
        counts[prompt] = max(5 * num if "temporal_flickering" in dimensions else num, counts.setdefault(prompt, 0))
    return counts


def pair_names(prompts: Path, names: Path) -> dict[str, str]:
    """The prompt to draw by the name of its files: line i of `prompts` is the rewritten line, or row, i of `names`.
    `names` is a text file, or VBench_full_info.json. A name that comes twice keeps its first prompt. Raises
    FileNotFoundError, or ValueError when the two do not pair."""
    long, short = ([p for p, _ in _full_info(f)] if f.suffix == ".json" else read_lines(f) for f in (prompts, names))
    if len(long) != len(short):
        short = list(dict.fromkeys(short))
    if len(long) != len(short):
        found = f"{prompts} holds {len(long)} prompts and {names} {len(short)} names"
        raise ValueError(f"{found}: line i of the one must be the rewritten line i of the other")
    pairs: dict[str, str] = {}
    for name, prompt in zip(short, long, strict=True):
        pairs.setdefault(name, prompt)
    return pairs


def _full_info(path: Path) -> list[tuple[str, list[str]]]:
    """(prompt, dimensions) of the rows of VBench_full_info.json."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it must be VBench's VBench_full_info.json")
    rows = read_json(path, list)
    try:
        return [(str(row["prompt_en"]), list(row["dimension"])) for row in rows]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is not like VBench_full_info.json: {error!r}") from error


def video_rows(counts: Mapping[str, int], prompts: Mapping[str, str] | None = None) -> list[tuple[str, str, int]]:
    """What `files.draw_missing` draws of `counts` videos of each prompt: `{prompt}-{i}.mp4`, its prompt, and i, whose
    noise it starts from. With `prompts` the keys of `counts` only name the files, and `prompts` holds what is drawn for
    each. Raises ValueError for a prompt that names no file, with what to do about it."""
    drawn = {name: name for name in counts} if prompts is None else prompts
    try:
        return [(video_name(name, i), drawn[name], i) for name, n in counts.items() for i in range(n)]
    except ValueError as error:
        mend = "for rewritten prompts give --names, VBench's own list, whose short prompts name the files"
        raise ValueError(f"{error}; {mend}") from error
