"""``jax-moriep launch``: runs a script on several processes of this machine, joined by jax.distributed.

All processes end together: when one fails, the others get a short time to report what they saw and are then
ended, and so they are on Ctrl-C, on SIGTERM, after a timeout, and when the launcher itself is killed.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from jax_moriep.errors import ConfigError, rule
from jax_moriep.runtime import compat, settings

TIMEOUT_CODE = 124
"""Exit code of a run that took longer than its timeout, as the command ``timeout`` has it."""
TERMINATE_SECONDS = 5.0
"""Time between SIGTERM and SIGKILL."""
_SETTLE_SECONDS = 1.0
"""Within this time after the first failure a killed process counts as the one that failed first: the
kernel tells of it when all its memory is given back, and its peers may have ended before that."""
_CHILD = Path(__file__).with_name("_child.py")
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
_COLLECTIVE_TIMEOUT_FLAG = "--xla_cpu_collective_timeout_seconds"


@dataclasses.dataclass(frozen=True)
class LaunchResult:
    """How a run ended.

    Attributes:
      returncode: 0, or the exit code of the process that failed first (128 + the signal's number if a signal
        ended it), or ``TIMEOUT_CODE``.
      codes: the exit code of each process, in the same sense; those that the launcher ended have 128 +
        SIGTERM, SIGKILL or SIGABRT.
      outputs: what each process wrote to stdout and stderr, in one text; empty without ``capture``.
    """

    returncode: int
    codes: list[int]
    outputs: list[str]


def launch(
    script: str | os.PathLike[str],
    nprocs: int,
    devices_per_process: int = 1,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    capture: bool = False,
    *,
    platform: str | None = None,
    module: bool = False,
    grace: float = 10.0,
    on_line: Callable[[int, str], None] | None = None,
) -> LaunchResult:
    """Runs a script on several processes; in each, jax.distributed is initialized before the script starts.

    A process that fails ends at once, without its exit handlers, for jax's own would wait for the peers.

    Args:
      script: path of the script, or with ``module`` a module's name; each process runs it as ``__main__``.
      nprocs: number of processes.
      devices_per_process: devices that each process has; on the CPU platform they are made, elsewhere process
        i takes the devices from ``i * devices_per_process`` on.
      args: the script's arguments.
      env: variables to set or replace in the processes' environment.
      timeout: seconds after which all processes print their stacks and are ended.
      capture: collect the output in the result instead of printing it with ``[i]`` before each line.
      platform: value for JAX_PLATFORMS; None leaves it as it is.
      module: ``script`` is a module's name.
      grace: seconds that the others have after one process failed, to report what they saw.
      on_line: called with a process's number and a line of its output, instead of printing or collecting it;
        the line keeps its end. Calls do not overlap.

    Returns:
      The exit codes, and the outputs with ``capture``.

    Raises:
      ConfigError: ``nprocs`` or ``devices_per_process`` is not positive, or there is no such script.
    """
    for name, value in (("nprocs", nprocs), ("devices_per_process", devices_per_process)):
        if value < 1:
            raise ConfigError(rule(name, value, "be at least 1", "pass a positive int"))
    if not module and not Path(script).is_file():
        raise ConfigError(rule("script", os.fspath(script), "be an existing file", "correct the path"))

    lines: list[list[str]] = [[] for _ in range(nprocs)]
    if on_line is None:
        on_line = (lambda i, line: lines[i].append(line)) if capture else _print_line
    coordinator = f"127.0.0.1:{_free_port()}"
    service = compat.coordination_service(coordinator, nprocs)
    environment = _environment(env, platform, devices_per_process)
    events: queue.SimpleQueue[tuple[_Process, int | Exception]] = queue.SimpleQueue()
    output_lock = threading.Lock()
    processes: list[_Process] = []
    final_signal = signal.SIGTERM
    try:
        for i in range(nprocs):
            command = [sys.executable, "-u", os.fspath(_CHILD), coordinator]
            command += [str(n) for n in (nprocs, i, devices_per_process, os.getpid())]
            command += ["module" if module else "file", os.fspath(script), *args]
            processes.append(_Process(i, command, environment, events, on_line, output_lock))
        returncode = _wait(events, nprocs, timeout, grace)
        if returncode is None:
            returncode = TIMEOUT_CODE
            # Under faulthandler an abort prints each thread's stack: a run that hangs shows where.
            final_signal = signal.SIGABRT
    finally:
        _end(processes, final_signal)
        service.shutdown()
    return LaunchResult(returncode, [p.code for p in processes], ["".join(text) for text in lines])


class _Process:
    """One process of a run, with a thread that passes its output on and one that waits for its end."""

    def __init__(
        self,
        index: int,
        command: list[str],
        environment: dict[str, str],
        events: queue.SimpleQueue[tuple[_Process, int | Exception]],
        on_line: Callable[[int, str], None],
        output_lock: threading.Lock,
    ) -> None:
        self.index = index
        self.code = 0
        self._events = events
        self._on_line = on_line
        self._output_lock = output_lock
        self._end_lock = threading.Lock()
        self._popen = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            # A process group of its own, so that what the script starts can be ended with it.
            start_new_session=True,
        )
        self._pump = threading.Thread(target=self._pass_output_on, daemon=True)
        self._waiter = threading.Thread(target=self._wait_for_end, daemon=True)
        self._pump.start()
        self._waiter.start()

    def send_signal(self, number: int) -> None:
        """Signals the process and its group; does nothing when it has ended."""
        with self._end_lock:
            if self._popen.returncode is None:
                os.killpg(self._popen.pid, number)

    def join(self, seconds: float) -> bool:
        """Waits for the end; returns whether it came."""
        self._waiter.join(seconds)
        return not self._waiter.is_alive()

    def join_output(self) -> None:
        """Waits until the output is passed on: at most a second, for a daemon of the script's may hold it."""
        self._pump.join(1.0)

    def _pass_output_on(self) -> None:
        pipe = self._popen.stdout
        assert pipe is not None
        rest = b""
        failed = False
        with pipe:
            while chunk := pipe.read(1 << 16):
                # A progress bar ends its lines by a carriage return.
                *whole, rest = re.split(rb"(?<=[\n\r])", rest + chunk)
                failed = failed or not self._pass_lines_on(whole)
        if rest and not failed:
            self._pass_lines_on([rest + b"\n"])

    def _pass_lines_on(self, lines: list[bytes]) -> bool:
        try:
            with self._output_lock:
                for line in lines:
                    self._on_line(self.index, line.decode(errors="replace"))
        except Exception as error:  # noqa: BLE001 - raised again in the launching thread
            self._events.put((self, error))
            return False
        return True

    def _wait_for_end(self) -> None:
        # The process is kept as a zombie until its group is ended: so long nobody else can get its id.
        os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOWAIT)
        with self._end_lock:
            os.killpg(self._popen.pid, signal.SIGKILL)
            code = self._popen.wait()
        self.code = code if code >= 0 else 128 - code
        self._events.put((self, self.code))


