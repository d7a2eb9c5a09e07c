"""The package as a user gets it: built as a wheel, installed into an empty environment, and run there."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

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
    for name in ("JAX_MORIEP_LIB_DIR", "XLA_FLAGS"):
        environment.pop(name, None)
    done = subprocess.run(
        [str(word) for word in command], env=environment | variables, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel with this environment's tools, which are pinned, instead of fetching others."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


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
    # A GPU's library is there if this machine has a compiler for it.
    others -= {f"jax_moriep/lib/libmoriep_{name}.so" for name in ("cuda", "rocm")}
    libraries = {f"jax_moriep/lib/libmoriep_{name}.so" for name in ("cpu", "interop")}
    assert others == {"jax_moriep/py.typed", "jax_moriep/experts/triton/tuning.json"} | libraries
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_libraries_export_handlers_and_little_else(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        libraries = [archive.extract(name, tmp_path) for name in names]
    for library in libraries:
        symbols = run("nm", "--dynamic", "--defined-only", library).split("\n")
        # Weak symbols are inline functions of the standard library, shared by every library of a process.
        strong = {line.split()[-1] for line in symbols if line and line.split()[1] == "T"}
        assert strong
        assert {name for name in strong if not name.startswith(("Moriep", "moriep_"))} == set()


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
