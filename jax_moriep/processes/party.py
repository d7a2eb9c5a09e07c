"""The launchers of one job, one on each node, once they have met: they tell each other how it goes.

All say a line of JSON now and then. So a process that fails ends the job on all nodes, under its own name,
and a node that is gone or cut off is noticed by its silence: XLA's collectives would wait for it longer, and
not say for whom.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

from jax_moriep.processes.nodes import Nodes
from jax_moriep.processes.process import Event
from jax_moriep.processes.wait import TIMEOUT_CODE, describe
from jax_moriep.processes.wire import NONSENSE, Wire

_OWN_FAULT = 1


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
        wires: dict[int, Wire],
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

    def _listen(self, node: int, wire: Wire) -> None:
        over = False
        while not over:
            try:
                over = self._heard(node, wire.receive())
            except NONSENSE as error:
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

    def _lost(self, node: int, wire: Wire, error: Exception) -> Event:
        first = node * self._nprocs
        who = f"node {node} ({wire.peer}, processes {first} to {first + self._nprocs - 1})"
        if isinstance(error, TimeoutError):
            says = f"has not answered for {self._nodes.lost_after:g} s: the machine or the link to it is down"
        else:
            says = f"has lost its launcher, or the link to it is down ({error})"
        return Event(who, _OWN_FAULT, lost=True, says=says)
