"""What one process of ``jax-moriep launch`` runs: join jax.distributed, then run the script as ``__main__``.

The launcher starts this file by its path and it imports nothing of jax_moriep, so that nothing heavy comes
before the first lines of ``main``.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import runpy
import signal
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Runs one process.

    Args:
      argv: coordinator address, number of processes, this process's id, the first of its devices on the
        machine, devices per process, the launcher's process id, "file" or "module", the script's path or the
        module's name, and the script's arguments.
    """
    coordinator, num_processes, process_id, first, devices, launcher_pid, kind, target, *args = argv
    _die_with(int(launcher_pid))
    # On a crash, and when the launcher aborts a run that took too long, each thread's stack is printed.
    faulthandler.enable()

    import jax

    jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=int(num_processes),
        process_id=int(process_id),
        # On a machine with accelerators each process takes its own share of them.
        local_device_ids=range(int(first), int(first) + int(devices)),
        # The launcher hosts the service that all connect to. Process 0 starts one in any case: it gets a port
        # of its own, which nobody uses.
        coordinator_bind_address="127.0.0.1:0",
    )
    sys.argv = [target, *args]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.abspath(target)) if kind == "file" else os.getcwd()
    try:
        if kind == "file":
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code not in (None, 0):
            if not isinstance(stop.code, int):
                print(stop.code, file=sys.stderr)
            _leave(stop.code if isinstance(stop.code, int) else 1)
    except BaseException as error:  # noqa: BLE001 - any error ends this process, and in the same way
        sys.excepthook(type(error), error, error.__traceback__)
        _leave(1)


def _die_with(launcher_pid: int) -> None:
    """Has the kernel kill this process when the launcher dies, even by SIGKILL."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher_pid:
        sys.exit("the launcher is gone")


def _leave(code: int) -> NoReturn:
    """Ends a failed process without its exit handlers.

    One of them is jax's, which waits until every process of the job has come to its end too: the peers of a
    failed process would learn of the failure minutes later.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    main(sys.argv[1:])
