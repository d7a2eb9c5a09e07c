"""How the launchers of one job, one on each node, find each other.

Node 0's launcher listens at the coordinator's address, and the others connect to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import queue
import selectors
import socket
import time
from collections.abc import Generator, Iterator
from typing import Any

from jax_moriep.errors import ConfigError, MoriepError, TransportError, rule
from jax_moriep.processes.nodes import Nodes
from jax_moriep.processes.party import Party
from jax_moriep.processes.process import Event
from jax_moriep.processes.wait import say
from jax_moriep.processes.wire import NONSENSE, Wire

_FORMAT = "jax-moriep launch 2"
_RETRY_SECONDS = 0.5
_GREETING_SECONDS = 10.0
"""Within which who connects must say who it is."""
_OTHER_ARGUMENTS = "what is to be another on each goes by an environment variable"


@dataclasses.dataclass(frozen=True)
class Start:
    """How a launcher was started: alike on all nodes, or the job would hang or compute something else.

    Attributes:
      nprocs: processes on each node.
      devices_per_process: devices of each.
      platform: value of JAX_PLATFORMS, None where it is not set.
      script: its name without the folder, which may be another on each machine, or "-m" and a module's name.
      arguments: of the script.
    """

    nprocs: int
    devices_per_process: int
    platform: str | None
    script: str
    arguments: tuple[str, ...]

    def as_message(self, nodes: Nodes) -> dict[str, Any]:
        """What a launcher says of it, as JSON has it."""
        return {"nodes": nodes.count, **dataclasses.asdict(self), "arguments": list(self.arguments)}


def meet(nodes: Nodes, start: Start, service_port: int, events: queue.SimpleQueue[Event]) -> Party:
    """Waits until the launchers of all nodes are there.

    Args:
      nodes: which.
      start: how this one was started.
      service_port: that node 0 chose for jax's coordination service; other nodes are told.
      events: where the party puts what it hears.

    Raises:
      ConfigError: a node was started differently, or the coordinator's address is of another machine.
      TransportError: a node has not come in time.
    """
    if nodes.index:
        wire, service_port = _join(nodes, start)
        return Party(nodes, start.nprocs, {0: wire}, service_port, events)
    wires: dict[int, Wire] = {}
    try:
        _gather(nodes, start, wires)
    except BaseException as error:
        for wire in wires.values():
            wire.send(refused=str(error) if isinstance(error, MoriepError) else "its launcher was ended")
            wire.close()
        raise
    for wire in wires.values():
        wire.send(service_port=service_port)
    return Party(nodes, start.nprocs, wires, service_port, events)


def _gather(nodes: Nodes, start: Start, wires: dict[int, Wire]) -> None:
    """Node 0's part: fills ``wires``."""
    deadline = time.monotonic() + nodes.join_timeout
    with _listening(nodes) as server, contextlib.closing(_greetings(server, deadline)) as greetings:
        for wire, node, said in greetings:
            who, ours = f"node {node} ({wire.peer})", start.as_message(nodes)
            if said["format"] != _FORMAT:
                text = f"{who} speaks {said['format']!r}, node 0 {_FORMAT!r}; install one version everywhere"
            elif differ := _differences(said, ours):
                theirs, mine = map(", ".join, zip(*differ, strict=True))
                text = f"{who} was started with {theirs}, node 0 with {mine}; start all nodes alike"
                if said.get("arguments") != ours["arguments"]:
                    text += f"; {_OTHER_ARGUMENTS}"
            elif not 0 < node < nodes.count or (node in wires and not wires[node].is_closed()):
                text = rule("node", node, "be another on each node", f"{wire.peer} gave it; correct one")
            else:
                if node in wires:
                    say(f"node {node} was started again, by {wire.peer}")
                    wires[node].close()
                wires[node] = wire
                if len(wires) == nodes.count - 1:
                    return
                continue
            wire.send(refused=text)
            wire.close()
            raise ConfigError(text)
    missing = [k for k in range(1, nodes.count) if k not in wires]
    raise TransportError(
        f"of {nodes.count} nodes these did not come to {nodes.coordinator} within {nodes.join_timeout:g} s: "
        f"{missing}; start `jax-moriep launch` on each"
    )


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[tuple[str, str]]:
    """What one launcher was started with and another was not, in words; of the arguments the first."""
    pairs = [(name, theirs.get(name), ours[name]) for name in ours if name != "arguments"]
    for i, of_both in enumerate(itertools.zip_longest(theirs.get("arguments") or (), ours["arguments"]), 1):
        if of_both[0] != of_both[1]:
            pairs.append((f"argument {i}", *of_both))
            break
    return [(f"{name}={their!r}", f"{name}={our!r}") for name, their, our in pairs if their != our]


def _greetings(
    server: socket.socket, deadline: float
) -> Generator[tuple[Wire, int, dict[str, Any]], None, None]:
    """What launchers say first, with their nodes, as it comes: who connects and is silent holds up nobody."""
    until: dict[Wire, float] = {}

    def take_out(wire: Wire) -> None:
        selector.unregister(wire)
        del until[wire]

    def ignore(wire: Wire) -> None:
        take_out(wire)
        say(f"ignores {wire.peer}, which is no launcher of this version")
        wire.close()

    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        try:
            while (now := time.monotonic()) < deadline:
                for wire in [wire for wire, last in until.items() if last <= now]:
                    ignore(wire)
                for key, _ in selector.select(min([deadline, *until.values()]) - now):
                    if key.fileobj is server:
                        if (wire := _accept(server)) is not None:
                            until[wire] = now + _GREETING_SECONDS
                            selector.register(wire, selectors.EVENT_READ, wire)
                        continue
                    wire = key.data
                    try:
                        said = wire.receive()
                        node, _ = int(said["node"]), said["format"]
                    except BlockingIOError:
                        continue  # the rest of it is still to come
                    except NONSENSE:
                        ignore(wire)
                        continue
                    take_out(wire)
                    wire.wait_for(_GREETING_SECONDS)
                    yield wire, node, said
        finally:
            for wire in until:
                wire.close()


def _accept(server: socket.socket) -> Wire | None:
    """Somebody who has connected, as a wire that waits for nothing; None where nobody is there any more."""
    try:
        connection, _ = server.accept()
    except OSError:
        return None
    try:
        return Wire(connection, 0.0)
    except OSError:
        # It has gone already, as what looks for open ports does.
        connection.close()
        return None


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
        server.setblocking(False)
        yield server


def _join(nodes: Nodes, start: Start) -> tuple[Wire, int]:
    """Another node's part: the wire to node 0, and the port of jax's service there."""
    deadline = time.monotonic() + nodes.join_timeout
    seen: Exception | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            wire = Wire(socket.create_connection(nodes.address, timeout=min(left, _GREETING_SECONDS)), left)
        except OSError as error:
            seen = error
            time.sleep(min(_RETRY_SECONDS, left))
            continue
        wire.send(format=_FORMAT, node=nodes.index, **start.as_message(nodes))
        try:
            said = wire.receive()
            if "refused" not in said:
                return wire, int(said["service_port"])
        except NONSENSE as error:
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
