"""The environment variables that steer the runtime, validated where they are read."""

from __future__ import annotations

import os

from jax_moriep.errors import TransportError, rule


def timeout_seconds() -> float:
    """How long a rank waits for another: ``JAX_MORIEP_TIMEOUT`` seconds, 300 by default.

    Raises:
      TransportError: the variable is no positive number.
    """
    text = os.environ.get("JAX_MORIEP_TIMEOUT", "300")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise TransportError(
            rule("JAX_MORIEP_TIMEOUT", text, "be a positive number of seconds", "unset it or fix it")
        )
    return value
