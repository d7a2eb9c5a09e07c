"""What the pages say holds: their code runs, their commands parse, and what they name and link to exists.

``pages.py`` has the checks, and test_docs_checks.py shows of each that it can fail. Links to other places are
not followed.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jax_moriep as jm
from tests.conftest import UNOPTIMISED
from tests.packaging import page_setup, pages

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "tests/rocm/simulator/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
# The changelog's links must work; what it names may be gone.
TEXTS = {page: (ROOT / page).read_text() for page in [*PAGES, "CHANGELOG.md"]}
BLOCKS = {page: pages.blocks_of(TEXTS[page]) for page in PAGES}
PYTHON = {page: python for page in PAGES if (python := [b for b in BLOCKS[page] if b.kind == "python"])}

# How many blocks of a page cannot run here; a comment above each says why.
NOT_RUN = {"docs/interop.md": 2, "docs/maxtext.md": 2, "docs/mori.md": 1, "docs/quantisation.md": 1}

# Files that pages speak of and that are the reader's, another project's, or made by a command.
NOT_OURS = {
    *(
        "benchmark_mori_ep_moe.py",
        "config.json",
        "counts.npy",
        "demo.png",
        "first.py",
        "hip-lang-config.cmake",
    ),
    *("plan.json", "script.py", "table.json", "train.py", "train_moe.py"),
}

FOLDERS = ("cmake", "csrc", "docs", "examples", "findings", "jax_moriep", "tests", "tools")
FILES = {path.name for path in ROOT.iterdir() if path.is_file()}
FILES |= {
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
TARGETS = set(re.findall(r"^([a-z][\w-]*)(?=[\w -]*:(?!=))", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])

RUN = """
import json, sys
from tests.packaging.page_setup import prepare
page, blocks = json.load(sys.stdin)
names = {"__name__": "__main__"} | prepare(page)
for line, code in blocks:
    exec(compile("\\n" * (line - 1) + code, page, "exec"), names)
"""


# Ten seconds on an idle core, and some fifteen times that on a busy machine.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PYTHON)
def test_code_runs(page, tmp_path):
    """All blocks of a page in order, on eight devices; a traceback has the page's line."""
    blocks = [(block.line, block.code) for block in PYTHON[page] if block.not_run is None]
    if not blocks:
        assert NOT_RUN[page] == len(PYTHON[page])
        return
    flags = f"{UNOPTIMISED} --xla_force_host_platform_device_count=8"
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([page, blocks]),
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_code_that_is_not_run_is_known():
    not_run = {page: sum(b.not_run is not None for b in blocks) for page, blocks in PYTHON.items()}
    assert {page: n for page, n in not_run.items() if n} == NOT_RUN
    for page in PAGES:
        assert pages.comments_of(TEXTS[page]) == NOT_RUN.get(page, 0), "one is not directly above a block"


@pytest.mark.parametrize("page", PYTHON)
def test_names_and_arguments_in_code_exist(page):
    for block in PYTHON[page]:
        faults = pages.python_faults(block.code) or pages.name_faults(block.code)
        assert not faults, f"{page}, line {block.line}: {faults}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_taken(page):
    shell = [(block.line, block.code) for block in BLOCKS[page] if block.kind == "shell"]
    assert not pages.each(shell, lambda code: pages.shell_faults(code, TARGETS, EXTRAS))


@pytest.mark.parametrize("page", PAGES)
def test_what_sentences_quote_exists(page):
    assert not pages.each(pages.spans_of(TEXTS[page]), lambda span: pages.span_faults(span, TARGETS))


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    code = [*pages.spans_of(TEXTS[page]), *((b.line, b.code) for b in BLOCKS[page] if b.kind == "shell")]
    known, folder = frozenset(FILES | NOT_OURS), str(Path(page).parent)
    assert not pages.each(code, lambda text: pages.path_faults(text, known, folder))


def test_files_that_are_not_ours_are_spoken_of():
    text = "\n".join(TEXTS.values())
    assert {name for name in NOT_OURS if name not in text} == set()


def test_environment_variables_are_read():
    sources = [ROOT / f for f in FILES if re.match(r"(jax_moriep|csrc)/.*\.(py|cc|h)$|tests/conftest", f)]
    known = variables_in(path.read_text() for path in sources)
    for page in PAGES:
        assert variables_in([TEXTS[page]]) <= known, page


def variables_in(texts):
    return {name for text in texts for name in re.findall(r"\bJAX_MORIEP_[A-Z_]*[A-Z]\b", text)}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_and_headings(page):
    assert not pages.link_faults(page, TEXTS[page], ROOT)


def test_the_reference_has_all_public_names():
    text = TEXTS["docs/reference/api.md"]
    for module in (jm, jm.flax, jm.interop, jm.maxtext, jm.weights):
        modules = {"flax", "interop", "maxtext", "weights"} if module is jm else set()
        of_module = f".. currentmodule:: {module.__name__}\n"
        assert of_module in text
        parts = [part.split(".. currentmodule::")[0] for part in text.split(of_module)[1:]]
        named = re.findall(r"^\.\. (?:auto\w+|py:data):: (\w+)$", "".join(parts), re.MULTILINE)
        assert sorted(named) == sorted(set(module.__all__) - modules)


def test_every_page_has_a_place_on_the_site():
    (reading,) = [
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "docs/conf.py").read_text()).body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "READING"
        and isinstance(node.value, ast.Dict)
    ]
    placed = [f"{page}.md" for page_list in reading.values() for page in page_list]
    assert len(placed) == len(set(placed))
    assert set(placed) == set(TEXTS) - {"README.md"}


def test_every_set_up_has_its_page():
    assert set(page_setup.PAGES) <= set(PYTHON)
