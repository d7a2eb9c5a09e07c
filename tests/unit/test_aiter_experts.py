"""aiter_experts on the CPU, with functions of AITER's signature: in NumPy always, in torch where it is."""

import importlib.util
import math
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep.interop import aiter_experts
from jax_moriep.transports.arrivals import Arrivals

NO_TORCH = importlib.util.find_spec("torch") is None
needs_torch = pytest.mark.skipif(NO_TORCH, reason="torch is not installed; pip install 'jax_moriep[torch]'")
SEEN = []
"""The arguments of each call of the stand-ins."""


class NumPy:
    """What the stand-in needs of NumPy."""

    erf, exp, full = np.vectorize(math.erf), np.exp, staticmethod(np.full)

    def wide(self, tensor):
        return tensor.astype(np.float64)

    def like(self, array, tensor):
        return array.astype(tensor.dtype)

    def address(self, tensor):
        return tensor.__array_interface__["data"][0]


class Torch:
    """The same of torch."""

    def __init__(self):
        torch = importlib.import_module("torch")
        self.erf, self.exp = torch.erf, torch.exp
        self.full = lambda shape, value: torch.full(shape, value, dtype=torch.float64)

    def wide(self, tensor):
        return tensor.double()

    def like(self, array, tensor):
        return array.to(tensor.dtype)

    def address(self, tensor):
        return tensor.data_ptr()


NUMPY_FOR_TORCH = SimpleNamespace(from_dlpack=np.asarray)


def stand_in(library):
    """A function with the signature and the contract of ``aiter.fused_moe.fused_moe``."""

    def fused_moe(
        hidden_states,
        w1,
        w2,
        topk_weight,
        topk_ids,
        expert_mask=None,
        activation=None,
        quant_type=None,
        doweight_stage1=False,
        w1_scale=None,
        w2_scale=None,
        a1_scale=None,
        a2_scale=None,
        block_size_M=None,
        num_local_tokens=None,
        moe_sorting_dispatch_policy=0,
        dtype=None,
        hidden_pad=0,
        intermediate_pad=0,
        bias1=None,
        bias2=None,
        splitk=0,
    ):
        SEEN.append((library.address(hidden_states), library.address(w1), library.address(w2)))
        assert expert_mask is not None
        assert num_local_tokens is not None
        count = int(num_local_tokens[0])
        inner = w2.shape[2]
        out = library.full((hidden_states.shape[0], w2.shape[1]), math.nan)
        out[:count] = 0
        local = -1
        for expert in range(len(expert_mask)):
            if not int(expert_mask[expert]):
                continue
            local += 1
            for t in range(count):
                for k in range(topk_ids.shape[1]):
                    # AITER reads the mask at every id.
                    assert 0 <= int(topk_ids[t, k]) < len(expert_mask)
                    if int(topk_ids[t, k]) != expert:
                        continue
                    both = library.wide(w1[local]) @ library.wide(hidden_states[t])
                    gate, up = both[:inner], both[inner:]
                    if activation.value == 0:
                        h = gate / (1 + library.exp(-gate)) * up
                    else:
                        h = gate * (1 + library.erf(gate / 2**0.5)) / 2 * up
                    out[t] += library.wide(w2[local]) @ h * float(topk_weight[t, k])
        return library.like(out, hidden_states)

    return fused_moe


@pytest.fixture(params=["numpy", pytest.param("torch", marks=needs_torch)])
def fused_moe(request, monkeypatch):
    """In NumPy, where NumPy passes for torch: the function is all that uses it."""
    SEEN.clear()
    if request.param == "torch":
        return stand_in(Torch())
    monkeypatch.setitem(sys.modules, "torch", NUMPY_FOR_TORCH)
    return stand_in(NumPy())


E, K, H, INTER, T = 8, 2, 32, 16, 12
RANKS = 4


def make(dtype=jnp.bfloat16, **changes):
    cfg = jm.MoEConfig(E, K, H, INTER, **changes)
    params = jm.init_params(jax.random.key(0), cfg, dtype)
    return cfg, params, jax.random.normal(jax.random.key(1), (RANKS * T, H)).astype(dtype)


