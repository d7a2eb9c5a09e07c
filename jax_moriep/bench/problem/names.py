"""The names of what is compared: transports and their ways, experts, schemes, and what others have made."""

from __future__ import annotations

from jax_moriep.config import SCHEMES, TRANSPORTS

FP8 = "-fp8"
"""Ends the name of an exchange whose tokens travel as float8."""
PUT = "-put"
"""Ends, but for the wire, the name of native's that puts: ``Tuning.native_dispatch``, so on GPUs only."""
_ROWS = (*TRANSPORTS, "native" + PUT)
EXCHANGES = (*_ROWS, *(name + FP8 for name in _ROWS))
"""All exchanges."""

EXPERTS = ("blocked", "triton", "reference", "ragged_dot")
PAIRS = tuple(f"{transport}+{experts}" for transport in TRANSPORTS for experts in EXPERTS)
"""Layers: a transport and experts."""
QUANTISED = tuple(
    f"{pair}-{scheme}" for pair in PAIRS if not pair.endswith("ragged_dot") for scheme in SCHEMES
)
"""The same with experts under a scheme."""

PLAIN = ("plain", "plain_hopper")
"""Layers written without this package, for one rank."""
TOKAMAX = "plain_tokamax"
"""One by tokamax's grouped product."""
TORCH = "torch"
"""One by torch, and not in jax at all."""
OTHERS = (*PLAIN, TOKAMAX, TORCH)
"""All layers that others' products are in."""
DENSE_COPY = "dense+copy"
"""Floor under the layer of one rank: dense products of its FLOPs, and copies of the bytes that must move."""
DENSE_COPY_READ = "dense+copy+read"
"""The same and all experts' weights read, where the products read those of one: what bounds short runs."""
READ = "read"
"""Floor under decoding: a sum over as many bytes as the used experts' weights have."""
FLOORS = ("memcpy", "nccl", "copy", READ, DENSE_COPY, DENSE_COPY_READ)
"""What no implementation can be faster than, or hardly."""
SEND_TO_NEXT = "ppermute"
"""The measure of the links."""
ALONE = (*OTHERS, "copy", READ, DENSE_COPY, DENSE_COPY_READ)
"""What is there for one rank only."""


def transport_of(name: str) -> str:
    """The transport of an exchange."""
    return name.removesuffix(FP8).removesuffix(PUT)


def puts(name: str) -> bool:
    """Whether an exchange is told to put."""
    return name.removesuffix(FP8).endswith(PUT)


def wire_of(name: str) -> str | None:
    """The wire of an exchange, as ``MoEConfig`` names it."""
    return "fp8" if name.endswith(FP8) else None


def pair_of(name: str) -> tuple[str, str, str | None]:
    """The transport, the experts and the scheme of a layer's name, such as "native+blocked-fp8_block"."""
    transport, experts = name.split("+")
    scheme = next((scheme for scheme in SCHEMES if experts.endswith(f"-{scheme}")), None)
    return transport, experts.removesuffix(f"-{scheme}"), scheme


def is_baseline(name: str) -> bool:
    """Whether a name is of something that others have made: its errors are not the package's."""
    return name in (*OTHERS, *FLOORS, SEND_TO_NEXT)
