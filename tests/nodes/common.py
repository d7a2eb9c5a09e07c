"""What the scripts of these tests share: a layer, its tokens, and its mesh over all machines."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

import jax_moriep as jm
from tests.contract import oracle

EXPERTS, TOP_K, HIDDEN, INNER = 10, 3, 16, 8
TOKENS = 6
"""Of each rank."""


def mesh():
    """One axis over every device of every process; jax.make_mesh refuses devices of several machines."""
    return jax.sharding.Mesh(np.array(jax.devices()), ("ep",))


def config(transport, hidden=HIDDEN):
    return jm.MoEConfig(EXPERTS, TOP_K, hidden, INNER, transport=transport)


def case(num_ranks, hidden=HIDDEN, tokens=TOKENS):
    """The same in every process, and in the test: weights, tokens and their cotangent."""
    rng = np.random.default_rng(7)
    layer = oracle.random_layer(rng, EXPERTS, TOP_K, hidden, INNER)
    x, dy = rng.normal(size=(2, num_ranks * tokens, hidden)).astype(np.float32)
    return layer, x, dy


def masks(num_ranks):
    """Which tokens are real: all of them; none of the second machine's."""
    half = np.arange(num_ranks * TOKENS) < num_ranks * TOKENS // 2
    return {"all": np.ones_like(half), "one machine's": half}


def place(array, mesh, spec):
    """A global array from a host array that all processes have."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def placed_params(layer, cfg, mesh):
    params = jm.MoEParams(
        **{name: jnp.asarray(getattr(layer, name), jnp.float32) for name in ("router", "w1", "w2")}
    )
    padded = jax.tree.map(np.asarray, jm.pad_params(params, mesh.size))
    return jax.tree.map(lambda p, spec: place(p, mesh, spec), padded, jm.param_specs(cfg))


def say(*words):
    """Prints at once, so that the launcher sees it before the process dies."""
    print(*words, flush=True)
