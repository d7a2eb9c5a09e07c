"""From a mesh to groups of ranks: which device is which rank, and the opening of their shared memory.

A group is the devices along the expert-parallel axis that share all other mesh coordinates. Its name is
made from the global device ids, so every process computes the same name, and several meshes, layers and
configs live side by side.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import functools
import hashlib
import json
import threading
import time
from typing import Any

import jax
import numpy as np

from jax_moriep.errors import ShardingError, TransportError, rule
from jax_moriep.runtime import compat, hosts, library, memory, settings, targets, watchdog
from jax_moriep.runtime.store import DistributedStore, Store

_ERROR_BYTES = 1024
_ADDRESS_WORDS = 12
_CONNECTED, _FAILED = 2, 3
_generations: dict[tuple[str, str], int] = {}
_on_gpus: dict[tuple[str, str], ctypes.CDLL] = {}
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


def open_groups(groups: Groups, backend: str, *, again: bool = False, far: bool = False) -> None:
    """Opens a backend's groups of a mesh axis; does nothing for groups that are open.

    Arenas of this process's ranks are made and announced at once; the peers are connected in the background,
    because another process may trace its program later. The first exchange waits for the connection.

    Args:
      groups: the groups.
      backend: "cpu", "cuda", "rocm" or "mori".
      again: make groups that have failed anew, and return only when every peer is connected; every process
        must do so.
      far: whether ranks may be on other machines, to which the backend has a way of its own.

    Raises:
      LibraryError: the native library is missing or does not fit.
      TransportError: a group could not be opened or connected, or an environment variable breaks its rule.
    """
    settings.check()
    targets.register(backend)
    native = loaded(backend)
    with _lock:
        state = native.moriep_group_state(groups.name.encode())
        if state == 0 or (state == _FAILED and again):
            if backend == "cpu":
                memory.keep_freed()
            _open(native, backend, groups, far)
            if backend != "cpu":
                _on_gpus[backend, groups.name] = native
            if any(d.process_index != jax.process_index() for d in groups.devices.flat):
                watchdog.watch(
                    f"{backend} {groups.name}", groups.platform, lambda: _failure(native, groups.name)
                )
    if again:
        wait_connected(native, groups.name)


def _failure(native: ctypes.CDLL, name: str) -> str | None:
    """Why a group has failed, or None."""
    buffer = ctypes.create_string_buffer(_ERROR_BYTES)
    failed = native.moriep_group_failure(name.encode(), buffer, _ERROR_BYTES)
    return buffer.value.decode(errors="replace") if failed else None


def check_failures() -> None:
    """Raises TransportError if an exchange of this process has failed on a GPU.

    There an exchange runs after the call that enqueued it, and XLA replays it without a call, so nothing
    raises by itself; the results of a step that failed, and of all after it, are NaN.
    """
    for (_, name), native in list(_on_gpus.items()):
        check_group(native, name)


def check_group(native: ctypes.CDLL, name: str) -> None:
    """Raises TransportError if a backend's group of this process has failed."""
    if (why := _failure(native, name)) is not None:
        raise TransportError(why)


def _open(native: ctypes.CDLL, backend: str, groups: Groups, far: bool) -> None:
    name = groups.name.encode()
    num_groups, num_ranks = groups.devices.shape
    me = jax.process_index()
    local = np.array([d.process_index == me for d in groups.devices.flat], dtype=np.uint8)
    ids = np.array([_ordinal(d, me) for d in groups.devices.flat], dtype=np.int64)
    check(
        native.moriep_group_open(
            name,
            num_groups,
            num_ranks,
            ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)),
            local.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)),
            settings.TIMEOUT.value(),
            *error_buffer(),
        )
    )
    local = local.reshape(num_groups, num_ranks)
    mine = [g for g in range(num_groups) if local[g].any()]
    if all(local[g].all() for g in mine):
        return
    generation = _generations[backend, groups.name] = _generations.get((backend, groups.name), -1) + 1
    prefix = f"jax_moriep/{backend}/{groups.name}/{generation}"
    store = DistributedStore()
    host = hosts.identity()
    for g in mine:
        for r in np.flatnonzero(local[g]):
            address = (ctypes.c_int64 * _ADDRESS_WORDS)()
            check(native.moriep_group_address(name, g, int(r), address, *error_buffer()))
            store.put(f"{prefix}/{g}/{r}", json.dumps({"host": host, "address": list(address)}).encode())
    missing = [(g, int(r)) for g in mine for r in np.flatnonzero(~local[g].astype(bool))]
    deadline = time.monotonic() + settings.TIMEOUT.value()
    threading.Thread(
        target=_connect,
        args=(native, groups.name, prefix, store, host, far, missing, deadline),
        daemon=True,
        name="moriep-connect",
    ).start()


