"""Opens MORI in this process: its world, which is one group of ranks, and its handles, one for each shape.

MORI opens by blocking calls that all ranks make together, and answers what differs between them with an
endless wait. So a thread makes these calls, in the order in which programs were traced, and only after all
ranks have told each other through the key-value store that they are there and want the same. What goes wrong
is told by the exchange that waits for its handle.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from jax_moriep.errors import LibraryError, TransportError
from jax_moriep.mori import limits, network, wheel
from jax_moriep.runtime import group, hosts, native_api, settings
from jax_moriep.runtime.mesh import Groups
from jax_moriep.runtime.store import DistributedStore, Store

BACKEND = "mori"
_UNIQUE_ID_BYTES = 128
# As MORI's C++ numbers them.
_KERNEL_TYPES = ("IntraNode", "InterNode", "InterNodeV1", "InterNodeV1LL", "AsyncLL", "IntraNodeLL")
# Room for handles of other shapes than the first, whose own sizes nobody knows yet.
_HEAP_FACTOR = 2
_HEAP_LEAST = 64 << 20


@dataclasses.dataclass(frozen=True)
class Request:
    """A handle that an exchange will ask for.

    Attributes:
      size: what it is made from.
      config: the layer in words, compared between the ranks.
      kernels: folders of MORI's code objects.
    """

    size: limits.HandleSize
    config: str
    kernels: tuple[Path, ...]

    @property
    def nodes(self) -> int:
        """The machines that the handle spans."""
        between = self.size.kernel in limits.INTER_NODE_V1
        return self.size.ranks // self.size.gpus_per_node if between else 1

    @property
    def key(self) -> str:
        """What the custom calls name the handle by."""
        s = self.size
        return (
            f"{s.kernel}/T{s.max_tokens}/H{s.hidden}/K{s.top_k}/L{s.experts_per_rank}/"
            f"B{s.element_bytes}/S{s.scales}"
        )


def open_group(groups: Groups, *, again: bool = False) -> None:
    """Opens the part of a group that needs no shape; does nothing for one that is open.

    Args:
      groups: of a mesh axis.
      again: make a group that has failed anew, and return only when every rank is connected; every process
        must do so.

    Raises:
      LibraryError: MORI's libraries, or ours on them, are missing or do not fit.
      TransportError: the group could not be opened or begun anew.
    """
    limits.check_environment(os.environ)
    native = library()
    opener = _opener(groups)
    if again and native_api.has_failed(native, groups.name) and opener.has_world:
        opener.begin_anew()
    else:
        if again and native_api.has_failed(native, groups.name):
            opener.forget()
        group.open_groups(groups, BACKEND, again=again, far=True)


def open_handle(groups: Groups, request: Request, *, wait: bool = False) -> str:
    """Has a handle made in the background, once for each shape and config.

    Args:
      groups: of a mesh axis, open.
      request: the handle; the same on all ranks.
      wait: return when it is there.

    Returns:
      The handle's key.

    Raises:
      TransportError: with ``wait``, it could not be made.
    """
    return _opener(groups).ask(request, wait=wait)


@functools.cache
def library() -> ctypes.CDLL:
    """Our library on MORI's, loaded after MORI's own.

    Raises:
      LibraryError: one of them is missing, or they are of different versions.
    """
    found = wheel.find()
    wheel.load(found)
    native = native_api.loaded(BACKEND)
    i64, i32, text = ctypes.c_int64, ctypes.c_int32, ctypes.c_char_p
    bytes_of = ctypes.POINTER(ctypes.c_uint8)
    for name, result, arguments in (
        ("moriep_mori_version", text, []),
        ("moriep_mori_unique_id", i32, [bytes_of, text, i64]),
        ("moriep_mori_open_world", i32, [text, i64, bytes_of, text, i32, text, i64]),
        ("moriep_mori_load_kernels", i32, [text, text, i64]),
        ("moriep_mori_open_handle", i32, [text, text, ctypes.POINTER(i64), text, i64]),
        ("moriep_mori_handle_failed", None, [text, text, text]),
        ("moriep_mori_reset", i32, [text, text, i64]),
    ):
        function = getattr(native, name)
        function.restype, function.argtypes = result, arguments
    built = native.moriep_mori_version().decode()
    if built != found.version:
        raise LibraryError(
            f"libmoriep_mori.so was built with amd-mori {built}, and {found.folder} is {found.version}; "
            f"{wheel.INSTALL}, or rebuild jax_moriep"
        )
    return native


class _Opener:
    """Opens what one group of this process asks for."""

    def __init__(self, groups: Groups) -> None:
        me = jax.process_index()
        places = [
            (int(g), int(r)) for g, r in np.ndindex(groups.devices.shape) if _process(groups, g, r) == me
        ]
        limits.check_process(len(places))
        self._native = library()
        self._name = groups.name
        self._group, self._rank = places[0]
        self._num_ranks = groups.num_ranks
        self._generation = 0
        self._asked: dict[Request, threading.Event] = {}
        self._handles: set[str] = set()
        self._heap_used = limits.HEAP_OWN_BYTES
        self._heap = 0
        self._jobs: queue.SimpleQueue[tuple[str, Request, threading.Event]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="moriep-mori").start()

    @property
    def has_world(self) -> bool:
        """Whether MORI is open."""
        return self._heap > 0

    def ask(self, request: Request, *, wait: bool) -> str:
        done = self._asked.get(request)
        if done is None:
            done = self._asked[request] = threading.Event()
            self._jobs.put((self._key(f"handle/{len(self._asked)}"), request, done))
        if wait:
            if not done.wait(settings.TIMEOUT.value()):
                raise TransportError(
                    f"MORI's handle {request.key} was not made within {settings.TIMEOUT.value():g} s; does "
                    "every process run the same program?"
                )
            native_api.check_group(self._native, self._name)
        return request.key

    def forget(self) -> None:
        """Takes back what was asked of a group that failed before MORI was open: it is to be made again."""
        self._generation += 1
        self._asked.clear()

    def begin_anew(self) -> None:
        """Makes the failed group as it was before its first step; all ranks meet before and after."""
        store = self._store()
        self._generation += 1
        deadline = time.monotonic() + settings.TIMEOUT.value()
        list(self._exchange(store, self._key("anew"), "", deadline))
        native_api.call(self._native.moriep_mori_reset, self._name.encode())
        list(self._exchange(store, self._key("begun"), "", deadline))
        self._asked.clear()

    def _work(self) -> None:
        while True:
            key, request, done = self._jobs.get()
            try:
                self._make(key, request)
            except Exception as e:  # noqa: BLE001 - a thread has nobody to raise to
                self._native.moriep_mori_handle_failed(
                    self._name.encode(), request.key.encode(), str(e).encode()
                )
            finally:
                done.set()

    def _make(self, key: str, request: Request) -> None:
        group.wait_connected(self._native, self._name)
        store = self._store()
        deadline = time.monotonic() + settings.TIMEOUT.value()
        nodes = request.nodes
        proxy = nodes > 1 and network.by_proxy(os.environ, network.adapters())[0]
        needed = limits.heap_bytes(request.size) + limits.between_bytes(request.size)
        if not self._heap:
            self._heap_used += limits.notice_bytes(nodes)
        heap = self._heap or _heap_size(needed, self._heap_used)
        told = {"handle": request.key, "config": request.config, "heap_mb": heap >> 20}
        if nodes > 1:
            told["sent_by"] = "MORI's host proxy" if proxy else "the GPU"
        wanted = json.dumps(told)
        for rank, theirs in self._exchange(store, key, wanted, deadline):
            if theirs != wanted:
                raise TransportError(
                    f"rank {rank} wants {theirs} where rank {self._rank} wants {wanted}; every rank must run "
                    "the same layers, in the same order, with the same settings"
                )
        if request.key in self._handles:
            return
        if self._heap_used + needed > heap:
            raise TransportError(
                f"the handle {request.key} needs {needed} bytes of MORI's heap, of whose {heap} bytes "
                f"{self._heap_used} are in use; set {settings.MORI_HEAP_MB.name} to at least "
                f"{(self._heap_used + needed >> 20) + 1} before the program starts"
            )
        name = self._name.encode()
        if not self._heap:
            self._open_world(store, heap, deadline, nodes, proxy)
        for folder in request.kernels:
            for path in sorted(folder.glob("*.hsaco")):
                native_api.call(self._native.moriep_mori_load_kernels, str(path).encode())
        native_api.call(
            self._native.moriep_mori_open_handle, name, request.key.encode(), _numbers(request.size)
        )
        self._handles.add(request.key)
        self._heap_used += needed

    def _open_world(self, store: Store, heap: int, deadline: float, nodes: int, proxy: bool) -> None:
        key = self._key("unique-id")
        id_bytes = (ctypes.c_uint8 * _UNIQUE_ID_BYTES)()
        if self._rank == 0:
            native_api.call(self._native.moriep_mori_unique_id, id_bytes)
            store.put(key, bytes(id_bytes))
        else:
            id_bytes[:] = store.get(key, deadline)
        # What MORI takes for machines must be what we do.
        node = hashlib.sha256(hosts.identity().encode()).hexdigest()[:16] if nodes > 1 else ""
        native_api.call(
            self._native.moriep_mori_open_world, self._name.encode(), heap, id_bytes, node.encode(), proxy
        )
        self._heap = heap

    def _exchange(self, store: Store, key: str, value: str, deadline: float) -> Iterator[tuple[int, str]]:
        """Tells the other ranks a value and gives theirs."""
        store.put(f"{key}/{self._rank}", value.encode())
        for rank in range(self._num_ranks):
            if rank == self._rank:
                continue
            try:
                yield rank, store.get(f"{key}/{rank}", deadline).decode()
            except TimeoutError as e:
                raise TransportError(
                    f"rank {rank} did not come to open MORI within {settings.TIMEOUT.value():g} s; does "
                    "every process run the same program? Restart the job"
                ) from e

    def _key(self, what: str) -> str:
        return f"jax_moriep/mori/{self._name}/{self._group}/{self._generation}/{what}"

    def _store(self) -> Store:
        return _Alone() if self._num_ranks == 1 else DistributedStore()


class _Alone:
    """The store of a group of one rank, which has nobody to tell anything."""

    def put(self, key: str, value: bytes) -> None:
        pass

    def get(self, key: str, deadline: float) -> bytes:
        raise TimeoutError(key)


def _process(groups: Groups, g: int, r: int) -> int:
    return groups.devices[g, r].process_index


_openers: dict[str, _Opener] = {}
_lock = threading.Lock()


def _opener(groups: Groups) -> _Opener:
    with _lock:
        if groups.name not in _openers:
            _openers[groups.name] = _Opener(groups)
        return _openers[groups.name]


def _heap_size(needed: int, used: int) -> int:
    """The heap of a world whose first handle needs so many bytes beside those in use, in whole MiB."""
    megabytes = settings.MORI_HEAP_MB.value()
    if megabytes is None:
        wanted = max(_HEAP_LEAST, _HEAP_FACTOR * needed) + used
        return -(-wanted >> 20) << 20
    return megabytes << 20


def _numbers(size: limits.HandleSize) -> ctypes.Array[ctypes.c_int64]:
    """As csrc/mori/handle.h takes them."""
    numbers = (
        _KERNEL_TYPES.index(size.kernel),
        size.max_tokens,
        size.hidden,
        size.top_k,
        size.experts_per_rank,
        size.element_bytes,
        size.scales,
        size.gpus_per_node,
        1,
    )
    return (ctypes.c_int64 * len(numbers))(*numbers)
