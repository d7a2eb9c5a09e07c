"""The direction of dependence, kept: in Python by the import statements, in C++ by the includes."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jax_moriep"
MAX_LINES = 420  # about 400: a line more is no reason to split a module

# Each module may import modules of its own layer and of the layers below it, never of one above. Modules of
# the package that are not named here are at its top: nothing in the layers may import them.
LAYERS = [
    ["errors", "version"],
    ["tuning_options", "hf_config"],
    ["config"],
    ["plan", "quant", "operands"],
    ["schemes"],
    ["runtime"],
    ["mori", "aiter"],
    ["transports"],
    ["exchange", "experts", "routing"],
    ["balance"],
    ["fused"],
    ["layout"],
    ["resize", "padding", "params", "stats", "weights", "explain"],
    ["layer"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# The rooms at the top, and which of them each may import; nothing else of the package imports one.
ROOMS = {
    "processes": set(),
    "doctor": set(),
    "demo": {"processes", "bench"},
    "bench": {"processes", "demo"},
    "cli": {"processes", "doctor", "demo", "bench"},
    "__main__": {"cli"},
}
# All that `processes` needs of the package.
BELOW_PROCESSES = ("runtime", "config", "errors")
# All that the demo needs of bench: how pictures are drawn, and which machine it was.
BENCH_FOR_DEMO = ("bench.show.figures", "bench.measure.machine")
# The rooms of ``experts/pallas``: what Triton's and Mosaic's kernels share knows neither of them, and neither
# knows the other. Only these modules, which choose between them, know both.
PALLAS = "jax_moriep.experts.pallas"
CHOOSES = ["__init__.py", "choice.py", "mlp.py"]

CPP_MAY_INCLUDE = {
    "include": [r"moriep/"],
    "aiter": [r"moriep/", r"gpu/", r"[a-z0-9_]+\.h$"],
    "cpu": [r"moriep/", r"[a-z_]+\.h$"],
    "gpu": [r"moriep/", r"[a-z0-9_]+\.h$"],
    "interop": [r"[a-z_]+\.h$"],
    "tests": [r"moriep/", r"(\.\./)?cpu/", r"gpu/", r"interop/", r"(\.\./)?[a-z_]+\.h$"],
}


def python_modules():
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    """The part of the package that a module belongs to: ``runtime/group.py`` -> ``runtime``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path):
    """What a module imports of the package anywhere in its text, without the package's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "jax_moriep":
                yield rest, node.lineno


def imported_parts(path):
    """The parts of the package that a module imports."""
    for name, line in imported_names(path):
        yield name.split(".")[0], line


@pytest.mark.parametrize("path", python_modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_depends_one_way(path):
    level = LEVEL.get(name_of(path))
    if level is None:
        return
    for part, line in imported_parts(path):
        where = f"{path.relative_to(ROOT)}:{line} imports jax_moriep.{part}"
        assert part in LEVEL, f"{where}, which is at the top of the package"
        assert LEVEL[part] <= level, f"{where}, which is a layer above"


def imported_modules(path):
    """The full names of the modules, or of names in them, that a module imports anywhere in its text."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name):
    """The room of a module of ``experts/pallas``: "triton", "hopper", or "" for what both share."""
    first = name.removeprefix(f"{PALLAS}.").split(".")[0]
    return first if first in ("triton", "hopper") else ""


def test_the_rooms_of_pallas_depend_one_way():
    folder = PACKAGE / "experts" / "pallas"
    rooms_seen = set()
    for path in sorted(folder.rglob("*.py")):
        own = room_of(f"{PALLAS}." + ".".join(path.relative_to(folder).with_suffix("").parts))
        rooms_seen.add(own)
        for name in imported_modules(path):
            if not name.startswith(PALLAS) or str(path.relative_to(folder)) in CHOOSES:
                continue
            assert room_of(name) in (own, ""), f"{path.relative_to(ROOT)} imports {name}"
            # What is shared does not know who chooses, and neither does what is chosen.
            assert not name.startswith((f"{PALLAS}.choice", f"{PALLAS}.mlp")), f"{path} imports {name}"
    assert rooms_seen == {"", "triton", "hopper"}