def _ordinal(device: Any, process_index: int) -> int:
    """What XLA tells a handler: on a GPU the process's own number of the device, else its global id."""
    if device.platform != "gpu":
        return device.id
    return device.local_hardware_id if device.process_index == process_index else -1


def _connect(
    native: ctypes.CDLL,
    name: str,
    prefix: str,
    store: Store,
    host: str,
    far: bool,
    missing: list[tuple[int, int]],
    deadline: float,
) -> None:
    """Connects the ranks of other processes; what goes wrong is told by the exchange that waits for it."""
    for g, r in missing:
        try:
            peer = json.loads(store.get(f"{prefix}/{g}/{r}", deadline))
            near = peer["host"] == host
            if not near and not far:
                raise TransportError(
                    "it runs on another machine, and this transport needs one machine; use "
                    "transport='collective'"
                )
            # Zeros: there is no memory in common.
            address = (ctypes.c_int64 * _ADDRESS_WORDS)(*(peer["address"] if near else ()))
            check(native.moriep_group_connect(name.encode(), g, r, address, *error_buffer()))
        except Exception as e:  # noqa: BLE001 - a thread has nobody to raise to
            native.moriep_group_connect_failed(name.encode(), g, f"rank {r}: {e}".encode())
            return


def has_failed(native: ctypes.CDLL, name: str) -> bool:
    """Whether a backend's group of this process has failed."""
    return native.moriep_group_state(name.encode()) == _FAILED


def wait_connected(native: ctypes.CDLL, name: str) -> None:
    """Returns when all ranks of a backend's group are connected.

    Raises:
      TransportError: the group has failed, or a rank has not come in time.
    """
    deadline = time.monotonic() + settings.TIMEOUT.value()
    while native.moriep_group_state(name.encode()) != _CONNECTED:
        if native.moriep_group_state(name.encode()) == _FAILED:
            raise TransportError(
                f"group {name} has failed: {_failure(native, name)}; restart the job, or call jm.initialize "
                "in every process"
            )
        if time.monotonic() > deadline:
            raise TransportError(
                f"group {name} was not connected within {settings.TIMEOUT.value():g} s; does every process "
                "call jm.initialize?"
            )
        time.sleep(0.005)


_error = threading.local()


def error_buffer() -> tuple[Any, int]:
    """This thread's buffer for the text of a library function's failure, and its size."""
    _error.buffer = ctypes.create_string_buffer(_ERROR_BYTES)
    return _error.buffer, _ERROR_BYTES


def check(code: int) -> None:
    """Raises TransportError with the text in this thread's buffer unless a library function gave 0."""
    if code:
        raise TransportError(_error.buffer.value.decode(errors="replace"))


@functools.cache
def loaded(backend: str) -> ctypes.CDLL:
    """A backend's library, whose functions know their types.

    Raises:
      LibraryError: it is missing or does not fit.
    """
    lib = library.load(backend)
    i64, i32, text = ctypes.c_int64, ctypes.c_int32, ctypes.c_char_p
    i64_array = ctypes.POINTER(i64)
    prototypes: dict[str, tuple[Any, list[Any]]] = {
        "moriep_group_open": (
            i32,
            [text, i64, i64, i64_array, ctypes.POINTER(ctypes.c_uint8), ctypes.c_double, text, i64],
        ),
        "moriep_group_address": (i32, [text, i64, i64, i64_array, text, i64]),
        "moriep_group_connect": (i32, [text, i64, i64, i64_array, text, i64]),
        "moriep_group_connect_failed": (None, [text, i64, text]),
        "moriep_group_state": (i32, [text]),
        "moriep_group_failure": (i32, [text, text, i64]),
        "moriep_close_all": (None, []),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    # Peers that still wait for this process learn that it left in good order, instead of finding it dead.
    atexit.register(lib.moriep_close_all)
    return lib
