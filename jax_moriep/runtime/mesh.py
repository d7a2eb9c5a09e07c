"""Which mesh a call runs on, and the groups of ranks that one of its axes makes: which device is which rank.

A group is the devices along the expert-parallel axis that share all other mesh coordinates. The table of a
mesh's groups has a name made from the global device ids, so every process computes the same name, and several
meshes, layers and configs live side by side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jax_moriep.errors import ShardingError, rule
from jax_moriep.runtime import compat

_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups that one axis of a mesh makes.

    Attributes:
      devices: [number of groups, R] devices in rank order.
      name: what the compiled module calls them.
    """

    devices: np.ndarray
    name: str

    @classmethod
    def of(cls, devices: np.ndarray) -> Groups:
        """Groups of devices [number of groups, R]; the name is made from the global device ids."""
        ids = [[d.id for d in group] for group in devices]
        return cls(devices, f"{devices.shape[0]}x{devices.shape[1]}-{_digest(ids)}")

    def split(self, num_ranks: int) -> Groups:
        """Groups of each run of so many ranks; a divisor of R."""
        return Groups.of(self.devices.reshape(-1, num_ranks))

    @property
    def num_ranks(self) -> int:
        """R."""
        return self.devices.shape[1]

    @property
    def platform(self) -> str:
        """ "cpu" or "gpu"."""
        return self.devices.flat[0].platform


def groups_of(mesh: jax.sharding.Mesh, ep_axis: str) -> Groups:
    """The groups along ``ep_axis``.

    Args:
      mesh: a mesh with devices.
      ep_axis: one of its axes.

    Raises:
      ShardingError: the mesh has no such axis.
    """
    check_axis(mesh, ep_axis, "ep_axis")
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index(ep_axis), -1)
    return Groups.of(devices.reshape(-1, devices.shape[-1]))


def abstract_name(mesh: Any, ep_axis: str) -> str:
    """A name for a mesh without devices: such a module is lowered and read, but not run."""
    return f"abstract-{_digest([sorted(mesh.shape.items()), ep_axis])}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def check_axis(mesh: Any, axis: str, name: str) -> None:
    """Raises ShardingError unless the mesh has the axis."""
    if axis not in mesh.axis_names:
        raise ShardingError(
            rule(
                name,
                axis,
                f"be an axis of the mesh {dict(mesh.shape)}",
                "name an axis of the mesh, or pass another mesh",
            )
        )


def resolve(mesh: Any) -> Mesh | AbstractMesh:
    """The mesh that a layer runs on: the caller's, or that of ``jax.set_mesh``.

    Raises:
      ShardingError: it is no mesh, there is none, or the call is inside a shard_map.
    """
    context = jax.sharding.get_abstract_mesh()
    if not context.empty and AxisType.Manual in context.axis_types:
        raise ShardingError(
            f"ep_moe opens a shard_map of its own and cannot run inside one (manual axes: "
            f"{context.manual_axes}); there, call jm.route, jm.dispatch, jm.expert_mlp and jm.combine"
        )
    if mesh is not None:
        if not isinstance(mesh, (Mesh, AbstractMesh)):
            raise ShardingError(
                rule("mesh", mesh, "be a jax.sharding.Mesh or AbstractMesh", "make one with jax.make_mesh")
            )
        return mesh
    concrete = compat.concrete_mesh()
    if concrete is not None:
        return concrete
    if not context.empty:
        return context
    raise ShardingError(
        "mesh=None must find a mesh in context; pass mesh=, or call ep_moe under jax.set_mesh(mesh)"
    )


def mesh_in_shard_map(axis_name: str) -> Any:
    """The mesh of the shard_map around the call, with its devices.

    The context there tells the mesh's shape but not its devices. They are taken from ``jax.set_mesh``, else
    from a mesh that ``initialize`` opened, else from ``jax.devices()`` in order; the native handlers check
    that each device's rank is the one the program computes, so a wrong guess is an error and no wrong number.

    Returns:
      A ``Mesh``, or the context's ``AbstractMesh`` where there are too few devices to run it.

    Raises:
      ShardingError: there is no such axis in the context.
    """
    abstract = jax.sharding.get_abstract_mesh()
    if abstract.empty:
        raise ShardingError(
            f"axis_name={axis_name!r} must be a mesh axis of an enclosing jax.shard_map; there is none"
        )
    check_axis(abstract, axis_name, "axis_name")
    wanted = dict(abstract.shape)
    context = compat.concrete_mesh()
    for mesh in [*([context] if context is not None else []), *reversed(_opened_meshes)]:
        if dict(mesh.shape) == wanted:
            return mesh
    devices = jax.devices()
    if len(devices) < abstract.size:
        return abstract
    return jax.sharding.Mesh(
        np.array(devices[: abstract.size]).reshape(tuple(wanted.values())), tuple(wanted)
    )


_opened_meshes: list[jax.sharding.Mesh] = []


def remember_mesh(mesh: jax.sharding.Mesh) -> None:
    """Lets ``mesh_in_shard_map`` find a mesh by its shape; the mesh remembered last wins."""
    with _lock:
        if mesh in _opened_meshes:
            _opened_meshes.remove(mesh)
        _opened_meshes.append(mesh)
