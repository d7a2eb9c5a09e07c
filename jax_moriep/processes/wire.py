"""Lines of JSON between the launchers of two nodes."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

NONSENSE = (OSError, ValueError, KeyError, TypeError, OverflowError)
"""What is raised where a line, or what is taken out of it, is not what a launcher says, or none comes."""
_LONGEST_LINE = 1 << 22
"""A script's arguments are in one, and the kernel lets them have two million bytes."""


class Wire:
    """One connection; what is said is an object, and sending may come from any thread."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.peer = str(connection.getpeername()[0]).removeprefix("::ffff:")
        self._connection = connection
        self._lock = threading.Lock()
        self._rest = b""
        connection.settimeout(seconds)

    def fileno(self) -> int:
        """For selectors."""
        return self._connection.fileno()

    def wait_for(self, seconds: float) -> None:
        """How long ``receive`` waits."""
        self._connection.settimeout(seconds)

    def send(self, **said: Any) -> None:
        """Says something, if the other can still hear it: that it cannot is seen where it is listened to."""
        with contextlib.suppress(OSError), self._lock:
            self._connection.sendall(json.dumps(said).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next line.

        Raises:
          TimeoutError: none came, or BlockingIOError where it does not wait; what came of it is kept.
          ConnectionError: the other has closed.
          ValueError: it is no launcher's.
        """
        while b"\n" not in self._rest:
            if len(self._rest) > _LONGEST_LINE:
                raise ValueError("a line without an end")
            if not (read := self._connection.recv(1 << 16)):
                raise ConnectionError("closed")
            self._rest += read
        line, self._rest = self._rest.split(b"\n", 1)
        try:
            said = json.loads(line)
        except RecursionError as error:
            raise ValueError("too many brackets") from error
        if not isinstance(said, dict):
            raise ValueError("no object of JSON")
        return said

    def is_closed(self) -> bool:
        """Whether the other has gone before it has said anything more."""
        seconds = self._connection.gettimeout()
        self._connection.settimeout(0)
        try:
            return not self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self._connection.settimeout(seconds)

    def close(self) -> None:
        # A thread that still reads is told, which closing alone does not do.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
