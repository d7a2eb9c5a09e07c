"""What a page of Markdown says that can be checked: code, commands, names, paths, links and headings.

Pages are parsed as CommonMark, which is what GitHub and the site's generator read. Every function that checks
something returns the faults that it found, as text.
"""

import argparse
import ast
import contextlib
import functools
import inspect
import io
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from markdown_it import MarkdownIt
from markdown_it.token import Token

import jax_moriep as jm
from jax_moriep import cli

NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
# The programs that shell blocks call. An indented block that begins with none of them must be Python.
PROGRAMS = {
    *("apt", "cuda_peer", "cuda_speed", "export", "jax-moriep", "make", "mpirun", "pip", "pytest"),
    *("python", "python3.11", "python3.12", "rm", "srun"),
}
# What stands in commands for a value of the reader's.
PLACEHOLDERS = {"SCHEME": "fp8_block", "SHARE": "deepseek-v3-ep8", "FILE": "file.json", "SEED": "0"}
SUFFIXES = r"(?:py|md|cc|h|hip|sh|toml|txt|json|cmake|png|npz)"


@dataclass(frozen=True)
class Block:
    """A block of code; ``line`` counts from 1 and is that of its first line of code."""

    line: int
    kind: str
    code: str
    not_run: str | None


def tokens_of(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page.

    Raises:
      ValueError: a block's language is unknown, or one that names none is code.
    """
    blocks, before = [], None
    for token in tokens_of(text):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            line = token.map[0] + (2 if token.type == "fence" else 1)
            if token.type == "code_block":
                kind = "shell" if is_shell(token.content) else "python"
            else:
                kind = kind_of_fence(token.info.strip(), token.content, line)
            comment = NOT_RUN.search(before.content) if before and before.type == "html_block" else None
            blocks.append(Block(line, kind, token.content, comment and comment[1]))
        before = token
    return blocks


def kind_of_fence(language: str, code: str, line: int) -> str:
    if language in ("python", "text") or language.startswith("{"):
        return language
    if language in ("sh", "bash", "shell"):
        return "shell"
    if language:
        raise ValueError(f"line {line}: no test knows the language {language!r}")
    if is_shell(code) or not python_faults(code):
        raise ValueError(f"line {line}: a block of code that does not say its language")
    return "text"


def is_shell(code: str) -> bool:
    first = code.split()[0]
    return Path(first).name in PROGRAMS or re.match(r"\w+=\S", first) is not None


def comments_of(text: str) -> int:
    """How many comments say that a block is not run, wherever they are."""
    return sum(len(NOT_RUN.findall(t.content)) for t in tokens_of(text) if t.type == "html_block")


def spans_of(text: str) -> Iterator[tuple[int, str]]:
    """The line of the paragraph, and the code in it, of each inline code."""
    for token in tokens_of(text):
        for child in token.children or []:
            if child.type == "code_inline":
                assert token.map is not None
                yield token.map[0] + 1, child.content


# --- Python


def python_faults(code: str) -> list[str]:
    try:
        ast.parse(code)
    except SyntaxError as error:
        return [f"no Python: {error}"]
    return []


def name_faults(code: str, *, whole: bool = True) -> list[str]:
    """The ``jm.`` names that do not exist, and the calls of them whose arguments do not fit.

    Args:
      code: Python.
      whole: calls have all arguments that they need; what a sentence names has only those it speaks of.
    """
    faults = []
    for node in ast.walk(ast.parse(code)):
        called = isinstance(node, ast.Call)
        path = dotted(node.func if called else node)
        if path is None or path[0] != "jm":
            continue
        found: Any = jm
        for name in path[1:]:
            if not hasattr(found, name):
                # A call's own name is another node.
                faults += [] if called else [f"{'.'.join(path)} does not exist"]
                break
            found = getattr(found, name)
        else:
            faults += argument_faults(node, found, ".".join(path), whole) if called else []
    return faults


def dotted(node: ast.AST) -> list[str] | None:
    """``jm.weights.load`` -> its three names; None of what is more than names."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) and names else None


def argument_faults(call: ast.Call, called: Any, name: str, whole: bool) -> list[str]:
    omitted = [a for a in call.args if isinstance(a, ast.Constant) and a.value is ...]
    positional = [a for a in call.args if a not in omitted]
    keywords = {k.arg: None for k in call.keywords if k.arg is not None}
    if any(isinstance(a, ast.Starred) for a in positional):
        return []
    complete = whole and not omitted and len(keywords) == len(call.keywords)
    signature = inspect.signature(called)
    try:
        (signature.bind if complete else signature.bind_partial)(*positional, **keywords)
    except TypeError as error:
        return [f"{name}: {error}"]
    return []


# --- the shell


def commands_of(code: str) -> Iterator[str]:
    """The commands of a shell block: what ``\\`` continues is one line, what ``&&`` joins are two."""
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        yield from filter(None, (part.strip() for part in line.split(" && ")))


def words_of(command: str) -> list[str]:
    """A command's words without its variables; placeholders and what the shell fills in have values."""
    if re.match(r"\w+=\$\(", command):
        return []
    command = re.sub(r"\$\([^()]*\)", "value", command)
    command = re.sub(r"\$\w+", "1", re.sub(r"[\[\]](?=\s|-|\]|$)", "", command))
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)]
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    return words


