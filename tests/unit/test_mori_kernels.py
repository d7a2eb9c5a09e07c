"""MORI's kernels: what is compiled and when, how they are kept, and what a compiler that dies leaves behind.

The compiler here is a script that writes what a code object must have. tests/rocm has a real one.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from jax_moriep.errors import LibraryError
from jax_moriep.mori import compiler, kernels
from jax_moriep.mori.kernels import Unit
from jax_moriep.mori.wheel import Wheel
from tests.unit.test_mori_wheel import make_wheel

# It answers what the real one is asked: its version, whether it has a builtin, and for a code object. A file
# "slow" beside it makes it wait until the file is gone, "broken" makes it fail, "short" leave a kernel out.
COMPILER = """\
#!{python}
import pathlib, re, struct, sys, time
here = pathlib.Path(__file__).parent
arguments = sys.argv[1:]
if "--version" in arguments:
    print((here / "version").read_text())
    sys.exit()
if "-E" in arguments:
    sys.stdin.read()
    print("moriep_has_it" if (here / "has_builtin").exists() else "")
    sys.exit()
with open(here / "calls", "a") as calls:
    calls.write(repr(arguments) + "\\n")
while (here / "slow").exists():
    time.sleep(0.01)
if (here / "broken").exists():
    sys.exit("kernels.hip:3: error: nobody knows")
defined = dict(a[2:].split("=", 1) for a in arguments if a.startswith("-DMORIEP_"))
names = {kernels}[defined["MORIEP_KERNEL"]]
names = [name.replace("{{}}", defined["MORIEP_ROW_NAME"]) for name in names]
if (here / "short").exists():
    names.pop()
