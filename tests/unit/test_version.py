"""The version is said in two places, which agree."""

import tomllib
from pathlib import Path

import jax_moriep


def test_version_is_that_of_pyproject():
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert jax_moriep.__version__ == pyproject["project"]["version"]
