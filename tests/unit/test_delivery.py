"""Who moves the tokens of native's dispatch between GPUs: who decides, and where it is said."""

import re

import pytest

import jax_moriep as jm
from jax_moriep import transports
from jax_moriep.doctor import facts, text
from jax_moriep.plan import ExchangeShape
from jax_moriep.runtime.place import Place
from jax_moriep.transports import delivery, native

VARIABLE = "JAX_MORIEP_NATIVE_DISPATCH"
HOPPER = Place("gpu", "sm_90", num_ranks=4)
SIZES = (16, 2, 64, 32)


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def named(way):
    return jm.MoEConfig(*SIZES, tuning=jm.Tuning(native_dispatch=way))


def told(place, cfg):
    return transports.describe("native", place, cfg, ExchangeShape.of(cfg, place.num_ranks, 8), "bfloat16")


def attribute(place, cfg, monkeypatch):
    monkeypatch.setattr(native, "open_groups", lambda *args, **kwargs: "g")
    shape = ExchangeShape.of(cfg, place.num_ranks, 8)
    return dict(native.open(place, cfg, shape, "bfloat16").attributes)["delivery"]


def test_the_table_says_why():
    assert delivery.choose(HOPPER, None)[0] == "pull"
    assert "two H200" in told(HOPPER, jm.MoEConfig(*SIZES))
    assert "neither has been measured on AMD's hardware" in delivery.choose(Place("gpu", "gfx942"), None)[1]
    assert delivery.choose(Place("gpu", "sm_120"), None) == ("pull", "nothing has been measured on sm_120")


def test_the_config_decides_before_the_environment_and_that_before_the_table(monkeypatch):
    cfg = jm.MoEConfig(*SIZES)
    assert attribute(HOPPER, cfg, monkeypatch) == "pull"
    monkeypatch.setenv(VARIABLE, "put")
    assert told(HOPPER, cfg) == f"dispatches by put: named by {VARIABLE}"
    assert attribute(HOPPER, cfg, monkeypatch) == attribute(HOPPER, named("auto"), monkeypatch) == "put"
    assert told(HOPPER, named("pull")) == "dispatches by pull: named by cfg.tuning"
    assert attribute(HOPPER, named("pull"), monkeypatch) == "pull"


def test_cpus_pull(monkeypatch):
    monkeypatch.setenv(VARIABLE, "put")
    assert delivery.choose(Place("cpu", num_ranks=4), named("put"))[0] == "pull"
    assert told(Place("cpu", num_ranks=4), named("put")) is None


def test_what_is_neither_is_refused(monkeypatch):
    with pytest.raises(
        jm.ConfigError, match=re.escape("native_dispatch='push' must be one of ('auto', 'pull', ")
    ):
        jm.Tuning(native_dispatch="push")
    monkeypatch.setenv(VARIABLE, "push")
    refused = f"{VARIABLE}='push' must be pull or put; unset it or fix it"
    with pytest.raises(jm.TransportError, match=refused):
        delivery.choose(HOPPER, None)
    assert told(HOPPER, jm.MoEConfig(*SIZES)) == f"refuses every exchange: {refused}"
    assert facts._native_dispatch(HOPPER) == f"refuses every exchange: {refused}"


def test_doctor_says_it(monkeypatch):
    found = facts.examine()
    assert found["native_dispatch"] == {}
    found["native_dispatch"]["cpu"] = facts._native_dispatch(HOPPER)  # as it would stand with GPUs
    assert "\n      native dispatches by pull: on two H200" in text.as_text(found)
