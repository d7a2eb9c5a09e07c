"""The package as a user gets it: built as a wheel, installed into an empty environment, and run there.

The wheel is built as a release's is: in an environment of its own, with NVIDIA's compiler from PyPI, on a
machine whose CMake is Debian 12's and whose nvcc does not work.
"""

import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from jax_moriep.runtime import compat
from tests.conftest import UNOPTIMISED

ROOT = Path(__file__).parents[2]
# The first test waits for the wheel: a minute of two idle cores, and 275 MB of downloads where pip's cache is
# empty, 104 MB of them CUDA's compiler.
pytestmark = pytest.mark.timeout(1200)

# What scikit-build-core asks of a CMake on the PATH before it takes it.
OLD_CMAKE = """#!/bin/sh
echo '{"version": {"string": "3.25.1", "major": 3, "minor": 25, "patch": 1, "suffix": "", "isDirty": false}}'
test "$1 $2" = "-E capabilities"
"""

EP_MOE = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_moriep as jm
from jax_moriep.runtime import library

environment = Path(sys.prefix)
assert environment in Path(jm.__file__).parents, jm.__file__
assert environment in library.find("cpu").parents, library.find("cpu")

mesh = jax.make_mesh((4,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.random.normal(jax.random.key(1), (32, 16))
results = {}
for transport in ("native", "reference"):
    cfg = jm.MoEConfig(num_experts=8, top_k=2, hidden_size=16, intermediate_size=32, transport=transport)
    params = jm.init_params(jax.random.key(0), cfg, dtype=jnp.float32)

    @jax.jit
    def loss(x, params):
        y, stats = jm.ep_moe(x, params, cfg, mesh=mesh)
        return jnp.sum(y**2) + stats.load_balance_loss, (y, stats.expert_counts)

    (_, aux), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, params)
    results[transport] = jax.tree.leaves(jax.device_get((aux, grads)))
assert int(results["native"][1].sum()) == 32 * 2
for native, reference in zip(*results.values(), strict=True):
    assert np.abs(reference).max() > 0
    np.testing.assert_allclose(native, reference, rtol=1e-5, atol=1e-5)
print("same")
"""

DLPACK_CALL = """
import jax
import numpy as np

import jax_moriep as jm


def triple(x, y):
    np.multiply(np.asarray(x), 3, out=np.asarray(y))


x = np.array([1, 2], np.float32)
print(jax.jit(jm.interop.dlpack_call(triple, jax.ShapeDtypeStruct((2,), x.dtype)))(x))
"""


def run(*command, **variables):
    """Runs a command as a user would whose shell knows nothing of this checkout; returns its stdout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for name in ("CMAKE_ARGS", "JAX_MORIEP_LIB_DIR", "XLA_FLAGS"):
        environment.pop(name, None)
    done = subprocess.run(
        [str(word) for word in command], env=environment | variables, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("build")


@pytest.fixture(scope="module")
def wheel(build_folder, tmp_path_factory):
    """Builds the wheel in an environment that pip sets up, with the versions that constraints.txt pins."""
    folder, programs = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("programs")
    for name, text in (("cmake", OLD_CMAKE), ("nvcc", "#!/bin/sh\nexit 1\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    # The first name is for pip before 25.3, the second for later ones.
    pins = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), str(ROOT / "constraints.txt"))
    options = ["-C", "cuda.toolkit=pypi", "-C", f"build-dir={build_folder}"]
    path = f"{programs}:{os.environ['PATH']}"
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", *options, "-w", folder, ROOT, PATH=path, **pins)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def libraries(wheel, tmp_path_factory):
    """The path of each backend's library in the wheel."""
    folder = tmp_path_factory.mktemp("libraries")
    with zipfile.ZipFile(wheel) as archive:
        paths = [Path(archive.extract(n, folder)) for n in archive.namelist() if n.endswith(".so")]
    return {path.stem.removeprefix("libmoriep_"): path for path in paths}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel; returns its folder.

    The dependencies come from this environment. A folder named in a .pth file is searched, but the .pth files
    in it are not read: this environment's editable install of the checkout stays out.
    """
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')")
    Path(purelib, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_one_wheel_serves_every_python(wheel):
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, version) == ("jax_moriep", "0.1.0")
    assert (python, abi) == ("py3", "none")
    assert platform.startswith("linux_")


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "jax_moriep").rglob("*.py")}
    assert modules <= names
    others = {name for name in names - modules if ".dist-info/" not in name}
    # AMD's libraries are there if this machine has what they are built with, else the reasons why not.
    others -= {
        f"jax_moriep/lib/libmoriep_{name}.{kind}" for name in ("rocm", "mori") for kind in ("so", "txt")
    }
    libraries = {f"jax_moriep/lib/libmoriep_{name}.so" for name in ("cpu", "interop", "cuda")}
    data = {f"jax_moriep/{name}" for name in ("py.typed", "mori/kernels.hip", "mori/relay.h")}
    tables = {str(path.relative_to(ROOT)) for path in (ROOT / "jax_moriep").rglob("triton/devices/*.json")}
    assert tables
    data |= tables
    assert others == data | libraries
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def exports(library):
    """The functions of a library that are not weak: those are inline ones of the standard library."""
    symbols = run("nm", "--dynamic", "--defined-only", library).split("\n")
    return {line.split()[-1] for line in symbols if line and line.split()[1] == "T"}


def test_the_libraries_export_handlers_and_little_else(libraries):
    for library in libraries.values():
        strong = exports(library)
        assert strong
        assert {name for name in strong if not name.startswith(("Moriep", "moriep_"))} == set()


def test_the_cuda_library_is_made_with_the_compiler_from_pypi(libraries, build_folder):
    """And with nothing of a CUDA that this machine may have."""
    commands = json.loads((build_folder / "compile_commands.json").read_text())
    kernels = [entry["command"] for entry in commands if entry["file"].endswith("csrc/gpu/pull.cc")]
    assert "/nvidia/cu13/bin/nvcc " in kernels[0]
    caches = (build_folder / "CMakeCache.txt").read_text() + (build_folder / "build.ninja").read_text()
    assert "/nvidia/cu13/lib/libcudart_static.a" in caches
    assert not re.search(r"/usr/local/cuda|/opt/cuda", caches)


def test_the_cuda_library_has_the_handlers_and_loads_where_there_is_no_gpu(libraries):
    """CUDA's runtime is linked in: a machine without CUDA must be able to load and ask it."""
    assert exports(libraries["cuda"]) >= {"MoriepDispatch", "MoriepCombine", "MoriepReplay"}
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "--dynamic", libraries["cuda"]))
    assert needed
    assert not [name for name in needed if "cuda" in name or "nv" in name]
    built = ctypes.CDLL(str(libraries["cuda"])).moriep_ffi_api_version()
    assert divmod(built, 1000) <= compat.ffi_api_version()


