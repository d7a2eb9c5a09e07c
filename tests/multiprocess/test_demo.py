"""The demo from end to end: it trains, reports, draws, and goes on from a checkpoint as if never stopped."""

import json
import re
import shutil
import subprocess
import sys

import pytest

STEPS = 4


def demo(folder, *options, ranks=2):
    """Runs a short demo in a folder of its own; returns what it printed."""
    ended = subprocess.run(
        [sys.executable, "-m", "jax_moriep", "demo", f"--ranks={ranks}", "--experts=4", "--windows=4"]
        + ["--sample-bytes=24", f"--steps={STEPS}", "--checkpoint-every=2", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def report(text):
    """The closing report: everything behind the last checkpoint but the run's time."""
    closing = text.split(f"checkpoint after step {STEPS} in checkpoints")[1]
    return re.sub(r"\d+ s in all", "", closing)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(folder, "--json=f32.json")


def test_it_learns_and_shows_what_it_promises(finished):
    folder, text = finished
    assert "transport native, experts blocked" in text
    before, after, frequencies = map(float, re.search(r"nats per byte +(\S+) +(\S+) +(\S+)", text).groups())
    # A model that knows nothing is at ln 256 = 5.545 nats.
    assert before == pytest.approx(5.545, abs=1e-3)
    assert after < before - 0.5
    assert 2 < frequencies < 4
    assert re.findall(rf"step +(\d)/{STEPS}  loss \d", text) == ["1", "2", "3", "4"]
    assert re.search(r"[\d,]+ tokens/s", text)
    loads = re.findall(r"layer \d: +(.+)", text)
    assert len(loads) == 4
    assert all(sum(map(float, load.split())) == pytest.approx(100, abs=0.5) for load in loads)
    assert "  | def read_lines(path):" in text
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_goes_on_ends_as_one_that_never_stopped(finished):
    folder, text = finished
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    resumed = demo(folder, "--resume")
    assert "going on from the checkpoint after step 2" in resumed
    assert f"step 1/{STEPS}" not in re.sub(" +", " ", resumed)
    assert report(resumed) == report(text)


def test_fp8_experts_in_bf16_learn_as_well_and_plot_puts_the_losses_beside_each_other(finished):
    folder, _ = finished
    # On one rank, which sees the same windows: each process compiles the whole model.
    options = ("--quant=fp8_block", "--dtype=bf16", "--json=fp8.json", "--checkpoint-dir=quantised")
    text = demo(folder, *options, ranks=1)
    assert "experts blocked, fp8_block experts in bf16" in text
    plain, quantised = (json.loads((folder / name).read_text()) for name in ("f32.json", "fp8.json"))
    others = {"quant": "fp8_block", "dtype": "bf16", "ranks": 1}
    assert quantised["settings"] == {**plain["settings"], **others}
    assert len(plain["loss"]) == len(quantised["loss"]) == STEPS
    # In the first step the head is zero; later ones differ by what rounding changes, and by little.
    assert quantised["loss"][0] == pytest.approx(plain["loss"][0], abs=1e-3)
    assert quantised["loss"][2:] != plain["loss"][2:]
    assert quantised["loss"] == pytest.approx(plain["loss"], abs=0.05)
    command = [sys.executable, "-m", "jax_moriep", "plot", "f32.json", "fp8.json", "--out", "both.png"]
    drawn = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    assert (folder / "both.png").read_bytes().startswith(b"\x89PNG")


def test_it_does_not_go_on_from_another_run(finished):
    folder, _ = finished
    ended = subprocess.run(
        [sys.executable, "-m", "jax_moriep", "demo", "--ranks=2", "--experts=8", "--resume"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode != 0
    assert "experts=8 must be 4 as in the checkpoint" in ended.stdout + ended.stderr


def test_it_clears_no_folder_of_somebody_else(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine").touch()
    ended = subprocess.run(
        [sys.executable, "-m", "jax_moriep", "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode != 0
    assert "be empty or of an earlier demo" in ended.stderr
    assert (tmp_path / "checkpoints" / "mine").exists()
