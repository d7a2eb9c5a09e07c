"""Each check of pages.py fails on what it is there to find, and on no more."""

import pytest

from tests.packaging import pages

PAGE = """
# A page

```python
first = 1
```

Text.

    make test    # all tests

<!-- not run: it needs a GPU -->
```python
second = 2
```

1. In a list:

   <!-- not run: it needs two -->
   ```python
   third = 3
   ```

       jax-moriep doctor

2. Next.

<!-- not run: not directly above -->

Text.

    fourth = 4

```
x ──► y
```
"""


def test_blocks_have_kind_line_and_reason():
    assert pages.blocks_of(PAGE) == [
        pages.Block(5, "python", "first = 1\n", None),
        pages.Block(10, "shell", "make test    # all tests\n", None),
        pages.Block(14, "python", "second = 2\n", "it needs a GPU"),
        pages.Block(21, "python", "third = 3\n", "it needs two"),
        pages.Block(24, "shell", "jax-moriep doctor\n", None),
        pages.Block(32, "python", "fourth = 4\n", None),
        pages.Block(35, "text", "x ──► y\n", None),
    ]
    assert pages.comments_of(PAGE) == 3
    lines = PAGE.splitlines()
    assert all(block.code.startswith(lines[block.line - 1].strip()) for block in pages.blocks_of(PAGE))


@pytest.mark.parametrize("code", ["x = 1", "make test", "jax-moriep doctor"])
def test_code_says_its_language(code):
    with pytest.raises(ValueError, match="line 2: a block of code that does not say its language"):
        pages.blocks_of(f"```\n{code}\n```\n")


def test_languages_that_nobody_checks_are_refused():
    with pytest.raises(ValueError, match="no test knows the language 'ruby'"):
        pages.blocks_of("```ruby\nputs 1\n```\n")


def test_an_indented_block_is_shell_or_python():
    (block,) = pages.blocks_of("    jax-morieb doctor --json\n")
    assert block.kind == "python"
    assert pages.python_faults(block.code)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("jm.ep_mo(x)", "jm.ep_mo does not exist"),
        ("y = jm.weights.lod", "jm.weights.lod does not exist"),
        ("def f():\n    return [jm.weigths.load(folder)]", "jm.weigths does not exist"),
        ("jm.MoEConfig.from_hg(folder)", "jm.MoEConfig.from_hg does not exist"),
        ("jm.ep_moe(x, params, cfg, maesh=mesh)", "unexpected keyword argument 'maesh'"),
        ("jm.ep_moe(x, params)", "jm.ep_moe: missing a required argument: 'cfg'"),
        ("jm.check_stats(stats, 1, 2, 3)", "jm.check_stats: too many positional arguments"),
        (
            "jm.Tuning(mori_kernels='IntraNode')",
            "unexpected keyword argument 'mori_kernels'",
        ),
        ("jm.ep_moe(x, params, cfg, mesh=mesh)[0].mean()", None),
        ("jm.MoEConfig(..., top_k=2)", None),
        ("jm.ep_moe(*operands, **options)", None),
        ("dataclasses.replace(jm.MoEConfig(4, 2, 8, 8), top_k=1)", None),
        ("other.ep_mo(x)", None),
    ],
)
def test_names_and_arguments(code, fault):
    found = pages.name_faults(code)
    assert any(fault in f for f in found) if fault else not found


TARGETS, EXTRAS = {"test", "demo"}, {"flax", "torch"}


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("make tset", "make has no target 'tset'"),
        ("make test && make tset", "make has no target 'tset'"),
        ("pip install '.[flax,touch]'", "no extra 'touch'"),
        ("jax-moriep launhc -n 4 train.py", "invalid choice: 'launhc'"),
        ("jax-moriep launch -n 4 train.py\njax-moriep doctor --jsno", "unrecognized arguments: --jsno"),
        ("jax-moriep bench layer --ranks \\\n  two", "invalid int value: 'two'"),
        ("NAME=1 .venv/bin/jax-moriep tune --out a.json --uot", "unrecognized arguments: --uot"),
        ("srun -N 2 bash -c 'jax-moriep launch --node $ID --nodse 2 -n 8 train.py'", "--nodse"),
        ("jax-moriep bench kernels --quant SCHEMES", "invalid choice: 'SCHEMES'"),
        ("jax-moriep doctor\nfoo --bar", "unknown program 'foo'"),
        ("make test JOBS=4    # make tset", None),
        ("jax-moriep bench kernels --quant SCHEME --json FILE", None),
        ("jax-moriep demo [--dtype bf16 [--quant fp8_block]] --seed SEED", None),
        ("pip install . -C cuda.toolkit=pypi\npip install '.[flax,torch]'", None),
        (
            "srun bash -c 'jax-moriep launch --nodes $N --node 1 --coordinator $(f $L | g):1 -n 8 a.py'",
            None,
        ),
    ],
)
def test_commands(code, fault):
    found = pages.shell_faults(code, TARGETS, EXTRAS)
    assert any(fault in f for f in found) if fault else not found