header = bytearray(64)
header[:5] = b"\\x7fELF\\x02"
struct.pack_into("<H", header, 18, 224)
text = b"\\0" + b"".join(name.encode() + b".kd\\0" for name in names)
struct.pack_into("<Q", header, 40, 64 + len(text))
struct.pack_into("<HH", header, 58, 64, 1)
pathlib.Path(arguments[-1]).write_bytes(header + text + bytes(64))
"""


class Machine:
    """A machine with a wheel, a compiler and a cache, all in a folder."""

    def __init__(self, folder):
        self.wheel = Wheel(make_wheel(folder / "wheel"), "1.2.4")
        self.bin = folder / "rocm" / "bin"
        self.bin.mkdir(parents=True)
        script = self.bin / "hipcc"
        script.write_text(COMPILER.format(python=sys.executable, kernels=kernels.KERNELS))
        script.chmod(0o755)
        (self.bin / "version").write_text("HIP version: 7.2")
        self.cache = folder / "cache" / "mori"
        self.environment = {
            "JAX_MORIEP_ROCM_PATH": str(folder / "rocm"),
            "JAX_MORIEP_CACHE_DIR": str(folder / "cache"),
            "JAX_MORIEP_MORI_DIR": str(self.wheel.folder),
            "JAX_PLATFORMS": "cpu",
        }
        self.said = []

    def calls(self):
        path = self.bin / "calls"
        return [eval(line) for line in path.read_text().splitlines()] if path.exists() else []  # noqa: S307

    def obtain(self, *units, arch="gfx942"):
        return kernels.obtain(self.wheel, arch, units, self.said.append)

    def start(self):
        """A process that obtains one unit."""
        program = """
            import sys
            from jax_moriep.mori import kernels, wheel
            unit = kernels.Unit("IntraNode", "bfloat16")
            print(kernels.obtain(wheel.find(), "gfx942", [unit], lambda line: print(line, flush=True))[0])
        """
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            env=os.environ | self.environment,
            stdout=subprocess.PIPE,
            text=True,
        )


BF16 = Unit("IntraNode", "bfloat16")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    compiler._version.cache_clear()
    made = Machine(tmp_path)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("JAX_MORIEP_MORI_KERNELS", "MORI_ENABLE_HOST_PROXY", "MORI_DEVICE_NIC"):
        monkeypatch.delenv(name, raising=False)
    yield made
    compiler._version.cache_clear()


def test_compiled_once_and_kept(machine):
    (folder,) = machine.obtain(BF16)
    assert folder.parent == machine.cache
    assert folder.name.startswith("IntraNode-bf16-gfx942-1.2.4-")
    assert [path.name for path in folder.iterdir()] == ["IntraNode.hsaco"]
    (line,) = machine.said
    assert line == (
        f"compiling MORI's kernels {folder.name}, once, with {machine.bin}/hipcc; they are kept in "
        f"{machine.cache}"
    )
    assert machine.obtain(BF16) == [folder]
    assert len(machine.calls()) == 1
    assert len(machine.said) == 1


def test_what_the_compiler_is_told(machine):
    machine.obtain(BF16)
    (call,) = machine.calls()
    for option in (
        "--offload-arch=gfx942",
        f"--rocm-path={machine.bin.parent}",
        "-DMORIEP_KERNEL=IntraNode",
        "-DMORIEP_ROW_NAME=bf16",
        "-DMORIEP_ROW_TYPE=hip_bfloat16",
        f"-isystem{machine.wheel.sources}/3rdparty/spdlog/include",
        '-D__scoped_atomic_thread_fence(order,scope)=__builtin_amdgcn_fence(order,"")',
    ):
        assert option in call
    (machine.bin / "has_builtin").touch()
    machine.obtain(BF16)
    assert not any("__scoped_atomic_thread_fence" in option for option in machine.calls()[1])


def test_only_what_is_asked_for(machine):
    folders = machine.obtain(BF16, Unit("IntraNode", "float8_e4m3fnuz"), Unit("IntraNodeLL", "float32"))
    assert len({*folders}) == 3
    assert [folder.name.rsplit("-", 1)[0] for folder in folders] == [
        "IntraNode-bf16-gfx942-1.2.4",
        "IntraNode-fp8_fnuz-gfx942-1.2.4",
        "IntraNodeLL-f32-gfx942-1.2.4",
    ]
    assert len(machine.calls()) == 3


def test_the_key_is_the_content(machine):
    seen = set(machine.obtain(BF16))

    def is_new(**more):
        before = len(seen)
        seen.update(machine.obtain(BF16, **more))
        return len(seen) == before + 1

    assert not is_new()
    assert is_new(arch="gfx950")
    (machine.bin / "version").write_text("HIP version: 7.3")
    assert not is_new()  # a process asks once
    compiler._version.cache_clear()
    assert is_new()
    changed = make_wheel(machine.bin / "changed")
    (changed / "_jit-sources" / "include" / "a.hpp").write_text("// b\n")
    machine.wheel = Wheel(changed, "1.2.4")
    assert is_new()


def test_the_network_is_part_of_the_key_where_it_is_used(machine, monkeypatch):
    monkeypatch.setattr(kernels, "_commonest_adapter", lambda: "mlx5")
    monkeypatch.setenv("MORI_ENABLE_HOST_PROXY", "0")
    unit = Unit("InterNodeV1", "bfloat16")
    (one,) = machine.obtain(unit)
    assert one.name.startswith("InterNodeV1-bf16-gfx942-1.2.4-mlx5-")
    monkeypatch.setenv("MORI_ENABLE_HOST_PROXY", "1")
    (other,) = machine.obtain(unit)
    assert other.name.startswith("InterNodeV1-bf16-gfx942-1.2.4-mlx5_proxy-")
    assert "-DMORI_PROXY_ENABLED" in machine.calls()[1]
    assert "-DMORI_PROXY_ENABLED" not in machine.calls()[0]
    monkeypatch.setenv("MORI_DEVICE_NIC", "ionic")
    machine.obtain(unit, BF16)
    ionic = [call for call in machine.calls() if "-DMORI_DEVICE_NIC_IONIC" in call]
    assert ["-DMORIEP_KERNEL=InterNodeV1" in call for call in ionic] == [True]
    monkeypatch.setenv("MORI_DEVICE_NIC", "carrier_pigeon")
    with pytest.raises(
        LibraryError, match="MORI_DEVICE_NIC='carrier_pigeon' must be one of mlx5, bnxt, ionic; "
    ):
        machine.obtain(unit)


def test_the_commonest_adapter(tmp_path):
    assert kernels._commonest_adapter(tmp_path / "none") == "mlx5"
    for number, driver in enumerate(["mlx5_core", "ionic", "ionic"]):
        (tmp_path / "drivers" / driver).mkdir(parents=True, exist_ok=True)
        device = tmp_path / "infiniband" / f"rdma{number}" / "device"
        device.mkdir(parents=True)
        (device / "driver").symlink_to(tmp_path / "drivers" / driver)
    assert kernels._commonest_adapter(tmp_path / "infiniband") == "ionic"


def test_a_broken_entry_is_made_again(machine):
    (folder,) = machine.obtain(BF16)
    path = folder / "IntraNode.hsaco"
    whole = path.read_bytes()
    for damage in (b"", whole[:70], whole[:-1], b"text" + whole[4:], whole[:18] + b"\x3e\0" + whole[20:]):
        path.write_bytes(damage)
        assert machine.obtain(BF16) == [folder]
        assert path.read_bytes() == whole
    assert len(machine.calls()) == 6


def test_a_compiler_that_fails(machine):
    (machine.bin / "broken").touch()
    with pytest.raises(LibraryError, match="do not compile") as caught:
        machine.obtain(BF16)
    assert "nobody knows" in str(caught.value)
    assert "JAX_MORIEP_MORI_KERNELS" in str(caught.value)
    (machine.bin / "broken").unlink()
    (machine.bin / "short").touch()
    with pytest.raises(LibraryError, match="lacks the kernels EpCombineIntraNodeKernel_bf16_p2p"):
        machine.obtain(BF16)
    assert not list(machine.cache.glob("*-*/")), "what failed must not look like a result"
    (machine.bin / "short").unlink()
    machine.obtain(BF16)


def test_a_cache_that_cannot_be_written(machine):
    machine.cache.parent.mkdir(parents=True)
    machine.cache.write_text("a file where the folder should be")
    with pytest.raises(LibraryError, match="cannot be kept in .*; set JAX_MORIEP_CACHE_DIR to a folder"):
        machine.obtain(BF16)


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_MORIEP_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.cache_folder() == tmp_path / "jax_moriep" / "mori"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernels.cache_folder() == tmp_path / ".cache" / "jax_moriep" / "mori"


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_wait_for_each_other(machine):
    (machine.bin / "slow").touch()
    first = machine.start()
    wait_for(machine.calls)
    second = machine.start()
    assert second.stdout.readline().startswith("waiting for the process that compiles IntraNode-bf16-")
    (machine.bin / "slow").unlink()
    ends = [process.communicate(timeout=20)[0].splitlines()[-1] for process in (first, second)]
    assert ends[0] == ends[1]
    assert len(machine.calls()) == 1


def test_a_killed_process_is_in_nobodys_way(machine):
    (machine.bin / "slow").touch()
    first = machine.start()
    wait_for(machine.calls)
    second = machine.start()
    assert second.stdout.readline().startswith("waiting for ")
    first.send_signal(signal.SIGKILL)
    assert first.wait(timeout=20) == -signal.SIGKILL
    # The first one's compiler still runs, and the second has the lock all the same.
    assert second.stdout.readline().startswith("compiling ")
    wait_for(lambda: len(machine.calls()) == 2)
    (machine.bin / "slow").unlink()
    (end,) = second.communicate(timeout=20)[0].splitlines()
    assert os.listdir(end) == ["IntraNode.hsaco"]
    wait_for(lambda: [p.name for p in machine.cache.iterdir() if p.name.startswith(".")] == [])
    first.stdout.close()


def test_given_kernels(machine, monkeypatch):
    (folder,) = machine.obtain(BF16)
    monkeypatch.setenv("JAX_MORIEP_MORI_KERNELS", str(machine.cache))
    monkeypatch.setenv("JAX_MORIEP_ROCM_PATH", "/nowhere")
    assert machine.obtain(BF16) == [folder]
    with pytest.raises(
        LibraryError, match=re.escape("must hold one folder IntraNode-f32-gfx942-1.2.4-*, and")
    ):
        machine.obtain(Unit("IntraNode", "float32"))
    with pytest.raises(LibraryError, match="IntraNode-bf16-gfx950-1.2.4-"):
        machine.obtain(BF16, arch="gfx950")
    (folder / "IntraNode.hsaco").write_bytes(b"")
    with pytest.raises(LibraryError, match="must hold good kernels, but .* is no ELF file; copy the folder"):
        machine.obtain(BF16)


def make_program(path, version="Debian clang version 19.1.7"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
    return path


def test_which_compiler(tmp_path, monkeypatch):
    compiler._version.cache_clear()
    rocm, path = tmp_path / "rocm", tmp_path / "path"
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setenv("JAX_MORIEP_ROCM_PATH", str(rocm))
    with pytest.raises(LibraryError, match=f"no HIP compiler was found in {rocm}, nor a clang") as caught:
        compiler.find()
    assert "JAX_MORIEP_ROCM_PATH" in str(caught.value)
    make_program(path / "clang++-18", "clang version 18.1.0")
    make_program(path / "clang++", "clang version 18.1.0")
    (rocm / "include" / "hip").mkdir(parents=True)
    with pytest.raises(LibraryError):
        compiler.find()
    make_program(path / "clang++-19")
    assert compiler.find().program == str(path / "clang++-19")
    assert compiler.find().version == "Debian clang version 19.1.7"
    make_program(path / "clang++-21")
    assert compiler.find().program == str(path / "clang++-21")
    assert compiler.find().options == (f"--rocm-path={rocm}",)
    make_program(rocm / "llvm" / "bin" / "clang++")
    assert compiler.find().program == str(rocm / "llvm" / "bin" / "clang++")
    make_program(rocm / "bin" / "hipcc")
    assert compiler.find().program == str(rocm / "bin" / "hipcc")
    monkeypatch.delenv("JAX_MORIEP_ROCM_PATH")
    monkeypatch.setenv("ROCM_PATH", str(rocm))
    assert compiler.find().program == str(rocm / "bin" / "hipcc")


def test_every_kernel_of_the_source_is_listed():
    """kernels.hip and KERNELS name the same kernels."""
    text = kernels.SOURCE.read_text().replace("\\\n", " ")
    bodies = dict(re.findall(r"#define (\w+)\(name, type\)(.*)", text))

    def names(body):
        for macro, first, second in re.findall(r"(\w+)\((\w+), (\w+)(?:##\w+)?[,)]", body):
            if macro.startswith("WRAP"):
                yield first
            else:
                assert (first, second) == ("name", "type")
                yield from names(bodies[macro])

    for kernel, listed in kernels.KERNELS.items():
        # The relay is ours, and of no type of rows.
        moris = {name.split("_{}")[0] for name in listed if "{}" in name}
        assert {*names(bodies[f"KERNELS_OF_{kernel}"])} == moris
