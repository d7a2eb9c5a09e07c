"""MORIEP_BUILD_CUDA and MORIEP_BUILD_ROCM: a compiler that cannot be used costs its own library and no other.

The compilers here are scripts that CMake finds and cannot use. Nothing is compiled for a GPU.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jax_moriep.errors import LibraryError
from jax_moriep.runtime import library

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent
# Who reads the one line must not have to look up how to go on.
CURES = {"cuda": "-C cuda.toolkit=pypi", "rocm": "ROCM_PATH"}
COMPILER_VARIABLES = {"cuda": "CUDACXX", "rocm": "HIPCXX"}


def configure(build, *defines, **variables):
    """Configures the checkout with this environment's CMake; no GPU's compiler is there unless given."""
    absent = {name: str(build / "no-such-compiler") for name in COMPILER_VARIABLES.values()}
    tools = [f"CMAKE_MAKE_PROGRAM={TOOLS / 'ninja'}", f"Python_EXECUTABLE={sys.executable}"]
    command = [TOOLS / "cmake", "-S", ROOT, "-B", build, "-G", "Ninja"]
    command += [f"-D{define}" for define in [*tools, *defines]]
    return subprocess.run(
        [str(word) for word in command],
        env=os.environ | absent | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


def targets(build):
    return set(
        re.findall(r"^build \S*libmoriep_(\w+)\.so", (build / "build.ninja").read_text(), re.MULTILINE)
    )


@pytest.fixture
def broken(tmp_path):
    """A compiler that says what is wrong with it."""
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\necho 'nvcc fatal   : this is [no]; compiler' >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


def test_auto_leaves_out_what_cannot_be_compiled_and_says_why_in_one_line(broken, tmp_path):
    build = tmp_path / "build"
    done = configure(build, CUDACXX=broken)
    assert done.returncode == 0, done.stdout
    assert targets(build) == {"cpu", "interop"}
    for backend, cure in CURES.items():
        (line,) = re.findall(rf"^.*libmoriep_{backend}\.so.*$", done.stdout, re.MULTILINE)
        assert line.startswith(f"libmoriep_{backend}.so is not built: ")
        assert cure in line
        assert f"MORIEP_BUILD_{backend.upper()}=OFF" in line
    assert "is not built: nvcc fatal : this is [no]; compiler; " in done.stdout
    assert f"{build / 'no-such-compiler'}; set ROCM_PATH" in done.stdout


def test_the_missing_library_is_explained_at_run_time(broken, tmp_path, monkeypatch):
    """pip hides what a build prints, so what is missing must be explained where it is missed."""
    build = tmp_path / "build"
    assert configure(build, "MORIEP_BUILD_ROCM=OFF", CUDACXX=broken).returncode == 0
    monkeypatch.setenv("JAX_MORIEP_LIB_DIR", str(build / "csrc"))
    with pytest.raises(
        LibraryError, match=r"libmoriep_cuda.so \(not built: nvcc fatal : .*\); .*toolkit=pypi"
    ):
        library.find("cuda")
    with pytest.raises(LibraryError, match=r"libmoriep_rocm.so \(not built: .*MORIEP_BUILD_ROCM=OFF\); "):
        library.find("rocm")


def test_a_compiler_that_was_mended_is_used_again(broken, tmp_path):
    """What a first configuration found must not stay in a cache: the reason changes with the compiler."""
    build = tmp_path / "build"
    configure(build, "MORIEP_BUILD_LIBRARY=OFF", CUDACXX=broken)
    Path(broken).write_text("#!/bin/sh\necho 'nvcc fatal   : another reason' >&2\nexit 1\n")
    done = configure(build, "MORIEP_BUILD_LIBRARY=OFF", CUDACXX=broken)
    assert done.returncode == 0
    assert "libmoriep_cuda.so is not built: nvcc fatal : another reason; " in done.stdout


def test_the_trial_is_made_with_the_flags_and_the_compiler_of_the_build(broken, tmp_path):
    Path(broken).write_text(
        "#!/bin/sh\ncase \"$*\" in *'--one --two'*) echo 'nvcc fatal : told' >&2;; esac\nexit 1\n"
    )
    defines = [f"CMAKE_CUDA_COMPILER={broken}", "CMAKE_CUDA_FLAGS=--one --two", "MORIEP_BUILD_LIBRARY=OFF"]
    done = configure(tmp_path / "build", *defines)
    assert done.returncode == 0
    assert "libmoriep_cuda.so is not built: nvcc fatal : told; " in done.stdout


@pytest.mark.parametrize("backend", CURES)
def test_on_fails_with_the_reason(backend, broken, tmp_path):
    switch = f"MORIEP_BUILD_{backend.upper()}"
    done = configure(
        tmp_path / "build",
        "MORIEP_BUILD_LIBRARY=OFF",
        f"{switch}=ON",
        **{COMPILER_VARIABLES[backend]: broken},
    )
    assert done.returncode != 0
    text = " ".join(done.stdout.split())
    assert re.search(rf"{switch}=ON must find a (CUDA|HIP) compiler that works: .*{CURES[backend]}", text), (
        text
    )
    if backend == "cuda":
        assert "nvcc fatal : this is [no]; compiler" in text


def test_pypi_without_its_packages_says_how_to_get_them(tmp_path):
    done = configure(tmp_path / "build", "MORIEP_BUILD_LIBRARY=OFF", "MORIEP_BUILD_CUDA=PYPI")
    assert done.returncode != 0
    text = " ".join(done.stdout.split())
    assert "lack nvidia/cu13/bin/nvcc; build with `pip install . -C cuda.toolkit=pypi`" in text


@pytest.mark.parametrize(("switch", "values"), [("CUDA", "AUTO, ON, OFF, PYPI"), ("ROCM", "AUTO, ON, OFF")])
def test_another_value_is_refused(switch, values, tmp_path):
    done = configure(tmp_path / "build", f"MORIEP_BUILD_{switch}=pipi")
    assert done.returncode != 0
    assert f"MORIEP_BUILD_{switch}=pipi must be one of {values}; pick one of" in " ".join(done.stdout.split())


def test_pip_and_cmake_ask_for_the_same_cmake():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    for path in (ROOT / "CMakeLists.txt", ROOT / "cmake/probe/CMakeLists.txt"):
        (version,) = re.findall(r"cmake_minimum_required\(VERSION ([0-9.]+)\)", path.read_text())
        assert settings["cmake"]["version"] == f">={version}"


def test_the_compiler_from_pypi_is_the_pinned_one():
    """Releases and CI build with the same compiler as users."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    (override,) = settings["overrides"]
    pins = set((ROOT / "constraints.txt").read_text().split("\n"))
    assert len(override["build"]["requires"]) == 5
    assert set(override["build"]["requires"]) <= pins
