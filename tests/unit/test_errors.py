"""Each mistake a user can make at trace time gives an error that names the value, the rule and the cure."""

import ctypes
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep import transports
from jax_moriep.runtime import compat, group, library, native_api, settings
from jax_moriep.runtime.place import Place
from jax_moriep.transports import native


def mesh_of(count=4, names=("ep",), kind=AxisType.Auto):
    shape = (count,) if len(names) == 1 else (count // 2, 2)
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), names, axis_types=(kind,) * len(names))


CFG = jm.MoEConfig(8, 2, 16, 8, transport="native")
PARAMS = jm.init_params(jax.random.key(0), CFG)


def call(x=None, params=None, cfg=CFG, **options):
    x = jnp.zeros((8, 16)) if x is None else x
    params = jm.init_params(jax.random.key(0), CFG) if params is None else params
    return jax.eval_shape(lambda x, p: jm.ep_moe(x, p, cfg, **{"mesh": mesh_of(), **options}), x, params)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"top_k": 9}, "top_k=9 must be at most num_experts=8; lower top_k or add experts"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"num_experts": 8.0}, "num_experts=8.0 must be an integer"),
        ({"num_experts": True}, "num_experts=True must be an integer"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0 must be positive; use None"),
        ({"activation_limit": 0}, "activation_limit=0.0 must be positive; use a clamp above 0"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan must be a finite number"),
        ({"block": 0}, "block=0 must be at least 1"),
        ({"transport": "carrier_pigeon"}, "transport='carrier_pigeon' must be one of"),
        ({"experts": "cutlass"}, "experts='cutlass' must be one of"),
        ({"activation": "relu"}, "activation='relu' must be one of"),
        ({"router": "argmax"}, "router='argmax' must be one of"),
        ({"wire_dtype": "int8"}, "wire_dtype='int8' must be one of"),
        ({"shared_gate": True}, "shared_gate=True must come with a shared expert"),
        ({"score_bias": True}, "score_bias=True must come with a router that uses one"),
        ({"num_groups": 2}, "num_groups=2 must come with a grouped router"),
        ({"router": "deepseek_v3", "num_groups": 2}, "must be set together"),
        (
            {"router": "deepseek_v3", "num_groups": 3, "top_groups": 1},
            "num_groups=3 must divide num_experts=8",
        ),
        (
            {"router": "deepseek_v3", "num_groups": 2, "top_groups": 3},
            "top_groups=3 must be at most num_groups=2",
        ),
        (
            {"router": "deepseek_v3", "num_groups": 8, "top_groups": 1, "top_k": 2},
            "top_k=2 must be at most the 1",
        ),
        ({"norm_topk": 1}, "norm_topk=1 must be True or False"),
    ],
)
def test_config(options, text):
    with pytest.raises(jm.ConfigError, match=re.escape(text)):
        jm.MoEConfig(**{"num_experts": 8, "top_k": 2, "hidden_size": 16, "intermediate_size": 8, **options})


def test_configs_are_equal_and_hash_by_value():
    numpy_made = jm.MoEConfig(np.int64(8), np.int32(2), 16, 8, routed_scaling=np.float32(1.0))
    assert numpy_made == jm.MoEConfig(8, 2, 16, 8)
    assert hash(numpy_made) == hash(jm.MoEConfig(8, 2, 16, 8))
    assert type(numpy_made.top_k) is int


