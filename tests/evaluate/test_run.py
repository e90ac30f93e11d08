from pathlib import Path

import pytest

from dollar_jax.evaluate.run import outputs


def test_only_metrics_json_has_the_page_of_the_run():
    assert outputs(Path("run/metrics.json")) == (Path("run/report.html"), Path("run/videos"))
    assert outputs(Path("run/again.json")) == (Path("run/again.html"), Path("run/again_videos"))
    with pytest.raises(ValueError, match=r"--out=a.html must end in .json"):
        outputs(Path("a.html"))