def _wait(
    events: queue.SimpleQueue[tuple[_Process, int | Exception]],
    nprocs: int,
    timeout: float | None,
    grace: float,
) -> int | None:
    """Waits until all processes have ended or shall be ended; returns the run's code, None on timeout."""
    deadline = None if timeout is None else time.monotonic() + timeout
    first_failure = 0
    settled = 0.0
    running = nprocs
    while running:
        try:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            process, code = events.get(timeout=left)
        except queue.Empty:
            if not first_failure:
                _say(f"no end after {timeout:g} s; ending all processes")
            return first_failure or None
        if isinstance(code, Exception):
            raise code
        running -= 1
        if code and not first_failure:
            first_failure = code
            process.join_output()
            deadline = time.monotonic() + grace
            settled = time.monotonic() + _SETTLE_SECONDS
            others = f"; ending the others in {grace:g} s" if running else ""
            _say(f"process {process.index} failed with {_describe(code)}{others}")
        elif first_failure <= 128 and _was_killed(code) and time.monotonic() < settled:
            first_failure = code
            _say(f"process {process.index} failed with {_describe(code)}, which others noticed first")
    return first_failure


def _was_killed(code: int) -> bool:
    """Whether a signal ended a process from outside; by SIGABRT jax ends those that lost a peer."""
    return code > 128 and code != 128 + signal.SIGABRT


