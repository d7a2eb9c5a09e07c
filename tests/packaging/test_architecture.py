"""The direction of dependence, kept: in Python by the import statements, in C++ by the includes."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jax_moriep"
MAX_LINES = 400
# Longer, with the reason.
LONGER = {"csrc/gpu/plan.cc": "the kernels of one sort, which count on each other's order"}

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
    ["router_product"],
    ["exchange", "experts", "routing"],
    ["balance"],
    ["fused"],
    ["layout"],
    ["resize", "padding", "params", "stats", "weights", "explain"],
    ["routing_step", "routing_kernel"],
    ["layer"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# The rooms at the top, and which of them each may import; nothing else of the package imports one.
ROOMS = {
    "processes": set(),
    "doctor": set(),
    "results": set(),
    "demo": {"processes", "results"},
    "bench": {"processes", "results", "demo"},
    "cli": {"processes", "doctor", "results", "demo", "bench"},
    "__main__": {"cli"},
}
# All that `processes` needs of the package.
BELOW_PROCESSES = ("runtime", "config", "errors")
# The bench's rooms: each may import from itself and from those before it.
BENCH_ROOMS = ["problem", "measure", "against", "kinds", "run", "show"]
# The rooms of ``experts/pallas``: what Triton's and Mosaic's kernels share knows neither of them, and neither
# knows the other. Only these modules, which choose between them, know both.
PALLAS = "experts.pallas"
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
        for name, _ in imported_names(path):
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
        for name, _ in imported_names(path):
            if inside:
                assert name.removeprefix("experts.").split(".")[0] not in others, (path, name)
            else:
                assert not name.startswith(f"{PALLAS}."), (path, name)


def module_of(path):
    """The dotted name of a module or package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(text, modules):
    """The modules among ``modules`` that a text imports, at its top, inside functions or for types alone."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # What is imported from a package is a module of its own, or a name of the package.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in names]
        else:
            continue
        yield from (name for name in names if name in modules)


def import_graph(texts):
    """For each module the others that it imports."""
    return {name: set(imported_modules(text, texts)) - {name} for name, text in texts.items()}


def folded(graph, folder):
    """The graph of what lies directly in a folder: its modules, and its folders as one each."""

    def entry(name):
        return name[len(folder) + 1 :].split(".")[0] if name.startswith(f"{folder}.") else None

    entries = {}
    for name, imported in graph.items():
        if entry(name) is not None:
            found = entries.setdefault(entry(name), set())
            found |= {entry(other) for other in imported} - {None, entry(name)}
    return entries


def in_circles(graph):
    """The circles of a graph, and what lies between two; empty if there is none.

    What imports nothing that is left, or is imported by nothing that is left, is taken away until all stays.
    """
    left = {name: set(imported) for name, imported in graph.items()}
    while True:
        imported = set().union(*left.values()) if left else set()
        gone = {name for name in left if not left[name] & set(left) or name not in imported}
        if not gone:
            return set(left)
        left = {name: others - gone for name, others in left.items() if name not in gone}


TEXTS = {module_of(path): path.read_text() for path in python_modules()}


GRAPH = import_graph(TEXTS)


def test_no_circle_of_files():
    assert in_circles(GRAPH) == set()


FOLDERS = sorted({module_of(path.parent / "__init__.py") for path in python_modules()})


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_circle_of_folders(folder):
    assert in_circles(folded(GRAPH, folder)) == set()


def test_circles_are_seen():
    """Also through a function and through a name of a module; a chain is none."""
    texts = {
        "p": "",
        "p.a": "from p import b",
        "p.b": "def f():\n    from p.q.c import name",
        "p.q": "",
        "p.q.c": "import p.q.d",
        "p.q.d": "",
    }
    graph = import_graph(texts)
    assert graph["p.b"] == {"p.q.c"}
    assert in_circles(graph) == set()
    assert in_circles(folded(graph, "p")) == set()
    back = import_graph({**texts, "p.q.d": "if TYPE_CHECKING:\n    from p.a import name"})
    assert in_circles(back) == {"p.a", "p.b", "p.q.c", "p.q.d"}
    assert in_circles(folded(back, "p")) == {"a", "b", "q"}
    assert in_circles(folded(back, "p.q")) == set()


def bench_modules():
    return [path for path in python_modules() if path.is_relative_to(PACKAGE / "bench")]


@pytest.mark.parametrize("path", bench_modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_benchs_rooms_have_one_direction(path):
    room = path.relative_to(PACKAGE / "bench").parts[0]
    if path == PACKAGE / "bench" / "__init__.py":
        assert not list(imported_parts(path))
        return
    assert room in BENCH_ROOMS, f"{path} lies in no room"
    for name in imported_modules(path.read_text(), TEXTS):
        words = name.split(".")
        if words[:2] == ["jax_moriep", "bench"]:
            assert len(words) > 2, f"{path} imports the bench itself"
            assert BENCH_ROOMS.index(words[2]) <= BENCH_ROOMS.index(room), (
                f"{path} imports {name}, which is above"
            )


def test_the_benchs_docstring_names_every_module():
    text = ast.get_docstring(ast.parse((PACKAGE / "bench" / "__init__.py").read_text()))
    rooms = dict(re.findall(r"(?ms)^- ``(\w+)``: (.*?)(?=^- |\Z)", text))
    assert list(rooms) == BENCH_ROOMS
    for path in bench_modules():
        room, name = path.parent.name, path.stem
        if name != "__init__":
            assert f"``{name}``" in rooms[room], f"bench/__init__.py does not name {room}/{name}.py"
    for room, of_room in rooms.items():
        for name in re.findall(r"``(\w+)``", of_room):
            there = (PACKAGE / "bench" / room / f"{name}.py").exists()
            assert there, f"bench/__init__.py names {name}, which is not in {room}"


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "jax_moriep"])
def test_a_packages_docstring_names_its_modules(folder):
    """And no other; the bench's, which is of six packages, has a test of its own."""
    if folder.startswith("jax_moriep.bench"):
        return
    path = ROOT.joinpath(*folder.split("."))
    text = ast.get_docstring(ast.parse((path / "__init__.py").read_text())) or ""
    rows = re.findall(r"(?m)^\| (`.*?`) \|", text)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(named) == sorted(set(named))
    modules = {module.name for module in path.glob("*.py")} - {"__init__.py"}
    assert {name for name in named if name.endswith(".py")} == modules, folder
    assert all((path / name).exists() for name in named)


def test_the_house_in_the_docs_names_every_module_and_folder():
    text = (ROOT / "docs" / "design.md").read_text().split("\n## House\n")[1].split("\n\nA package's")[0]
    rows = re.findall(r"(?m)^\| (`.*?`) \|", text)
    named = {name.removeprefix("jax_moriep/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    entries = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    entries |= {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert named - {"csrc/"} == entries


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
        longer = len(path.read_text().splitlines()) > MAX_LINES
        # A reason whose file is short again goes.
        assert longer == (str(path.relative_to(ROOT)) in LONGER), path
