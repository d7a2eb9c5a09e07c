"""By which code a run ends, from the order in which ends and failures are heard; no process runs."""

import queue

import pytest

from jax_moriep.processes import wait as waiting
from jax_moriep.processes.process import Event
from jax_moriep.processes.wait import TIMEOUT_CODE, wait


def outcome(events, grace=5.0):
    heard = queue.SimpleQueue()
    for event in events:
        heard.put(event)
    return wait(heard, len(events), timeout=None, grace=grace)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([1, 137], 137),  # a killed process is the cause, also where a peer that noticed it is seen first
        ([7, 137], 137),
        ([137, 7], 137),
        ([137, 139], 137),
        ([1, 7], 7),  # so is one that chose its code: by 1 and by SIGABRT those end that lost a peer
        ([7, 1], 7),
        ([134, 7], 7),
        ([7, 134], 7),
        ([134, 137], 137),
        ([1, 134], 1),
        ([134, 1], 134),
        ([1, 7, 9], 7),
        ([3, 1, 0], 3),
        ([0, 0], 0),
    ],
)
def test_the_cause_gives_the_code(codes, expected):
    assert outcome([Event(f"process {i}", code) for i, code in enumerate(codes)]).code == expected


def test_the_cause_is_said_in_both_orders(capfd):
    peer, cause = Event("process 0", 1), Event("process 3", 7)
    outcome([peer, cause])
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "jax-moriep launch: process 0 failed with exit code 1; ending the others in 5 s",
        "jax-moriep launch: process 3 failed with exit code 7, which others noticed first",
    ]
    outcome([cause, peer])
    said = capfd.readouterr().err.splitlines()
    assert said == ["jax-moriep launch: process 3 failed with exit code 7; ending the others in 5 s"]


def test_what_comes_later_is_no_cause(monkeypatch):
    monkeypatch.setattr(waiting, "_SETTLE_SECONDS", 0.0)
    assert outcome([Event("process 0", 1), Event("process 1", 7)]).code == 1


def test_a_launcher_that_ran_out_of_time_is_no_cause():
    late = Event("node 1's launcher", TIMEOUT_CODE, lost=True, says="was ended, with exit code 124")
    assert outcome([Event("process 0", 1), late]).code == 1


@pytest.mark.parametrize("before", [[], [Event("process 0", 1)]])
def test_a_verdict_is_the_last_word(before):
    """Node 0 has given its own: another code here would differ from it."""
    verdict = Event("node 0's launcher", 1, verdict=True, says="has ended the job with exit code 1")
    assert outcome([*before, verdict, Event("process 2", 137), Event("process 3", 7)]).code == 1
