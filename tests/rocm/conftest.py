"""Runs functions of jax on simulated MI300X devices, in a process of their own."""

import os
import pickle
import subprocess
import threading
from collections.abc import Callable, Iterator
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


_DONE = "done\n"


class _Child:
    """A process on simulated devices that calls one function after the other."""

    def __init__(self, folder: Path, devices: int, environment: dict[str, str]):
        self._given, self._result = folder / "given.pickle", folder / "result.pickle"
        self._stderr = folder / "stderr"
        command = (simulated.PYTHON, "-m", "tests.rocm.on_device")
        with self._stderr.open("w") as stderr:
            self._process = simulated.start(
                *command, devices=devices, stdin=True, stderr=stderr, **environment
            )

    def call(self, function: Callable, arguments: Any, deadline: float) -> tuple[Any, str]:
        """What the function gave, and what was written to stderr meanwhile."""
        said = self._stderr.stat().st_size
        self._given.write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{self._given} {self._result}\n")
        timer = threading.Timer(deadline, self._process.kill)
        timer.start()
        answer = ""
        for line in self._process.stdout:
            answer = line
            if line == _DONE:
                break
        timer.cancel()
        with self._stderr.open() as stderr:
            stderr.seek(said)
            text = stderr.read()
        if answer != _DONE:
            code = self._process.wait()
            pytest.fail(f"exit {code} within {deadline} s of {function.__qualname__}\n{answer}{text}")
        return pickle.loads(self._result.read_bytes()), text

    def end(self) -> None:
        """Lets it end by itself, so that what it holds is given back."""
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None


class OnRocm:
    """Calls a function of a test module on simulated devices and gives its arrays as NumPy's.

    jax chooses its platform once, so the calls are done in other processes. Those of a test file that want
    the same devices and environment share one, for it takes seconds to start; after a call that failed, which
    may have taken its device along, the next one gets a new process. Keywords beyond `devices` and
    `deadline` (seconds) set the process's environment.
    """

    def __init__(self, folders: Callable[[], Path]):
        self._folders = folders
        self._children: dict[Any, _Child] = {}
        self.said = ""  # what the last call wrote to stderr

    def __call__(self, function: Callable, *arguments: Any, devices=1, deadline=120.0, **more: str) -> Any:
        environment = {"PYTHONPATH": simulated.JAX_PATH} | more
        key = (devices, *sorted(environment.items()))
        child = self._children.get(key)
        if child is None or child.ended:
            child = self._children[key] = _Child(self._folders(), devices, environment)
        result, self.said = child.call(function, arguments, deadline)
        return result

    def end(self) -> None:
        """Ends all processes."""
        for child in self._children.values():
            child.end()


@pytest.fixture(scope="module")
def on_rocm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRocm]:
    calls = OnRocm(lambda: tmp_path_factory.mktemp("calls"))
    yield calls
    calls.end()
