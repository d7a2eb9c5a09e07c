"""The site that `make docs` builds with Sphinx: README.md, the pages of docs/, and the reference.

The source folder is the root of the repository, so that links which work on GitHub work on the site as they
are: to a page, to one of its headings, or to any other file, of which the site gets a copy.
"""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]

# In the order in which they are meant to be read, behind README.md. A page that is missing here is an error.
READING = {
    "How it works": ["docs/design", "docs/sharp_bits"],
    "Tasks": [
        "docs/weights",
        "docs/checkpoints",
        "docs/quantisation",
        "docs/multi_node",
        "docs/maxtext",
        "docs/interop",
        "docs/mori",
        "docs/adding_a_transport",
    ],
    "Reference": ["docs/reference/api", "docs/reference/command_line", "docs/settings"],
    "What was measured": ["docs/benchmarks", "docs/rocm", "tests/rocm/simulator/README"],
    "The project": ["CHANGELOG", "CONTRIBUTING"],
}

project = "jax_moriep"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["README.md", "docs/**.md", *(f"{p}.md" for pages in READING.values() for p in pages)]
exclude_patterns = [".*", "build", "dist"]
myst_heading_anchors = 4
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "jax_moriep"
html_copy_source = False
html_show_copyright = False
templates_path = ["templates"]
# Who opens the folder is led to README.html.
html_additional_pages = {"index": "first_page.html"}

# The package is read from the checkout, and nothing of it runs: no library needs to be built.
sys.path.insert(0, str(ROOT))
# The width of the command line's help.
os.environ["COLUMNS"] = "100"


class CommandLine(SphinxDirective):
    """``{command-line}``: what ``jax-moriep --help`` prints, and each subcommand's, in sections."""

    def run(self) -> list[nodes.Node]:
        from jax_moriep import cli

        sections: list[nodes.Node] = []
        for command in cli.EXAMPLES:
            words = ["jax-moriep", *command.split()]
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
                cli.main([*words[1:], "--help"])
            section = nodes.section("", nodes.title("", " ".join(words)), ids=["-".join(words)])
            section += nodes.literal_block("", shown.getvalue(), language="none")
            sections.append(section)
        return sections


def append_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Gives README.md its table of contents, which GitHub would show as text."""
    if page == root_doc:
        for title, pages in READING.items():
            source[0] += "\n".join(
                ["", "```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```", ""]
            )


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("command-line", CommandLine)
    app.connect("source-read", append_contents)
    return {"parallel_read_safe": True}
