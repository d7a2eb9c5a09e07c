"""dlpack_call on the CPU, with NumPy and, where it is installed, torch."""

import gc
import importlib.util
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep.interop import Tensor, dlpack_call, dtypes, runner, streams
from jax_moriep.interop.tensor import Loans
from jax_moriep.runtime import targets

S = jax.ShapeDtypeStruct
F32 = jnp.float32
NO_TORCH = importlib.util.find_spec("torch") is None
needs_torch = pytest.mark.skipif(NO_TORCH, reason="torch is not installed; pip install 'jax_moriep[torch]'")
LIBRARIES = ["numpy", pytest.param("torch", marks=needs_torch)]
X = np.arange(12, dtype=np.float32).reshape(3, 4) / 7


@pytest.fixture(params=LIBRARIES)
def from_dlpack(request):
    return importlib.import_module(request.param).from_dlpack


def address(view):
    return view.data_ptr() if hasattr(view, "data_ptr") else view.__array_interface__["data"][0]


def mesh_of(n=4, kind=AxisType.Auto):
    return jax.make_mesh((n,), ("ep",), axis_types=(kind,), devices=jax.devices()[:n])


def scale(x, out):
    np.multiply(np.asarray(x), 3, out=np.asarray(out))


def scale_vjp(x, dy, dx):
    assert np.asarray(x).shape == x.shape
    np.multiply(np.asarray(dy), 3, out=np.asarray(dx))


def scaled(x, vjp=None):
    return dlpack_call(scale, S(x.shape, x.dtype), vjp)(x)


def error_of(fn, *arrays, result=S((3,), F32)):  # noqa: B008 - it is immutable
    """The text of the error of a call that fails when it runs."""
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(dlpack_call(fn, result)(*arrays))
    return str(caught.value)


# What the function sees, and that nothing is copied.


def test_inputs_and_outputs_are_the_buffers_of_xla(from_dlpack):
    seen = []

    def add(*tensors):
        x, y, out = map(from_dlpack, tensors)
        seen.extend(map(address, (x, y, out)))
        out[...] = x + y

    x, y = jnp.asarray(X), jnp.asarray(X * X)
    z = jax.jit(dlpack_call(add, S(X.shape, F32)))(x, y)
    np.testing.assert_array_equal(z, X + X * X)
    assert seen == [array.unsafe_buffer_pointer() for array in (x, y, z)]


def test_buffers_of_each_device_in_shard_map(from_dlpack):
    seen = {}
    lock = threading.Lock()

    def double(x, out):
        x, out = from_dlpack(x), from_dlpack(out)
        with lock:
            seen[address(x)] = address(out)
        out[...] = x * 2

    def body(x):
        return dlpack_call(double, S(x.shape, x.dtype))(x)

    mesh = mesh_of(8)
    x = jax.device_put(jnp.arange(64.0).reshape(16, 4), jax.sharding.NamedSharding(mesh, P("ep")))
    y = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))(x)
    np.testing.assert_array_equal(y, 2 * np.asarray(x))
    of_device = {s.device: s.data.unsafe_buffer_pointer() for s in y.addressable_shards}
    assert seen == {s.data.unsafe_buffer_pointer(): of_device[s.device] for s in x.addressable_shards}


@pytest.mark.parametrize("name", dtypes.CODES)
def test_every_dtype_in_numpy(name):
    seen = []

    def copy(x, out):
        seen.append((x.dtype.name, x.dtype.itemsize, address(np.asarray(x)), address(np.asarray(out))))
        np.asarray(out)[...] = np.asarray(x)

    with jax.enable_x64(True):
        x = jnp.asarray([1, 0, 1, 1], name)
        y = dlpack_call(copy, S((4,), name))(x)
        assert np.asarray(y).tobytes() == np.asarray(x).tobytes()
    size = np.dtype(x.dtype).itemsize
    assert seen == [(name, size, x.unsafe_buffer_pointer(), y.unsafe_buffer_pointer())]


