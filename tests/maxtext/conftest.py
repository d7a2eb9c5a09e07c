"""MaxText without Google's cloud, which must be said before it is imported.

These tests need MaxText and are no part of ``make test``: ``make test-maxtext`` makes their environment.
"""

import importlib.util
import os

import pytest

import jax_moriep as jm

os.environ["DECOUPLE_GCLOUD"] = "TRUE"

if importlib.util.find_spec("maxtext") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    """Warnings of MaxText and of what it uses are none of ours."""
    for item in items:
        if "tests/maxtext/" in item.nodeid:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def installed():
    """install, undone after the test."""
    yield jm.maxtext.install
    jm.maxtext.uninstall()
