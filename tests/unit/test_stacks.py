"""Experts that read their weights in a stack of layers, and what is refused of a stack."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_moriep as jm
from jax_moriep.experts import IMPLEMENTATIONS, ExpertSpec, ExpertWeights, pallas
from jax_moriep.experts.pallas import launch
from jax_moriep.experts.spec import Stack
from jax_moriep.schemes import FORMATS, code_dtype, quantise_weights

LAYERS, EXPERTS, BLOCK, CAPACITY, HIDDEN, INNER = 3, 4, 8, 80, 40, 24
SIZES = np.array([13, 0, 20, 1], np.int32)


def problem(scheme=None, frozen=False, biases=False, weight_input=False, saved_rows=None):
    """spec, rows, row weights, and the weights of all layers."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

    w1, w2 = draw(LAYERS, EXPERTS, 2 * INNER, HIDDEN), draw(LAYERS, EXPERTS, HIDDEN, INNER)
    weights = ExpertWeights(w1, w2)
    if frozen:
        dtype = code_dtype(scheme, FORMATS["e4m3fn"])
        (c1, s1), (c2, s2) = (quantise_weights(w, scheme, dtype, parts=n) for w, n in ((w1, 2), (w2, 1)))
        weights = ExpertWeights(c1, c2, w1_scale=s1, w2_scale=s2)
    if biases:
        weights = weights._replace(b1=draw(LAYERS, EXPERTS, 2 * INNER), b2=draw(LAYERS, EXPERTS, HIDDEN))
    spec = ExpertSpec("silu", 7.0, 1.702, weight_input, BLOCK, saved_rows, scheme)
    return spec, draw(CAPACITY, HIDDEN), draw(CAPACITY), weights


def trained(weights, values=None):
    """The parts of weights that have gradients; or weights with others in their place."""
    names = ("b1", "b2") if weights.frozen else ("w1", "w2", "b1", "b2")
    if values is None:
        return {name: getattr(weights, name) for name in names if getattr(weights, name) is not None}
    return weights._replace(**values)