def device_code(library):
    """The (kind, compute capability) of each piece of device code in a library.

    Kind 1 is PTX, 2 machine code. They are the entries of nvcc's fat binaries, each with a header of its own.
    """
    data, found, at = library.read_bytes(), [], 0
    while (at := data.find(struct.pack("<IH", 0xBA55ED50, 1), at)) >= 0:
        header, size = struct.unpack_from("<HQ", data, at + 6)
        entry, at = at + header, at + header + size
        while entry < at:
            kind, header, size, capability = struct.unpack_from("<H2xIQ12xI", data, entry)
            found.append((kind, capability))
            entry += header + size
    return found


def test_the_cuda_library_has_code_for_hopper_and_for_newer_devices(libraries):
    sources = [path for path in (ROOT / "csrc/gpu").glob("*.cc") if "__global__" in path.read_text()]
    found = device_code(libraries["cuda"])
    assert set(found) == {(1, 90), (2, 90)}
    assert min(found.count((1, 90)), found.count((2, 90))) >= len(sources)


def test_ep_moe_runs_from_the_wheel(installed, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(EP_MOE)
    flags = "--xla_force_host_platform_device_count=4"
    assert run(installed / "bin" / "python", script, JAX_PLATFORMS="cpu", XLA_FLAGS=flags) == "same\n"


def test_dlpack_call_runs_from_the_wheel(installed, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DLPACK_CALL)
    assert run(installed / "bin" / "python", script, JAX_PLATFORMS="cpu") == "[3. 6.]\n"


def test_the_command_runs_from_the_wheel(installed):
    found = json.loads(run(installed / "bin" / "jax-moriep", "doctor", "--json", JAX_PLATFORMS="cpu"))
    assert found["libraries"]["cpu"]["path"].startswith(str(installed))
    assert found["chosen"]["cpu"]["transport"] == "native"
    assert found["libraries"]["cuda"]["reason"] is None


# The newcomer's way, by the README alone: its code and its commands, the training with fewer steps.


def test_the_ten_lines_of_the_readme(installed):
    code = found_in_readme(r"```python\n(.*?)```")[0]
    shown = of_four_devices(
        installed, "python", "-c", code + "\nprint([w.shape for w in jax.tree.leaves(grads)])"
    )
    assert shown.strip() == "[(64, 16), (16, 256, 64), (16, 64, 128)]"


def test_a_checkpoint_comes_in_as_the_readme_says(installed, tmp_path):
    layers, experts, hidden, inner = 2, 6, 16, 24
    rng, tensors, block = np.random.default_rng(0), {}, "model.layers.{}.block_sparse_moe."
    for layer in range(layers):
        names = {"gate.weight": (experts, hidden)}
        for e in range(experts):
            names |= {f"experts.{e}.{w}.weight": (inner, hidden) for w in ("w1", "w3")}
            names |= {f"experts.{e}.w2.weight": (hidden, inner)}
        for name, shape in names.items():
            tensors[block.format(layer) + name] = rng.normal(size=shape, scale=0.3).astype(np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": 2}
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "silu"}))

    lines = found_in_readme(r"^ {4}((?:cfg|params) = jm\.(?:MoEConfig\.from_hf|weights\.load)\(.*)$")
    assert len(lines) == 2
    code = ["import jax, jax_moriep as jm, numpy as np", f"folder = {str(tmp_path)!r}"]
    code += ["mesh = jax.make_mesh((4,), ('ep',), axis_types=(jax.sharding.AxisType.Auto,))", *lines]
    code += ["x = jax.random.normal(jax.random.key(0), (8, cfg.hidden_size))"]
    code += ["y, _ = jax.lax.scan(lambda x, p: jm.ep_moe(x, p, cfg, mesh=mesh), x, params)"]
    code += [f"np.savez({str(tmp_path / 'out.npz')!r}, x=x, y=y)"]
    of_four_devices(installed, "python", "-c", "\n".join(code))

    with np.load(tmp_path / "out.npz") as out:
        x, y = out["x"].astype(np.float64), out["y"]
    for layer in range(layers):
        w = {name: np.float64(tensors[block.format(layer) + name]) for name in names}
        logits = x @ w["gate.weight"].T
        added = np.zeros_like(x)
        for t, chosen in enumerate(np.argsort(-logits, axis=1)[:, :2]):
            share = np.exp(logits[t, chosen] - logits[t, chosen].max())
            for e, weight in zip(chosen, share / share.sum(), strict=True):
                gate, up = w[f"experts.{e}.w1.weight"] @ x[t], w[f"experts.{e}.w3.weight"] @ x[t]
                added[t] += weight * (w[f"experts.{e}.w2.weight"] @ (gate / (1 + np.exp(-gate)) * up))
        x = added
    np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-3 * np.abs(x).max())


