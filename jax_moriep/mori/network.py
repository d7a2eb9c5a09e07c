"""MORI's networks: the interface over which ranks find each other, and who sends between nodes."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from jax_moriep.errors import TransportError, rule

INTERFACE_VARIABLE = "MORI_SOCKET_IFNAME"
PROXY_VARIABLE = "MORI_ENABLE_HOST_PROXY"
MAKER_VARIABLE = "MORI_DEVICE_NIC"
# Makers of adapters that MORI's kernels drive themselves, by the names of their drivers.
MAKERS = ("mlx5", "bnxt", "ionic")
_SIOCGIFADDR = 0x8915  # the Linux call for an interface's IPv4 address
_NAME_BYTES = 16


def interfaces() -> list[str]:
    """The network interfaces of this machine that have an IPv4 address; MORI knows no other kind."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        return [name for _, name in socket.if_nameindex() if _has_address(asked, name)]


def _has_address(asked: socket.socket, name: str) -> bool:
    request = struct.pack(f"{_NAME_BYTES}s240x", name.encode()[: _NAME_BYTES - 1])
    try:
        fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)
    except OSError:
        return False
    return True


def chosen_interface(environment: Mapping[str, str], present: list[str]) -> tuple[str | None, str | None]:
    """The interface that MORI takes, and why it cannot take one.

    MORI takes the name to the letter: no list, no pattern, and an empty value is a name that nothing has.

    Args:
      environment: such as ``os.environ``.
      present: as ``interfaces`` gives them.

    Returns:
      (interface, None), or (None, reason with the cure).
    """
    named = environment.get(INTERFACE_VARIABLE)
    if named is None:
        outer = next((name for name in present if name != "lo"), None)
        if outer is not None:
            return outer, None
        return None, (
            "this machine has no interface with an IPv4 address but the loopback; set "
            f"{INTERFACE_VARIABLE}=lo if all ranks are here"
        )
    if named in present:
        return named, None
    must = f"be one interface with an IPv4 address, exactly ({', '.join(present) or 'there is none'})"
    return None, rule(INTERFACE_VARIABLE, named, must, "name one of these, or unset it")


def adapters(root: Path = Path("/sys/class/infiniband")) -> list[str]:
    """The drivers of this machine's network adapters."""
    if not root.is_dir():
        return []
    return sorted((path / "device" / "driver").resolve().name for path in root.iterdir())


def by_proxy(environment: Mapping[str, str], drivers: list[str]) -> tuple[bool, str]:
    """Whether a thread of MORI's sends between nodes, or the GPU itself; all ranks must do the same.

    Args:
      environment: such as ``os.environ``.
      drivers: as ``adapters`` gives them.

    Returns:
      (by the thread, why).

    Raises:
      TransportError: MORI's own switch is neither on nor off.
    """
    named = environment.get(PROXY_VARIABLE)
    if named is not None:
        if named not in ("0", "1"):
            raise TransportError(rule(PROXY_VARIABLE, named, "be 0 or 1", "unset it or fix it"))
        return named == "1", f"{PROXY_VARIABLE}={named}"
    if maker := environment.get(MAKER_VARIABLE):
        return False, f"{MAKER_VARIABLE}={maker}"
    known = sorted({maker for maker in MAKERS if any(name.startswith(maker) for name in drivers)})
    if known:
        return False, f"a GPU can drive {', '.join(known)}"
    return True, "no adapter here is of a kind that a GPU can drive"
