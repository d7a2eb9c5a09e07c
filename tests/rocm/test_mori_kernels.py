"""jax_moriep's knowledge of the real amd-mori: its kernels compile, load and run; its heap; its tables."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import jax_moriep as jm
from jax_moriep.mori import kernels, limits, tuning, wheel
from jax_moriep.mori.kernels import Unit
from jax_moriep.mori.limits import HandleSize
from jax_moriep.tuning_options import MORI_KERNELS
from tests.rocm import code_object, simulated
from tests.rocm.mori_rank import Config
from tests.rocm.test_mori import ENVIRONMENT, HERE, KERNEL_SETTINGS, link_with_mori, run_ranks
from tests.unit.test_mori_limits import MEASURED

# The block of arguments that MORI's host library fills for its kernels, without what the compiler adds behind
# it.
ARGUMENTS_SIZE = 744


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _settings(monkeypatch, cache):
    for name in ("JAX_MORIEP_MORI_KERNELS", "MORI_ENABLE_HOST_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (KERNEL_SETTINGS | {"MORI_DEVICE_NIC": "mlx5"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_MORIEP_CACHE_DIR", str(cache))


def obtain(*units, said=None):
    return kernels.obtain(wheel.find(), "gfx942", units, (said if said is not None else []).append)


@pytest.mark.parametrize("kernel", MORI_KERNELS)
def test_every_kernel_type_compiles(kernel):
    unit = Unit(kernel, "bfloat16")
    (folder,) = obtain(unit)
    (path,) = folder.iterdir()
    found = {kernel.name: kernel for kernel in code_object.kernels(path)}
    assert set(unit.symbols) == set(found)
    relay = found.pop("MoriepRelay", None)  # ours, with arguments of its own
    assert (relay is not None) == kernel.startswith("InterNodeV1")
    for one in found.values():
        first, *added = one.arguments
        assert (first.offset, first.size) == (0, ARGUMENTS_SIZE)
        assert all(argument.offset >= ARGUMENTS_SIZE for argument in added)


def test_kernels_of_another_network(monkeypatch):
    monkeypatch.setenv("MORI_ENABLE_HOST_PROXY", "1")
    (folder,) = obtain(Unit("InterNodeV1", "bfloat16"))
    assert folder.name.startswith("InterNodeV1-bf16-gfx942-1.2.4-mlx5_proxy-")


OBTAIN = """
    from jax_moriep.mori import kernels, wheel
    unit = kernels.Unit("IntraNode", "float32")
    print(kernels.obtain(wheel.find(), "gfx942", [unit], lambda line: print(line, flush=True))[0])
"""


def start_obtaining():
    command = [sys.executable, "-c", textwrap.dedent(OBTAIN)]
    return subprocess.Popen(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True
    )


def test_a_process_killed_while_it_compiles(monkeypatch, tmp_path, configure):
    """The next one goes on at once, and what it makes runs."""
    monkeypatch.setenv("JAX_MORIEP_CACHE_DIR", str(tmp_path))
    first = start_obtaining()
    assert first.stdout.readline().startswith("compiling ")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "mori").glob(".IntraNode-f32-*")):
        assert time.monotonic() < deadline, list((tmp_path / "mori").iterdir())
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=20)
    first.stdout.close()
    second = start_obtaining()
    *said, folder = second.communicate(timeout=240)[0].splitlines()
    assert [line.split()[0] for line in said] == ["compiling"]
    assert [path.name for path in (tmp_path / "mori").glob("*/")] == [os.path.basename(folder)]
    run_ranks(dataclasses.replace(configure("float32"), kernels=folder))


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    output = tmp_path_factory.mktemp("mori") / "libmori_rank.so"
    return link_with_mori(HERE / "mori_host.cc", output, "-shared", "-fPIC")


@pytest.fixture
def configure(host_library):
    """Makes a Config of test_mori's for two ranks, or with other values."""

    def make(dtype="bfloat16", **more):
        (folder,) = obtain(Unit("IntraNodeLL" if more.get("low_latency") else "IntraNode", dtype))
        shape = {"ranks": 2, "hidden": 128, "top_k": 2, "experts_per_rank": 4, "max_tokens": 32} | more
        return Config(host=str(host_library), kernels=str(folder), dtype=dtype, rounds=4, seed=0, **shape)

    return make


@pytest.mark.parametrize("fetch", [False, True], ids=["send", "fetch"])
@pytest.mark.parametrize("low_latency", [False, True], ids=["IntraNode", "IntraNodeLL"])
def test_kernels_of_one_machine(configure, low_latency, fetch):
    run_ranks(configure(ranks=4, top_k=8, experts_per_rank=4, low_latency=low_latency, fetch=fetch))


@pytest.mark.parametrize("beyond", [{"top_k": 9}, {"waves": 2}], ids=lambda beyond: next(iter(beyond)))
def test_the_low_latency_kernel_is_wrong_beyond_its_limits(configure, beyond):
    """Why ``limits`` refuses them; should MORI mend it, this fails."""
    config = configure(**{"ranks": 2, "top_k": 8, "experts_per_rank": 8, "low_latency": True} | beyond)
    size = HandleSize("IntraNodeLL", 2, 2, 32, 128, 2, 8, config.top_k)
    check = (
        limits.check_handle
        if "top_k" in beyond
        else functools.partial(
            limits.check_launch, compute_units=304, block_num=2, warp_num=config.waves, rdma_block_num=0
        )
    )
    with pytest.raises(jm.ConfigError):
        check(size)
    with pytest.raises(AssertionError, match="rank 0: exit 1"):
        run_ranks(config)


