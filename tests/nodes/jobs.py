"""Jobs on simulated machines: one command on each, with what it said and how it ended."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.nodes.machines import Machines

ROOT = Path(__file__).parents[2]
PORT = 29400


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that has ended: code, output, and the time at which it did."""

    code: int
    output: str
    when: float


class Job:
    """Commands that run on the machines, one on each; as a context manager it ends what still runs."""

    def __init__(self, machines: Machines, commands: Sequence[Sequence[str]], env: Mapping[str, str]) -> None:
        env = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))), **env}
        self._popens = [machines.start(k, argv, env) for k, argv in enumerate(commands)]
        self._lines: list[list[str]] = [[] for _ in commands]
        self._ended = [0.0 for _ in commands]
        self._threads = [
            threading.Thread(target=self._read, args=(k,), daemon=True) for k in range(len(commands))
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        for popen in self._popens:
            if popen.poll() is None:
                # It passes no signal on to what it runs, but ends with it; the rest ends with the machine.
                popen.send_signal(signal.SIGKILL)
            popen.wait()

    def wait_for(self, text: str, count: int, seconds: float) -> None:
        """Waits until a text was said so often, on all machines together."""
        deadline = time.monotonic() + seconds
        while sum(line.count(text) for lines in self._lines for line in lines) < count:
            assert time.monotonic() < deadline, f"{text!r} was not said:\n{self.said()}"
            assert any(thread.is_alive() for thread in self._threads), self.said()
            time.sleep(0.05)

    def wait(self, seconds: float) -> list[Ended]:
        """Waits for the end of all."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"no end within {seconds} s:\n{self.said()}"
        codes = [popen.wait() for popen in self._popens]
        return [
            Ended(code, "".join(lines), when)
            for code, lines, when in zip(codes, self._lines, self._ended, strict=True)
        ]

    def said(self) -> str:
        return "\n".join(f"machine {k}:\n{''.join(lines)}" for k, lines in enumerate(self._lines))

    def _read(self, k: int) -> None:
        pipe = self._popens[k].stdout
        assert pipe is not None
        with pipe:
            for line in pipe:
                self._lines[k].append(line)
        self._ended[k] = time.time()


def launch(
    machines: Machines, script: str, *args: object, nprocs: int = 2, options: Sequence[str] = (), **env: str
) -> Job:
    """The launcher on every machine."""
    count = len(machines.addresses)
    at = ["--nodes", str(count), "--coordinator", f"{machines.addresses[0]}:{PORT}", "--join-timeout", "30"]
    command = [
        sys.executable,
        "-m",
        "jax_moriep",
        "launch",
        "-n",
        str(nprocs),
        "--platform",
        "cpu",
        *at,
        *options,
    ]
    behind = [str(Path(__file__).with_name(script)), *map(str, args)]
    return Job(machines, [[*command, "--node", str(k), *behind] for k in range(count)], env)


def python(machines: Machines, environments: Sequence[Mapping[str, str]], script: str, *args: object) -> Job:
    """One process on every machine, each with variables of its own, as another launcher would start it."""
    behind = [sys.executable, str(Path(__file__).with_name(script)), *map(str, args)]
    commands = [["env", *(f"{name}={value}" for name, value in e.items()), *behind] for e in environments]
    return Job(machines, commands, {})
