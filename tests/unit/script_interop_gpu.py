"""dlpack_call with torch, and CuPy where it is installed, on a GPU; run by test_interop_gpu.py or by hand.

Exits with 0 when all is right, and with 77 where there is no GPU that both jax and torch can use.
"""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from jax.sharding import PartitionSpec as P

import jax_moriep as jm

S = jax.ShapeDtypeStruct
dlpack_call = jm.interop.dlpack_call


def same_buffers(dtype, from_dlpack, address):
    """The function's views are XLA's buffers, on XLA's stream, and the numbers arrive."""
    seen = []

    def copy(x, out):
        seen.append((address(from_dlpack(x)), address(from_dlpack(out)), x.stream))
        from_dlpack(out)[...] = from_dlpack(x)

    x = jnp.asarray(np.arange(4096) % 7, dtype)
    y = jax.jit(dlpack_call(copy, S(x.shape, x.dtype)))(x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(x, np.float32))
    assert seen[0][:2] == (x.unsafe_buffer_pointer(), y.unsafe_buffer_pointer()), dtype
    assert seen[0][2] != 0


def order_on_the_stream():
    """Slow work of XLA before the call and of XLA behind it, many times: a race would show."""

    def product(x, w, out):
        assert torch.cuda.current_stream().cuda_stream == x.stream
        torch.matmul(torch.from_dlpack(x), torch.from_dlpack(w), out=torch.from_dlpack(out))

    @jax.jit
    def by_torch(x, w):
        for _ in range(8):
            x = jnp.tanh(x @ w)
            x = jnp.tanh(dlpack_call(product, S(x.shape, x.dtype))(x, w))
        return x

    @jax.jit
    def by_jax(x, w):
        for _ in range(16):
            x = jnp.tanh(x @ w)
        return x

    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    w = jax.random.normal(jax.random.key(1), (2048, 2048)) / 64
    with jax.default_matmul_precision("highest"):
        want = by_jax(x, w)
        for _ in range(20):
            np.testing.assert_allclose(by_torch(x, w), want, atol=1e-3)


def gradient():
    def gelu(x, out):
        torch.from_dlpack(out).copy_(torch.nn.functional.gelu(torch.from_dlpack(x)))

    def gelu_vjp(x, dout, dx):
        leaf = torch.from_dlpack(x).requires_grad_()
        (result,) = torch.autograd.grad(torch.nn.functional.gelu(leaf), leaf, torch.from_dlpack(dout))
        torch.from_dlpack(dx).copy_(result)

    x = jnp.linspace(-3, 3, 1000)
    got = jax.jit(jax.grad(lambda x: jnp.sum(dlpack_call(gelu, S(x.shape, x.dtype), gelu_vjp)(x) ** 2)))(x)
    want = jax.grad(lambda x: jnp.sum(jax.nn.gelu(x, approximate=False) ** 2))(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def errors():
    kept = []

    def another_stream(x, out):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.from_dlpack(x)

    for fn, text in (
        (lambda x, out: kept.append(torch.from_dlpack(x)), "kept 1 of its tensors"),
        (another_stream, "must be XLA's stream"),
        (lambda x, out: np.asarray(x), "has no NumPy view"),
    ):
        try:
            jax.block_until_ready(dlpack_call(fn, S((2,), jnp.float32))(jnp.ones(2)))
            error = ""
        except jax.errors.JaxRuntimeError as e:
            error = str(e)
        assert text in error, f"{text!r} is not in {error!r}"


def each_device():
    devices = []

    def triple(x, out):
        devices.append(x.device[1])
        torch.mul(torch.from_dlpack(x), 3, out=torch.from_dlpack(out))

    def body(x):
        return dlpack_call(triple, S(x.shape, x.dtype))(x)

    n = len(jax.devices())
    mesh = jax.make_mesh((n,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.arange(8.0 * n).reshape(2 * n, 4)
    y = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))(x)
    np.testing.assert_array_equal(y, 3 * np.asarray(x))
    assert sorted(devices) == list(range(n))


def main():
    if jax.default_backend() not in ("gpu", "cuda", "rocm") or not torch.cuda.is_available():
        print(f"no GPU for both: jax runs on {jax.default_backend()}, torch {torch.__version__}")
        return 77
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int32):
        same_buffers(dtype, torch.from_dlpack, lambda view: view.data_ptr())
    libraries = ["torch"]
    if importlib.util.find_spec("cupy") is not None:
        cupy = importlib.import_module("cupy")
        same_buffers(jnp.float32, cupy.from_dlpack, lambda view: view.data.ptr)
        libraries.append("cupy")
    for check in (order_on_the_stream, gradient, errors, each_device):
        check()
    print(f"right on {len(jax.devices())} x {jax.devices()[0].device_kind} with {', '.join(libraries)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
