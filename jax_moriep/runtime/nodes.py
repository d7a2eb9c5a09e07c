"""Nodes: runs of adjacent ranks on one machine, all of one size, so that each rank has a partner in each.

A node need not be a whole machine. Where machines hold different numbers of a group's ranks, or ranks of one
machine are not adjacent along the axis, nodes are as large as fits everywhere; in the worst case a rank each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import jax

from jax_moriep.errors import TransportError, rule
from jax_moriep.runtime import hosts, settings
from jax_moriep.runtime.mesh import Groups


def size_of(machines: Iterable[Sequence[str]], most: int | None) -> int:
    """P, the ranks of each node: the most that divides every run of ranks on one machine.

    Args:
      machines: for each group the machine of each of its ranks, in rank order.
      most: no node has more ranks; None for no such limit.
    """
    runs = [len(list(run)) for ranks in machines for _, run in itertools.groupby(ranks)]
    largest = math.gcd(*runs)
    return max(size for size in range(1, min(most or largest, largest) + 1) if largest % size == 0)


def ranks_per_node(groups: Groups) -> int:
    """P of some groups; asks the other processes once.

    Raises:
      TransportError: a process does not answer, or its ``JAX_MORIEP_RANKS_PER_NODE`` is another.
    """
    processes = [[d.process_index for d in ranks] for ranks in groups.devices]
    _check_equal(frozenset(itertools.chain(*processes)))
    machine = hosts.of_processes(itertools.chain(*processes))
    return size_of([[machine[p] for p in ranks] for ranks in processes], settings.RANKS_PER_NODE.value())


def _check_equal(processes: frozenset[int]) -> None:
    """Raises TransportError unless all processes have the same setting: they would run different programs."""
    if processes == {jax.process_index()}:
        return
    mine = settings.RANKS_PER_NODE.text() or "unset"
    for process in sorted(processes):
        if (theirs := hosts.limit_of(process)) != mine:
            raise TransportError(
                rule(
                    settings.RANKS_PER_NODE.name,
                    f"{mine} in process {jax.process_index()} and {theirs} in process {process}",
                    "be the same in all processes",
                    "set it for the whole job, or unset it",
                )
            )