def mesh():
    return jax.make_mesh((RANKS,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices()[:RANKS])


def layer(cfg, experts):
    """The layer in a shard_map of the user's own."""

    def body(x, params):
        route = jm.route(x, params, cfg)
        disp = jm.dispatch(x, route.ids, route.weights, cfg, axis_name="ep")
        return jm.combine(experts(disp, params, cfg), disp.plan, axis_name="ep")

    specs = (P("ep"), jm.param_specs(cfg))
    # A shard_map of the user's own does not tell which device is which rank, and another test may have opened
    # a mesh of this shape in another order.
    jm.initialize(mesh(), "ep")
    return jax.jit(jax.shard_map(body, mesh=mesh(), in_specs=specs, out_specs=P("ep")))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_rows_of_a_layer(fused_moe, dtype, activation):
    cfg, params, x = make(dtype, activation=activation)
    y = layer(cfg, lambda *args: aiter_experts(*args, fused_moe=fused_moe))(x, params)
    expected = layer(cfg, jm.expert_mlp)(x, params)
    assert y.dtype == dtype
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (y, expected)), atol=0.02, rtol=0.02)
    assert np.abs(np.asarray(expected, np.float32)).max() > 0.5


def test_capacity_that_is_full(fused_moe):
    cfg, params, x = make(capacity_factor=0.5)
    y = layer(cfg, lambda *args: aiter_experts(*args, fused_moe=fused_moe))(x, params)
    expected = layer(cfg, jm.expert_mlp)(x, params)
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (y, expected)), atol=0.02, rtol=0.02)


def arrivals(dtype, ids, weights, count):
    tokens = jax.random.normal(jax.random.key(2), (len(ids), H)).astype(dtype)
    # What lies behind the last token is anything.
    tokens = jnp.where(jnp.arange(len(ids))[:, None] < count, tokens, jnp.nan)
    ids, weights = jnp.asarray(ids, jnp.int32), jnp.asarray(weights, jnp.float32)
    return Arrivals(tokens, ids, weights, None, jnp.asarray([count], jnp.int32))


def local_share(params, first, num):
    return jm.MoEParams(None, params.w1[first : first + num], params.w2[first : first + num])


def expected_tokens(came, params, first):
    """NumPy's float64, token by token."""
    w1, w2 = (np.asarray(w, np.float64) for w in (params.w1, params.w2))
    out = np.zeros(came.tokens.shape)
    for t in range(int(came.count[0])):
        for expert, weight in zip(came.ids[t].tolist(), came.weights[t].tolist(), strict=True):
            if first <= expert < first + len(w1):
                gate, up = np.split(w1[expert - first] @ np.asarray(came.tokens[t], np.float64), 2)
                out[t] += weight * (w2[expert - first] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("count", [0, 3, 5])
def test_arrivals(fused_moe, count):
    cfg, params, _ = make()
    share = local_share(params, 2, 3)
    ids = [[2, 7], [-1, 4], [3, 3], [0, 1], [4, -1], [99, 2]]
    came = arrivals(jnp.bfloat16, ids, np.linspace(0.5, 1.5, 12).reshape(6, 2), count)
    run = jax.jit(lambda came, share: aiter_experts(came, share, cfg, first_expert=2, fused_moe=fused_moe))
    y = run(came, share)
    assert y.shape == (6, H)
    np.testing.assert_allclose(
        np.asarray(y, np.float32), expected_tokens(came, share, 2), atol=0.02, rtol=0.02
    )
    assert not np.asarray(y[count:], np.float32).any()


def test_a_failed_exchange_is_seen(fused_moe):
    cfg, params, _ = make()
    came = arrivals(jnp.bfloat16, [[0, 1]] * 3, np.ones((3, 2)), 0)
    failed = Arrivals(came.tokens, came.ids, came.weights, None, jnp.asarray([-1], jnp.int32))
    assert np.isnan(np.asarray(aiter_experts(failed, params, cfg, fused_moe=fused_moe), np.float32)).all()


def test_nothing_is_copied_on_the_way_in(fused_moe):
    cfg, params, _ = make()
    came = arrivals(jnp.bfloat16, [[0, 1]] * 3, np.ones((3, 2)), 3)
    jax.block_until_ready(jax.jit(lambda *args: aiter_experts(*args, cfg, fused_moe=fused_moe))(came, params))
    assert SEEN == [tuple(a.unsafe_buffer_pointer() for a in (came.tokens, params.w1, params.w2))]


def test_a_program_is_compiled_once(fused_moe):
    cfg, params, _ = make()
    came = arrivals(jnp.bfloat16, [[0, 1]] * 3, np.ones((3, 2)), 3)
    texts = {
        jax.jit(lambda *args: aiter_experts(*args, cfg, fused_moe=fused_moe)).lower(came, params).as_text()
        for _ in range(2)
    }
    assert len(texts) == 1


# What is refused


def test_a_gradient(fused_moe):
    cfg, params, _ = make()
    came = arrivals(jnp.bfloat16, [[0, 1]] * 3, np.ones((3, 2)), 3)

    def loss(tokens):
        moved = Arrivals(tokens, came.ids, came.weights, None, came.count)
        return aiter_experts(moved, params, cfg, fused_moe=fused_moe).sum()

    with pytest.raises(
        jm.ConfigError, match="aiter_experts must not be differentiated, because AITER has no"
    ):
        jax.grad(loss)(came.tokens)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"activation": "swiglu_clamped"}, "activation='swiglu_clamped' must be 'silu' or 'gelu' for aiter"),
        ({"expert_bias": True}, "expert_bias=True must be False for aiter_experts; use jm.expert_mlp"),
        ({"expert_quant": "fp8_block"}, "expert_quant='fp8_block' must be None for aiter_experts"),
        ({"router": "llama4"}, "router='llama4' must not multiply the experts' inputs"),
    ],
)
def test_configs_that_it_does_not_compute(changes, text):
    cfg = jm.MoEConfig(E, K, H, INTER, **changes)
    _, params, _ = make()
    came = arrivals(jnp.bfloat16, [[0, 1]], np.ones((1, 2)), 1)
    with pytest.raises(jm.ConfigError, match=text):
        aiter_experts(came, params, cfg)


