"""Machines on one machine: each has network, processes, memory files, name and boot identity of its own.

They are namespaces of the kernel, joined by cables (veth) to a switch (a bridge). Anybody may make them where
the system lets users have user namespaces; elsewhere it takes root. They end with their first process, and
that ends with the test, so nothing stays behind.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

_INIT = Path(__file__).with_name("init.py")
_START_SECONDS = 20.0
_PACKAGES = {"unshare": "util-linux", "nsenter": "util-linux", "mount": "mount", "ip": "iproute2"}
"""Debian's package of each command that is needed."""
_NETWORK = "10.77.0"


class Unavailable(Exception):
    """Why this system does not let the tests make machines."""


class _Namespaces:
    """Namespaces with their first process."""

    def __init__(self, command: Sequence[str], folder: str, name: str) -> None:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        ours.settimeout(_START_SECONDS)
        with tempfile.TemporaryFile("w+") as said, theirs:
            descriptor = theirs.fileno()
            self._socket = ours
            self._popen = subprocess.Popen(
                [*command, sys.executable, "-IS", os.fspath(_INIT), str(descriptor), folder, name],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
            theirs.close()
            try:
                message, ancillary, _, _ = ours.recvmsg(16, socket.CMSG_SPACE(12))
            except TimeoutError:
                message, ancillary = b"", []
            if message != b"ready":
                self.close()
                said.seek(0)
                text = " ".join(said.read().split()[-40:])
                raise Unavailable(f"{' '.join(command)}: {text or 'no answer'}")
        # The kernel tells the sender's process id as it is in this process's namespace.
        self.pid = struct.unpack("iII", ancillary[0][2])[0]

    def close(self) -> None:
        self._socket.close()
        self._popen.wait()


class Machines:
    """Some machines and a switch, as a context manager.

    Attributes:
      addresses: of each machine.
    """

    def __init__(self, count: int) -> None:
        self.addresses = [f"{_NETWORK}.{k + 1}" for k in range(count)]
        self._own_user = _own_user()
        self._folder = tempfile.TemporaryDirectory()
        self._made: list[_Namespaces] = []

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for made in reversed(self._made):
            made.close()
        self._folder.cleanup()

    def command(self, machine: int, argv: Sequence[str]) -> list[str]:
        """The command that runs another on a machine."""
        return [*self._enter(1 + machine, "net", "pid", "mount", "uts"), "--", *argv]

    def start(self, machine: int, argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
        """Starts a command on a machine; its output, stderr included, is a pipe of text."""
        return subprocess.Popen(
            self.command(machine, argv),
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def misname(self) -> None:
        """Lets every machine's name mean itself, as Debian's installer has it, and no other's address."""
        lines = [f"127.0.1.1 node{k}" for k in range(len(self.addresses))]
        (Path(self._folder.name) / "hosts").write_text("\n".join(lines) + "\n")

    def plug(self, machine: int, *, into: bool) -> None:
        """Pulls a machine's cable out of the switch, or plugs it in again."""
        self._switch("ip", "link", "set", f"port{machine}", "up" if into else "down")

    def slow_down(self, machine: int, rate: str) -> None:
        """Limits what a machine may send, to a rate as ``tc`` writes it: "20mbit".

        Raises:
          Unavailable: the kernel cannot.
        """
        limit = ["tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate]
        command = [*self._enter(1 + machine, "net"), *limit, "burst", "64kb", "latency", "200ms"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{' '.join(limit)}: {done.stderr.strip()}")

    def sent_bytes(self, machine: int) -> int:
        """What a machine has sent to others so far, with the headers of its packets."""
        command = [*self._enter(1 + machine, "net"), "ip", "-s", "-j", "link", "show", "dev", "eth0"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)[0]["stats64"]["tx"]["bytes"]

    def _make(self) -> None:
        folder = Path(self._folder.name)
        names = [f"node{k}" for k in range(len(self.addresses))]
        lines = ["127.0.0.1 localhost", *map(" ".join, zip(self.addresses, names, strict=True))]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        for name in names:
            (folder / name).write_text(f"{uuid.uuid4()}\n")
        self._made.append(_Namespaces(_first_command(self._own_user), self._folder.name, ""))
        self._switch("ip", "link", "add", "name", "switch", "type", "bridge")
        self._switch("ip", "link", "set", "switch", "up")
        for k, name in enumerate(names):
            inside = [*self._enter(0, "net", "pid", "mount"), "--"]
            own = ["unshare", "--net", "--pid", "--mount", "--uts", "--mount-proc", "--fork", "--kill-child"]
            self._made.append(_Namespaces([*inside, *own], self._folder.name, name))
            ends = ["name", f"port{k}", "type", "veth", "peer", "name", "eth0"]
            self._switch("ip", "link", "add", *ends, "netns", str(self._made[-1].pid))
            self._switch("ip", "link", "set", f"port{k}", "master", "switch", "up")
            there = self._enter(1 + k, "net")
            address = ["ip", "address", "add", f"{self.addresses[k]}/24", "dev", "eth0"]
            for command in (address, ["ip", "link", "set", "eth0", "up"]):
                subprocess.run([*there, *command], check=True, capture_output=True)

    def _enter(self, which: int, *kinds: str) -> list[str]:
        user = ["--user", "--preserve-credentials"] if self._own_user else []
        return ["nsenter", "--target", str(self._made[which].pid), *user, *(f"--{kind}" for kind in kinds)]

    def _switch(self, *argv: str) -> None:
        subprocess.run([*self._enter(0, "net"), *argv], check=True, capture_output=True)


def _first_command(own_user: bool) -> list[str]:
    user = ["--user", "--map-root-user"] if own_user else []
    return ["unshare", *user, "--net", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]


@functools.cache
def _own_user() -> bool:
    """Whether machines are made in a user namespace; without one it takes root.

    Raises:
      Unavailable: they cannot be made.
    """
    for tool, package in _PACKAGES.items():
        if shutil.which(tool) is None:
            raise Unavailable(f"the command {tool!r} is missing; install Debian's package {package}")
    reasons = []
    for own_user in (True, False):
        try:
            _Namespaces(_first_command(own_user), "", "").close()
        except Unavailable as error:
            reasons.append(str(error))
        else:
            return own_user
    raise Unavailable("; ".join(reasons))
