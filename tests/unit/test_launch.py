"""What the launcher decides before it starts a process."""

import socket
import sys

import pytest

from jax_moriep.errors import ConfigError, TransportError
from jax_moriep.processes import launch
from jax_moriep.processes.meeting import Start
from jax_moriep.processes.nodes import Nodes, has_only_cpus


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"nprocs": 0}, "nprocs=0 must be at least 1; pass a positive int"),
        ({"nprocs": 1, "devices_per_process": -1}, "devices_per_process=-1 must be at least 1"),
        ({"nprocs": 1}, "script='no/such/file.py' must be an existing file"),
    ],
)
def test_launch_refuses_bad_arguments(kwargs, text):
    with pytest.raises(ConfigError) as error:
        launch.launch("no/such/file.py", **kwargs)
    assert text in str(error.value)


def test_the_device_count_replaces_an_inherited_one(monkeypatch):
    timeout = "--xla_cpu_collective_timeout_seconds=7"
    monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 {timeout} --xla_force_host_platform_device_count=8")
    environment = launch._environment(None, None, 3)
    assert environment["XLA_FLAGS"] == f"--xla_a=1 {timeout} --xla_force_host_platform_device_count=3"
    environment = launch._environment({"XLA_FLAGS": timeout, "X": "y"}, "cpu", 2)
    assert environment["XLA_FLAGS"] == f"{timeout} --xla_force_host_platform_device_count=2"
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["X"] == "y"


def test_collectives_between_cpus_wait_no_longer_than_exchanges(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    for seconds, flag in (("0.5", "1"), ("45", "45"), (None, "300")):
        monkeypatch.delenv("JAX_MORIEP_TIMEOUT", raising=False)
        environment = launch._environment({"JAX_MORIEP_TIMEOUT": seconds} if seconds else None, None, 1)
        assert f"--xla_cpu_collective_timeout_seconds={flag} " in environment["XLA_FLAGS"]
    with pytest.raises(TransportError, match="JAX_MORIEP_TIMEOUT='soon' must be a positive number"):
        launch._environment({"JAX_MORIEP_TIMEOUT": "soon"}, None, 1)


def test_the_port_is_free_and_outside_the_kernels_own_range():
    port = launch._free_port()
    assert 20000 <= port < 32768
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


@pytest.mark.parametrize(("module", "name"), [(False, "test_launch.py"), (True, "-m tests.unit.test_launch")])
def test_what_the_nodes_compare(monkeypatch, module, name):
    """Of a script no folder, which may be another on each machine."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    asked = []

    def meet(nodes, start, port, events):
        asked.append(start)
        raise TransportError("asked")

    monkeypatch.setattr(launch, "meet", meet)
    nodes = Nodes(2, 0, "127.0.0.1:1")
    script = "tests.unit.test_launch" if module else __file__
    for platform in ("cpu", None):
        with pytest.raises(TransportError, match="asked"):
            launch.launch(script, 2, 3, ["-x", "y"], platform=platform, module=module, nodes=nodes)
    assert asked == [Start(2, 3, platform, name, ("-x", "y")) for platform in ("cpu", None)]


@pytest.mark.parametrize(
    ("environment", "installed", "expected"),
    [
        ({}, None, True),
        ({"JAX_PLATFORMS": ""}, None, True),
        ({"JAX_PLATFORMS": "cpu"}, "entry point", True),
        ({"JAX_PLATFORMS": "cuda"}, None, False),
        ({}, "entry point", False),
        ({}, "module", False),
        ({}, "libtpu", False),
        ({"PJRT_NAMES_AND_LIBRARY_PATHS": "a:b"}, None, False),
    ],
)
def test_where_jax_has_only_cpus(monkeypatch, tmp_path, environment, installed, expected):
    # This environment's own plugins are not seen.
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "jax_plugins", raising=False)
    if installed == "entry point":
        (tmp_path / "plugin-1.dist-info").mkdir()
        text = "[jax_plugins]\nplugin = plugin\n"
        (tmp_path / "plugin-1.dist-info" / "entry_points.txt").write_text(text)
    elif installed is not None:
        folder = tmp_path / {"module": "jax_plugins/plugin", "libtpu": "libtpu"}[installed]
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    assert has_only_cpus(environment) == expected


@pytest.mark.parametrize("only_cpus", [False, True])
def test_the_hostname_is_looked_at_where_jax_has_only_cpus(monkeypatch, only_cpus):
    monkeypatch.setattr(launch, "has_only_cpus", lambda environment: only_cpus)
    monkeypatch.setattr(launch, "why_name_misleads", lambda: "it misleads")
    # An address that is kept for documentation and is nobody's.
    nodes = Nodes(2, 0, "192.0.2.1:4000")
    with pytest.raises(ConfigError, match="it misleads" if only_cpus else "coordinator="):
        launch.launch(__file__, 1, nodes=nodes)
