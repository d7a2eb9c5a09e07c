"""Opens the memory that the ranks of a group share, and connects it with that of ranks in other processes.

A group's name comes from ``runtime/mesh.py``. Opening is local; peers are connected in the background, and
what goes wrong is told by the exchange that waits for it.
"""

from __future__ import annotations

import ctypes
import json
import threading
import time
from typing import Any

import jax
import numpy as np

from jax_moriep.errors import TransportError
from jax_moriep.runtime import hosts, memory, native_api, settings, targets, watchdog
from jax_moriep.runtime.mesh import Groups
from jax_moriep.runtime.store import DistributedStore, Store

_generations: dict[tuple[str, str], int] = {}
_on_gpus: dict[tuple[str, str], ctypes.CDLL] = {}
_lock = threading.Lock()


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
      TransportError: a group could not be opened or connected.
    """
    targets.register(backend)
    native = native_api.loaded(backend)
    with _lock:
        state = native.moriep_group_state(groups.name.encode())
        if state == 0 or (state == native_api.FAILED and again):
            if backend == "cpu":
                memory.keep_freed()
            _open(native, backend, groups, far)
            if backend != "cpu":
                _on_gpus[backend, groups.name] = native
            if any(d.process_index != jax.process_index() for d in groups.devices.flat):
                watchdog.watch(
                    f"{backend} {groups.name}",
                    groups.platform,
                    lambda: native_api.failure(native, groups.name),
                )
    if again:
        wait_connected(native, groups.name)


def check_failures() -> None:
    """Raises TransportError if an exchange of this process has failed on a GPU.

    There an exchange runs after the call that enqueued it, and XLA replays it without a call, so nothing
    raises by itself; the results of a step that failed, and of all after it, are NaN.
    """
    for (_, name), native in list(_on_gpus.items()):
        native_api.check_group(native, name)


def wait_connected(native: ctypes.CDLL, name: str) -> None:
    """Returns when all ranks of a backend's group are connected.

    Raises:
      TransportError: the group has failed, or a rank has not come in time.
    """
    deadline = time.monotonic() + settings.TIMEOUT.value()
    while native.moriep_group_state(name.encode()) != native_api.CONNECTED:
        if native.moriep_group_state(name.encode()) == native_api.FAILED:
            raise TransportError(
                f"group {name} has failed: {native_api.failure(native, name)}; restart the job, or call "
                "jm.initialize in every process"
            )
        if time.monotonic() > deadline:
            raise TransportError(
                f"group {name} was not connected within {settings.TIMEOUT.value():g} s; does every process "
                "call jm.initialize?"
            )
        time.sleep(0.005)


def _open(native: ctypes.CDLL, backend: str, groups: Groups, far: bool) -> None:
    name = groups.name.encode()
    num_groups, num_ranks = groups.devices.shape
    me = jax.process_index()
    local = np.array([d.process_index == me for d in groups.devices.flat], dtype=np.uint8)
    ids = np.array([_ordinal(d, me) for d in groups.devices.flat], dtype=np.int64)
    native_api.call(
        native.moriep_group_open,
        name,
        num_groups,
        num_ranks,
        ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)),
        local.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)),
        settings.TIMEOUT.value(),
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
            address = (ctypes.c_int64 * native_api.ADDRESS_WORDS)()
            native_api.call(native.moriep_group_address, name, g, int(r), address)
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
                    "transport='two_level'"
                )
            # Zeros: there is no memory in common.
            address = (ctypes.c_int64 * native_api.ADDRESS_WORDS)(*(peer["address"] if near else ()))
            native_api.call(native.moriep_group_connect, name.encode(), g, r, address)
        except Exception as e:  # noqa: BLE001 - a thread has nobody to raise to
            native.moriep_group_connect_failed(name.encode(), g, f"rank {r}: {e}".encode())
            return
