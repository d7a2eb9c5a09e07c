"""Who moves the tokens of native's dispatch between GPUs: their receivers, by pull, or their owners, by put.

Results are the same to the bit; which is faster is a matter of the links.
"""

from __future__ import annotations

from jax_moriep.config import MoEConfig
from jax_moriep.runtime import settings
from jax_moriep.runtime.place import Place

_BY_ARCHITECTURE = {
    "sm_90": (
        "pull",
        "on two H200 put took 1.07 to 1.36 of pull's time: it takes a second pass over what came",
    ),
    "gfx942": (
        "pull",
        "neither has been measured on AMD's hardware; where devices read each other's memory much slower "
        "than they write it, put is the one to try",
    ),
}


def choose(place: Place, cfg: MoEConfig | None) -> tuple[str, str]:
    """("pull" or "put", why) for the exchanges of a layer at a place.

    Raises:
      TransportError: ``JAX_MORIEP_NATIVE_DISPATCH`` has no such value; also where something else decides.
    """
    named = settings.NATIVE_DISPATCH.value()
    if place.platform == "cpu":
        return "pull", "ranks on CPUs share memory"
    tuning = None if cfg is None else cfg.tuning
    if tuning is not None and tuning.native_dispatch != "auto":
        return tuning.native_dispatch, "named by cfg.tuning"
    if named is not None:
        return named, f"named by {settings.NATIVE_DISPATCH.name}"
    unknown = ("pull", f"nothing has been measured on {place.architecture or 'this architecture'}")
    return _BY_ARCHITECTURE.get(place.architecture, unknown)


def describe(place: Place, cfg: MoEConfig | None) -> str:
    """The choice in a line for people."""
    delivery, why = choose(place, cfg)
    return f"dispatches by {delivery}: {why}"