@needs_torch
@pytest.mark.parametrize("name", dtypes.CODES)
def test_every_dtype_that_torch_has(name):
    torch = importlib.import_module("torch")
    if not hasattr(torch, name):
        pytest.skip(f"torch has no {name}")
    seen = []

    def copy(x, out):
        x, out = torch.from_dlpack(x), torch.from_dlpack(out)
        seen.append((x.dtype, x.data_ptr(), out.data_ptr()))
        out.copy_(x)

    with jax.enable_x64(True):
        x = jnp.asarray([1, 0, 1, 1], name)
        y = dlpack_call(copy, S((4,), name))(x)
        assert np.asarray(y).tobytes() == np.asarray(x).tobytes()
    assert seen == [(getattr(torch, name), x.unsafe_buffer_pointer(), y.unsafe_buffer_pointer())]


def test_bits_are_for_libraries_without_the_dtype(from_dlpack):
    def negate(x, out):
        from_dlpack(out.bits())[...] = from_dlpack(x.bits()) ^ 0x80

    x = jnp.asarray([1, -2, 0.5], jnp.float8_e4m3fn)
    y = dlpack_call(negate, S((3,), jnp.float8_e4m3fn))(x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), [-1, 2, -0.5])


def test_shapes_trees_scalars_and_empty_arrays(from_dlpack):
    def fill(x, empty, scalar, first, second, none):
        assert (x.shape, empty.shape, scalar.shape, none.shape) == ((3, 4), (0, 5), (), (2, 0))
        assert from_dlpack(empty).shape == (0, 5)
        assert from_dlpack(none).shape == (2, 0)
        from_dlpack(first)[...] = from_dlpack(x).sum()
        from_dlpack(second)[...] = from_dlpack(scalar)

    shapes = {"a": S((), F32), "b": [S((2, 1), jnp.int32), S((2, 0), F32)]}
    result = jax.jit(dlpack_call(fill, shapes))(X, jnp.zeros((0, 5)), 7)
    assert jax.tree.map(lambda r, s: (r.shape, r.dtype) == (s.shape, s.dtype), result, shapes)
    np.testing.assert_allclose(result["a"], X.sum(), rtol=1e-6)
    np.testing.assert_array_equal(result["b"][0], [[7], [7]])


def test_a_call_without_inputs():
    def fill(out):
        np.asarray(out)[...] = 5

    np.testing.assert_array_equal(jax.jit(dlpack_call(fill, S((2,), F32)))(), [5, 5])


def test_numpy_cannot_write_an_input():
    def write(x, out):
        np.from_dlpack(out)[...] = 0
        np.from_dlpack(x)[...] = 0

    assert "read-only" in error_of(write, X)
    assert "read-only" in error_of(lambda x, out: np.asarray(x).fill(0), X)


def test_capsules_of_both_kinds():
    names = []

    def show(x, out):
        names.extend(repr(x.__dlpack__(max_version=v)).split('"')[1] for v in (None, (0, 8), (1, 0), (2, 0)))
        np.asarray(out)[...] = 0

    dlpack_call(show, S((3,), F32))(X)
    assert names == ["dltensor", "dltensor", "dltensor_versioned", "dltensor_versioned"]


def test_requests_that_cannot_be_met():
    def ask(**options):
        return error_of(lambda x, out: x.__dlpack__(**options), X)

    assert "BufferError: copy=True must be None or False" in ask(copy=True)
    assert "BufferError: dl_device=(2, 0) must be (1, 0)" in ask(dl_device=(2, 0))
    assert "only in a copy" in error_of(lambda x, out: np.array(x, np.int8, copy=False), X)
    assert np.array_equal([1, 2], dlpack_call(cast, S((2,), jnp.int32))(jnp.array([1.5, 2.5])))


def cast(x, out):
    np.asarray(out)[...] = np.asarray(x, np.int32)


# Transformations.


def test_the_module_holds_a_name_and_no_address():
    text = jax.jit(scaled).lower(X).as_text()
    assert f'backend_config = {{function = "{__name__}.scale"}}' in text


def test_functions_of_one_name_are_told_apart():
    def make(factor):
        def times(x, out):
            np.multiply(np.asarray(x), factor, out=np.asarray(out))

        return times

    class Adder:
        def __init__(self, term):
            self.term = term

        def add(self, x, out):
            np.add(np.asarray(x), self.term, out=np.asarray(out))

        __call__ = add

    two, three, one = make(2), make(3), Adder(1)

    @jax.jit
    def program(x):
        results = [dlpack_call(f, S(x.shape, x.dtype))(x) for f in (two, three, two, one.add, one.add, one)]
        return jnp.stack(results)

    np.testing.assert_allclose(program(X), np.stack([2 * X, 3 * X, 2 * X, X + 1, X + 1, X + 1]))
    names = set(re.findall(r'function = "[^"]*\.([^."]*)"', program.lower(X).as_text()))
    assert names == {"times", "times#1", "add", "Adder"}