def test_a_config_in_words_is_the_same_in_every_process():
    class Router:
        def __call__(self, logits, bias, cfg):
            return jm.ROUTERS["softmax_topk"](logits, bias, cfg)

    def described(router):
        return jm.MoEConfig(8, 2, 16, 8, router=router).describe()

    assert described(Router()).endswith("Router")
    partial = functools.partial(Router(), object(), scale=2.0)
    assert re.search(r"router=partial\(\S+Router, <object object>, scale=2.0\)$", described(partial))
    assert "0x" not in described(partial)
    assert described(partial) != described(functools.partial(Router(), object(), scale=3.0))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"x": jnp.zeros((8, 15))}, jm.ConfigError, "x.shape=(8, 15) must end in hidden_size=16"),
        ({"x": jnp.zeros((8, 16), jnp.int32)}, jm.ConfigError, "x.dtype='int32' must be float32"),
        ({"token_mask": jnp.ones((8,))}, jm.ConfigError, "token_mask='float32[8]' must be bool[8]"),
        ({"token_mask": jnp.ones((4,), bool)}, jm.ConfigError, "token_mask='bool[4]' must be bool[8]"),
        ({"ep_axis": "experts"}, jm.ShardingError, "ep_axis='experts' must be an axis of the mesh {'ep': 4}"),
        ({"tp_axis": "tp"}, jm.ShardingError, "tp_axis='tp' must be an axis of the mesh"),
        ({"tp_axis": "ep"}, jm.ShardingError, "tp_axis='ep' must differ from ep_axis"),
        ({"token_axes": ("dp",)}, jm.ShardingError, "token_axes='dp' must be an axis of the mesh"),
        ({"token_axes": 5}, jm.ShardingError, "token_axes=5 must be names of axes or a PartitionSpec"),
        ({"token_axes": ("ep", "ep")}, jm.ShardingError, "token_axes=('ep', 'ep') must name no axis twice"),
        ({"mesh": None}, jm.ShardingError, "mesh=None must find a mesh in context"),
        ({"params": {"router": 1}}, jm.ConfigError, "params='dict' must be a jm.MoEParams"),
        ({"token_mask": [True] * 8}, jm.ConfigError, "token_mask='list' must be an array; wrap it in jnp"),
        ({"x": PARAMS}, jm.ConfigError, "x='MoEParams' must be an array; call ep_moe(x, params, cfg)"),
        ({"mesh": 8}, jm.ShardingError, "mesh=8 must be a jax.sharding.Mesh or AbstractMesh"),
        *(
            (
                {"params": dataclasses.replace(PARAMS, **{name: [1.0]})},
                jm.ConfigError,
                f"params.{name}='list'",
            )
            for name in ("router", "w1", "w2", "b1")
        ),
    ],
)
def test_layer(options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call(**options)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (
            lambda d, x: jm.dispatch(x, None, None, CFG),
            "ids='NoneType' must be an array; pass jm.route's arrays",
        ),
        (lambda d, x: jm.dispatch(x, d.plan.ids, [[1.0]], CFG), "weights='list' must be an array"),
        (lambda d, x: jm.dispatch(x, None, None, None), "cfg='NoneType' must be a jm.MoEConfig"),
        (lambda d, x: jm.combine(None, d.plan), "rows='NoneType' must be an array"),
        (lambda d, x: jm.combine(d.rows, d), "plan='Dispatched' must be a jm.Plan"),
    ],
)
def test_what_the_exchanges_are_given(wrong, text):
    def local(x):
        route = jm.route(x, PARAMS, CFG)
        wrong(jm.dispatch(x, route.ids, route.weights, CFG), x)

    with pytest.raises(jm.ConfigError, match=re.escape(text)):
        jax.eval_shape(
            jax.shard_map(local, mesh=mesh_of(), in_specs=P("ep"), out_specs=P("ep")), jnp.zeros((8, 16))
        )


def test_tokens_must_be_split_over_the_ranks():
    mesh = mesh_of(names=("dp", "ep"))
    with pytest.raises(jm.ShardingError, match=re.escape("token_axes=('dp',) must contain ep_axis='ep'")):
        call(mesh=mesh, token_axes=("dp",))
    with pytest.raises(jm.ShardingError, match=re.escape("must not contain tp_axis='dp'")):
        call(mesh=mesh, token_axes=("dp", "ep"), tp_axis="dp")


def test_tp_must_divide():
    cfg = jm.MoEConfig(8, 2, 16, 7, transport="native")
    with pytest.raises(jm.ShardingError, match=r"intermediate_size=7 must be divisible by the 2 devices"):
        call(
            params=jm.init_params(jax.random.key(0), cfg),
            cfg=cfg,
            mesh=mesh_of(names=("ep", "tp")),
            tp_axis="tp",
        )


def test_params_must_fit_the_config():
    params = jm.init_params(jax.random.key(0), jm.MoEConfig(6, 2, 16, 8))
    with pytest.raises(jm.ConfigError, match=re.escape("params.router.shape=(16, 6) must be (16, 8)")):
        call(params=params)
    biased = jm.MoEConfig(8, 2, 16, 8, expert_bias=True)
    with pytest.raises(jm.ConfigError, match=re.escape("params.b1=None must be (8, 16) for this config")):
        call(cfg=biased)


