"""The demo's losses in files, and their picture, without training."""

import json

import pytest

from jax_moriep import cli
from jax_moriep.demo import curves
from jax_moriep.demo.report import Results
from jax_moriep.demo.settings import Settings


def results(quant):
    settings = Settings(2, 3, 4, "auto", 0, "checkpoints", 1, False, quant)
    start = {"transport": "native", "experts": "blocked", "byte_frequency_loss": 3.1}
    return Results(settings, start, [5.5, 4.0, 3.5], [], 5.5, 3.4)


def test_plot_draws_what_demo_wrote(tmp_path, capsys):
    files = [tmp_path / f"{quant}.json" for quant in (None, "fp8_block")]
    for quant, path in zip((None, "fp8_block"), files, strict=True):
        curves.write(results(quant), 1.0, "jax-moriep demo", path)
    read = curves.read(files[1])
    assert read is not None
    assert read["settings"]["quant"] == "fp8_block"
    assert read["loss"] == [5.5, 4.0, 3.5]
    assert read["heldout"] == {"before": 5.5, "after": 3.4}
    out = tmp_path / "both.png"
    assert cli.main(["plot", *map(str, files), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_plot_does_not_mix_the_demo_with_the_bench(tmp_path, capsys):
    files = [tmp_path / "demo.json", tmp_path / "bench.json"]
    curves.write(results(None), 1.0, "jax-moriep demo", files[0])
    files[1].write_text(json.dumps({"format": "jax-moriep bench 1"}))
    assert cli.main(["plot", *map(str, files)]) == 1
    assert "be all of `demo` or all of others" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no json", "[]", "{}"])
def test_other_files_are_none(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert curves.read(path) is None


@pytest.mark.parametrize("option", ["--json", "--out"])
@pytest.mark.parametrize(
    ("file", "cure"), [("no/x.png", "make the folder first"), (".", "name a file in it")]
)
def test_the_demo_refuses_what_cannot_be_written_before_it_trains(option, file, cure, tmp_path, capsys):
    assert cli.main(["demo", option, str(tmp_path / file)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"jax-moriep demo: {option}=")
    assert cure in said
