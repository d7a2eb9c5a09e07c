"""Nodes: how large they are, what is said of them, and when "auto" takes the transport that needs them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep import cli, transports
from jax_moriep.exchange import make_link
from jax_moriep.runtime import nodes
from jax_moriep.runtime.place import Place
from jax_moriep.transports import two_level

SETTING = "JAX_MORIEP_RANKS_PER_NODE"
CFG = jm.MoEConfig(16, 4, 256, 64, transport="two_level")


def mesh(*sizes, names=("ep",)):
    return Mesh(np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), names)


@pytest.mark.parametrize(
    ("groups", "most", "size"),
    [
        (["AAAA"], None, 4),
        (["AABB"], None, 2),
        (["AABBCC"], 1, 1),
        (["AAAABB"], None, 2),  # machines with different numbers of ranks
        (["AAABB"], None, 1),
        (["ABAB"], None, 1),  # ranks of a machine that are not adjacent
        (["AAAA", "AABB"], None, 2),  # a group within a machine, and one across two
        (["AAAAAA"], 4, 3),  # the setting is a limit; six ranks do not divide by it
        (["AAAAA"], 2, 1),
        (["A"], 8, 1),
    ],
)
def test_the_size_of_nodes(groups, most, size):
    assert nodes.size_of(groups, most) == size


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", ""])
def test_a_bad_setting_is_refused(monkeypatch, value, capsys):
    monkeypatch.setenv(SETTING, value)
    text = f"{SETTING}={value!r} must be a whole number from 1 to 1048576; unset it or fix it"
    assert transports.reasons(Place.of(mesh(2), "ep"))["two_level"] == text
    with pytest.raises(jm.TransportError, match="cannot run here"):
        jm.initialize(mesh(2), cfg=CFG)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cli.main(["doctor"])
    assert f"  no  two_level: {text}\n" in capsys.readouterr().out


def test_nodes_of_two_dtypes_have_two_digests():
    """float16 and bfloat16 have as many bytes, so nothing else that goes between nodes tells them apart."""
    digests = {two_level._digest(make_link(CFG, mesh(2), 4, name, "ep")) for name in ("float16", "bfloat16")}
    assert len(digests) == 2


def test_explain_tells_the_nodes(monkeypatch):
    assert "two_level" not in jm.explain(CFG, mesh(8), num_tokens=64).transport_details
    monkeypatch.setenv(SETTING, "2")
    told = jm.explain(CFG, mesh(8), num_tokens=64, dtype="float32")
    assert told.transport == "two_level"
    # Three other nodes, to each 64 tokens of 256 float32 and four routes of 8 bytes.
    assert told.transport_details["two_level"].splitlines() == [
        "4 nodes of 2 ranks: native inside, jax's collectives between them",
        "a dispatch sends 0.203 MB of each rank to other nodes",
    ]
    lowered = jm.explain(CFG, AbstractMesh((6,), ("ep",)), num_tokens=64)
    assert lowered.transport_details["two_level"].startswith("3 nodes of 2 ranks")


def test_auto_takes_it_where_there_are_several_machines(monkeypatch):
    cfg = jm.MoEConfig(16, 4, 256, 64)
    assert jm.explain(cfg, mesh(4)).transport == "native"
    monkeypatch.setattr(Place, "num_nodes", 2)
    told = jm.explain(cfg, mesh(4))
    assert told.transport == "two_level"
    assert told.transport_reasons["native"].endswith("on one machine; use transport='two_level'")


def test_auto_takes_nothing_else_for_a_bad_setting(monkeypatch):
    """Else a process with a typing error would run collective beside others that run two_level."""
    monkeypatch.setenv(SETTING, "x")
    assert transports.choose("auto", Place.of(mesh(2), "ep")) == "native"
    monkeypatch.setattr(Place, "num_nodes", 2)
    with pytest.raises(jm.TransportError, match=f"{SETTING}='x' must be a whole number"):
        transports.choose("auto", Place.of(mesh(2), "ep"))
    assert transports.choose("collective", Place.of(mesh(2), "ep")) == "collective"


def test_explain_says_of_a_bad_setting_what_a_layer_would(monkeypatch):
    cfg = jm.MoEConfig(16, 4, 256, 64)
    monkeypatch.setenv(SETTING, "x")
    assert jm.explain(cfg, mesh(2)).transport == "native"
    monkeypatch.setattr(Place, "num_nodes", 2)
    with pytest.raises(jm.TransportError, match=f"{SETTING}='x' must be a whole number"):
        jm.explain(cfg, mesh(2))
    named = jm.explain(dataclasses.replace(cfg, transport="collective"), mesh(2))
    assert named.transport == "collective"
    assert named.transport_reasons["two_level"].startswith(f"{SETTING}='x' must be")
    assert jm.explain(CFG, mesh(2)).transport is None


def test_groups_of_two_axes_are_cut_alike(monkeypatch):
    """Each group along the axis has its nodes; all have the same, because they run one program."""
    monkeypatch.setenv(SETTING, "2")
    place = Place.of(mesh(2, 4, names=("dp", "ep")), "ep")
    assert place.ranks_per_node == 2
    x = jax.random.normal(jax.random.key(0), (8, 6, 256))
    cfg = jm.MoEConfig(16, 4, 256, 64, transport="two_level", experts="blocked")
    params = jm.init_params(jax.random.key(1), cfg)
    got = jax.jit(lambda x: jm.ep_moe(x, params, cfg, mesh=place.mesh)[0])(x)
    want = jax.jit(lambda x: jm.ep_moe(x, params, cfg, mesh=mesh(1))[0])(x)
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=2e-5, rtol=2e-4)


def test_a_mesh_that_is_not_the_one_in_context_is_found_out(monkeypatch):
    """Also where each rank is at its own place, of another node: the handlers count ranks along the axis."""
    monkeypatch.setenv(SETTING, "2")
    running = Mesh(np.array(jax.devices())[[2, 3, 0, 1]], ("ep",))

    def body(x):
        ids = jnp.zeros((x.shape[0], CFG.top_k), jnp.int32)
        disp = jm.dispatch(x, ids, jnp.ones(ids.shape), CFG)
        return jm.combine(disp.rows, disp.plan)

    jm.initialize(mesh(4), cfg=CFG)
    step = jax.jit(jax.shard_map(body, mesh=running, in_specs=P("ep"), out_specs=P("ep")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="of the running mesh, which is not its place"):
        jax.block_until_ready(step(jnp.ones((8, CFG.hidden_size))))
