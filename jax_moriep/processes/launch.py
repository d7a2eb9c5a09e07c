"""``launch``: runs a script on processes of one or more machines, joined by jax.distributed.

All processes end together: when one fails, the others get a short time to report what they saw and are then
ended, and so they are on Ctrl-C, on SIGTERM, after a timeout, when a launcher itself is killed, and when a
machine or the link to it is down.
"""

from __future__ import annotations

import dataclasses
import math
import os
import queue
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jax_moriep.errors import ConfigError, rule
from jax_moriep.processes.meeting import Start, meet
from jax_moriep.processes.nodes import Nodes, has_only_cpus, why_name_misleads
from jax_moriep.processes.process import Event, Process, end
from jax_moriep.processes.wait import check_seconds, wait
from jax_moriep.runtime import compat, settings

_CHILD = Path(__file__).with_name("child.py")
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
_COLLECTIVE_TIMEOUT_FLAG = "--xla_cpu_collective_timeout_seconds"


@dataclasses.dataclass(frozen=True)
class LaunchResult:
    """How a run ended.

    Attributes:
      returncode: 0, or the exit code of the process that failed first (128 + the signal's number if a signal
        ended it), 1 if another node was lost, or ``wait.TIMEOUT_CODE``.
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
    nodes: Nodes | None = None,
) -> LaunchResult:
    """Runs a script on several processes; in each, jax.distributed is initialized before the script starts.

    A process that fails ends at once, without its exit handlers, for jax's own would wait for the peers.

    Args:
      script: path of the script, or with ``module`` a module's name; each process runs it as ``__main__``.
      nprocs: number of processes on this machine.
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
      nodes: of which machines the job is, where it is of several: each has a launcher, called alike but for
        ``nodes.index``, and its processes are those from ``nodes.index * nprocs`` on.

    Returns:
      The exit codes, and the outputs with ``capture``, of this machine's processes; the return code is the
      same on all machines.

    Raises:
      ConfigError: ``nprocs`` or ``devices_per_process`` is not positive, a time cannot be waited, there is no
        such script, or the nodes were started differently.
      TransportError: a node has not come in time.
    """
    _check(script, nprocs, devices_per_process, module)
    if timeout is not None:
        check_seconds("timeout", timeout)
    check_seconds("grace", grace, zero=True)
    environment = _environment(env, platform, devices_per_process)
    if nodes is None or nodes.count == 1:
        # Of one machine nobody needs the coordinator's address.
        nodes = Nodes(1, 0, "127.0.0.1:1")
    if nodes.count > 1 and not nodes.on_one_machine and has_only_cpus(environment):
        if (why := why_name_misleads()) is not None:
            raise ConfigError(why)

    lines: list[list[str]] = [[] for _ in range(nprocs)]
    first = nodes.index * nprocs
    if on_line is None:
        on_line = (lambda i, line: lines[i - first].append(line)) if capture else _print_line
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    port = _free_port()
    start = Start(
        nprocs,
        devices_per_process,
        environment.get("JAX_PLATFORMS") or None,
        f"-m {script}" if module else os.path.basename(os.fspath(script)),
        tuple(args),
    )
    party = meet(nodes, start, port, events) if nodes.count > 1 else None
    coordinator = f"{nodes.host}:{party.service_port if party else port}"
    service = None
    output_lock = threading.Lock()
    processes: list[Process] = []
    final_signal = signal.SIGTERM
    returncode = 128 + signal.SIGTERM
    try:
        if not nodes.index:
            listen_at = f"[::]:{port}" if party else coordinator
            service = compat.coordination_service(listen_at, nodes.count * nprocs)
        for i in range(nprocs):
            numbers = (nodes.count * nprocs, first + i, i * devices_per_process, devices_per_process)
            command = _command(coordinator, numbers, script, module, args)
            title = party.title(first + i) if party else f"process {i}"
            processes.append(Process(first + i, title, command, environment, events, on_line, output_lock))
        outcome = wait(events, nprocs, timeout, grace, party)
        returncode = outcome.code
        if outcome.stuck:
            # Under faulthandler an abort prints each thread's stack: a run that hangs shows where.
            final_signal = signal.SIGABRT
    finally:
        # The others hear of it first, for jax ends their processes when its service goes.
        if party:
            party.close(returncode)
        end(processes, final_signal)
        if service is not None:
            service.shutdown()
    return LaunchResult(returncode, [p.code for p in processes], ["".join(text) for text in lines])


def _check(script: str | os.PathLike[str], nprocs: int, devices_per_process: int, module: bool) -> None:
    for name, value in (("nprocs", nprocs), ("devices_per_process", devices_per_process)):
        if value < 1:
            raise ConfigError(rule(name, value, "be at least 1", "pass a positive int"))
    if not module and not Path(script).is_file():
        raise ConfigError(rule("script", os.fspath(script), "be an existing file", "correct the path"))


def _command(
    coordinator: str,
    numbers: tuple[int, ...],
    script: str | os.PathLike[str],
    module: bool,
    args: Sequence[str],
) -> list[str]:
    """Of one process, as ``child.py`` reads it; ``numbers`` are those behind the coordinator there."""
    command = [sys.executable, "-u", os.fspath(_CHILD), coordinator]
    command += [str(n) for n in (*numbers, os.getpid())]
    return [*command, "module" if module else "file", os.fspath(script), *args]


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
        # Left alone, jax's collectives between CPUs wait far longer for a rank that does not come.
        flags.append(f"{_COLLECTIVE_TIMEOUT_FLAG}={math.ceil(settings.TIMEOUT.value(merged))}")
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
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free TCP port was found between 20000 and 32767")


def _print_line(index: int, line: str) -> None:
    sys.stdout.write(f"[{index}] {line}")
    sys.stdout.flush()
