"""Which machine a process is on, and the name that stands for it."""

from pathlib import Path

import jax
import pytest

from jax_moriep.runtime import hosts, settings


def test_a_named_machine(monkeypatch):
    monkeypatch.delenv(settings.NODE.name, raising=False)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert hosts.identity().startswith(boot)
    monkeypatch.setenv(settings.NODE.name, "b")
    assert hosts.identity() == "named/b"


@pytest.mark.parametrize(
    ("machines", "numbers"),
    [("aabb", (0, 0, 1, 1)), ("aaaa", (0, 0, 0, 0)), ("baba", (0, 1, 0, 1)), ("abca", (0, 1, 2, 0))],
)
def test_machines_are_numbered_as_they_come(monkeypatch, machines, numbers):
    monkeypatch.setattr(hosts, "_of_process", lambda index: machines[index])
    assert hosts.numbers(range(4)) == numbers


def test_one_process_asks_nobody():
    assert hosts.numbers([jax.process_index()] * 3) == (0, 0, 0)
