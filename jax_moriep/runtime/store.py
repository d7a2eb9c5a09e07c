"""The key-value exchange by which processes find each other's arenas."""

from __future__ import annotations

import time
from typing import Protocol

from jax_moriep.errors import TransportError
from jax_moriep.runtime import compat

_SLICE_SECONDS = 2.0


class Store(Protocol):
    """Bytes by name, visible to every process of the job."""

    def put(self, key: str, value: bytes) -> None:
        """Publishes a value; a key is written once."""
        ...

    def get(self, key: str, deadline: float) -> bytes:
        """Waits for a value until ``deadline`` (``time.monotonic`` seconds).

        Raises:
          TimeoutError: nobody published the key in time.
        """
        ...


class DistributedStore:
    """The store of ``jax.distributed``; needs ``jax.distributed.initialize`` to have run."""

    def __init__(self) -> None:
        client = compat.distributed_client()
        if client is None:
            raise TransportError(
                "the mesh has devices of several processes but jax.distributed is not initialised; call "
                "jax.distributed.initialize() first, or start the job with `jax-moriep launch`"
            )
        self._client = client

    def put(self, key: str, value: bytes) -> None:
        self._client.key_value_set_bytes(key, value)

    def get(self, key: str, deadline: float) -> bytes:
        # In slices, so that a process that ends meanwhile is not held inside one long call.
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"nobody published {key!r} in time")
            try:
                return self._client.blocking_key_value_get_bytes(
                    key, max(1, int(1000 * min(left, _SLICE_SECONDS)))
                )
            except Exception as e:  # noqa: BLE001 - jaxlib raises its own type, told apart by the code in the text
                if "DEADLINE_EXCEEDED" not in str(e):
                    raise