def test_a_function_lives_as_long_as_the_program():
    def program(x):
        return dlpack_call(lambda x, out: scale(x, out), S(x.shape, x.dtype))(x)

    compiled = jax.jit(program).lower(X).compile()
    del program
    jax.clear_caches()
    gc.collect()
    np.testing.assert_allclose(compiled(X), 3 * X)


def test_gradient_by_vjp(from_dlpack):
    """Of sum(x @ w * n), n an integer: the integers get no cotangent, nor does the integer result."""

    def product(x, w, n, out, count):
        x, w, n = map(from_dlpack, (x, w, n))
        from_dlpack(out)[...] = (x @ w) * n
        from_dlpack(count)[...] = 1

    def product_vjp(x, w, n, dout, dx, dw):
        x, w, n, dout = map(from_dlpack, (x, w, n, dout))
        from_dlpack(dx)[...] = (dout * n) @ w.T
        from_dlpack(dw)[...] = x.T @ (dout * n)

    w = np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2)
    n = np.array([[2], [3], [5]], np.int32)
    c = np.linspace(1, 2, 6, dtype=np.float32).reshape(3, 2)

    @jax.jit
    def loss(x, w, n):
        y, count = dlpack_call(product, (S((3, 2), F32), S((), jnp.int32)), product_vjp)(x, w, n)
        return jnp.sum(y * c), count

    (value, count), (dx, dw) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(X, w, n)
    assert count == 1
    np.testing.assert_allclose(value, (X.astype(float) @ w * n * c).sum(), rtol=1e-5)
    np.testing.assert_allclose(dx, (c * n).astype(float) @ w.T, rtol=1e-5)
    np.testing.assert_allclose(dw, X.T.astype(float) @ (c * n), rtol=1e-5)


