"""What test_interop.py runs on simulated devices."""

import ctypes
from ctypes import c_char_p, c_int, c_size_t, c_void_p, py_object

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from tests.rocm import hip

ROCM = 10  # DLPack's number


def address(tensor):
    """Where a tensor's elements lie, as its capsule says; it is the first field of what that points to."""
    capsule = tensor.__dlpack__(stream=tensor.stream)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = c_void_p, [py_object, c_char_p]
    return c_void_p.from_address(pointer(capsule, b"dltensor"))


def copy(x, out):
    assert x.device == out.device
    assert x.device[0] == ROCM
    size = int(np.prod(x.shape)) * x.dtype.itemsize
    hip.check("hipMemcpyAsync", address(out), address(x), c_size_t(size), c_int(hip.D2D), c_void_p(x.stream))


def copy_vjp(x, d_out, d_x):
    del x
    copy(d_out, d_x)


def copied(x):
    return jm.interop.dlpack_call(copy, jax.ShapeDtypeStruct(x.shape, x.dtype), vjp=copy_vjp)(x)


def between_other_operations(x, dtype):
    """The call's input is made just before it, and its output used just behind it."""
    return jax.jit(lambda x: copied((x + 1).astype(dtype)).astype(jnp.float32) * 2)(x)


def gradient(x):
    return jax.jit(jax.grad(lambda x: jnp.sum(copied(x * x) * x)))(x)


def on_every_device(x):
    mesh = Mesh(np.array(jax.devices()), ("i",))
    part = jax.shard_map(lambda x: copied(x + 1) * 2, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
    return jax.jit(part)(x)