@pytest.mark.parametrize("name", ["triton", "blocked"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"biases": True, "saved_rows": 16},
        {"weight_input": True},
        {"scheme": "fp8_block", "frozen": True, "biases": True},
        {"scheme": "int8_token", "frozen": True, "weight_input": True},
        {"scheme": "fp8_block"},
    ],
    ids=str,
)
def test_values_come_from_the_stack_and_gradients_go_to_the_layer(name, options):
    spec, rows, row_weights, weights = problem(**options)
    run, sizes = IMPLEMENTATIONS[name].expert_mlp, jnp.asarray(SIZES)
    one = jax.tree.map(lambda w: w[1], weights)

    def loss(rows, row_weights, values, own, stack):
        out = run(rows, row_weights, sizes, trained(own, values), spec, stack)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    want = step(rows, row_weights, trained(one), one, None)
    # Nobody may read the layer's own weights, so they hold nothing that could be taken for them.
    nothing = jax.tree.map(lambda w: jnp.full(w.shape, 7, w.dtype), one)
    got = step(rows, row_weights, trained(nothing), nothing, Stack(weights, jnp.int32(1)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


def opcodes(text, shape):
    """What computes arrays of a shape in an optimised program, layers of one in front of it or not."""
    dims = ",".join(map(str, shape))
    found = re.findall(rf"= \w+\[(?:1,)?{dims}\]\S* ([\w-]+)\(", text)
    return {name for name in found if name not in ("parameter", "get-tuple-element", "bitcast", "tuple")}


def opaque(kernel, name, operands, results, programs, tile, interpret, aliases=None):
    """A kernel as XLA sees one on a GPU: a custom call that wants its operands whole."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    return jax.pure_callback(lambda *_: [np.zeros(s.shape, s.dtype) for s in shapes], shapes, *operands)


@pytest.mark.parametrize("remat", [False, True])
def test_nothing_copies_a_layers_weights_before_the_kernels(monkeypatch, remat):
    """In the program that XLA makes of a scan with the kernels as custom calls, both passes; and without the
    stack it does, so that the test can tell."""
    from jax_moriep.experts.pallas import biases, rowwise
    from jax_moriep.experts.pallas.triton import products

    for module in (launch, products, biases, rowwise):
        monkeypatch.setattr(module, "call", opaque)
    spec, rows, row_weights, weights = problem()
    sizes = jnp.asarray(SIZES)

    def loss(rows, weights, reads_stack):
        def body(rows, of_layer):
            own, i = of_layer
            stack = Stack(lax.stop_gradient(weights), i) if reads_stack else None
            return pallas.expert_mlp(rows, row_weights, sizes, own, spec, stack), None

        body = jax.checkpoint(body) if remat else body
        return jnp.sum(lax.scan(body, rows, (weights, jnp.arange(LAYERS)))[0])

    def program(run, reads_stack):
        return jax.jit(run, static_argnums=2).lower(rows, weights, reads_stack).compile().as_text()

    shapes = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    forward, step = (program(run, True) for run in (loss, jax.value_and_grad(loss, (0, 1))))
    plain = program(loss, False)
    for shape in shapes:
        assert not opcodes(forward, shape)
        # The gradients come out of their kernels.
        assert opcodes(step, shape) <= {"custom-call"}
        assert opcodes(plain, shape) & {"dynamic-slice", "fusion", "copy"}


def layers_over(num_ranks):
    """A config, a mesh, and the weights of all layers."""
    cfg = jm.MoEConfig(EXPERTS, 2, HIDDEN, INNER, transport="native")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_ranks]), ("ep",))
    return (
        cfg,
        mesh,
        jax.vmap(lambda key: jm.init_params(key, cfg))(jax.random.split(jax.random.key(0), LAYERS)),
    )


def test_a_layer_keeps_no_weights_for_its_backward_pass():
    """What a scan saves of every layer, under shard_map too, is as large without the experts' weights."""
    cfg, mesh, stack = layers_over(2)

    def loss(x, stack):
        def body(x, of_layer):
            own, i = of_layer
            return jm.ep_moe(x, own, cfg, mesh=mesh, stack=stack, layer=i)[0], None

        return jnp.sum(lax.scan(body, x, (stack, jnp.arange(LAYERS)))[0])

    jaxpr = jax.make_jaxpr(lambda x, s: jax.vjp(loss, x, s))(jnp.ones((4, HIDDEN)), stack)
    (scan,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    sizes = {int(np.prod(out.aval.shape)) for out in scan.outvars}
    assert not sizes & {w.size for w in (stack.w1, stack.w2)}


def test_the_layer_reads_the_stack_in_the_compiled_program():
    cfg, mesh, stack = layers_over(1)

    def run(x, stack):
        def body(x, i):
            return jm.ep_moe(x, stack, cfg, mesh=mesh, layer=i)[0], None

        return lax.scan(body, x, jnp.arange(LAYERS))[0]

    text = jax.jit(run).lower(jnp.ones((4, HIDDEN)), stack).compile().as_text()
    for shape in ((EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)):
        assert not opcodes(text, shape)


CFG = jm.MoEConfig(8, 2, 16, 8, transport="native")


@pytest.fixture
def stack():
    return jax.vmap(lambda key: jm.init_params(key, CFG))(jax.random.split(jax.random.key(0), 2))


def one_of(stack):
    return jax.tree.map(lambda w: w[0], stack)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda s: (s, 2, None), r"layer=2 must be an integer in 0\.\.1; count the stack's layers from 0"),
        (lambda s: (s, -1, None), r"layer=-1 must be an integer in 0\.\.1"),
        (lambda s: (s, True, None), r"layer=True must be an integer in 0\.\.1; pass an int"),
        (lambda s: (s, 0.5, None), r"layer=0\.5 must be an integer"),
        (lambda s: (s, jnp.arange(2), None), r"layer='int32\[2\]' must be an integer"),
        (
            lambda s: (one_of(s), 0, None),
            r"params\.router\.shape=\(16, 8\) must have 3 dimensions with layer=",
        ),
        (lambda s: (one_of(s), None, s), "layer=None must be given with stack"),
        (lambda s: (one_of(s), 0, "layers"), "stack='str' must be a jm.MoEParams"),
        (
            lambda s: (s, 0, s),
            r"params\.router=.* must be one layer of stack\.router=\(\(2, 16, 8\), 'float32'\)",
        ),
        (
            lambda s: (one_of(s), 0, dataclasses.replace(s, w2=s.w2.astype(jnp.bfloat16))),
            r"params\.w2=.* must be one layer of stack\.w2=.*'bfloat16'",
        ),
        (
            lambda s: (dataclasses.replace(s, w1=s.w1[:1]), 0, None),
            r"params\.w1\.shape=\(1, 8, 16, 16\) must begin with 2, as many layers as the router has",
        ),
        (lambda s: (s, None, None), r"params\.router\.shape=\(2, 16, 8\) must be \(16, 8\)"),
    ],
)
def test_what_is_no_layer_of_a_stack_is_refused(stack, given, text):
    params, layer, whole = given(stack)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("ep",))
    with pytest.raises(jm.ConfigError, match=text):
        jm.ep_moe(jnp.ones((4, 16)), params, CFG, mesh=mesh, layer=layer, stack=whole)


def test_padding_and_specs_of_a_stack(stack):
    padded = jm.pad_params(stack, 3)
    assert padded.w1.shape == (2, 9, 16, 16)
    np.testing.assert_array_equal(padded.w1[:, :8], stack.w1)
    assert not np.any(padded.w2[:, 8:])
    np.testing.assert_array_equal(jm.pad_params(padded, 2).w1, stack.w1)
    specs = jm.param_specs(CFG, params=stack)
    assert specs.w1 == jax.sharding.PartitionSpec(None, "ep", None, None)
    assert specs.router == jax.sharding.PartitionSpec(None)
    assert specs.b1 is None
