"""How the launchers of one job, one on each node, find each other and tell each other how it goes.

Node 0's launcher listens at the coordinator's address, the others connect to it, and all say a line of JSON
now and then. So a process that fails ends the job on all nodes, under its own name, and a node that is gone
or cut off is noticed by its silence: XLA's collectives would wait for it longer, and not say for whom.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from jax_moriep.cli.launch_process import Event
from jax_moriep.cli.launch_wait import TIMEOUT_CODE, check_seconds, describe, say
from jax_moriep.errors import ConfigError, MoriepError, TransportError, rule

_FORMAT = "jax-moriep launch 1"
_RETRY_SECONDS = 0.5
_GREETING_SECONDS = 10.0
_LONGEST_LINE = 1 << 16
_OWN_FAULT = 1


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Which nodes a job has, as the launcher on one of them is told.

    Attributes:
      count: how many.
      index: of this one.
      coordinator: "host:port" at which node 0's launcher listens and the others find it.
      lost_after: seconds without a word after which a node counts as lost.
      join_timeout: seconds that the launchers wait for each other at the beginning.

    Raises:
      ConfigError: a value breaks a rule.
    """

    count: int
    index: int
    coordinator: str
    lost_after: float = 30.0
    join_timeout: float = 300.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(rule("nodes", self.count, "be at least 1", "pass a positive int"))
        if not 0 <= self.index < self.count:
            must = f"be from 0 to nodes-1={self.count - 1}"
            raise ConfigError(rule("node", self.index, must, "give each node a number of its own"))
        for name, value in (("lost_after", self.lost_after), ("join_timeout", self.join_timeout)):
            check_seconds(name, value)
        host, _, port = self.coordinator.rpartition(":")
        if not _is_host(host) or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            cure = "pass an address of node 0 and a free port, the same on every node"
            must = "be HOST:PORT, with brackets around an IPv6 address"
            raise ConfigError(rule("coordinator", self.coordinator, must, cure))

    @property
    def host(self) -> str:
        """Of the coordinator, as it is written before a port."""
        return self.coordinator.rpartition(":")[0]

    @property
    def address(self) -> tuple[str, int]:
        """Of the coordinator, as sockets want it."""
        return self.host.strip("[]"), int(self.coordinator.rpartition(":")[2])

    @property
    def on_one_machine(self) -> bool:
        """Whether all are on this machine, as in a trial: nobody else reaches the coordinator."""
        host, _ = self.address
        return host in ("localhost", "::1") or host.startswith("127.")


def _is_host(text: str) -> bool:
    """Whether sockets take it for a name or an address: what they cannot encode is no OSError of theirs.

    Without brackets jax takes the end of an IPv6 address for a port, and waits at it.
    """
    if ":" in text and not (text.startswith("[") and text.endswith("]")):
        return False
    try:
        return bool(text.encode("idna"))
    except UnicodeError:
        return False


class _Wire:
    """Lines of JSON between two launchers."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.peer = str(connection.getpeername()[0]).removeprefix("::ffff:")
        self._connection = connection
        self._lock = threading.Lock()
        self._rest = b""
        connection.settimeout(seconds)

    def wait_for(self, seconds: float) -> None:
        self._connection.settimeout(seconds)

    def send(self, **said: Any) -> None:
        """Says something, if the other can still hear it: that it cannot is seen where it is listened to."""
        with contextlib.suppress(OSError), self._lock:
            self._connection.sendall(json.dumps(said).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next line.

        Raises:
          TimeoutError: none came.
          ConnectionError: the other has closed.
          ValueError: it is no launcher's.
        """
        while b"\n" not in self._rest:
            if len(self._rest) > _LONGEST_LINE:
                raise ValueError("a line without an end")
            if not (read := self._connection.recv(1 << 12)):
                raise ConnectionError("closed")
            self._rest += read
        line, self._rest = self._rest.split(b"\n", 1)
        said = json.loads(line)
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


