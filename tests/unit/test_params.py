"""Making, padding and sharding of a layer's weights, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moriep as jm
from jax_moriep.errors import rule

CFG = jm.MoEConfig(10, 2, 16, 8, router="gpt_oss", router_bias=True, expert_bias=True)


def make(cfg=CFG, dtype=jnp.float32):
    return jm.init_params(jax.random.key(0), cfg, dtype)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", jnp.float16, np.dtype("float32"), float])
def test_floating_dtypes_of_every_form(dtype):
    assert make(dtype=dtype).w1.dtype == jnp.zeros(0, dtype).dtype


@pytest.mark.parametrize("dtype", ["int32", jnp.int8, bool, "complex64", "bf17", None.__class__, 3])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(jm.ConfigError, match=r"dtype=.* must be a floating dtype; pass jnp\.float32"):
        make(dtype=dtype)


@pytest.mark.parametrize("num_ranks", [1, 3, 4, 8, np.int64(4)])
def test_padding_is_zeros_behind_the_experts(num_ranks):
    params = make()
    padded = jm.pad_params(params, num_ranks)
    count = -(-10 // num_ranks) * num_ranks
    for name in ("w1", "w2", "b1", "b2"):
        before, after = np.asarray(getattr(params, name)), np.asarray(getattr(padded, name))
        assert after.shape == (count, *before.shape[1:])
        np.testing.assert_array_equal(after[:10], before)
        assert not after[10:].any()
    assert_equal(padded.router, params.router)
    assert_equal(padded.router_bias, params.router_bias)


@pytest.mark.parametrize("first", [1, 4, 8, 7])
@pytest.mark.parametrize("then", [1, 2, 4, 5, 8])
def test_padding_for_another_number_of_ranks(first, then):
    params = make()
    assert_equal(jm.pad_params(jm.pad_params(params, first), then), jm.pad_params(params, then))


@pytest.mark.parametrize("num_ranks", [0, -1, 2.0, "4", None, True])
def test_ranks_that_are_no_number_of_ranks(num_ranks):
    with pytest.raises(jm.ConfigError, match=r"num_ranks=.* must be a positive integer; pass the size of"):
        jm.pad_params(make(), num_ranks)


def test_values_of_another_type_are_named_by_their_type():
    params, x = make(), jnp.zeros((8, 16))
    for call, text in (
        (lambda: jm.pad_params(x, 4), "params='ArrayImpl' must be a jm.MoEParams"),
        (lambda: jm.pad_params(vars(params), 4), "params='dict' must be a jm.MoEParams"),
        (lambda: jm.init_params(CFG, params), "cfg='MoEParams' must be a jm.MoEConfig"),
        (lambda: jm.param_specs(params), "cfg='MoEParams' must be a jm.MoEConfig"),
    ):
        with pytest.raises(jm.ConfigError, match=text) as raised:
            call()
        assert len(str(raised.value)) < 200


def test_a_long_value_is_cut_in_an_error_text():
    with pytest.raises(jm.ConfigError, match=r"num_experts=Array\(.*\.\.\. must be an integer") as raised:
        dataclasses.replace(CFG, num_experts=jnp.arange(900))
    assert len(str(raised.value)) < 300
    assert rule("top_k", 9, "be at most 8", "lower it") == "top_k=9 must be at most 8; lower it"


def test_param_specs_says_how_experts_are_made_divisible():
    assert "pad_params" in jm.param_specs.__doc__
