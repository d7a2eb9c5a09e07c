"""The names of the exchanges that the bench compares: a transport, how it delivers, and its wire."""

from __future__ import annotations

from jax_moriep.config import TRANSPORTS

FP8 = "-fp8"
"""Ends the name of an exchange whose tokens travel as float8."""
PUT = "-put"
"""Ends, but for the wire, the name of native's that puts: ``Tuning.native_dispatch``, so on GPUs only."""
_ROWS = (*TRANSPORTS, "native" + PUT)
EXCHANGES = (*_ROWS, *(name + FP8 for name in _ROWS))
"""All of them."""


def transport_of(name: str) -> str:
    """The transport of an exchange."""
    return name.removesuffix(FP8).removesuffix(PUT)


def puts(name: str) -> bool:
    """Whether it is told to put."""
    return name.removesuffix(FP8).endswith(PUT)


def wire_of(name: str) -> str | None:
    """Its wire, as ``MoEConfig`` names it."""
    return "fp8" if name.endswith(FP8) else None
