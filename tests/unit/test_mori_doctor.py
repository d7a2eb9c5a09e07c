"""What the doctor says of MORI, where it is and where it is not, and of the network between ranks."""

import json

import pytest

from jax_moriep import cli
from jax_moriep.doctor import facts, mori
from jax_moriep.errors import TransportError
from jax_moriep.mori import network
from tests.unit.test_mori_kernels import make_program
from tests.unit.test_mori_wheel import make_wheel


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    for name in (
        "JAX_MORIEP_MORI_DIR",
        "JAX_MORIEP_MORI_KERNELS",
        "MORI_SOCKET_IFNAME",
        "MORI_SHMEM_HEAP_SIZE",
        "MORI_IGNORE_CPU_AFFINITY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_MORIEP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_MORIEP_ROCM_PATH", str(tmp_path / "rocm"))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine that has all."""
    monkeypatch.setenv("JAX_MORIEP_MORI_DIR", str(make_wheel(tmp_path / "wheel")))
    monkeypatch.setattr(network, "interfaces", lambda: ["lo", "eth0"])
    monkeypatch.setattr(network, "adapters", lambda: ["mlx5_core"])
    make_program(tmp_path / "rocm" / "bin" / "hipcc")
    return tmp_path


def test_without_mori():
    found = mori.examine()
    assert (found["folder"], found["version"]) == (None, None)
    title, line = mori.lines(found)
    assert title == "MORI"
    assert line == "  no  amd-mori: amd-mori is not installed; run: pip install amd-mori==1.2.4"


def test_with_mori(machine):
    kept = machine / "cache" / "mori"
    for name in ("IntraNode-bf16-gfx942-1.2.4-0123", ".IntraNode-f32-gfx942-1.2.4-4567.tmp"):
        (kept / name).mkdir(parents=True)
        (kept / name / "IntraNode.hsaco").touch()
    lines = mori.lines(mori.examine())
    assert lines[:6] == [
        "MORI",
        f"  ok  amd-mori: 1.2.4 at {machine}/wheel/mori",
        f"  ok  compiler of its kernels: {machine}/rocm/bin/hipcc",
        "  ok  interface between ranks: eth0",
        "  ok  sending between machines: by the GPU itself, for a GPU can drive mlx5",
        "  ok  settings: nothing is set that forbids its use",
    ]
    assert lines[6] == f"      kernels in {kept}: IntraNode-bf16-gfx942-1.2.4-0123"
    assert "MORI binds the thread that opens a group" in lines[7]


def test_what_is_wrong_is_said_with_its_cure(machine, monkeypatch):
    (machine / "rocm" / "bin" / "hipcc").unlink()
    monkeypatch.setenv("MORI_SOCKET_IFNAME", "eth")
    monkeypatch.setenv("MORI_SHMEM_HEAP_SIZE", "1T")
    monkeypatch.setenv("MORI_IGNORE_CPU_AFFINITY", "1")
    text = "\n".join(mori.lines(mori.examine()))
    assert "  no  compiler of its kernels: no HIP compiler was found in " in text
    assert "  no  interface between ranks: MORI_SOCKET_IFNAME='eth' must be one interface" in text
    assert "  no  settings: MORI_SHMEM_HEAP_SIZE='1T' must be a whole number" in text
    assert "threads stay where they are, for MORI_IGNORE_CPU_AFFINITY=1" in text
    assert "      MORI_SHMEM_HEAP_SIZE=1T" in text
    monkeypatch.delenv("MORI_SHMEM_HEAP_SIZE")
    monkeypatch.setenv("MORI_DISABLE_P2P", "1")
    assert "MORI_DISABLE_P2P='1' must be unset" in mori.examine()["settings"]


def test_given_kernels_are_named(machine, monkeypatch):
    monkeypatch.setenv("JAX_MORIEP_MORI_KERNELS", str(machine))
    assert f"      kernels in {machine}: none yet" in mori.lines(mori.examine())


def test_it_is_a_part_of_the_doctor(machine, capsys):
    found = facts.examine()
    assert found["mori"]["version"] == "1.2.4"
    assert cli.main(["doctor"]) == 0
    assert f"MORI\n  ok  amd-mori: 1.2.4 at {machine}/wheel/mori\n" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mori"] == found["mori"]


def test_xlas_own_mori(tmp_path, monkeypatch, machine):
    for name, version, content in (
        ("jax_rocm7_pjrt", "0.12.0", b"xMoriCollectivesx"),
        ("jax_rocm9_pjrt", "1", b"x"),
    ):
        info = tmp_path / "site" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text(f"jax_plugins/{name}/xla_rocm_plugin.so,,\n")
        library = tmp_path / "site" / "jax_plugins" / name / "xla_rocm_plugin.so"
        library.parent.mkdir(parents=True)
        library.write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = mori.examine()
    assert found["xla"] == ["jax-rocm7-pjrt 0.12.0"]
    line = "      jax-rocm7-pjrt 0.12.0 holds a MORI of its own, which obeys the same MORI_* variables"
    assert line in mori.lines(found)


def test_the_interface():
    choose = network.chosen_interface
    assert choose({}, ["lo", "eth0", "eth1"]) == ("eth0", None)
    assert choose({"MORI_SOCKET_IFNAME": "lo"}, ["lo"]) == ("lo", None)
    assert choose({"MORI_SOCKET_IFNAME": "eth1"}, ["lo", "eth0", "eth1"]) == ("eth1", None)
    interface, why = choose({}, ["lo"])
    assert interface is None
    assert why.endswith("set MORI_SOCKET_IFNAME=lo if all ranks are here")
    for bad in ("", "eth", "^lo", "lo,eth0"):
        interface, why = choose({"MORI_SOCKET_IFNAME": bad}, ["lo", "eth0"])
        assert interface is None
        assert why == (
            f"MORI_SOCKET_IFNAME={bad!r} must be one interface with an IPv4 address, exactly (lo, eth0); "
            "name one of these, or unset it"
        )


def test_interfaces_of_this_machine():
    assert "lo" in network.interfaces()


@pytest.mark.parametrize(("count", "said"), [(1, "1 NUMA node here"), (8, "8 NUMA nodes here")])
def test_numa_nodes(tmp_path, count, said):
    for number in range(count):
        (tmp_path / f"node{number}").mkdir()
    (tmp_path / "online").touch()
    assert said in mori._affinity(tmp_path)


@pytest.mark.parametrize(
    ("environment", "found", "proxy", "why"),
    [
        ({}, [], True, "no adapter here is of a kind that a GPU can drive"),
        ({}, ["irdma"], True, "no adapter here"),
        ({}, ["ionic", "mlx5_core", "mlx5_core"], False, "a GPU can drive ionic, mlx5"),
        ({"MORI_DEVICE_NIC": "bnxt"}, [], False, "MORI_DEVICE_NIC=bnxt"),
        ({"MORI_ENABLE_HOST_PROXY": "1"}, ["mlx5_core"], True, "MORI_ENABLE_HOST_PROXY=1"),
        ({"MORI_ENABLE_HOST_PROXY": "0"}, [], False, "MORI_ENABLE_HOST_PROXY=0"),
    ],
)
def test_who_sends_between_machines(environment, found, proxy, why):
    by_proxy, said = network.by_proxy(environment, found)
    assert by_proxy == proxy
    assert said.startswith(why)


def test_a_switch_that_is_neither_on_nor_off():
    with pytest.raises(
        TransportError, match="MORI_ENABLE_HOST_PROXY='yes' must be 0 or 1; unset it or fix it"
    ):
        network.by_proxy({"MORI_ENABLE_HOST_PROXY": "yes"}, [])
