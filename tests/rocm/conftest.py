"""Runs functions of jax on simulated MI300X devices, in a process of their own."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.conftest import OLD_EMITTERS
from tests.rocm import simulated

# What a device gives is compared with a CPU's. XLA reads its flags at the first compilation.
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(OLD_EMITTERS, "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # This file takes half of the time: with several workers the others are done beside it.
    items.sort(key=lambda item: item.path.name != "test_native.py")


@pytest.fixture(scope="session", autouse=True)
def _built():
    simulated.skip_unless_built()


@pytest.fixture(scope="session")
def ffi_scale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of kernels/ffi_scale.hip."""
    source = Path(__file__).parent / "kernels" / "ffi_scale.hip"
    output = tmp_path_factory.mktemp("kernels") / "libffi_scale.so"
    return simulated.compile_library(source, output, "-isystem", jax.ffi.include_dir())


class OnRocm:
    """Calls a function of a test module on simulated devices and gives its arrays as NumPy's.

    A call takes a process of its own, because jax chooses its platform once, and because a kernel that fails
    takes its device along. Keywords beyond `devices` and `deadline` (seconds) set the process's environment.
    """

    def __init__(self, folder: Path):
        self._given, self._result = folder / "given.pickle", folder / "result.pickle"
        self.said = ""  # what the last call wrote to stderr

    def __call__(self, function: Callable, *arguments: Any, devices=1, deadline=120.0, **more: str) -> Any:
        self._given.write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        command = (simulated.PYTHON, "-m", "tests.rocm.on_device", self._given, self._result)
        more = {"PYTHONPATH": simulated.JAX_PATH} | more
        _, self.said = simulated.run(*command, devices=devices, deadline=deadline, **more)
        return pickle.loads(self._result.read_bytes())


@pytest.fixture
def on_rocm(tmp_path: Path) -> OnRocm:
    return OnRocm(tmp_path)
