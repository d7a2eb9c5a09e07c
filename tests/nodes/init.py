"""The first process of a simulated machine: it makes the machine's identity, and ends with the test.

It runs in namespaces that ``machines.py`` made, and when it ends the kernel ends every process beside it.
"""

import os
import signal
import socket
import subprocess
import sys


def main(descriptor: int, folder: str, name: str) -> None:
    # Whose parent has ended is this process's child; so nobody stays a zombie.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if name:
        socket.sethostname(name)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
        for source, target in (("hosts", "/etc/hosts"), (name, "/proc/sys/kernel/random/boot_id")):
            subprocess.run(["mount", "--bind", os.path.join(folder, source), target], check=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    test = socket.socket(fileno=descriptor)
    test.send(b"ready")
    # The other end closes with the test, also if that is killed.
    test.recv(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
