"""Which machines a job runs on, as the launcher on each is told, and whether they can reach this one."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import pkgutil
import socket
from collections.abc import Mapping

from jax_moriep.errors import ConfigError, rule
from jax_moriep.processes.wait import check_seconds


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Which nodes a job has, as the launcher on one of them is told.

    Attributes:
      count: how many.
      index: of this one.
      coordinator: "host:port" at which node 0's launcher listens and the others find it.
      lost_after: seconds without a word after which a node counts as lost.
      join_timeout: seconds that the launchers wait for each other at the beginning.

    Raises:
      ConfigError: a value breaks a rule.
    """

    count: int
    index: int
    coordinator: str
    lost_after: float = 30.0
    join_timeout: float = 300.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(rule("nodes", self.count, "be at least 1", "pass a positive int"))
        if not 0 <= self.index < self.count:
            must = f"be from 0 to nodes-1={self.count - 1}"
            raise ConfigError(rule("node", self.index, must, "give each node a number of its own"))
        for name, value in (("lost_after", self.lost_after), ("join_timeout", self.join_timeout)):
            check_seconds(name, value)
        host, _, port = self.coordinator.rpartition(":")
        if not _is_host(host) or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            cure = "pass an address of node 0 and a free port, the same on every node"
            must = "be HOST:PORT, with brackets around an IPv6 address"
            raise ConfigError(rule("coordinator", self.coordinator, must, cure))

    @property
    def host(self) -> str:
        """Of the coordinator, as it is written before a port."""
        return self.coordinator.rpartition(":")[0]

    @property
    def address(self) -> tuple[str, int]:
        """Of the coordinator, as sockets want it."""
        return self.host.strip("[]"), int(self.coordinator.rpartition(":")[2])

    @property
    def on_one_machine(self) -> bool:
        """Whether all are on this machine, as in a trial: nobody else reaches the coordinator."""
        host, _ = self.address
        return host in ("localhost", "::1") or host.startswith("127.")


def _is_host(text: str) -> bool:
    """Whether sockets take it for a name or an address: what they cannot encode is no OSError of theirs.

    Without brackets jax takes the end of an IPv6 address for a port, and waits at it.
    """
    if ":" in text and not (text.startswith("[") and text.endswith("]")):
        return False
    try:
        return bool(text.encode("idna"))
    except UnicodeError:
        return False


def has_only_cpus(environment: Mapping[str, str]) -> bool:
    """Whether jax will have no devices but CPUs: it was told so, or no plugin for others is installed.

    With a plugin but without its devices jax takes the CPUs too; that shows only when it has started.

    Args:
      environment: of the processes.
    """
    if platforms := environment.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    # As jax looks for them; for TPUs the plugin is jaxlib's own, and needs this library.
    plugins = importlib.util.find_spec("jax_plugins")
    return not (
        environment.get("PJRT_NAMES_AND_LIBRARY_PATHS")
        or importlib.metadata.entry_points(group="jax_plugins")
        or (plugins and any(pkgutil.iter_modules(plugins.submodule_search_locations or ())))
        or importlib.util.find_spec("libtpu")
    )


def why_name_misleads() -> str | None:
    """Why XLA's collectives for CPUs would not reach this machine from another, and the cure; or None.

    Gloo listens at the first address of the machine's own name at which it can.
    """
    name = socket.gethostname()
    cure = f"let {name!r} mean an address that the other nodes reach, for example in /etc/hosts"
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        return rule("hostname", name, f"resolve on its own machine ({error})", cure)
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
        if str(address[0]).startswith("127.") or address[0] == "::1":
            must = f"not be this machine's loopback {address[0]} in a job of several nodes on CPUs"
            return rule("hostname", name, must, cure)
        return None
    return rule("hostname", name, "mean an address of this machine", cure)