def test_no_command_runs():
    assert pages.command_faults(["launch", "-n", "1", "/no/such/script.py"]) == []


@pytest.mark.parametrize(
    ("span", "fault"),
    [
        ("make tset", "make has no target 'tset'"),
        ("jax-moriep dcotor", "invalid choice: 'dcotor'"),
        ("jax-moriep bench exchagne", "invalid choice: 'exchagne'"),
        (r"jax-moriep bench exchange\|expert", "invalid choice: 'expert'"),
        ("jax-moriep launch --nodse", "jax-moriep launch has no --nodse"),
        ("jax-moriep bench layer --phases decode", "jax-moriep bench layer has no --phases"),
        ("jm.unpad_parms(tree, cfg)", "jm.unpad_parms does not exist"),
        ("jm.explain(cfg, mesh, tokens=T)", "jm.explain: got an unexpected keyword argument 'tokens'"),
        ("the jm.explian of a layer", "jm.explian does not exist"),
        ("make test JOBS=4", None),
        ("jax-moriep", None),
        (r"jax-moriep bench exchange\|experts", None),
        ("jax-moriep launch --nodes M --node I", None),
        ("jax-moriep bench load --folder", None),
        ("jm.explain(cfg, num_tokens=T)", None),
        ("jm.explain(cfg, mesh).one_call", None),
        ("MoEConfig(..., top_k=2)", None),
    ],
)
def test_quotations(span, fault):
    found = pages.span_faults(span, TARGETS)
    assert any(fault in f for f in found) if fault else not found


FILES = frozenset({"README.md", "csrc/gpu/expand.h", "docs/tools/setup", "tests/nodes/test_nodes.py"})


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("csrc/gpu/expend.h", ["no file 'csrc/gpu/expend.h'"]),
        ("expend.h", ["no file 'expend.h'"]),
        ("xpand.h", ["no file 'xpand.h'"]),
        ("pytest -s tests/nodse.py tests/nodes", ["no file 'tests/nodse.py'"]),
        ("pytest tests/nodse", ["no file or folder 'tests/nodse'"]),
        ("csrc/cpu/", ["no file or folder 'csrc/cpu'"]),
        ("tools/setpu of docs/tools/setpu", ["no file or folder 'docs/tools/setpu'"]),
        ("csrc/gpu/expand.h, expand.h and gpu/expand.h", []),
        ("pytest tests/nodes/test_nodes.py csrc/gpu", []),
        ("~/.cache/a.json /etc/hosts.txt $PWD/b.py docs/x-{a,b}.json *.json 1/2", []),
    ],
)
def test_paths(text, faults):
    assert pages.path_faults(text, FILES, "docs") == faults


def test_links(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/other.md").write_text("# `two_level`, and more!\n## Again\n## Again\n\n## C++ [x](y)\n")
    (tmp_path / "docs/file.py").write_text("")
    text = """# Here
[a](other.md) [b](#here) [c](other.md#two_level-and-more) [d](other.md#again-1) [e](file.py) [f](https://x.yz/q)
[g](other.md#c-x)

```
[not](a-link.md)
```

[1](others.md) [2](#there) [3](other.md#again-2) [4](other.md#two-level-and-more) [5](file.py#line)
![6](no.png)
[7](../../x.md) | [8][ref]

[ref]: gone.md
"""
    (tmp_path / "docs/page.md").write_text(text)
    assert pages.link_faults("docs/page.md", text, tmp_path) == [
        "others.md does not exist",
        "#there has no such heading",
        "other.md#again-2 has no such heading",
        "other.md#two-level-and-more has no such heading",
        "file.py#line has no such heading",
        "no.png does not exist",
        "../../x.md is outside the repository",
        "gone.md does not exist",
    ]
