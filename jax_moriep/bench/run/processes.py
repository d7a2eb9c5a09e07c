"""Runs a module of the bench on several processes of this machine, and quotes the one that failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jax_moriep.processes.launch import launch

_SHOWN_LINES = 30
_KEPT_LINES = 400


def run(
    module: str,
    folder: Path,
    processes: int,
    devices: int,
    *,
    env: dict[str, str] | None,
    timeout: float | None,
    platform_name: str | None,
    on_line: Callable[[str], None] = lambda line: None,
) -> str | None:
    """Runs ``python -m MODULE FOLDER`` in each process.

    Args:
      module: its name.
      folder: has the job, and takes what the processes found.
      processes: how many.
      devices: of each process.
      env: variables for the processes.
      timeout: seconds after which the processes are ended; None for no limit.
      platform_name: value for JAX_PLATFORMS; None leaves it as it is.
      on_line: takes each line that a process writes.

    Returns:
      None, or how the processes failed, with the last lines of the one that failed first.
    """
    lines: list[list[str]] = [[] for _ in range(processes)]

    def keep(process: int, line: str) -> None:
        on_line(line)
        lines[process].append(line.rstrip("\n"))
        del lines[process][:-_KEPT_LINES]

    ended = launch(
        module,
        processes,
        devices,
        args=[str(folder)],
        env=env,
        timeout=timeout,
        platform=platform_name,
        module=True,
        on_line=keep,
    )
    if not ended.returncode:
        return None
    first = next((i for i, code in enumerate(ended.codes) if code == ended.returncode), 0)
    shown = "\n".join(lines[first][-_SHOWN_LINES:])
    return f"process {first} of the bench ended with code {ended.returncode}; it said:\n{shown}"
