"""The interface over which MORI's ranks find each other when a group opens."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Mapping

from jax_moriep.errors import rule

INTERFACE_VARIABLE = "MORI_SOCKET_IFNAME"
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


def chosen_interface(environment: Mapping[str, str], found: list[str]) -> tuple[str | None, str | None]:
    """The interface that MORI takes, and why it cannot take one.

    MORI takes the name to the letter: no list, no pattern, and an empty value is a name that nothing has.

    Args:
      environment: such as ``os.environ``.
      found: as ``interfaces`` gives them.

    Returns:
      (interface, None), or (None, reason with the cure).
    """
    named = environment.get(INTERFACE_VARIABLE)
    if named is None:
        outer = next((name for name in found if name != "lo"), None)
        if outer is not None:
            return outer, None
        return None, (
            "this machine has no interface with an IPv4 address but the loopback; set "
            f"{INTERFACE_VARIABLE}=lo if all ranks are here"
        )
    if named in found:
        return named, None
    must = f"be one interface with an IPv4 address, exactly ({', '.join(found) or 'there is none'})"
    return None, rule(INTERFACE_VARIABLE, named, must, "name one of these, or unset it")
