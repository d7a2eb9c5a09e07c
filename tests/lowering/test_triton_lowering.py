"""The Triton experts, lowered for CUDA and ROCm on a machine that has neither GPU."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep import schemes
from jax_moriep.config import SCHEMES
from jax_moriep.experts import ExpertSpec, ExpertWeights, Stack, pallas

L, C = 4, 1024
FORWARD = ["moriep_down", "moriep_gate_up"]


def mesh_of(platform):
    """A mesh for lowering; from jax 0.11 on Pallas-Triton asks it for the device."""
    try:
        from jax.sharding import AbstractDevice
    except ImportError:
        try:
            from jax._src.mesh import AbstractDevice
        except ImportError:
            return AbstractMesh((2,), ("ep",), axis_types=(AxisType.Auto,))
    kind = "NVIDIA H100 80GB HBM3" if platform == "cuda" else "gfx942"
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return AbstractMesh((2,), ("ep",), axis_types=(AxisType.Auto,), abstract_device=device)


def kernels(platform, dtype, hidden, inner, spec, biases=False, backward=True):
    """The names of the Triton kernels of both passes, under shard_map with check_vma."""
    mesh = mesh_of(platform)
    shapes = [
        ((C, hidden), dtype),
        ((C,), "float32"),
        ((L,), "int32"),
        ((L, 2 * inner, hidden), dtype),
        ((L, hidden, inner), dtype),
        *([((L, 2 * inner), dtype), ((L, hidden), dtype)] if biases else []),
    ]
    operands = [jax.ShapeDtypeStruct((2 * shape[0], *shape[1:]), d) for shape, d in shapes]

    def loss(rows, weights, sizes, *params):
        out = pallas.expert_mlp(rows, weights, sizes, ExpertWeights(*params), spec)
        return jnp.sum(out.astype(jnp.float32))

    arguments = (0, 1, *range(3, len(operands)))

    def body(*operands):
        if not backward:
            return loss(*operands)[None]
        return jax.grad(loss, arguments)(*operands)

    sharded = jax.shard_map(body, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(sharded).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.dot_general" not in text, "the products are the kernels', on every platform"
    return sorted(re.findall(r'name = "(moriep_\w+)"', text))


def spec_of(activation="silu", weight_input=False, saved_rows=None, scheme=None, format="e4m3fn"):
    return ExpertSpec(activation, 7.0, 1.702, weight_input, 128, saved_rows, scheme, format)


@pytest.mark.parametrize("platform", ["rocm", "cuda"])
@pytest.mark.parametrize(("dtype", "hidden", "inner"), [("bfloat16", 512, 256), ("float32", 96, 72)])
def test_forward(dtype, hidden, inner, platform):
    names = set(kernels(platform, dtype, hidden, inner, spec_of(), backward=False))
    assert names == set(FORWARD)


@pytest.mark.parametrize("platform", ["rocm", "cuda"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu_clamped"])
@pytest.mark.parametrize("weight_input", [False, True])
def test_backward(weight_input, activation, platform):
    names = kernels(platform, "bfloat16", 200, 104, spec_of(activation, weight_input))
    assert {"moriep_d_act", "moriep_d_rows", "moriep_dw1", "moriep_dw2"} <= set(names)
    assert names.count("moriep_gate_up") == 1
    assert "moriep_row_sums" not in names


@pytest.mark.parametrize("platform", ["rocm", "cuda"])
def test_backward_with_biases_and_rows_computed_again(platform):
    names = kernels(platform, "float16", 256, 128, spec_of("gelu", saved_rows=256), biases=True)
    assert names.count("moriep_gate_up") == 2
    assert names.count("moriep_row_sums") == 2
    assert names.count("moriep_rows_times_bias") == 1


@pytest.mark.parametrize(("platform", "format"), [("rocm", "e4m3fnuz"), ("cuda", "e4m3fn")])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("biases", [False, True])
def test_quantised_master_weights(biases, scheme, platform, format):
    spec = spec_of(scheme=scheme, saved_rows=256, format=format)
    names = kernels(platform, "bfloat16", 200, 104, spec, biases=biases)
    assert names.count("moriep_gate_up") == 2
    assert {"moriep_d_act", "moriep_act_grad", "moriep_d_rows", "moriep_dw1"} <= set(names)


@pytest.mark.parametrize(("platform", "format"), [("rocm", "e4m3fnuz"), ("cuda", "e4m3fn")])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_weights(scheme, platform, format):
    hidden, inner, spec = 512, 256, spec_of(scheme=scheme, format=format)
    code = schemes.code_dtype(scheme, schemes.FORMATS[format])
    scales = schemes.scale_shapes(scheme, L, hidden, inner)
    weights = ExpertWeights(
        jax.ShapeDtypeStruct((L, 2 * inner, hidden), code),
        jax.ShapeDtypeStruct((L, hidden, inner), code),
        w1_scale=jax.ShapeDtypeStruct(scales[0], jnp.float32),
        w2_scale=jax.ShapeDtypeStruct(scales[1], jnp.float32),
    )
    rows = jax.ShapeDtypeStruct((C, hidden), jnp.bfloat16)

    def loss(rows, row_weights, sizes, weights):
        return jnp.sum(pallas.expert_mlp(rows, row_weights, sizes, weights, spec).astype(jnp.float32))

    operands = rows, jax.ShapeDtypeStruct((C,), jnp.float32), jax.ShapeDtypeStruct((L,), jnp.int32), weights
    backward = ["moriep_act_grad", "moriep_d_act", "moriep_d_rows"]
    with jax.sharding.use_abstract_mesh(mesh_of(platform)):
        for fn, wanted in (
            (loss, FORWARD),
            (jax.value_and_grad(loss, (0, 1)), [*backward, *FORWARD]),
        ):
            text = jax.jit(fn).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
            assert sorted(re.findall(r'name = "(moriep_\w+)"', text)) == sorted(wanted)


@pytest.mark.parametrize("platform", ["rocm", "cuda"])
def test_a_layer_of_a_stack(platform):
    """Every kernel that multiplies with weights gets those of all layers, in both passes of a scan."""
    layers, hidden, inner, spec = 3, 200, 104, spec_of(saved_rows=256)
    shapes = (layers, L, 2 * inner, hidden), (layers, L, hidden, inner)
    weights = ExpertWeights(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
    rows = jax.ShapeDtypeStruct((C, hidden), jnp.bfloat16)
    given = rows, jax.ShapeDtypeStruct((C,), jnp.float32), jax.ShapeDtypeStruct((L,), jnp.int32), weights

    def loss(rows, row_weights, sizes, weights):
        @jax.checkpoint
        def body(rows, of_layer):
            own, layer = of_layer
            stack = Stack(jax.lax.stop_gradient(weights), layer)
            return pallas.expert_mlp(rows, row_weights, sizes, own, spec, stack), None

        return jnp.sum(jax.lax.scan(body, rows, (weights, jnp.arange(layers)))[0].astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh_of(platform)):
        step = jax.jit(jax.grad(loss, (0, 3))).trace(*given)
        text = step.lower(lowering_platforms=(platform,)).as_text()
    reads = {"gate_up": shapes[0], "down": shapes[1], "d_act": shapes[1], "d_rows": shapes[0]}
    for name, (_, _, tall, wide) in reads.items():
        calls = [line for line in text.splitlines() if f'name = "moriep_{name}"' in line]
        assert calls
        for call in calls:
            assert f"tensor<{layers * L}x{tall}x{wide}xbf16>" in call
            assert f"tensor<{L}x{tall}x{wide}xbf16>" not in call


@pytest.mark.parametrize("platform", ["rocm", "cuda"])
def test_the_layer(platform):
    """What the experts run on is the mesh's devices, and not those of the process that lowers."""
    mesh = mesh_of(platform)
    cfg = jm.MoEConfig(8, 2, 32, 16, transport="native", experts="triton", block=16)
    x = jax.ShapeDtypeStruct((16, 32), jnp.bfloat16)
    params = jax.eval_shape(lambda: jm.init_params(jax.random.key(0), cfg, jnp.bfloat16))
    layer = jax.jit(lambda x, params: jm.ep_moe(x, params, cfg, mesh=mesh)[0])
    with jax.sharding.use_abstract_mesh(mesh):
        text = layer.trace(x, params).lower(lowering_platforms=(platform,)).as_text()
    assert sorted(re.findall(r'name = "(moriep_\w+)"', text)) == FORWARD


@pytest.mark.parametrize("platform", ["rocm", "cuda"])
@pytest.mark.parametrize("biases", [False, True])
def test_under_x64(platform, biases):
    """The kernels count in int32 whatever the program around them does."""
    sizes = (platform, "float32", 96, 72, spec_of())
    plain = kernels(*sizes, biases=biases)
    with jax.enable_x64(True):
        assert kernels(*sizes, biases=biases) == plain
