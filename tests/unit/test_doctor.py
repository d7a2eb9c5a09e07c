"""The doctor: what it finds here, and what it says about a machine where something is missing."""

import json

import pytest

from jax_moriep import __version__, cli, experts, transports
from jax_moriep.doctor import facts, text
from jax_moriep.runtime.place import Place


@pytest.fixture
def found(monkeypatch):
    # Set, so that the assignment that examine makes for GPUs does not outlive the test.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return facts.examine()


def test_json_is_what_examine_found(found, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_this_machine(found):
    assert found["versions"]["jax_moriep"] == __version__
    assert found["versions"]["jax"]
    assert list(found["platforms"]) == ["cpu"]
    assert list(found["transports"]["cpu"])[: len(transports.IMPLEMENTATIONS)] == list(
        transports.IMPLEMENTATIONS
    )
    assert set(experts.IMPLEMENTATIONS) <= set(found["experts"]["cpu"])
    assert found["transports"]["cpu"]["reference"] is None
    assert found["libraries"]["cpu"]["reason"] is None
    # The headers it is built with are those of the oldest supported jaxlib.
    assert found["libraries"]["cpu"]["ffi_api"] == "0.3"
    assert found["machine"] == {"memfd": None, "peer memory": None}
    assert found["chosen"]["cpu"]["transport"] == "native"
    assert found["ok"]


def test_all_variables_of_ours_are_shown(monkeypatch, capsys):
    """Also those that change where ranks are, and one whose name is wrong and that nobody reads."""
    for name in ("JAX_MORIEP_NODE", "JAX_MORIEP_RANK_PER_NODE"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "\n  ok  JAX_MORIEP_NODE: 7\n" in shown
    assert "\n  no  JAX_MORIEP_RANK_PER_NODE: 7\n      JAX_MORIEP_RANK_PER_NODE='7' must" in shown


def test_text_names_everything(found, capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name, why in (found["transports"]["cpu"] | found["experts"]["cpu"]).items():
        assert (f"  ok  {name}: can run\n" if why is None else f"  no  {name}: {why}\n") in shown
    assert f"cpu: {found['libraries']['cpu']['path']}" in shown
    assert shown.endswith("the default path can run\n")


def test_which_kernels_run_is_told(found):
    """Mosaic's or Triton's: asked as of a GPU that this machine has not, shown below the experts' line."""
    assert found["experts_details"] == {"cpu": {}}
    reasons = {"aiter": "why not", "triton": None, "blocked": None}
    told = experts.details(Place("gpu", "gfx942"), reasons, None)
    assert list(told) == ["triton"]
    assert told["triton"].startswith("products by Pallas-Triton; not by Pallas-Mosaic's kernels: they are")
    shown = found | {"experts_details": {"cpu": {"blocked": told["triton"]}}}
    assert f"  ok  blocked: can run\n      {told['triton']}\n" in text.as_text(shown)


def test_a_missing_library_is_said_with_its_cure(found, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAX_MORIEP_LIB_DIR", str(tmp_path))
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"  no  cpu: the native library of backend='cpu' is not at {tmp_path}/libmoriep_cpu.so; " in shown
    assert "  no  native: the native library" in shown
    assert "transports on cpu (auto takes collective)" in shown
    assert f"  ok  JAX_MORIEP_LIB_DIR: {tmp_path}\n" in shown


def test_exit_code_1_when_nothing_can_run(found, monkeypatch, capsys):
    monkeypatch.setattr(transports, "reasons", lambda platform: {"native": "it is broken; mend it"})
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "  no  native: it is broken; mend it\n" in shown
    assert shown.endswith("the default path can NOT run\n")


def test_transports_are_asked_about_these_devices_with_a_process_for_each(found, monkeypatch):
    asked = []
    monkeypatch.setattr(facts.compat, "architecture", lambda device: "gfx942")
    monkeypatch.setattr(transports, "reasons", lambda place: asked.append(place) or {"native": None})
    facts.examine()
    (place,) = asked
    assert (place.platform, place.architecture, place.num_ranks) == ("cpu", "gfx942", 8)
    assert (place.num_processes, place.devices_per_process) == (8, 1)


def test_jax_without_devices_is_reported(found, monkeypatch, capsys):
    def devices(backend=None):
        raise RuntimeError("Unable to initialize backend 'rocm'")

    monkeypatch.setattr(facts.jax, "devices", devices)
    assert cli.main(["doctor"]) == 1
    assert "  none: Unable to initialize backend 'rocm'\n" in capsys.readouterr().out


def test_peer_memory_that_cannot_be_opened(monkeypatch):
    # No process has this id, so that the path does not exist: what a peer in another PID namespace sees.
    monkeypatch.setattr(facts.os, "getpid", lambda: 2**22 + 1)
    reason = facts._peer_memory_reason()
    assert reason is not None
    assert "FileNotFoundError" in reason
    assert "transport='collective'" in reason
