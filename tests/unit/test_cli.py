"""The command line: choosing a subcommand, and its errors."""

import importlib
import subprocess
import sys

import pytest

from jax_moriep import cli
from jax_moriep.cli import doctor
from jax_moriep.errors import TransportError


def test_help_lists_every_subcommand(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, summary in cli.COMMANDS.items():
        assert name in text
        assert summary.split()[0] in text


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["launch"], ["launch", "-n", "2"]])
def test_wrong_arguments_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: jax-moriep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "usage", "error"),
    [
        (["frobnicate"], "jax-moriep", "invalid choice: 'frobnicate'"),
        (["bench"], "jax-moriep bench", "the following arguments are required: KIND"),
        (["bench", "speed"], "jax-moriep bench", "argument KIND: invalid choice: 'speed'"),
        (["bench", "layer", "--speed"], "jax-moriep bench layer", "unrecognized arguments: --speed"),
        (["bench", "host", "--fast"], "jax-moriep bench host", "unrecognized arguments: --fast"),
        (["demo", "--steps", "many"], "jax-moriep demo", "argument --steps: invalid int value: 'many'"),
        (["demo", "--step-s"], "jax-moriep demo", "unrecognized arguments: --step-s"),
        (["doctor", "--jsn"], "jax-moriep doctor", "unrecognized arguments: --jsn"),
        (["launch", "-n", "2"], "jax-moriep launch", "the following arguments are required: script"),
        (["tune"], "jax-moriep tune", "the following arguments are required: --out"),
    ],
)
def test_wrong_arguments_are_answered_by_the_subcommand_itself(argv, usage, error, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith(f"usage: {usage} ")
    assert f"\n{usage}: error: {error}" in text.replace("argument COMMAND: ", "")
    assert text.splitlines()[-1].startswith(f"for example: {usage} ")


@pytest.mark.parametrize("key", cli.EXAMPLES)
def test_the_examples_of_wrong_arguments_are_right(key, monkeypatch):
    words = cli.EXAMPLES[key].split()
    assert words[: 1 + len(key.split())] == ["jax-moriep", *key.split()]
    module = importlib.import_module(f"jax_moriep.cli.{words[1]}")
    monkeypatch.setattr(module, "run", lambda args: 0)
    assert cli.main(words[1:]) == 0


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: jax-moriep {name}" in capsys.readouterr().out
    assert callable(importlib.import_module(f"jax_moriep.cli.{name}").run)


def test_only_the_chosen_subcommand_is_imported():
    code = (
        "import sys, jax_moriep.cli\n"
        "try: jax_moriep.cli.main(['launch', '--help'])\n"
        "except SystemExit: pass\n"
        "print([n for n in jax_moriep.cli.COMMANDS if 'jax_moriep.cli.' + n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['launch']"


def test_an_error_of_ours_is_one_line_and_exit_code_1(capsys, monkeypatch):
    def run(args):
        raise TransportError("no such thing; install it")

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "jax-moriep doctor: no such thing; install it\n"


@pytest.mark.parametrize("folder", ["missing", "a/file", "/proc"])
def test_a_checkpoint_of_bench_load_that_has_no_place_is_one_line(folder, tmp_path, capsys):
    place = tmp_path / folder
    if folder == "a/file":
        place.parent.mkdir()
        place.write_text("")
    assert cli.main(["bench", "load", "--folder", str(place)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"jax-moriep bench: --folder={str(place)!r} must be an existing folder that can be"
    )
    assert line.endswith("; make the folder first")


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "jax_moriep", "launch", "-n", "0", __file__], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "nprocs=0 must be at least 1" in done.stderr