def test_a_training_goes_on_at_another_expert_parallel_size(installed, tmp_path):
    """Four ranks store twelve experts, two ten; what is lost between them would change the losses."""
    commands = found_in_readme(r"^ {4}jax-moriep (launch -n \d examples/train\.py) --steps \d+ --folder run$")
    assert commands == ["launch -n 4 examples/train.py", "launch -n 2 examples/train.py"]
    options = ["--steps", "4", "--save-every", "2", "--folder", tmp_path]

    def losses(command):
        launched, script = command.rsplit(" ", 1)
        program = [installed / "bin" / "jax-moriep", *launched.split(), ROOT / script, *options]
        shown = run(*program, JAX_PLATFORMS="cpu", XLA_FLAGS=UNOPTIMISED)
        return shown, [(int(s), float(v)) for s, v in re.findall(r"step (\d): loss (\S+)", shown)]

    _, unbroken = losses(commands[0])
    shutil.rmtree(tmp_path / "4")
    shown, resumed = losses(commands[1])
    assert "going on after step 2 on 2 ranks" in shown
    assert [step for step, _ in unbroken + resumed] == [1, 2, 3, 4, 3, 4]
    assert unbroken[3][1] < unbroken[0][1] - 0.2
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in unbroken[2:]], abs=2e-4)


def found_in_readme(pattern):
    return re.findall(
        pattern, (ROOT / "README.md").read_text(), re.DOTALL if "```" in pattern else re.MULTILINE
    )


def of_four_devices(installed, program, *arguments):
    flags = "--xla_force_host_platform_device_count=4"
    return run(installed / "bin" / program, *arguments, JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