@needs_torch
def test_gradient_by_torch_autograd():
    torch = importlib.import_module("torch")

    def gelu(x, out):
        torch.from_dlpack(out).copy_(torch.nn.functional.gelu(torch.from_dlpack(x)))

    def gelu_vjp(x, dout, dx):
        leaf = torch.from_dlpack(x).requires_grad_()
        gradient = torch.autograd.grad(torch.nn.functional.gelu(leaf), leaf, torch.from_dlpack(dout))
        torch.from_dlpack(dx).copy_(gradient[0])

    def loss(x):
        return jnp.sum(dlpack_call(gelu, S(X.shape, F32), gelu_vjp)(x) ** 2)

    want = jax.grad(lambda x: jnp.sum(jax.nn.gelu(x, approximate=False) ** 2))(X)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(X), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradient_in_shard_map(kind, check_vma):
    """w is the same on all devices, so its gradient is a sum over them."""

    def times(x, w, out):
        np.multiply(np.asarray(x), np.asarray(w), out=np.asarray(out))

    def times_vjp(x, w, dout, dx, dw):
        np.multiply(np.asarray(dout), np.asarray(w), out=np.asarray(dx))
        np.multiply(np.asarray(dout), np.asarray(x), out=np.asarray(dw)[None])

    def body(x, w):
        return dlpack_call(times, S(x.shape, x.dtype), times_vjp)(x, w)

    mesh = mesh_of(4, kind)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P("ep"), P()), out_specs=P("ep"), check_vma=check_vma)
    x = jax.device_put(X.reshape(4, 3)[:, None], jax.sharding.NamedSharding(mesh, P("ep")))
    w = jax.device_put(jnp.array([1.0, 2, 3]), jax.sharding.NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        dx, dw = jax.jit(jax.grad(lambda x, w: jnp.sum(mapped(x[:, 0], w)), argnums=(0, 1)))(x, w)
    np.testing.assert_allclose(dx[:, 0], np.tile([1.0, 2, 3], (4, 1)))
    np.testing.assert_allclose(dw, X.reshape(4, 3).sum(0), rtol=1e-6)


def test_a_missing_psum_is_found():
    mapped = jax.shard_map(scaled, mesh=mesh_of(), in_specs=P("ep"), out_specs=P())
    with pytest.raises(ValueError, match="replicat"):
        jax.eval_shape(mapped, jnp.zeros((4, 2)))


def test_scan_cond_and_checkpoint():
    def step(x, _):
        x = jax.lax.cond(x.sum() > 100, lambda x: x, lambda x: scaled(x, scale_vjp), x)
        return x, x.sum()

    @jax.jit
    @jax.checkpoint
    def loss(x):
        return jax.lax.scan(step, x, length=3)[0].sum()

    np.testing.assert_allclose(loss(X), 27 * X.sum(), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(X), np.full_like(X, 27))


def test_devices_run_the_function_at_the_same_time():
    """The lock of Python is given up by NumPy's and by waits, so a function may wait for another device's."""
    meet = threading.Barrier(4, timeout=30)

    def wait(x, out):
        meet.wait()
        scale(x, out)

    mapped = jax.shard_map(
        lambda x: dlpack_call(wait, S(x.shape, x.dtype))(x),
        mesh=mesh_of(),
        in_specs=P("ep"),
        out_specs=P("ep"),
    )
    np.testing.assert_allclose(jax.jit(mapped)(jnp.ones((4, 2))), np.full((4, 2), 3.0))


# Errors.


def test_an_exception_is_the_error_of_the_program():
    def fail(x, out):
        raise KeyError("the spoon")

    text = error_of(fail, X)
    assert re.search(r"dlpack_call of \S*fail: KeyError: 'the spoon'\n\nTraceback", text)
    assert "in fail" in text
    with pytest.raises(jax.errors.JaxRuntimeError, match="the spoon"):
        jax.block_until_ready(jax.jit(dlpack_call(fail, S((3,), F32)))(X))
    assert "SystemExit" in error_of(lambda x, out: exit(3), X)
    assert "takes 1 positional argument but 2 were given" in error_of(lambda x: None, X)
    np.testing.assert_allclose(scaled(X), 3 * X)


def test_a_kept_view_is_an_error(from_dlpack):
    kept = []

    def keep(x, out):
        kept.append(from_dlpack(x)[1:])
        kept.append(from_dlpack(out))

    assert "RuntimeError: the function kept 2 of its tensors" in error_of(keep, X)
    kept.clear()

    def cycle(x, out):
        node = [from_dlpack(x)]
        node.append(node)
        from_dlpack(out)[...] = 1

    np.testing.assert_array_equal(dlpack_call(cycle, S((3,), F32))(X), np.ones(3))


def test_a_tensor_is_of_no_use_after_the_call():
    kept = []

    def keep(x, out):
        kept.extend([x, x.__dlpack__(max_version=(1, 0)), x.__dlpack__()])
        np.asarray(out)[...] = 1

    dlpack_call(keep, S((3,), F32))(X).block_until_ready()
    with pytest.raises(BufferError, match="after the function returned"):
        np.asarray(kept[0])
    assert [repr(capsule).split('"')[1] for capsule in kept[1:]] == [
        "used_dltensor_versioned",
        "used_dltensor",
    ]


def test_another_stream_on_a_gpu_is_refused():
    loans = Loans(None, 0)
    loans.lend = lambda *args, **options: "capsule"
    x = Tensor(loans, 0, (2,), np.dtype("float32"), (2, 1), 4096, writable=True)
    assert x.__dlpack_device__() == (2, 1)
    assert x.__dlpack__(stream=4096) == x.__dlpack__(stream=-1) == "capsule"
    for stream in (None, 1, 2, 8192):
        with pytest.raises(BufferError, match="must be XLA's stream 4096; import torch"):
            x.__dlpack__(stream=stream)
    with pytest.raises(TypeError, match="has no NumPy view"):
        np.asarray(x)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((3, S((3,), F32)), "fn=3 must be a function"),
        ((scale, S((3,), F32), "vjp"), "vjp='vjp' must be a function"),
        ((scale, ()), "result_shapes=() must have at least one result"),
        ((scale, (3,)), "result_shapes=3 must be a pytree of jax.ShapeDtypeStruct"),
        ((scale, S((3,), jnp.int4)), "result_shapes.dtype='int4' must be a dtype that DLPack has"),
        ((scale, S((3,), jnp.float4_e2m1fn)), "result_shapes.dtype='float4_e2m1fn' must be a dtype"),
        (
            (scale, S((3,), np.float64)),
            "result_shapes.dtype='float64' must be of 32 bits or less; call jax.con",
        ),
    ],
)
def test_wrong_arguments(arguments, text):
    with pytest.raises(jm.ConfigError, match=re.escape(text)):
        dlpack_call(*arguments)


