"""Where an exchange runs: what a transport and an implementation of the experts are asked about."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from jax_moriep.runtime import compat, hosts, library, nodes, settings
from jax_moriep.runtime.mesh import check_axis, groups_of


@dataclasses.dataclass(frozen=True)
class Place:
    """A mesh axis and the machinery under it.

    Attributes:
      platform: of the devices: "cpu", "gpu", ...; None for a mesh without devices, on which programs are only
        lowered.
      architecture: of the devices: "sm_90", "gfx942", ...; "" where there is no such name.
      num_ranks: R.
      num_processes: how many processes hold the ranks of all groups.
      mesh: the mesh; None where only a platform is asked about.
      ep_axis: its axis whose devices are the ranks.
    """

    platform: str | None
    architecture: str = ""
    num_ranks: int = 1
    num_processes: int = 1
    mesh: Any = None
    ep_axis: str = ""

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, ep_axis: str) -> Place:
        """The place that an axis of a mesh is.

        Raises:
          ShardingError: the mesh has no such axis.
        """
        check_axis(mesh, ep_axis, "ep_axis")
        num_ranks = mesh.shape[ep_axis]
        if isinstance(mesh, jax.sharding.AbstractMesh):
            return cls(None, num_ranks=num_ranks, mesh=mesh, ep_axis=ep_axis)
        first = mesh.devices.flat[0]
        processes = len({d.process_index for d in mesh.devices.flat})
        return cls(first.platform, compat.architecture(first), num_ranks, processes, mesh, ep_axis)

    @property
    def backend(self) -> str | None:
        """The native backend of the devices: "cpu", "cuda", "rocm", or None."""
        return None if self.platform is None else library.backend_of(self.platform)

    @functools.cached_property
    def node_of_ranks(self) -> tuple[tuple[int, ...], ...]:
        """For each group the machine of each rank, numbered as they come. Asks the other processes once.

        Raises:
          TransportError: a process does not answer.
        """
        if self.mesh is None or self.platform is None:
            return ((0,) * self.num_ranks,)
        devices = groups_of(self.mesh, self.ep_axis).devices
        return tuple(hosts.numbers(d.process_index for d in row) for row in devices)

    @functools.cached_property
    def num_nodes(self) -> int:
        """The most machines that the ranks of one group are on. Asks the other processes once.

        Raises:
          TransportError: a process does not answer.
        """
        return max(len(set(row)) for row in self.node_of_ranks)

    @functools.cached_property
    def ranks_per_node(self) -> int:
        """P: of how many ranks each node of transport="two_level" is. Asks the other processes once.

        Raises:
          TransportError: a process does not answer, or the setting is wrong or another there.
        """
        if self.mesh is None or self.platform is None:
            return nodes.size_of([[""] * self.num_ranks], settings.RANKS_PER_NODE.value())
        return nodes.ranks_per_node(groups_of(self.mesh, self.ep_axis))

    @property
    def devices_per_process(self) -> int:
        """How many ranks of all groups this process holds."""
        if self.mesh is None or self.platform is None:
            return 1
        return sum(d.process_index == jax.process_index() for d in self.mesh.devices.flat)
