"""One process that the launcher started: its output, its end, and how it is ended."""

from __future__ import annotations

import dataclasses
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

TERMINATE_SECONDS = 5.0
"""Time between SIGTERM and SIGKILL."""


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that the launcher waits for.

    Attributes:
      title: whom it is about, as "process 3".
      code: its exit code, 128 + the signal's number if a signal ended it; or what the callback raised that
        takes the output.
      process: the process of this launcher that has ended, if it is about one.
      ends: how many of those that the launcher waits for, its processes and other nodes, have ended by it.
      verdict: another launcher speaks for the whole job.
      lost: a node does not answer, and what its peers wait for may never come.
      says: what is to be said of it instead of its code.
    """

    title: str
    code: int | Exception
    process: Process | None = None
    ends: int = 1
    verdict: bool = False
    lost: bool = False
    says: str = ""


class Process:
    """One process of a run, with a thread that passes its output on and one that waits for its end."""

    def __init__(
        self,
        index: int,
        title: str,
        command: list[str],
        environment: dict[str, str],
        events: queue.SimpleQueue[Event],
        on_line: Callable[[int, str], None],
        output_lock: threading.Lock,
    ) -> None:
        self.index = index
        self.title = title
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
            self._events.put(Event(self.title, error, self, ends=0))
            return False
        return True

    def _wait_for_end(self) -> None:
        # The process is kept as a zombie until its group is ended: so long nobody else can get its id.
        os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOWAIT)
        with self._end_lock:
            os.killpg(self._popen.pid, signal.SIGKILL)
            code = self._popen.wait()
        self.code = code if code >= 0 else 128 - code
        self._events.put(Event(self.title, self.code, self))


def end(processes: Sequence[Process], number: int) -> None:
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
