"""One word per notion: no name in the package or in csrc/ has a word that docs/design.md retires."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jax_moriep"
SOURCES = [
    *sorted(PACKAGE.rglob("*.py")),
    *sorted(PACKAGE.rglob("*.h")),
    *sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cc")),
]
# A retired name that stays where somebody else chose it, or where users have it in their programs.
ALLOWED = {
    "jax_moriep/exchange.py": {"axis_name"},  # of jm.dispatch and jm.combine, as in jax's collectives
    "jax_moriep/bench/kinds/exchange.py": {"axis_name"},
    "jax_moriep/bench/kinds/layer.py": {"axis_name"},
    "jax_moriep/runtime/mesh.py": {"axis_name"},  # what those two were given
    "jax_moriep/runtime/compat.py": {"axis_name"},
}
OF_JAX = {"axis_names"}  # of a mesh


def retired():
    """(plain words, words that say nothing where others see them), of the table in docs/design.md."""
    text = (ROOT / "docs" / "design.md").read_text()
    table = text.split("\n| retired | instead |\n|---|---|\n")[1].split("\n\n")[0]
    plain, empty = set(), set()
    for row in table.splitlines():
        names, _, where = row.split("|")[1].strip().partition(" (")
        (empty if where else plain).update(name.strip() for name in names.split(","))
    return plain, empty


PLAIN, EMPTY = retired()


def words(name):
    """The words of a name: ``kNumSlots`` -> num, slot; ``axis_name`` -> axis, name. Plurals count as one."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return [part.lower().removesuffix("s") for part in parts]


def has(name, word):
    """Whether the words of a retired name stand in a name, one after the other."""
    mine, other = words(name), words(word)
    return any(mine[i : i + len(other)] == other for i in range(len(mine)))


def identifiers(path):
    """All names in a file; those in comments and texts are none."""
    text = path.read_text()
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        return {token.string for token in tokens if token.type == tokenize.NAME}
    text = re.sub(r'"(\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', " ", text, flags=re.DOTALL)
    return set(re.findall(r"\b[A-Za-z_]\w*", text))


def seen_by_others(path):
    """Names that leave a function: of functions, classes' attributes and a module's variables."""

    def targets(node):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            return [node.name]
        if isinstance(node, ast.AnnAssign):
            return [ast.unparse(node.target)]
        return [ast.unparse(target) for target in getattr(node, "targets", ())]

    tree = ast.parse(path.read_text())
    bodies = [tree.body] + [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    names = {name for body in bodies for node in body for name in targets(node)}
    return names | {
        target.removeprefix("self.")
        for node in ast.walk(tree)
        for target in targets(node)
        if target.startswith("self.")
    }


def test_the_table_is_read():
    assert {"slot", "order_token", "axis_name"} <= PLAIN
    assert {"found", "made", "seen"} == EMPTY
    for name, word in (("kNumSlots", "slot"), ("slot_of", "slot"), ("orderToken", "order_token")):
        assert has(name, word)
    for name, word in (("slotted", "slot"), ("token_order", "order_token")):
        assert not has(name, word)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_name_has_a_retired_word(path):
    where = str(path.relative_to(ROOT))
    for name in sorted(identifiers(path) - OF_JAX - ALLOWED.get(where, set())):
        for word in PLAIN:
            assert not has(name, word), f"{where}: {name}; docs/design.md has another word for {word}"
    if path.suffix == ".py":
        assert not {name.lstrip("_") for name in seen_by_others(path)} & EMPTY, where