def test_the_experts_know_pallas_by_its_front_door():
    """The other modules of ``experts`` import the package and nothing in it; it knows none of the others."""
    others = {"aiter", "blocked", "reference"}
    for path in sorted((PACKAGE / "experts").rglob("*.py")):
        inside = "pallas" in path.relative_to(PACKAGE / "experts").parts
        for name in imported_modules(path):
            if inside:
                assert name.removeprefix("jax_moriep.experts.").split(".")[0] not in others, (path, name)
            else:
                assert not name.startswith(f"{PALLAS}."), (path, name)


def test_interop_stands_alone():
    """It needs little of the package, and nothing needs it, but for the package's list of names."""
    for path in python_modules():
        for part, line in imported_parts(path):
            where = f"{path.relative_to(ROOT)}:{line} imports jax_moriep.{part}"
            if name_of(path) == "interop":
                assert part in ("interop", "runtime", "config", "errors"), where
            elif path != PACKAGE / "__init__.py":
                assert part != "interop", where


@pytest.mark.parametrize("path", python_modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_depend_one_way(path):
    room = name_of(path)
    for name, line in imported_names(path):
        part = name.split(".")[0]
        where = f"{path.relative_to(ROOT)}:{line} imports jax_moriep.{name}"
        assert part == room or part not in ROOMS or part in ROOMS.get(room, ()), where
        if room == "processes":
            assert part == room or part in BELOW_PROCESSES, where
        if (room, part) == ("demo", "bench"):
            assert f"{name}.".startswith(tuple(f"{module}." for module in BENCH_FOR_DEMO)), where


@pytest.mark.parametrize("room", ["processes", "doctor", "demo", "cli"])
def test_no_circle_of_files_in_a_room(room):
    files = [path for path in python_modules() if name_of(path) == room]
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}
    graph = {}
    for module, path in modules.items():
        # `from a.b import c` is of the module a.b, if a.b.c is none.
        names = [name for name, _ in imported_names(path)]
        graph[module] = {n if n in modules else n.rpartition(".")[0] for n in names} & modules.keys()
    graphlib.TopologicalSorter(graph).prepare()


def test_every_room_exists():
    assert set(ROOMS) <= {name_of(path) for path in python_modules()}


def test_every_layer_exists():
    parts = {name_of(path) for path in python_modules()}
    assert set(LEVEL) <= parts


@pytest.mark.parametrize("path", python_modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_modules_are_readable_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_only_compat_reaches_into_jax():
    for path in python_modules():
        if path.relative_to(PACKAGE) != Path("runtime/compat.py"):
            assert not re.search(r"^\s*(from|import) jax\._src", path.read_text(), re.MULTILINE), path


def test_only_targets_emits_custom_calls():
    users = {path for path in python_modules() if "ffi_call(" in path.read_text()}
    assert users == {PACKAGE / "runtime" / "targets.py"}


def cpp_files(folder):
    files = [p for p in sorted((ROOT / "csrc" / folder).rglob("*")) if p.suffix in (".h", ".cc")]
    assert files
    return files


@pytest.mark.parametrize("folder", CPP_MAY_INCLUDE)
def test_cpp_depends_one_way(folder):
    for path in cpp_files(folder):
        for include in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            allowed = any(re.match(pattern, include) for pattern in CPP_MAY_INCLUDE[folder])
            assert allowed, f"{path.relative_to(ROOT)} includes {include}"


@pytest.mark.parametrize("folder", CPP_MAY_INCLUDE)
def test_cpp_below_the_handlers_knows_no_xla(folder):
    for path in cpp_files(folder):
        assert not re.search(r'#\s*include\s+[<"]xla/', path.read_text()), path


@pytest.mark.parametrize("folder", ["include", "aiter", "cpu", "gpu", "ffi", "interop"])
def test_cpp_files_are_readable_in_one_sitting(folder):
    for path in cpp_files(folder):
        assert len(path.read_text().splitlines()) <= MAX_LINES, path