def test_padding_for_another_number_of_ranks_is_told_from_a_wrong_shape():
    cfg = jm.MoEConfig(10, 2, 16, 8, expert_bias=True, transport="native")
    params = jm.init_params(jax.random.key(0), cfg)
    for others in (1, 4):
        call(params=jm.pad_params(params, others), cfg=cfg)
    with pytest.raises(jm.ConfigError) as error:
        call(params=jm.pad_params(params, 8), cfg=cfg)
    assert str(error.value).startswith(
        "params.w1.shape=(16, 16, 16) must be (10, 16, 16) or (12, 16, 16) on 4 ranks, and is padded for "
        "another number of them; pass the weights through jm.pad_params(params, 4); for a whole state there "
        "are jm.unpad_params and jm.pad_like"
    )
    call(params=jm.pad_params(jm.pad_params(params, 8), 4), cfg=cfg)
    for name in ("w2", "b1"):
        other = {name: getattr(jm.pad_params(params, 4), name)}
        with pytest.raises(
            jm.ConfigError, match=rf"params.{name}.shape\[0\]=12 must be 10, as many .* w1 has"
        ):
            call(params=dataclasses.replace(params, **other), cfg=cfg)
    mixed = dataclasses.replace(params, w2=jm.pad_params(params, 4).w2)
    call(params=jm.pad_params(mixed, 4), cfg=cfg)


def test_experts_that_the_ranks_do_not_divide():
    """jax refuses to place them, in words that docs/sharp_bits.md has beside the cure."""
    cfg = jm.MoEConfig(16, 2, 16, 8)
    params = jm.init_params(jax.random.key(0), cfg)
    mesh = mesh_of(3)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), jm.param_specs(cfg))
    text = "array axis 0 is partitioned 3 times, but the dimension size is 16"
    with pytest.raises(ValueError, match=text):
        jax.device_put(params, shardings)
    placed = jax.device_put(jm.pad_params(params, 3), shardings)
    assert placed.w1.sharding.shard_shape(placed.w1.shape) == (6, 16, 16)
    # What pads by itself takes them as they are.
    assert jm.prepare_params(params, cfg, mesh).w1.shape[0] == 18
    call(params=params, cfg=cfg, mesh=mesh, x=jnp.zeros((9, 16)))


def test_explicit_shardings_must_match():
    mesh = mesh_of(kind=AxisType.Explicit)
    params = jm.init_params(jax.random.key(0), CFG)
    x = jax.device_put(jnp.zeros((8, 16)), NamedSharding(mesh, P("ep")))
    with jax.set_mesh(mesh):
        replicated = jax.tree.map(lambda p: jax.device_put(p, NamedSharding(mesh, P())), params)
        with pytest.raises(
            jm.ShardingError, match=r"params.w1.sharding=.* must be .*; place the weights with"
        ):
            jax.eval_shape(lambda x, p: jm.ep_moe(x, p, CFG), x, replicated)
        placed = jax.tree.map(
            lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), params, jm.param_specs(CFG)
        )
        whole = jax.device_put(jnp.zeros((8, 16)), NamedSharding(mesh, P()))
        with pytest.raises(
            jm.ShardingError, match=r"x.sharding=.* must split the leading dimensions.*reshard"
        ):
            jax.eval_shape(lambda x, p: jm.ep_moe(x, p, CFG), whole, placed)


def test_an_explicit_mesh_of_one_device_needs_no_sharding():
    """Axes of one device split nothing, so whether a sharding names them says nothing."""
    mesh = jax.make_mesh((1,), ("ep",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        y, _ = jm.ep_moe(jnp.ones((8, 16)), PARAMS, CFG)
    want, _ = jm.ep_moe(jnp.ones((8, 16)), PARAMS, CFG, mesh=mesh_of(1))
    np.testing.assert_allclose(y, want, rtol=1e-5)


def test_tokens_that_an_explicit_mesh_cannot_split():
    mesh = jax.make_mesh((3,), ("ep",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:3])
    with (
        jax.set_mesh(mesh),
        pytest.raises(jm.ShardingError, match=r"; pad x so that the 3 shards divide .* AxisType.Auto"),
    ):
        jm.ep_moe(jnp.ones((8, 16)), PARAMS, CFG)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: jm.explain(CFG, None), "mesh='NoneType' must be a jax.sharding.Mesh or AbstractMesh; make"),
        (lambda: jm.explain(None, CFG), r"cfg='NoneType' must be a jm.MoEConfig; call explain\(cfg, mesh\)"),
        (lambda: jm.check_stats(jnp.ones(3)), "stats='ArrayImpl' must be a jm.MoEStats; pass the second"),
    ],
)
def test_arguments_of_another_kind(call, text):
    with pytest.raises(jm.MoriepError, match=text):
        call()


def test_only_public_names_are_listed():
    assert set(dir(jm)) == set(jm.__all__)
    assert all(hasattr(jm, name) for name in dir(jm))


