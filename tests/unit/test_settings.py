"""The environment variables: their rules, where they are told, and that there are no others."""

import re
from pathlib import Path

import jax
import pytest

import jax_moriep as jm
from jax_moriep import cli
from jax_moriep.runtime import settings

ROOT = Path(__file__).parents[2]
BAD = {
    "JAX_MORIEP_TIMEOUT": ("", "soon", "0", "-1", "inf", "nan", "1e300"),
    "JAX_MORIEP_WATCHDOG": ("", "off", "2"),
    "JAX_MORIEP_KEEP_MEMORY": ("", "yes"),
    "JAX_MORIEP_NATIVE_DISPATCH": ("", "push", "PULL"),
    "JAX_MORIEP_ARENA_MB": ("", "0", "-1", "1.5", "1G", "1048577"),
    "JAX_MORIEP_RANKS_PER_NODE": ("", "0", "two", "-1", "\N{ARABIC-INDIC DIGIT THREE}", "1048577"),
    "JAX_MORIEP_MORI_HEAP_MB": ("", "0", "1G"),
}
GOOD = {
    "JAX_MORIEP_TIMEOUT": ("0.5", 0.5),
    "JAX_MORIEP_WATCHDOG": ("0", False),
    "JAX_MORIEP_KEEP_MEMORY": ("1", True),
    "JAX_MORIEP_NATIVE_DISPATCH": ("put", "put"),
    "JAX_MORIEP_ARENA_MB": ("1048576", 1048576),
    "JAX_MORIEP_RANKS_PER_NODE": ("4", 4),
    "JAX_MORIEP_MORI_HEAP_MB": ("1", 1),
    "JAX_MORIEP_NODE": ("a", "a"),
}
# Their values are any text, and empty is unset.
TEXTS = {s.name for s in settings.ALL} - set(BAD)
# Of the tests alone; no setting.
OF_TESTS = "JAX_MORIEP_TEST_"


@pytest.mark.parametrize(
    ("setting", "text"),
    [(setting, text) for setting in settings.ALL for text in BAD.get(setting.name, ())],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_value_that_breaks_the_rule(setting, text):
    message = f"{setting.name}={text!r} must be {setting.must}; unset it or fix it"
    with pytest.raises(jm.TransportError, match=f"^{re.escape(message)}$"):
        setting.value({setting.name: text})
    assert settings.describe({setting.name: text})[setting.name]["error"] == message


@pytest.mark.parametrize("setting", settings.ALL, ids=lambda setting: setting.name)
def test_values_and_defaults(setting):
    text, value = GOOD.get(setting.name, ("/some/where", Path("/some/where")))
    assert setting.value({setting.name: text}) == value
    assert setting.value({}) == setting.unset
    if setting.name in TEXTS:
        assert setting.value({setting.name: ""}) is None
    told = settings.describe({setting.name: text})[setting.name]
    assert (told["value"], told["from"], told["error"]) == (text, "environment", None)
    told = settings.describe({})[setting.name]
    assert (told["value"], told["from"], told["error"]) == (setting.default, "default", None)


def test_defaults_that_are_values_are_those_in_force():
    """What people read is what the program takes."""
    for setting in settings.ALL:
        if setting.name in BAD and setting.unset is not None:
            assert setting.parse(setting.default) == setting.unset, setting.name


def test_more_digits_than_python_reads_break_the_rule():
    with pytest.raises(jm.TransportError, match=r"RANKS_PER_NODE='9+\.\.\. must be a whole number"):
        settings.RANKS_PER_NODE.value({"JAX_MORIEP_RANKS_PER_NODE": "9" * 5000})


@pytest.mark.parametrize("text", ["\udcff", "a\n", "\0"])
def test_a_name_that_processes_cannot_tell_each_other_breaks_the_rule(text):
    with pytest.raises(jm.TransportError, match="NODE='.*' must be a name of printable characters"):
        settings.NODE.value({"JAX_MORIEP_NODE": text})


@pytest.mark.parametrize("transport", ["native", "collective", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_every_exchange_checks_them_all(name, transport, monkeypatch):
    """Also where some of them steer nothing: the same job may go to GPUs next."""
    monkeypatch.setenv(name, BAD[name][-1])
    cfg = jm.MoEConfig(8, 2, 16, 16, transport=transport)
    with pytest.raises(jm.TransportError, match=f"{name}='.*' must be .*; unset it or fix it"):
        jm.initialize(jax.make_mesh((8,), ("ep",)), cfg=cfg)


def test_a_bad_native_dispatch_is_told_on_cpus_too(monkeypatch):
    monkeypatch.setenv("JAX_MORIEP_NATIVE_DISPATCH", "push")
    cfg = jm.MoEConfig(8, 2, 16, 16, tuning=jm.Tuning(native_dispatch="pull"))
    told = jm.explain(cfg, jax.make_mesh((8,), ("ep",)), num_tokens=8)
    message = "JAX_MORIEP_NATIVE_DISPATCH='push' must be pull or put; unset it or fix it"
    assert told.transport_details["native"] == f"refuses every exchange: {message}"


def test_names_are_written_in_one_place():
    """What reads the environment asks ``settings``; the names of others' variables are not ours."""
    known = {setting.name for setting in settings.ALL}
    for path in [*(ROOT / "jax_moriep").rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]*")]:
        text = path.read_text()
        for name in set(re.findall(r"JAX_MORIEP_[A-Z_]*[A-Z]", text)):
            assert name in known or name.startswith(OF_TESTS), f"{path.relative_to(ROOT)}: {name}"
        if path.name != "settings.py" and path.suffix == ".py":
            read = re.search(r"environ(\.get\(|\.pop\(|\[)\s*f?[\"']JAX_MORIEP_", text)
            assert read is None, f"{path.relative_to(ROOT)} reads {read and read[0]} itself"
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name in set(re.findall(r"JAX_MORIEP_[A-Z_]*[A-Z]", path.read_text())):
            assert name in known or name.startswith(OF_TESTS), f"{path.relative_to(ROOT)}: {name}"


def test_the_page_is_the_list():
    rows = [f"| `{s.name}` | {s.default} | {s.meaning} | {s.must} |" for s in settings.ALL]
    page = (ROOT / "docs" / "settings.md").read_text().splitlines()
    assert [line for line in page if line.startswith("| `JAX_MORIEP_")] == rows, "\n".join(rows)
    assert "(docs/settings.md)" in (ROOT / "README.md").read_text()


def test_lines_for_people():
    environment = {
        "JAX_MORIEP_TIMEOUT": "soon",
        "JAX_MORIEP_TIMOUT": "7",
        "JAX_MORIEP_NODE": "a",
        "HOME": "/",
    }
    said = "\n".join(settings.lines(settings.describe(environment)))
    assert said.startswith(
        "settings\n  no  JAX_MORIEP_TIMEOUT: soon\n      JAX_MORIEP_TIMEOUT='soon' must be a "
    )
    assert "\n  ok  JAX_MORIEP_NODE: a\n" in said
    assert "\n  ok  JAX_MORIEP_ARENA_MB: 1024 (default)\n" in said
    assert said.endswith(
        "\n  no  JAX_MORIEP_TIMOUT: 7\n      JAX_MORIEP_TIMOUT='7' must have the name of a setting; "
        "unset it, or correct its name"
    )


def test_doctor_shows_what_is_in_force(monkeypatch, capsys):
    monkeypatch.setenv("JAX_MORIEP_TIMEOUT", "7")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "\nsettings\n  ok  JAX_MORIEP_TIMEOUT: 7\n  ok  JAX_MORIEP_WATCHDOG: 1 (default)\n" in text