def test_dtypes_that_it_does_not_take():
    cfg, params, _ = make()
    came = arrivals(jnp.float32, [[0, 1]], np.ones((1, 2)), 1)
    with pytest.raises(
        jm.ConfigError, match="rows.dtype='float32' must be bfloat16 or float16 for aiter_exp"
    ):
        aiter_experts(came, params, cfg)
    came = arrivals(jnp.float16, [[0, 1]], np.ones((1, 2)), 1)
    with pytest.raises(jm.ConfigError, match="w1.dtype='bfloat16' must be that of the rows, float16, for"):
        aiter_experts(came, params, cfg)


@pytest.mark.parametrize("missing", ["torch", "aiter"])
def test_libraries_that_are_missing(monkeypatch, missing):
    cfg, params, _ = make()
    came = arrivals(jnp.bfloat16, [[0, 1]], np.ones((1, 2)), 1)
    monkeypatch.setitem(sys.modules, "torch", NUMPY_FOR_TORCH)
    monkeypatch.setitem(sys.modules, missing, None)
    text = {
        "torch": "torch is not installed .*; install AMD's",
        "aiter": "AITER is not installed .*; install amd",
    }
    with pytest.raises(jm.LibraryError, match=f"needs torch and AITER, and {text[missing]}"):
        aiter_experts(came, params, cfg)


def test_aiter_itself_is_called_with_its_own_kind_of_activation(monkeypatch):
    cfg, params, _ = make(activation="gelu")
    kinds, inner = [], stand_in(NumPy())

    def fused_moe(*args, activation, **options):
        kinds.append(activation)
        return inner(*args, activation=SimpleNamespace(value=1), **options)

    monkeypatch.setitem(sys.modules, "torch", NUMPY_FOR_TORCH)
    monkeypatch.setitem(sys.modules, "aiter", SimpleNamespace(ActivationType=SimpleNamespace(Gelu="Gelu")))
    monkeypatch.setitem(sys.modules, "aiter.fused_moe", SimpleNamespace(fused_moe=fused_moe))
    came = arrivals(jnp.bfloat16, [[0, 1]] * 2, np.ones((2, 2)), 2)
    jax.block_until_ready(aiter_experts(came, params, cfg))
    assert kinds == ["Gelu"]
