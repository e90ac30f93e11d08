"""A run's folder: what is in it, and what a resumption may find there."""

import json

from dollar_jax.run import read_history, truncate_history


def test_history_is_json_and_drops_what_comes_after(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in (2, 4, 6)))
    truncate_history(tmp_path, 4)
    assert [line["step"] for line in read_history(tmp_path)] == [2, 4]
    assert read_history(tmp_path / "nowhere") == []
