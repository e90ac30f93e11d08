import json

import jax.numpy as jnp
import numpy as np
import pytest

from dollar_jax.files import write_json


def test_metrics_round_trip(tmp_path):
    numbers = {"reward": np.float32(0.5), "nfe": np.int64(4), "vendi": jnp.float32(2)}
    write_json(tmp_path / "run" / "metrics.json", {"student_4": numbers, "config": {"a": (1, None)}})
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == {
        "student_4": {"reward": 0.5, "nfe": 4, "vendi": 2.0},
        "config": {"a": [1, None]},
    }


@pytest.mark.parametrize("value", [float("nan"), np.float32("inf"), jnp.float32("nan")])
def test_metrics_that_failed_are_named_and_keep_the_old_file(tmp_path, value):
    path = tmp_path / "metrics.json"
    write_json(path, {"seconds": 1})
    with pytest.raises(ValueError, match=r"metrics\['student_4'\]\['reward'\] is (nan|inf)"):
        write_json(path, {"student_4": {"reward": value}})
    assert json.loads(path.read_text()) == {"seconds": 1}


def test_metrics_of_another_type_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\['flicker'\] is of type ndarray"):
        write_json(tmp_path / "metrics.json", {"flicker": np.zeros(3)})