def _end(processes: list[_Process], number: int) -> None:
    """Ends what still runs, by ``number`` first and by SIGKILL where that does not help."""
    for process in processes:
        process.send_signal(number)
    deadline = time.monotonic() + TERMINATE_SECONDS
    for process in processes:
        if not process.join(max(0.0, deadline - time.monotonic())):
            process.send_signal(signal.SIGKILL)
    for process in processes:
        process.join(TERMINATE_SECONDS)
        process.join_output()


def _environment(env: Mapping[str, str] | None, platform: str | None, devices: int) -> dict[str, str]:
    """The environment of the processes."""
    merged = dict(os.environ)
    # jax's preemption service takes SIGTERM for itself, and then SIGTERM does not end a process.
    merged.setdefault("JAX_ENABLE_PREEMPTION_SERVICE", "false")
    merged.update(env or {})
    if platform is not None:
        merged["JAX_PLATFORMS"] = platform
    # Only the CPU platform reads this flag, which may be the one that jax falls back to.
    flags = [f for f in merged.get("XLA_FLAGS", "").split() if not f.startswith(_DEVICE_COUNT_FLAG)]
    if not any(f.startswith(_COLLECTIVE_TIMEOUT_FLAG) for f in flags):
        # Left alone, jax's collectives between CPUs wait half an hour for a rank that does not come.
        flags.append(f"{_COLLECTIVE_TIMEOUT_FLAG}={math.ceil(settings.timeout_seconds(merged))}")
    merged["XLA_FLAGS"] = " ".join([*flags, f"{_DEVICE_COUNT_FLAG}={devices}"])
    return merged


def _free_port() -> int:
    """A TCP port that nobody uses now.

    The kernel gives outgoing connections ports from 32768 on; one below is still free when the service opens
    it. Port 0 does not do, for the service does not tell which port it got.
    """
    for port in random.SystemRandom().sample(range(20000, 32768), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free TCP port was found between 20000 and 32767")


def _print_line(index: int, line: str) -> None:
    sys.stdout.write(f"[{index}] {line}")
    sys.stdout.flush()


def _say(text: str) -> None:
    print(f"jax-moriep launch: {text}", file=sys.stderr, flush=True)


def _describe(code: int) -> str:
    if code <= 128:
        return f"exit code {code}"
    try:
        return f"signal {code - 128} ({signal.Signals(code - 128).name})"
    except ValueError:
        return f"exit code {code}"


def add_parser(subparsers: Any) -> None:
    """Adds the parser of ``jax-moriep launch``."""
    parser = subparsers.add_parser(
        "launch",
        description="Runs a script on several processes of this machine, joined by jax.distributed.",
        usage="jax-moriep launch -n N [options] (script.py | -m module) [argument ...]",
    )
    parser.add_argument("-n", "--nprocs", type=int, required=True, help="number of processes")
    parser.add_argument("--devices-per-process", type=int, default=1, metavar="D", help="default: 1")
    parser.add_argument("--platform", help="value for JAX_PLATFORMS, such as cpu")
    parser.add_argument("--timeout", type=float, metavar="S", help="end all processes after S seconds")
    parser.add_argument(
        "--grace",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds that the others have to report, after one process failed (default: 10)",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="the script is a module's name")
    parser.add_argument("script", help="the script that every process runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's arguments")


def run(args: argparse.Namespace) -> int:
    """Runs ``jax-moriep launch``; returns the exit code of the process that failed first, or 0."""
    signal.signal(signal.SIGTERM, _exit_by_signal)
    signal.signal(signal.SIGHUP, _exit_by_signal)
    # What the processes print is theirs: a terminal that cannot show it is no reason to end them.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return launch(
            args.script,
            args.nprocs,
            args.devices_per_process,
            args=args.arguments,
            timeout=args.timeout,
            platform=args.platform,
            module=args.module,
            grace=args.grace,
        ).returncode
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _exit_by_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Turns a signal into an exception, so that the processes are ended on the way out."""
    del frame
    raise SystemExit(128 + number)
