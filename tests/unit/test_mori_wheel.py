"""Finding amd-mori: in a folder that is named, installed, of another version, incomplete, twice HIP."""

import re
import subprocess
import sys

import pytest

from jax_moriep.errors import LibraryError
from jax_moriep.mori import wheel


def make_wheel(root, version="1.2.4"):
    """A folder that looks like an unpacked wheel."""
    folder = root / "mori"
    (folder / "_jit-sources" / "src" / "ops" / "kernels").mkdir(parents=True)
    (folder / "_jit-sources" / "include").mkdir()
    (folder / "_jit-sources" / "include" / "a.hpp").write_text("// a\n")
    (folder / "ops" / "tuning_configs").mkdir(parents=True)
    for name in ("application", "shmem", "cco", "ops"):
        (folder / f"libmori_{name}.so").write_bytes(b"")
    (folder / "__init__.py").write_text("raise SystemExit('mori was imported')\n")
    info = root / f"amd_mori-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: amd_mori\nVersion: {version}\n")
    return folder


def test_a_named_folder(tmp_path, monkeypatch):
    folder = make_wheel(tmp_path)
    for named in (folder, tmp_path):
        monkeypatch.setenv("JAX_MORIEP_MORI_DIR", str(named))
        found = wheel.find()
        assert (found.folder, found.version) == (folder, "1.2.4")
    assert found.sources == folder / "_jit-sources"
    assert found.library("ops") == folder / "libmori_ops.so"
    assert found.tables == folder / "ops" / "tuning_configs"
    assert found.sources / "include" in found.include_folders
    assert wheel.unavailable_reason() is None


def test_an_installed_wheel_is_found_and_not_imported(tmp_path):
    make_wheel(tmp_path)
    program = (
        "import sys; from jax_moriep.mori import wheel; print(wheel.find()); assert 'mori' not in sys.modules"
    )
    environment = {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "mori") in done.stdout


def test_no_wheel(monkeypatch):
    monkeypatch.delenv("JAX_MORIEP_MORI_DIR", raising=False)
    with pytest.raises(LibraryError, match=re.escape("pip install amd-mori==1.2.4")):
        wheel.find()
    assert "not installed" in wheel.unavailable_reason()


def test_a_folder_without_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_MORIEP_MORI_DIR", str(tmp_path))
    with pytest.raises(LibraryError, match=r"JAX_MORIEP_MORI_DIR='.*' must hold the folder _jit-sources; "):
        wheel.find()


@pytest.mark.parametrize("version", ["1.2.5", "1.2.40", "1.2.4.dev3"])
def test_another_version(tmp_path, monkeypatch, version):
    monkeypatch.setenv("JAX_MORIEP_MORI_DIR", str(make_wheel(tmp_path, version)))
    with pytest.raises(LibraryError, match=re.escape(f"amd-mori {version} at ")) as caught:
        wheel.find()
    assert "must be version 1.2.4" in str(caught.value)
    assert "pip install amd-mori==1.2.4" in str(caught.value)


def test_the_version_without_metadata(tmp_path, monkeypatch):
    folder = make_wheel(tmp_path)
    (tmp_path / "amd_mori-1.2.4.dist-info" / "METADATA").unlink()
    monkeypatch.setenv("JAX_MORIEP_MORI_DIR", str(folder))
    with pytest.raises(LibraryError, match="of unknown version"):
        wheel.find()
    (folder / "_version.py").write_text("__version__ = '1.2.4'\n")
    assert wheel.find().version == "1.2.4"


@pytest.mark.parametrize("part", ["libmori_cco.so", "_jit-sources/src/ops/kernels"])
def test_an_incomplete_wheel(tmp_path, monkeypatch, part):
    folder = make_wheel(tmp_path)
    path = folder / part
    path.rmdir() if path.is_dir() else path.unlink()
    monkeypatch.setenv("JAX_MORIEP_MORI_DIR", str(folder))
    with pytest.raises(LibraryError, match=re.escape(f"must hold {part}; ")):
        wheel.find()


def test_the_digest_sees_names_and_contents(tmp_path):
    digests = set()
    for number, (name, text) in enumerate([("a", "1"), ("a", "2"), ("b", "1")]):
        folder = make_wheel(tmp_path / str(number))
        (folder / "_jit-sources" / name).write_text(text)
        digests.add(wheel.Wheel(folder, "1.2.4").sources_digest())
    assert len(digests) == 3
    same = make_wheel(tmp_path / "same")
    (same / "_jit-sources" / "a").write_text("1")
    assert wheel.Wheel(same, "1.2.4").sources_digest() in digests


MAPS = """\
7f0000000000-7f0000001000 r-xp 00000000 08:01 1 /opt/rocm/lib/libamdhip64.so.7
7f0000001000-7f0000002000 rw-p 00001000 08:01 1 /opt/rocm/lib/libamdhip64.so.7
7f0000003000-7f0000004000 r-xp 00000000 08:01 2 /usr/lib/libc.so.6
"""


def test_one_hip_runtime():
    wheel.check_one_hip_runtime(MAPS)
    assert wheel.hip_runtimes(MAPS) == ["/opt/rocm/lib/libamdhip64.so.7"]


def test_no_hip_runtime():
    with pytest.raises(LibraryError, match=re.escape("jax.devices()")):
        wheel.check_one_hip_runtime(MAPS.replace("amdhip64", "other"))


def test_two_hip_runtimes():
    two = MAPS + "7f0000005000-7f0000006000 r-xp 00000000 08:01 3 /site/_rocm/libamdhip64.so.7.2 (deleted)\n"
    with pytest.raises(LibraryError, match="must have one libamdhip64") as caught:
        wheel.check_one_hip_runtime(two)
    assert "/opt/rocm/lib/libamdhip64.so.7," in str(caught.value)
    assert "/site/_rocm/libamdhip64.so.7.2" in str(caught.value)