def test_wrong_arrays():
    call = dlpack_call(scale, S((3,), F32))
    with pytest.raises(jm.ConfigError, match=re.escape("arrays[1].dtype='int4' must be a dtype that DLPack")):
        call(X, jnp.zeros(2, jnp.int4))
    with pytest.raises(jm.ConfigError, match=re.escape("arrays[0].dtype='key<fry>' must be")):
        call(jax.random.key(0))
    mesh = mesh_of(kind=AxisType.Explicit)
    x = jax.device_put(jnp.zeros((4, 2)), jax.sharding.NamedSharding(mesh, P("ep")))
    with jax.set_mesh(mesh), pytest.raises(jm.ShardingError, match=r"arrays\[0\].sharding=.*shard_map"):
        jax.jit(call)(x)
    replicated = jax.device_put(jnp.ones(3), jax.sharding.NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(call)(replicated), 3 * np.ones(3))


def test_derivatives_that_are_not_there():
    with pytest.raises(
        jm.ConfigError, match=r"vjp=None must be a function for \S*scale to be differentiated"
    ):
        jax.grad(lambda x: scaled(x).sum())(X)
    stopped = jax.grad(lambda x: (x * scaled(jax.lax.stop_gradient(x))).sum())(X)
    np.testing.assert_allclose(stopped, 3 * X)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: scaled(x, scale_vjp), (X,), (X,))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: jax.grad(lambda x: f(x).sum())])
def test_vmap_is_refused(wrap):
    with pytest.raises(jm.ConfigError, match="vmap over dlpack_call must not be"):
        jax.vmap(wrap(lambda x: scaled(x, scale_vjp)))(X)


def test_a_program_whose_function_is_not_here():
    runner.start()
    with pytest.raises(jax.errors.JaxRuntimeError, match="has not registered the function gone.away"):
        jax.block_until_ready(targets.call_function("gone.away", (S((3,), F32),), jnp.zeros(3)))


def test_the_library_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_MORIEP_LIB_DIR", str(tmp_path))
    runner.start.cache_clear()
    with pytest.raises(jm.LibraryError, match=r"libmoriep_interop.so; reinstall"):
        dlpack_call(scale, S((3,), F32))


ENDS_EARLY = """
import time

import jax
import jax.numpy as jnp
import numpy as np

import jax_moriep as jm


def slow(x, out):
    time.sleep(0.3)
    np.asarray(out)[...] = np.asarray(x)


@jax.jit
def program(x):
    for _ in range(5):
        x = jm.interop.dlpack_call(slow, jax.ShapeDtypeStruct(x.shape, x.dtype))(x) @ x
    return x


result = program(jnp.ones((300, 300)))
"""


def test_python_may_end_while_a_program_runs():
    for _ in range(3):
        subprocess.run([sys.executable, "-c", ENDS_EARLY], check=True, timeout=120)


# What can be seen of GPUs without one.


def test_xlas_stream_is_the_current_one_of_the_libraries(monkeypatch):
    log = []

    class Context:
        def __init__(self, *args, **options):
            self.text = f"{args}{options}"

        def __enter__(self):
            log.append(self.text)

        def __exit__(self, *exc):
            log.append("left")

    def library(**cuda):
        return SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True, **cuda))

    torch = library(ExternalStream=lambda pointer, device: (pointer, device), stream=Context)
    cupy = library(ExternalStream=Context, Device=Context)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with streams.current(3, 4096):
        assert log == ["((4096, 3),){}", "(3,){}", "(4096, 3){}"]
    assert log[3:] == ["left"] * 3


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_lowers_for_gpus(platform):
    traced = jax.jit(jax.grad(lambda x: scaled(x, scale_vjp).sum())).trace(X)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert f'"{__name__}.scale_vjp"' in text


def test_an_export_runs_by_the_functions_name():
    check = export.DisabledSafetyCheck.custom_call("moriep_dlpack_call")
    platforms = ["cpu", "cuda", "rocm"]
    exported = export.export(jax.jit(scaled), platforms=platforms, disabled_checks=[check])(X)
    restored = export.deserialize(exported.serialize())
    np.testing.assert_allclose(restored.call(X), 3 * X)
