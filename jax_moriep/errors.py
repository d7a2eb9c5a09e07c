"""Exception types, and the one form that every error text has.

A text names the argument, its value, the rule it breaks and the cure:
``top_k=9 must be at most num_experts=8; lower top_k or add experts``.
"""

from __future__ import annotations

_LONGEST_VALUE = 200


class MoriepError(Exception):
    """Base of the exceptions that jax_moriep defines."""


class ConfigError(MoriepError, ValueError):
    """A configuration value, a shape or a dtype breaks a rule."""


class ShardingError(MoriepError, ValueError):
    """A mesh, an axis name or an array's sharding does not fit the call."""


class TransportError(MoriepError, RuntimeError):
    """The named transport cannot run here; the text says why and how to make it run."""


class LibraryError(TransportError):
    """A native library is missing or was built for another FFI API version."""


class CapacityOverflow(MoriepError, RuntimeError):
    """Some rank received more rows than its capacity holds, so routes were dropped."""


def rule(name: str, value: object, must: str, cure: str) -> str:
    """Builds an error text: ``name=value must ...; cure``. A long value, such as an array, is cut."""
    shown = repr(value)
    if len(shown) > _LONGEST_VALUE:
        shown = " ".join(shown[:_LONGEST_VALUE].split()) + "..."
    return f"{name}={shown} must {must}; {cure}"
