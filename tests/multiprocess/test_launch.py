"""The launcher with real processes: how they are joined, how they end, and that nothing stays behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from jax_moriep.processes.launch import launch
from jax_moriep.processes.wait import TIMEOUT_CODE


@pytest.fixture
def script(tmp_path):
    """Writes a script; ``rank`` is defined in it."""

    def write(body):
        path = tmp_path / "script.py"
        path.write_text("import os, sys, time, jax\nrank = jax.process_index()\n" + body)
        return path

    return write


def is_alive(pid):
    """Whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids, seconds=20):
    """Returns those of ``pids`` that are still there after ``seconds``."""
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if is_alive(pid)]


@contextlib.contextmanager
def started_cli(*args):
    """The launcher as a command; it is killed at the end, should the test have failed."""
    # A shell lets what it starts in the background ignore SIGINT, and that would be inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "jax_moriep", "launch", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_pids(process, count):
    """Reads lines ``[rank] pid=N`` until ``count`` of them came."""
    pids = []
    while len(pids) < count:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        pids += map(int, re.findall(r"pid=(\d+)", line))
    return pids


def test_processes_are_joined(script):
    path = script(
        "from jax.experimental import multihost_utils\n"
        "seen = multihost_utils.process_allgather(jax.numpy.int32(rank))\n"
        "with open(f'{sys.path[0]}/{rank}.txt', 'w') as said:\n"
        "  counts = jax.process_count(), jax.local_device_count(), jax.device_count()\n"
        "  print(*counts, seen.tolist(), file=said)\n"
        "  there = sys.path[0] == os.path.dirname(__file__)\n"
        "  print(sys.argv[1:], os.environ['GIVEN'], __name__, there, file=said)\n"
    )
    result = launch(path, 2, 3, args=["-x", "y z"], env={"GIVEN": "value"}, capture=True, platform="cpu")
    assert result.returncode == 0, result.outputs
    assert result.codes == [0, 0]
    for rank in range(2):
        # From a file: Gloo, which carries the collective, writes to stdout by pieces, between other lines.
        lines = path.with_name(f"{rank}.txt").read_text().splitlines()
        assert lines == ["2 3 6 [0, 1]", "['-x', 'y z'] value __main__ True"]


def test_output_of_any_kind_is_passed_on(script):
    path = script(
        "print('step 1\\rstep 2')\n"
        "print('err \\u00e9', file=sys.stderr)\n"
        "sys.stdout.buffer.write(b'not utf-8: \\xff\\n')\n"
        "print('x' * 200_000)\n"
        "print('no line end', end='')\n"
    )
    seen = []
    result = launch(path, 1, platform="cpu", on_line=lambda index, line: seen.append((index, line)))
    assert result.codes == [0]
    assert seen == [
        (0, "step 1\r"),
        (0, "step 2\n"),
        (0, "err é\n"),
        (0, "not utf-8: \ufffd\n"),
        (0, "x" * 200_000 + "\n"),
        (0, "no line end\n"),
    ]


def test_the_first_failing_process_gives_the_code(script):
    path = script("if rank == 1: sys.exit(7)\ntime.sleep(600)\n")
    result = launch(path, 3, capture=True, platform="cpu", grace=0.5)
    assert result.returncode == 7
    # SIGTERM was enough: the others did not need to be killed.
    assert result.codes == [128 + signal.SIGTERM, 7, 128 + signal.SIGTERM]


def test_a_signal_counts_as_128_and_more_and_the_others_can_report(script):
    # Process 0 is the hard case: where it hosts the coordination service, jax aborts the others at once.
    path = script(
        "gone = os.path.join(os.path.dirname(__file__), 'gone')\n"
        "if rank == 0:\n"
        "    open(gone, 'w').close()\n"
        "    os.kill(os.getpid(), 9)\n"
        "while not os.path.exists(gone): time.sleep(0.05)\n"
        "time.sleep(1)\n"
        "raise RuntimeError('process 0 is dead')\n"
    )
    result = launch(path, 2, capture=True, platform="cpu", grace=60)
    assert result.returncode == 128 + signal.SIGKILL
    assert result.codes == [128 + signal.SIGKILL, 1]
    assert "RuntimeError: process 0 is dead" in result.outputs[1]


def test_a_message_as_exit_code(script):
    result = launch(script("sys.exit('a reason')\n"), 1, capture=True, platform="cpu")
    assert result.returncode == 1
    assert result.outputs == ["a reason\n"]


def test_timeout_shows_where_each_process_is(script):
    path = script("def stuck():\n    time.sleep(600)\nstuck()\n")
    result = launch(path, 2, capture=True, platform="cpu", timeout=10)
    assert result.returncode == TIMEOUT_CODE
    assert result.codes == [128 + signal.SIGABRT] * 2
    for output in result.outputs:
        assert "in stuck" in output


def test_an_error_of_the_callback_ends_the_run(script):
    pids = []

    def on_line(index, line):
        pids.append(int(line))
        if len(pids) == 2:
            raise ValueError(f"did not like {index}")

    path = script("print(os.getpid())\ntime.sleep(600)\n")
    with pytest.raises(ValueError, match="did not like"):
        launch(path, 2, platform="cpu", on_line=on_line)
    assert wait_until_gone(pids, seconds=0) == []


def test_command_prefixes_lines_and_runs_modules(script, tmp_path, monkeypatch):
    script("print('one\\ntwo', sys.argv)\nsys.exit(3 if rank else 0)\n").rename(tmp_path / "some_module.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with started_cli("-n", 2, "--platform", "cpu", "--grace", 1, "-m", "some_module", "-n", "4") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 3
    for i in range(2):
        lines = [line for line in out.splitlines() if line.startswith(f"[{i}]")]
        assert lines[0] == f"[{i}] one"
        assert lines[1].startswith(f"[{i}] two [")
        assert lines[1].endswith("some_module.py', '-n', '4']")
    assert "process 1 failed with exit code 3" in err


def test_killed_launcher_leaves_no_process(script):
    path = script("print(f'pid={os.getpid()}')\ntime.sleep(600)\n")
    with started_cli("-n", 2, "--platform", "cpu", path) as process:
        pids = read_pids(process, 2)
        process.kill()
        assert wait_until_gone(pids) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_launcher_ends_the_processes_and_what_they_started(script, number):
    path = script(
        "import subprocess\n"
        "sleeper = subprocess.Popen(['sleep', '600'])\n"
        "print(f'pid={os.getpid()} pid={sleeper.pid}')\n"
        "time.sleep(600)\n"
    )
    with started_cli("-n", 2, "--platform", "cpu", path) as process:
        pids = read_pids(process, 4)
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
        assert wait_until_gone(pids, seconds=0) == []
