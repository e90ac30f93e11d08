"""The packages; everything else is in pyproject.toml.

The experiments in configs/ travel in the wheel as `dollar_jax.configs`, which pyproject.toml cannot say beside finding
the other packages.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["dollar_jax", "dollar_jax.*"]), "dollar_jax.configs"],
    package_dir={"dollar_jax.configs": "configs"},
)
