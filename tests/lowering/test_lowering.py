"""Programs for CUDA and ROCm, lowered on a machine that has neither: targets, attributes, order."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import jax_moriep as jm

# The axis type is said, because jax changed what a mesh has by default.
MESH = AbstractMesh((16,), ("ep",), axis_types=(AxisType.Auto,))
CFG = jm.MoEConfig(64, 4, 32, 16, transport="native", capacity_factor=2.0, block=16)


def lowered(platform, grad=False):
    def layer(x, params):
        y, stats = jm.ep_moe(x, params, CFG, mesh=MESH)
        return jnp.sum(jnp.sin(y)) + stats.z_loss

    fn = jax.grad(layer, argnums=(0, 1)) if grad else layer
    sharded = jax.jit(fn)
    x = jax.ShapeDtypeStruct((16 * 8, 32), jnp.bfloat16)
    params = jax.eval_shape(lambda: jm.init_params(jax.random.key(0), CFG, jnp.bfloat16))
    return sharded.trace(x, params).lower(lowering_platforms=(platform,)).as_text()


def calls(text):
    """Every custom call of ours: (target, its text)."""
    return [
        (m.group(1), line)
        for line in text.splitlines()
        if (m := re.search(r"custom_call @(moriep_\w+)", line))
    ]


@pytest.mark.parametrize("platform", ["rocm", "cuda", "cpu"])
def test_targets_attributes_and_types(platform):
    found = calls(lowered(platform))
    assert [name for name, _ in found] == ["moriep_dispatch", "moriep_combine"]
    for _, line in found:
        attributes = re.search(r"backend_config = \{([^}]*)\}", line).group(1)
        assert "num_experts = 64 : i64" in attributes
        assert "num_local_experts = 4 : i64" in attributes
        assert "block = 16 : i64" in attributes
        assert re.search(r'group = "abstract-[0-9a-f]{16}"', attributes)
        assert "capacity_factor=2.0" in attributes
        assert 'delivery = "pull"' in attributes
        assert "rank" not in attributes
        assert "has_side_effect = true" not in line


@pytest.mark.parametrize("platform", ["rocm", "cuda"])
def test_backward_uses_the_transposed_calls(platform):
    names = sorted(name for name, _ in calls(lowered(platform, grad=True)))
    assert names == ["moriep_combine", "moriep_combine", "moriep_dispatch", "moriep_replay"]


def test_the_order_goes_from_dispatch_to_combine():
    (_, dispatch), (_, combine) = calls(lowered("rocm"))
    result, count = re.match(r"\s*(%\w+):(\d+) = ", dispatch).groups()
    text = lowered("rocm")
    # The order is the last result; it reaches combine's last operand through the float that AD carries.
    order = re.search(r"custom_call @moriep_combine\(([^)]*)\)", combine).group(1).split(", ")[-1]
    sources = {}
    for line in text.splitlines():
        if m := re.match(r"\s*(%[\w#:]+) = stablehlo\.(?:convert|optimization_barrier) (%[\w#]+)", line):
            sources[m.group(1)] = m.group(2)
    while order in sources:
        order = sources[order]
    assert order == f"{result}#{int(count) - 1}"


def test_one_module_for_all_ranks():
    """Nothing in the module tells a rank: it is lowered once for the abstract mesh and mentions no device."""
    text = lowered("rocm")
    assert "partition_id" in text or "partition-id" in text
    assert not re.search(r"device_ordinal|process_index", text)


def test_multi_platform_export():
    def body(x, ids, weights):
        disp = jm.dispatch(x, ids, weights, CFG)
        return jm.combine(disp.rows, disp.plan)

    mapped = jax.shard_map(body, mesh=MESH, in_specs=P("ep"), out_specs=P("ep"))
    checks = [jax.export.DisabledSafetyCheck.custom_call(f"moriep_{n}") for n in ("dispatch", "combine")]
    exported = jax.export.export(jax.jit(mapped), platforms=["rocm", "cuda", "cpu"], disabled_checks=checks)(
        jax.ShapeDtypeStruct((128, 32), jnp.bfloat16, sharding=jax.NamedSharding(MESH, P("ep"))),
        jax.ShapeDtypeStruct((128, 4), jnp.int32, sharding=jax.NamedSharding(MESH, P("ep"))),
        jax.ShapeDtypeStruct((128, 4), jnp.float32, sharding=jax.NamedSharding(MESH, P("ep"))),
    )
    assert exported.nr_devices == 16
    assert "moriep_dispatch" in exported.mlir_module()
