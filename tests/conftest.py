"""Eight virtual CPU devices, a reused random key is an error, annotated shapes are checked.

A test that passes a wrong value to see our own error is named `test_bad_...` and goes unchecked.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_debug_key_reuse", True)

# Not where registered dataclasses are: `jax.tree.map` may put anything into the fields of those.
CHECKED = ["losses", "models", "sample", "schedule"]
jaxtyping.install_import_hook([f"dollar_jax.{name}" for name in CHECKED], "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs live in pytest's cache: a second run compiles only what has changed."""
    if cache := getattr(config, "cache", None):
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True)
def _types_are_checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    unchecked = request.node.name.startswith("test_bad_")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", unchecked)
