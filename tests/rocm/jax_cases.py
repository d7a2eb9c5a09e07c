"""What test_jax.py computes both on simulated devices and on the CPU: functions of arrays to arrays."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@jax.jit
def _elementwise(x):
    y = jnp.sin(x) * jnp.exp(-x * x) + jnp.tanh(x) / (1 + jnp.abs(x))
    return jnp.where(x > 0, jnp.sqrt(jnp.abs(y)), jnp.log1p(jnp.abs(y)))


def round_trip(x):
    return jax.device_put(x)


def deserialised(x):
    """XLA copies the constants of a program that was saved into the code object's read-only data."""
    run = jax.jit(lambda x: (x * 3, jnp.full(1, 7, jnp.int32), jnp.zeros(1))).lower(x).compile()
    return deserialize_and_load(*serialize(run), execution_devices=jax.devices()[:1])(x)


def elementwise(x):
    return _elementwise(x)


def integers(x):
    return jax.jit(lambda x: (x * 7 + 3) % 11 ^ (x >> 2) | (x << 3))(x)


def sums(x):
    return jax.jit(lambda x: (x.sum(), x.sum(0), x.max(1), jnp.argmax(x, 1)))(x)


def softmax(x):
    return jax.jit(lambda x: jax.nn.softmax(x, axis=-1))(x)


def gather(x, rows):
    return jax.jit(lambda x, rows: x[rows])(x, rows)


def scatter_add(x, rows):
    return jax.jit(lambda x, rows: jnp.zeros_like(x).at[rows].add(x))(x, rows)


def sort(x):
    return jax.jit(lambda x: (jnp.sort(x, axis=-1), jnp.argsort(x, axis=-1)))(x)


def top_k(x):
    return jax.jit(lambda x: jax.lax.top_k(x, 4))(x)


def cumsum(x):
    return jax.jit(lambda x: jnp.cumsum(x, axis=0))(x)


def while_loop(x):
    def step(state):
        count, y = state
        return count + 1, y * 0.5 + 1

    return jax.jit(lambda x: jax.lax.while_loop(lambda s: jnp.max(s[1]) > 2.5, step, (0, x)))(x)


def scan(x):
    return jax.jit(lambda x: jax.lax.scan(lambda c, row: (c + row, jnp.sin(c)), jnp.zeros(x.shape[1]), x))(x)


def conditional(x):
    return jax.jit(lambda x: jax.lax.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, x))(x)


def random_bits(seed):
    key = jax.random.key(seed)
    return jax.jit(lambda key: (jax.random.bits(key, (100,)), jax.random.uniform(key, (64,))))(key)


def convert(x, dtype):
    return jax.jit(lambda x: x.astype(dtype))(x)


def dot(x, y, precision):
    def of(x, y):
        return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)

    return jax.jit(of)(x, y)


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), ("i",))


def sharded_elementwise(x, count):
    mesh = mesh_of(count)
    x = jax.device_put(x, NamedSharding(mesh, P("i")))
    return jax.jit(jax.shard_map(_elementwise, mesh=mesh, in_specs=P("i"), out_specs=P("i")))(x)


def fft(x):
    return jax.jit(jnp.fft.fft)(x)


def many_launches(x):
    """One small program in a loop: what command buffers are for."""
    step = jax.jit(lambda x: jnp.sin(x) + 0.5 * x)
    for _ in range(20):
        x = step(x)
    return x


def pallas_dot(x, y):
    """A Pallas kernel that Triton compiles, with jnp.dot inside; interpreted where there is no Triton."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    block = 32

    def kernel(x_ref, y_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    call = pl.pallas_call(
        kernel,
        grid=(x.shape[0] // block, y.shape[1] // block),
        in_specs=[
            pl.BlockSpec((block, x.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((y.shape[0], block), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((block, block), lambda i, j: (i, j)),
        compiler_params=triton.CompilerParams(),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], y.shape[1]), jnp.float32),
        interpret=jax.default_backend() == "cpu",
    )
    return jax.jit(call)(x, y)


def ffi_scale(x, library, count):
    """A custom call whose handler launches a kernel; on every device of a mesh when there are several."""
    handler = jax.ffi.pycapsule(ctypes.CDLL(str(library)).Scale)
    jax.ffi.register_ffi_target("scale", handler, platform="ROCM")

    def scale(x):
        return jax.ffi.ffi_call("scale", jax.ShapeDtypeStruct(x.shape, x.dtype))(x, by=np.float32(3)) + 1

    if count > 1:
        mesh = mesh_of(count)
        x = jax.device_put(x, NamedSharding(mesh, P("i")))
        scale = jax.shard_map(scale, mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=False)
    scale = jax.jit(scale)
    for _ in range(3):
        x = scale(x)
    return x