class Party:
    """This node's launcher among those of its job, all of which have met.

    Attributes:
      count: how many others it hears the end of: node 0 of all, another node of node 0, which speaks for all.
      service_port: at which jax's coordination service is on node 0.
    """

    def __init__(
        self,
        nodes: Nodes,
        nprocs: int,
        wires: dict[int, _Wire],
        service_port: int,
        events: queue.SimpleQueue[Event],
    ) -> None:
        self.count = len(wires)
        self.service_port = service_port
        self._nodes, self._nprocs, self._wires, self._events = nodes, nprocs, wires, events
        self._over = threading.Event()
        for node, wire in wires.items():
            wire.wait_for(nodes.lost_after)
            threading.Thread(target=self._listen, args=(node, wire), daemon=True).start()
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def title(self, process: int) -> str:
        """What a process is called."""
        return f"process {process} on node {process // self._nprocs}"

    def tell_failed(self, process: int, code: int) -> None:
        """Tells the others that a process has failed."""
        for wire in self._wires.values():
            wire.send(failed=process, code=code)

    def tell_ended(self) -> None:
        """Tells node 0 that all processes of this node have ended."""
        if self._nodes.index:
            self._wires[0].send(ended=0)

    def close(self, code: int) -> None:
        """Leaves: node 0's launcher with the whole job's code, another's with its own."""
        self._over.set()
        for wire in self._wires.values():
            wire.send(**{"left" if self._nodes.index else "verdict": code})
            wire.close()

    def _keep_alive(self) -> None:
        while not self._over.wait(min(1.0, self._nodes.lost_after / 4)):
            for wire in self._wires.values():
                wire.send(alive=True)

    def _listen(self, node: int, wire: _Wire) -> None:
        over = False
        while not over:
            try:
                over = self._heard(node, wire.receive())
            except (OSError, ValueError, KeyError, TypeError) as error:
                if not self._over.is_set():
                    self._report(node, self._lost(node, wire, error))
                return

    def _heard(self, node: int, said: dict[str, Any]) -> bool:
        """Passes on what another launcher said; returns whether it was its last word."""
        who = f"node {node}'s launcher"
        if "failed" in said:
            process, code = int(said["failed"]), int(said["code"])
            for other, to in self._wires.items():
                if other != node:
                    to.send(failed=process, code=code)
            self._events.put(Event(self.title(process), code, ends=0))
        elif "ended" in said:
            self._events.put(Event(f"node {node}", 0))
            return True
        elif "verdict" in said:
            code = int(said["verdict"])
            says = f"has ended the job with {describe(code)}"
            self._events.put(Event(who, code, verdict=True, lost=code == TIMEOUT_CODE, says=says))
            return True
        elif "left" in said:
            code = int(said["left"])
            says = f"was ended, with {describe(code)}"
            # One runs out of time first: what it waited for is to be seen on the others too.
            self._report(node, Event(who, code or _OWN_FAULT, lost=code == TIMEOUT_CODE, says=says))
            return True
        elif "who" in said:
            who, says = str(said["who"]), str(said["says"])
            self._events.put(Event(who, int(said["code"]), ends=0, lost=bool(said["lost"]), says=says))
        return False

    def _report(self, node: int, event: Event) -> None:
        """Takes an end of another launcher for one, and tells the rest, who hear of it by node 0 only."""
        for other, to in self._wires.items():
            if other != node:
                to.send(who=event.title, says=event.says, code=event.code, lost=event.lost)
        self._events.put(event)

    def _lost(self, node: int, wire: _Wire, error: Exception) -> Event:
        first = node * self._nprocs
        who = f"node {node} ({wire.peer}, processes {first} to {first + self._nprocs - 1})"
        if isinstance(error, TimeoutError):
            says = f"has not answered for {self._nodes.lost_after:g} s: the machine or the link to it is down"
        else:
            says = f"has lost its launcher, or the link to it is down ({error})"
        return Event(who, _OWN_FAULT, lost=True, says=says)


def meet(
    nodes: Nodes, nprocs: int, devices_per_process: int, service_port: int, events: queue.SimpleQueue[Event]
) -> Party:
    """Waits until the launchers of all nodes are there.

    Args:
      nodes: which.
      nprocs: processes on each node.
      devices_per_process: devices of each.
      service_port: that node 0 chose for jax's coordination service; other nodes are told.
      events: where the party puts what it hears.

    Raises:
      ConfigError: a node was started with other numbers, or the coordinator's address is of another machine.
      TransportError: a node has not come in time.
    """
    shape = {"nodes": nodes.count, "nprocs": nprocs, "devices_per_process": devices_per_process}
    if nodes.index:
        wire, service_port = _join(nodes, shape)
        return Party(nodes, nprocs, {0: wire}, service_port, events)
    wires: dict[int, _Wire] = {}
    try:
        _gather(nodes, shape, wires)
    except BaseException as error:
        for wire in wires.values():
            wire.send(refused=str(error) if isinstance(error, MoriepError) else "its launcher was ended")
            wire.close()
        raise
    for wire in wires.values():
        wire.send(service_port=service_port)
    return Party(nodes, nprocs, wires, service_port, events)