def test_inside_a_shard_map():
    params = jm.init_params(jax.random.key(0), CFG)

    def body(x):
        return jm.ep_moe(x, params, CFG)[0]

    mapped = jax.shard_map(body, mesh=mesh_of(), in_specs=P("ep"), out_specs=P("ep"))
    with pytest.raises(jm.ShardingError, match="cannot run inside one.*call jm.route, jm.dispatch"):
        jax.eval_shape(mapped, jnp.zeros((8, 16)))


def in_shard_map(fn, *args):
    mapped = jax.shard_map(fn, mesh=mesh_of(), in_specs=P("ep"), out_specs=P("ep"))
    return jax.eval_shape(mapped, *args)


@pytest.mark.parametrize(
    ("x", "ids", "weights", "text"),
    [
        ((8, 15), ((8, 2), jnp.int32), ((8, 2), jnp.float32), "x.shape=(2, 15) must be (T, hidden_size=16)"),
        ((8, 16), ((8, 3), jnp.int32), ((8, 2), jnp.float32), "ids.shape=(2, 3) must be (T, top_k) = (2, 2)"),
        ((8, 16), ((8, 2), jnp.int8), ((8, 2), jnp.float32), "ids.dtype='int8' must be int32"),
        ((8, 16), ((8, 2), jnp.int32), ((8, 1), jnp.float32), "weights.shape=(2, 1) must be"),
        ((8, 16), ((8, 2), jnp.int32), ((8, 2), jnp.int32), "weights.dtype='int32' must be floating"),
    ],
)
def test_dispatch_operands(x, ids, weights, text):
    with pytest.raises(jm.ConfigError, match=re.escape(text)):
        in_shard_map(lambda *a: jm.dispatch(*a, CFG).rows, jnp.zeros(x), jnp.zeros(*ids), jnp.zeros(*weights))


def test_dispatch_outside_a_shard_map():
    with pytest.raises(jm.ShardingError, match="must be a mesh axis of an enclosing jax.shard_map"):
        jm.dispatch(jnp.zeros((2, 16)), jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 2)), CFG)


def test_combine_operands():
    def wrong_rows(x):
        disp = jm.dispatch(x, jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 2)), CFG)
        return jm.combine(disp.rows[:-1], disp.plan)

    with pytest.raises(jm.ConfigError, match=r"rows.shape=.* must be .*; pass dispatch's rows"):
        in_shard_map(wrong_rows, jnp.zeros((8, 16)))

    def wrong_axis(x):
        disp = jm.dispatch(x, jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 2)), CFG)
        return jm.combine(disp.rows, disp.plan, axis_name="dp")

    with pytest.raises(jm.ShardingError, match="axis_name='dp' must be the axis of the plan, 'ep'"):
        in_shard_map(wrong_axis, jnp.zeros((8, 16)))


def test_a_transport_that_cannot_run_says_why():
    with pytest.raises(jm.TransportError, match="transport='mori' cannot run here: .*use transport="):
        call(cfg=jm.MoEConfig(8, 2, 16, 8, transport="mori"))


def test_library_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_MORIEP_LIB_DIR", str(tmp_path))
    with pytest.raises(jm.LibraryError, match=r"libmoriep_cpu.so; reinstall jax_moriep"):
        library.load("cpu")
    explained = jm.explain(jm.MoEConfig(8, 2, 16, 8), mesh_of())
    assert explained.transport == "collective"
    assert "reinstall" in str(explained)
    with pytest.raises(jm.TransportError, match="transport='native' cannot run here: .*reinstall"):
        call()


def test_library_broken(monkeypatch, tmp_path):
    (tmp_path / "libmoriep_cpu.so").write_bytes(b"not a library")
    monkeypatch.setenv("JAX_MORIEP_LIB_DIR", str(tmp_path))
    with pytest.raises(jm.LibraryError, match="does not load"):
        library.load("cpu")


def test_library_of_another_api_version(tmp_path):
    major, minor = compat.ffi_api_version()
    library.check_api_version(tmp_path, (major, minor))
    library.check_api_version(tmp_path, (major, max(0, minor - 1)))
    for built in ((major, minor + 1), (major + 1, 0)):
        with pytest.raises(jm.LibraryError, match=rf"built for XLA FFI API {built[0]}.{built[1]}.*rebuild"):
            library.check_api_version(tmp_path, built)


def test_a_group_that_will_not_be_connected_says_why(monkeypatch):
    """The cause is told at once, not a timeout after JAX_MORIEP_TIMEOUT seconds."""
    native = native_api.loaded("cpu")
    ids = (ctypes.c_int64 * 2)(0, 2048)
    local = (ctypes.c_uint8 * 2)(1, 0)  # rank 1 lives in another process
    native_api.call(native.moriep_group_open, b"halves", 1, 2, ids, local, 60.0)
    native.moriep_group_connect_failed(b"halves", 0, b"rank 1: it runs on another machine")
    with pytest.raises(jm.TransportError, match="halves has failed: rank 1: it runs on another machine"):
        group.wait_connected(native, "halves")


