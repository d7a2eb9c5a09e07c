"""The environment variables that steer the runtime, validated where they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping

from jax_moriep.errors import TransportError, rule

RANKS_PER_NODE_VARIABLE = "JAX_MORIEP_RANKS_PER_NODE"


def timeout_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """How long a rank waits for another: ``JAX_MORIEP_TIMEOUT`` seconds, 300 by default.

    Args:
      environment: where the variable is looked up.

    Raises:
      TransportError: the variable is no positive number.
    """
    text = environment.get("JAX_MORIEP_TIMEOUT", "300")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise TransportError(
            rule("JAX_MORIEP_TIMEOUT", text, "be a positive number of seconds", "unset it or fix it")
        )
    return value


def ranks_per_node() -> int | None:
    """The most ranks that form a node of transport="two_level": ``JAX_MORIEP_RANKS_PER_NODE``.

    Returns:
      The number; None, which is the default, for as many as a machine has.

    Raises:
      TransportError: the variable is no whole number of at least 1.
    """
    text = os.environ.get(RANKS_PER_NODE_VARIABLE)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        cure = "unset it or fix it"
        raise TransportError(rule(RANKS_PER_NODE_VARIABLE, text, "be a whole number of at least 1", cure))
    return int(text)


def watchdog_enabled() -> bool:
    """Whether a process that waits for ever beside a failed exchange ends: ``JAX_MORIEP_WATCHDOG``, 1 or 0.

    Raises:
      TransportError: the variable is neither.
    """
    return _switch("JAX_MORIEP_WATCHDOG")


def keep_memory() -> bool:
    """Whether a process on CPUs keeps large buffers that it frees: ``JAX_MORIEP_KEEP_MEMORY``, 1 or 0.

    Raises:
      TransportError: the variable is neither.
    """
    return _switch("JAX_MORIEP_KEEP_MEMORY")


def native_dispatch() -> str | None:
    """How native dispatches between GPUs: ``JAX_MORIEP_NATIVE_DISPATCH``, pull or put; None where unset.

    Raises:
      TransportError: the variable is neither.
    """
    text = os.environ.get("JAX_MORIEP_NATIVE_DISPATCH")
    if text not in (None, "pull", "put"):
        raise TransportError(rule("JAX_MORIEP_NATIVE_DISPATCH", text, "be pull or put", "unset it or fix it"))
    return text


def _switch(name: str) -> bool:
    text = os.environ.get(name, "1")
    if text not in ("0", "1"):
        raise TransportError(rule(name, text, "be 0 or 1", "unset it or fix it"))
    return text == "1"
