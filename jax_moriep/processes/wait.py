"""How the launcher decides that a run is over, and by which code."""

from __future__ import annotations

import dataclasses
import queue
import signal
import sys
import time
from typing import Protocol

from jax_moriep.errors import ConfigError, rule
from jax_moriep.processes.process import Event

TIMEOUT_CODE = 124
"""Exit code of a run that took longer than its timeout, as the command ``timeout`` has it."""
_MOST_SECONDS = 1e9
"""What threads and sockets can wait ends somewhere; this is thirty years."""
_SETTLE_SECONDS = 1.0
"""Within this time after the first failure one that says more counts as the first (``_weight``): a process's
connections close before it has ended and its memory is given back, and peers that notice may end sooner."""
_LOST_A_PEER = (1, 128 + signal.SIGABRT)
"""How those end that lost a peer: an exception that nobody caught, and jax's own abort."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      code: 0, that of the process that failed first, or ``TIMEOUT_CODE``.
      stuck: what still runs may wait for ever, so that it is worth seeing where.
    """

    code: int
    stuck: bool = False


class Others(Protocol):
    """The launchers of a job's other nodes."""

    count: int
    """How many of them this launcher hears the end of."""

    def tell_failed(self, process: int, code: int) -> None:
        """A process of this node has failed."""
        ...

    def tell_ended(self) -> None:
        """All processes of this node have ended."""
        ...


def wait(
    events: queue.SimpleQueue[Event],
    nprocs: int,
    timeout: float | None,
    grace: float,
    others: Others | None = None,
) -> Outcome:
    """Waits until all processes have ended, or shall be ended.

    Args:
      events: where ends and failures come.
      nprocs: how many processes this launcher has.
      timeout: seconds that the run may take.
      grace: seconds that the others have after the first failure.
      others: the launchers of other nodes.

    Raises:
      Exception: an output's callback raised it.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    first_failure, lost, settled = 0, False, 0.0
    own, running = nprocs, nprocs + (others.count if others else 0)
    while running:
        try:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            event = events.get(timeout=left)
        except queue.Empty:
            if not first_failure:
                say(f"no end after {timeout:g} s; ending all processes")
            return Outcome(first_failure or TIMEOUT_CODE, stuck=lost or not first_failure)
        if isinstance(event.code, Exception):
            raise event.code
        code = event.code
        running -= event.ends
        if event.process is not None:
            own -= 1
            if others is not None:
                if code:
                    others.tell_failed(event.process.index, code)
                if not own:
                    others.tell_ended()
        if code and not first_failure:
            first_failure, lost = code, event.lost
            if event.process is not None:
                event.process.join_output()
            deadline = time.monotonic() + grace
            settled = 0.0 if event.verdict else time.monotonic() + _SETTLE_SECONDS
            rest = f"; ending the others in {grace:g} s" if own else ""
            say(f"{event.title} {event.says or f'failed with {describe(code)}'}{rest}")
        elif code and event.verdict:
            # All nodes end by the one code, whatever else is still heard here.
            first_failure, settled = code, 0.0
        elif time.monotonic() < settled and _weight(code) > _weight(first_failure) and not event.lost:
            first_failure = code
            say(f"{event.title} {event.says or f'failed with {describe(code)}'}, which others noticed first")
    return Outcome(first_failure)


def check_seconds(name: str, value: float, *, zero: bool = False) -> None:
    """Refuses a time that nothing can wait.

    Args:
      name: of the argument.
      value: its seconds.
      zero: none at all are a time too.

    Raises:
      ConfigError: it is negative, not a number, or endless.
    """
    if not (0 < value <= _MOST_SECONDS or (zero and value == 0)):
        must = f"be {'at least 0' if zero else 'positive'}, and at most {_MOST_SECONDS:g}"
        raise ConfigError(rule(name, value, must, "pass a number of seconds"))


def _weight(code: int) -> int:
    """How surely a process that ended so is the cause and no other's victim: most if a signal killed it."""
    if not code or code in _LOST_A_PEER:
        return 0
    return 2 if code > 128 else 1


def say(text: str) -> None:
    """Tells the user something that no process of the run said."""
    print(f"jax-moriep launch: {text}", file=sys.stderr, flush=True)


def describe(code: int) -> str:
    """An exit code for people."""
    if code <= 128:
        return f"exit code {code}"
    try:
        return f"signal {code - 128} ({signal.Signals(code - 128).name})"
    except ValueError:
        return f"exit code {code}"
