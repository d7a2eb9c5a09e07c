"""The watchdog: it ends a process whose program waits for ever beside a failed group, and no other."""

import os
import subprocess
import sys
import textwrap

import pytest

from jax_moriep.errors import TransportError
from jax_moriep.runtime import settings, watchdog

SCRIPT = """
import threading, time
import jax, jax.numpy as jnp
from jax_moriep.runtime import watchdog

ends = threading.Event()

def wait(x):
    ends.wait(30)
    return x

@jax.jit
def program(x):
    return jax.pure_callback(wait, x, x)

failed = True
watchdog.watch("group", "cpu", lambda: "dispatch, rank 0, step 7: waited for rank 1" if failed else None)
{body}
print("lived", flush=True)
"""


# Before jax is imported, so that it runs when jax has cleaned up.
LATE = """
import atexit, time

def late():
    from jax._src import xla_bridge
    for _ in range(40):
        time.sleep(0.05)
    print("opened" if xla_bridge.backends_are_initialized() else "closed", flush=True)

atexit.register(late)
"""


def run(body, first="", **environment):
    done = subprocess.run(
        [sys.executable, "-c", first + SCRIPT.format(body=textwrap.dedent(body))],
        env=os.environ | {"JAX_MORIEP_TIMEOUT": "1", "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


WAITS = "jax.block_until_ready(program(jnp.ones(3)))"


@pytest.mark.parametrize(
    "body", [WAITS, "y = program(jnp.ones(3))\nwhile not ends.is_set(): time.sleep(0.1)"]
)
def test_a_program_that_waits_for_ever_ends_the_process_with_the_text(body):
    code, out, err = run(body)
    assert code == watchdog.EXIT_CODE
    assert "jax_moriep: dispatch, rank 0, step 7: waited for rank 1; a program" in err
    assert "lived" not in out


@pytest.mark.parametrize(
    ("body", "environment"),
    [
        # Who has caught the error and goes on is left alone.
        ("for _ in range(40): time.sleep(0.1)", {}),
        ("time.sleep(4)", {}),
        # So is who opens the group again.
        (f"threading.Timer(3, ends.set).start()\nfailed = False\n{WAITS}", {}),
        (f"threading.Timer(4, ends.set).start()\n{WAITS}", {"JAX_MORIEP_WATCHDOG": "0"}),
    ],
)
def test_other_processes_live(body, environment):
    code, out, err = run(body, **environment)
    assert code == 0, err
    assert "lived" in out


def test_it_opens_no_devices_that_jax_has_given_up():
    code, out, err = run("jnp.ones(3).block_until_ready()", LATE, JAX_MORIEP_TIMEOUT="60")
    assert code == 0, err
    assert "lived\nclosed\n" in out


def test_its_switch_is_checked(monkeypatch):
    monkeypatch.setenv("JAX_MORIEP_WATCHDOG", "off")
    with pytest.raises(TransportError, match="JAX_MORIEP_WATCHDOG='off' must be 0 or 1; unset it"):
        settings.WATCHDOG.value()