@pytest.mark.parametrize("ranks", [3, 6])
def test_ranks_that_are_no_power_of_two(configure, ranks):
    """On one machine MORI does them, told the right number of GPUs per node."""
    run_ranks(configure(ranks=ranks))


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_heap_that_is_just_large_enough(configure, ranks):
    config = configure(ranks=ranks)
    told = limits.gpus_per_node("IntraNode", ranks, 1)
    size = HandleSize("IntraNode", ranks, told, 32, 128, 2, 4, 2)
    needed = limits.heap_bytes(size) + limits.HEAP_OWN_BYTES
    run_ranks(config, MORI_SHMEM_HEAP_SIZE=str(needed))


@pytest.fixture(scope="module")
def mori_heap(tmp_path_factory):
    return link_with_mori(HERE / "mori_heap.cc", tmp_path_factory.mktemp("heap") / "mori_heap")


@pytest.mark.parametrize("size", MEASURED, ids=lambda size: f"{size.kernel}-{size.ranks}")
def test_the_heap_need_is_exact(mori_heap, size):
    """A handle is constructed with the computed heap, and not with one that is a byte smaller."""
    kernel = {
        "IntraNode": 0,
        "InterNode": 1,
        "InterNodeV1": 2,
        "InterNodeV1LL": 3,
        "AsyncLL": 4,
        "IntraNodeLL": 5,
    }
    numbers = (size.ranks, size.gpus_per_node, size.hidden, size.element_bytes, size.max_tokens)
    numbers += (size.experts_per_rank, size.top_k, size.scales, size.scale_bytes)
    needed = limits.heap_bytes(size) + limits.HEAP_OWN_BYTES
    libraries = simulated.environment(1)["LD_LIBRARY_PATH"]
    for heap, constructed in ((needed, True), (needed - 1, False)):
        more = ENVIRONMENT | {
            "LD_LIBRARY_PATH": f"{libraries}:{simulated.MORI}",
            "MORI_SHMEM_HEAP_SIZE": str(heap),
        }
        process = simulated.start(mori_heap, kernel[size.kernel], *numbers, **more)
        out, err = simulated.finish(process, 60)
        assert ("constructed" in out, process.returncode == 0) == (constructed, constructed), err[-2000:]


MODELS = [
    ("gfx942", "mi300x"),
    ("gfx942", "mi308x"),
    ("gfx942", "mi325x"),
    ("gfx950", "mi350x"),
    ("gfx950", "mi355x"),
]


@pytest.mark.parametrize(("arch", "model"), MODELS)
def test_all_that_the_tables_say_can_be_launched(arch, model):
    """Whatever is asked, the numbers are within the limits; some of them are measured."""
    tables, units = wheel.find().tables, tuning.COMPUTE_UNITS[model]
    measured = set()
    for ranks, nodes, kernel in (
        *((ranks, 1, kernel) for ranks in (1, 2, 3, 4, 8) for kernel in ("IntraNode", "IntraNodeLL")),
        *((16, 2, kernel) for kernel in ("InterNodeV1", "InterNodeV1LL", "AsyncLL")),
    ):
        hardware = tuning.Hardware(arch, model, units, ranks, nodes)
        for top_k, hidden, wire in ((8, 7168, None), (8, 7168, "fp8"), (6, 7168, None), (2, 512, None)):
            cfg = jm.MoEConfig(64 * ranks, top_k, hidden, 64, wire_dtype=wire, tuning=jm.Tuning(kernel))
            told = limits.gpus_per_node(kernel, ranks, nodes)
            for num_tokens in (0, 1, 64, 500, 4096, 100_000):
                size = HandleSize(kernel, ranks, told, max(1, num_tokens), hidden, 2, 64, top_k)
                for zero_copy in (False, True):
                    found = tuning.resolve(tables, hardware, cfg, num_tokens, "bfloat16", zero_copy=zero_copy)
                    for launch in (found.dispatch, found.combine):
                        limits.check_launch(size, units, *dataclasses.astuple(launch)[:3])
                        if ".json" in launch.source:
                            measured.add((kernel, ranks))
    assert {("IntraNode", 2), ("IntraNode", 4), ("IntraNode", 8), ("InterNodeV1LL", 16)} <= measured


def test_the_tables_of_mi300x():
    """Values read off the wheel's files by eye."""
    tables = wheel.find().tables
    hardware = tuning.Hardware("gfx942", "mi300x", 304, 8)

    def launch(phase, num_tokens, top_k=8, dtype="bfloat16", wire=None, kernel="auto", zero_copy=True):
        cfg = jm.MoEConfig(256, top_k, 7168, 2048, wire_dtype=wire, tuning=jm.Tuning(kernel))
        found = getattr(tuning.resolve(tables, hardware, cfg, num_tokens, dtype, zero_copy=zero_copy), phase)
        return found.block_num, found.warp_num_per_block

    assert launch("dispatch", 128) == (208, 5)  # the nearest top_k is 6
    assert launch("dispatch", 128, top_k=16) == (256, 8)  # 257 in the file
    assert launch("dispatch", 4096, wire="fp8") == (136, 14)
    assert launch("dispatch", 64, kernel="IntraNodeLL") == (128, 10)
    assert launch("combine", 4096) == (80, 4)
    assert launch("combine", 10**5) == (80, 4)
    assert launch("combine", 128, top_k=16) == (64, 16)
    assert launch("combine", 4096, zero_copy=False) == (256, 16)  # its rows are copies
