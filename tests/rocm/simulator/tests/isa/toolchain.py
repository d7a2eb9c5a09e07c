"""The assembler, the compiler and the simulator, each a program; tests skip where one is missing."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[5]
BUILD = Path(os.environ.get("GFX942_SIM_BUILD", ROOT / "build" / "rocm-sim"))
TARGET = ["-target", "amdgcn-amd-amdhsa", "-mcpu=gfx942"]


def need(*programs):
    """Skips the test unless the programs are installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; run tests/rocm/simulator/tools/setup")


PROGRAM = BUILD / "tests" / "isa" / "gfx942_batch"


def simulator():
    """The path of `gfx942_batch`; skips the test where it is not built."""
    if not PROGRAM.exists():
        pytest.skip(f"not built: {PROGRAM}; configure and build tests/rocm/simulator in {BUILD}")
    return PROGRAM


def _checked(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr[:6000]}"
    return done.stdout


def assemble(source, path):
    """Assembly text -> the path of a loadable code object beside `path`."""
    need("clang-19", "ld.lld-19")
    text = path.with_suffix(".s")
    text.write_text(source)
    unlinked = path.with_suffix(".o")
    _checked(["clang-19", "-x", "assembler", *TARGET, "-c", text, "-o", unlinked])
    _checked(["ld.lld-19", "-shared", unlinked, "-o", path])
    return path


def compile_cpp(flags, source, path, *libraries):
    """One C++ or HIP file -> `path`."""
    _checked(["clang++-19", *flags, source, "-o", path, *libraries])


def disassembly(path):
    """The text that llvm-objdump prints for a code object."""
    need("llvm-objdump-19")
    return _checked(["llvm-objdump-19", "-d", "--mcpu=gfx942", path])


def mnemonics(path):
    """The instructions that a code object holds, without the suffix of their encoding."""
    names = re.findall(r"^\t([a-z]\w+)", disassembly(path), re.MULTILINE)
    return {base_name(name) for name in names}


def base_name(mnemonic):
    """`v_add_f32_e64_dpp` -> `v_add_f32`: an instruction's name, whatever its encoding."""
    return re.sub(r"(_e32|_e64|_sdwa|_dpp)+$", "", mnemonic)
