"""Runs functions of jax on simulated MI300X devices, in a process of their own."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.rocm import simulated


@pytest.fixture(scope="session", autouse=True)
def _built():
    simulated.skip_unless_built()


@pytest.fixture(scope="session")
def ffi_scale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of kernels/ffi_scale.hip."""
    source = Path(__file__).parent / "kernels" / "ffi_scale.hip"
    output = tmp_path_factory.mktemp("kernels") / "libffi_scale.so"
    return simulated.compile_library(source, output, "-isystem", jax.ffi.include_dir())


@pytest.fixture
def on_rocm(tmp_path: Path) -> Callable[..., Any]:
    """Calls a function of a test module on the simulated devices and returns its arrays as NumPy's.

    The call is ``on_rocm(function, *arguments, devices=1, deadline=120, **environment)``. It takes a process
    of its own, because jax chooses its platform once, and because a kernel that fails takes its device along.
    """

    def call(function: Callable, *arguments: Any, devices=1, deadline=120.0, **more: str) -> Any:
        given, result = tmp_path / "given.pickle", tmp_path / "result.pickle"
        given.write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        command = (simulated.PYTHON, "-m", "tests.rocm.on_device", given, result)
        simulated.run(*command, deadline=deadline, devices=devices, **more)
        return pickle.loads(result.read_bytes())

    return call