def _gather(nodes: Nodes, shape: dict[str, int], wires: dict[int, _Wire]) -> None:
    """Node 0's part: fills ``wires``."""
    deadline = time.monotonic() + nodes.join_timeout
    with _listening(nodes) as server:
        while len(wires) < nodes.count - 1:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = [k for k in range(1, nodes.count) if k not in wires]
                raise TransportError(
                    f"of {nodes.count} nodes these did not come to {nodes.coordinator} within "
                    f"{nodes.join_timeout:g} s: {missing}; start `jax-moriep launch` on each"
                ) from None
            try:
                wire = _Wire(connection, _GREETING_SECONDS)
            except OSError:
                # It has gone already, as what looks for open ports does.
                connection.close()
                continue
            try:
                said = wire.receive()
                node, format_ = int(said["node"]), said["format"]
            except (OSError, ValueError, KeyError, TypeError):
                say(f"ignores {wire.peer}, which is no launcher of this version")
                wire.close()
                continue
            theirs = {name: said.get(name) for name in shape}
            if format_ != _FORMAT or theirs != shape:
                text = (
                    f"node {node} ({wire.peer}) was started with {theirs} by {format_!r}, node 0 with "
                    f"{shape} by {_FORMAT!r}; start all nodes alike"
                )
            elif not 0 < node < nodes.count or (node in wires and not wires[node].is_closed()):
                text = rule("node", node, "be another on each node", f"{wire.peer} gave it; correct one")
            else:
                if node in wires:
                    say(f"node {node} was started again, by {wire.peer}")
                    wires[node].close()
                wires[node] = wire
                continue
            wire.send(refused=text)
            wire.close()
            raise ConfigError(text)


@contextlib.contextmanager
def _listening(nodes: Nodes) -> Iterator[socket.socket]:
    host, port = nodes.address
    dual = socket.has_dualstack_ipv6()
    try:
        # The host must be one of this machine's: else the others would wait for somebody else.
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        must = f"be an address of node 0's machine with a free port ({error})"
        raise ConfigError(
            rule("coordinator", nodes.coordinator, must, "correct it, or take another port")
        ) from None
    with server:
        yield server


def _join(nodes: Nodes, shape: dict[str, int]) -> tuple[_Wire, int]:
    """Another node's part: the wire to node 0, and the port of jax's service there."""
    deadline = time.monotonic() + nodes.join_timeout
    seen: Exception | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            wire = _Wire(socket.create_connection(nodes.address, timeout=min(left, _GREETING_SECONDS)), left)
        except OSError as error:
            seen = error
            time.sleep(min(_RETRY_SECONDS, left))
            continue
        wire.send(format=_FORMAT, node=nodes.index, **shape)
        try:
            said = wire.receive()
            if "refused" not in said:
                return wire, int(said["service_port"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            # Node 0's launcher was ended, or was none: it may come again.
            seen = error
            wire.close()
            time.sleep(_RETRY_SECONDS)
            continue
        wire.close()
        raise ConfigError(f"node 0 refused node {nodes.index}: {said['refused']}")
    raise TransportError(
        f"node {nodes.index}: no launcher of node 0 with all its nodes at {nodes.coordinator} within "
        f"{nodes.join_timeout:g} s ({seen}); start `jax-moriep launch` on each, and let it reach that address"
    )


def why_name_misleads() -> str | None:
    """Why XLA's collectives for CPUs would not reach this machine from another, and the cure; or None.

    Gloo listens at the first address of the machine's own name at which it can.
    """
    name = socket.gethostname()
    cure = f"let {name!r} mean an address that the other nodes reach, for example in /etc/hosts"
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        return rule("hostname", name, f"resolve on its own machine ({error})", cure)
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
        if str(address[0]).startswith("127.") or address[0] == "::1":
            must = f"not be this machine's loopback {address[0]} in a job of several nodes on CPUs"
            return rule("hostname", name, must, cure)
        return None
    return rule("hostname", name, "mean an address of this machine", cure)