def shell_faults(code: str, targets: set[str], extras: set[str]) -> list[str]:
    """The faults of a block's commands.

    Args:
      code: the block.
      targets: the targets of the Makefile.
      extras: the extras of pyproject.toml.
    """
    faults = []
    for command in commands_of(code):
        words = words_of(command)
        if not words:
            continue
        program = Path(words[0]).name
        if program not in PROGRAMS and words[0] != ".":
            faults.append(f"unknown program {words[0]!r}")
        elif program == "make":
            faults += [f"make has no target {w!r}" for w in make_words(words) if w not in targets]
        elif program == "pip":
            named = re.findall(r"\.\[(.*?)\]", command)
            faults += [f"no extra {e!r}" for list_ in named for e in list_.split(",") if e not in extras]
        elif program == "jax-moriep":
            faults += command_faults(words[1:])
        elif program == "srun":
            inner = next((w for w in words if w.startswith("jax-moriep")), None)
            faults += command_faults(words_of(inner)[1:]) if inner else []
    return faults


def make_words(words: list[str]) -> list[str]:
    return [word for word in words[1:] if "=" not in word and not word.startswith("-")]


class Parsed(Exception):
    """The arguments were parsed, and nothing shall run."""


def command_faults(arguments: list[str]) -> list[str]:
    """What ``jax-moriep`` answers to these arguments if they are wrong; they are parsed, and nothing runs."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(*args: Any) -> None:
        parse(*args)
        raise Parsed

    said = io.StringIO()
    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_only):
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                cli.main(arguments)
        except Parsed:
            return []
        except SystemExit as error:
            if error.code == 0:  # --help
                return []
    return [f"jax-moriep {' '.join(arguments)}: {said.getvalue()}"]


def span_faults(span: str, targets: set[str]) -> list[str]:
    """The faults of what a sentence quotes: a command and some of its options, a target, a ``jm.`` name."""
    if re.match(r"make [\w-]", span):
        return [f"make has no target {w!r}" for w in make_words(span.split()) if w not in targets]
    if span.startswith("jax-moriep "):
        words = span.split()[1:]
        kinds = re.split(r"\\?\|", words[1]) if len(words) > 1 and "|" in words[1] else None
        commands = [[words[0], kind] for kind in kinds] if kinds else [leading(words)]
        options = [word for word in words if word.startswith("-")]
        return [f for command in commands for f in quoted_command_faults(command, options)]
    if re.search(r"\bjm\.", span) and not python_faults(span):
        return name_faults(span, whole=False)
    return [f"{n} does not exist" for n in re.findall(r"\bjm(?:\.[A-Za-z_]\w*)+", span) if name_faults(n)]


def leading(words: list[str]) -> list[str]:
    """The subcommand and, of bench, its kind."""
    return words[: 2 if words[0] == "bench" and words[1:] and not words[1].startswith("-") else 1]


def quoted_command_faults(command: list[str], options: list[str]) -> list[str]:
    faults = command_faults([*command, "--help"])
    if faults:
        return faults
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown.getvalue()))
    return [f"jax-moriep {' '.join(command)} has no {option}" for option in options if option not in known]


# --- paths and links


def path_faults(text: str, files: frozenset[str], folder: str) -> list[str]:
    """The paths in some code that no file or folder of the repository has.

    Args:
      text: a command, or what a sentence quotes.
      files: all files of the repository, relative to its root. A file may be named by the end of its path.
      folder: the page's own.
    """
    faults = []
    folders, ends = folders_and_ends(files)
    for word in re.findall(r"(?<![\w./~$<>*{}:-])[\w.-]+(?:/[\w.-]+)*/?(?![\w/*{}<>-])", text):
        name = word.rstrip("/")
        if re.fullmatch(rf".*\.{SUFFIXES}", name):
            faults += [] if name in ends else [f"no file {name!r}"]
        elif "/" in word and name.split("/")[0] in folders and "." not in Path(name).name:
            known = {name, f"{folder}/{name}"} & (folders | files)
            faults += [] if known else [f"no file or folder {name!r}"]
    return faults


@functools.cache
def folders_and_ends(files: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
    """The folders of files, and all ends of their paths."""
    parts = [file.split("/") for file in files]
    ends = {"/".join(names[i:]) for names in parts for i in range(len(names))}
    return frozenset("/".join(names[:i]) for names in parts for i in range(1, len(names))), frozenset(ends)


def link_faults(page: str, text: str, root: Path) -> list[str]:
    """The relative links of a page whose file does not exist, or has no such heading."""
    faults = []
    for target in targets_of(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (root / page).parent / path if path else root / page
        if not file.resolve().is_relative_to(root.resolve()):
            faults.append(f"{target} is outside the repository")
        elif not file.exists():
            faults.append(f"{target} does not exist")
        elif anchor and (file.suffix != ".md" or anchor not in anchors_of(file.read_text())):
            faults.append(f"{target} has no such heading")
    return faults


def targets_of(text: str) -> Iterable[str]:
    for token in tokens_of(text):
        for child in token.children or []:
            target = child.attrs.get({"link_open": "href", "image": "src"}.get(child.type, ""))
            if target is not None:
                yield str(target)


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page: equal ones are numbered."""
    anchors: dict[str, int] = {}
    tokens = tokens_of(text)
    for heading, inline in zip(tokens, tokens[1:], strict=False):
        if heading.type == "heading_open":
            shown = "".join(c.content for c in inline.children or [] if c.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
            anchors[slug] = anchors.get(slug, -1) + 1
            if anchors[slug]:
                anchors[f"{slug}-{anchors[slug]}"] = 0
    return set(anchors)


def each(found: Iterable[tuple[int, str]], check: Callable[[str], list[str]]) -> list[str]:
    """The faults of pieces of a page, with their lines."""
    return [f"line {line}: {fault}" for line, piece in found for fault in check(piece)]