def test_a_peer_on_another_machine_is_told_with_the_transport_that_reaches_it():
    class Native:
        def __init__(self):
            self.said = []

        def moriep_group_connect_failed(self, name, group_of_rank, why):
            self.said.append((name, group_of_rank, why.decode()))

    class Peer:
        def get(self, key, deadline):
            return b'{"host": "there", "address": []}'

    native_of = Native()
    group._connect(native_of, "g", "prefix", Peer(), "here", False, [(0, 1)], 0.0)
    ((name, of, why),) = native_of.said
    assert (name, of) == (b"g", 0)
    assert why.startswith("rank 1: it runs on another machine")
    assert why.endswith("use transport='two_level'")


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_timeout_variable(monkeypatch, text):
    monkeypatch.setenv("JAX_MORIEP_TIMEOUT", text)
    with pytest.raises(jm.TransportError, match="must be a positive number of seconds"):
        settings.TIMEOUT.value()


def test_a_mesh_whose_devices_cannot_be_seen_is_checked_at_run_time():
    """In a shard_map over devices in another order the guess is wrong: an error, not a wrong number."""
    mesh = Mesh(np.array(jax.devices()[:4])[::-1], ("ep",))
    ids = jnp.tile(jnp.array([[0, 5]], jnp.int32), (8, 1))

    def body(x, ids):
        disp = jm.dispatch(x, ids, jnp.ones((2, 2)), CFG)
        return jm.combine(disp.rows, disp.plan)

    x = jnp.arange(8.0 * 16).reshape(8, 16)

    def traced_anew():
        return jax.jit(jax.shard_map(lambda *a: body(*a), mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))

    with pytest.raises(jax.errors.JaxRuntimeError, match=r"of the running mesh.*jm.initialize"):
        jax.block_until_ready(traced_anew()(x, ids))
    jm.initialize(mesh)
    np.testing.assert_allclose(np.asarray(traced_anew()(x, ids)), 2 * np.asarray(x))


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        (None, "there is no GPU in this process; use transport='collective'"),
        ("rocm", "backend='rocm' is not at .*libmoriep_rocm.so; reinstall jax_moriep .* ROCm's compiler"),
        ("cuda", "backend='cuda' is not at .*libmoriep_cuda.so; reinstall jax_moriep .* nvcc"),
    ],
)
def test_native_on_a_gpu_says_what_is_missing(backend, text, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_MORIEP_LIB_DIR", str(tmp_path))
    if backend is not None:
        monkeypatch.setattr(compat, "gpu_backend", lambda: backend)
    assert re.search(text, native.unavailable_reason(Place("gpu")))


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """The folder of the libraries, empty; and no warning given yet."""
    monkeypatch.setenv("JAX_MORIEP_LIB_DIR", str(tmp_path))
    transports._warn.cache_clear()
    yield tmp_path
    transports._warn.cache_clear()


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_auto_warns_once_when_the_package_s_own_library_does_not_load(content, no_library):
    if content is not None:
        (no_library / "libmoriep_cpu.so").write_bytes(content)
    with pytest.warns(RuntimeWarning, match="passes over 'native'.*is slower: .*; reinstall jax_moriep"):
        assert transports.choose("auto", Place("cpu")) == "collective"
    # A second warning would be an error.
    assert transports.choose("auto", Place("cpu")) == "collective"


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_auto_is_silent_where_no_library_is_expected(platform, monkeypatch, no_library):
    monkeypatch.setattr(compat, "gpu_backend", lambda: "cuda")
    assert transports.choose("auto", Place(platform)) == "collective"


@pytest.mark.parametrize(
    ("mesh", "options", "error", "text"),
    [
        (jax.sharding.AbstractMesh((2,), ("ep",)), {}, jm.ShardingError, "mesh='AbstractMesh' must be a jax"),
        (mesh_of(), {"cfg": "native"}, jm.ConfigError, "cfg='str' must be a jm.MoEConfig"),
        (mesh_of(), {"num_tokens": 4}, jm.ConfigError, "num_tokens=4 must come with cfg"),
        (mesh_of(), {"cfg": CFG, "num_tokens": -4}, jm.ConfigError, "num_tokens=-4 must be 0 or more"),
    ],
)
def test_initialize_says_what_it_takes(mesh, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        jm.initialize(mesh, **options)
