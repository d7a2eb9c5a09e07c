"""Launchers of several nodes, in one process: how they meet, whom they refuse, what they tell each other."""

import json
import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jax_moriep.errors import ConfigError, TransportError
from jax_moriep.processes import meeting
from jax_moriep.processes.nodes import Nodes, why_name_misleads
from jax_moriep.processes.process import Event
from jax_moriep.processes.wait import Outcome, wait
from jax_moriep.processes.wire import Wire


@pytest.fixture
def address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(nprocs=1, devices=1, platform=None, script="train.py", arguments=()):
    return meeting.Start(nprocs, devices, platform, script, arguments)


def meet_all(address, shapes, count=None, seconds=20.0):
    """Node k with (nprocs, devices) of ``shapes[k]`` -> futures of (party, events)."""

    def meet(node, nprocs, devices):
        events = queue.SimpleQueue()
        nodes = Nodes(count or len(shapes), node, address, lost_after=1.0, join_timeout=seconds)
        return meeting.meet(nodes, start(nprocs, devices), 1234 if node == 0 else 1, events), events

    with ThreadPoolExecutor() as pool:
        return [pool.submit(meet, node, *shape) for node, shape in enumerate(shapes)]


def connected(address):
    """A connection to node 0's launcher, once that listens."""
    host, port = address.split(":")
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=20)
        except ConnectionRefusedError:
            continue


def test_three_launchers_end_a_job_by_the_failure_of_one(address):
    met = [future.result() for future in meet_all(address, [(2, 1)] * 3)]
    assert [party.service_port for party, _ in met] == [1234] * 3
    assert [party.count for party, _ in met] == [2, 1, 1]
    outcomes = {}

    def run(node):
        party, events = met[node]
        outcomes[node] = wait(events, 2, timeout=None, grace=0.5, others=party)

    threads = [threading.Thread(target=run, args=(node,), daemon=True) for node in range(3)]
    for thread in threads:
        thread.start()
    # A process of node 2 fails; no launcher hears anything else.
    met[2][0].tell_failed(4, 9)
    met[2][1].put(Event(met[2][0].title(4), 9))
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert outcomes == dict.fromkeys(range(3), Outcome(9))
    for party, _ in met:
        party.close(9)


@pytest.mark.parametrize("cause_first", [True, False])
def test_the_cause_on_another_node_gives_the_code(address, cause_first):
    """Process 1 of node 1 chose the code 7; process 0 of node 0 lost it and raised."""
    met = [future.result() for future in meet_all(address, [(1, 1)] * 2)]
    outcomes = {}

    def run(node):
        party, events = met[node]
        outcomes[node] = wait(events, 1, timeout=None, grace=1.5, others=party)

    threads = [threading.Thread(target=run, args=(node,), daemon=True) for node in range(2)]
    for thread in threads:
        thread.start()
    for node, code in ((1, 7), (0, 1)) if cause_first else ((0, 1), (1, 7)):
        party, events = met[node]
        party.tell_failed(node, code)
        events.put(Event(party.title(node), code))
        time.sleep(0.3)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert outcomes == dict.fromkeys(range(2), Outcome(7))
    for party, _ in met:
        party.close(7)


def test_a_silent_node_is_lost_and_one_that_leaves_is_not(address):
    (first, heard), (second, _) = (future.result() for future in meet_all(address, [(4, 1)] * 2))
    second.close(130)
    left = heard.get(timeout=20)
    assert (left.code, left.lost, left.ends) == (130, False, 1)
    assert left.says == "was ended, with signal 2 (SIGINT)"
    first.close(0)
    again = address.replace("127.0.0.1", "localhost")
    (first, heard), (second, _) = (future.result() for future in meet_all(again, [(4, 1)] * 2))
    second._over.set()  # it lives, but says nothing more
    lost = heard.get(timeout=20)
    assert (lost.code, lost.lost, lost.title) == (1, True, "node 1 (127.0.0.1, processes 4 to 7)")
    assert lost.says == "has not answered for 1 s: the machine or the link to it is down"
    first.close(1)
    second.close(1)


def test_nonsense_is_a_loss(address):
    (first, heard), (second, _) = (future.result() for future in meet_all(address, [(1, 1)] * 2))
    second._wires[0].send(failed="a name", code=None)
    lost = heard.get(timeout=20)
    assert (lost.lost, lost.title) == (True, "node 1 (127.0.0.1, processes 1 to 1)")
    first.close(1)
    second.close(1)


def test_the_rest_hear_which_node_was_lost(address):
    """Node 2 has a wire to node 0 only, and would else read no more than that node 0 ended the job."""
    met = [future.result() for future in meet_all(address, [(2, 1)] * 3)]
    (_, heard0), (second, _), (_, heard2) = met
    second._wires[0].close()
    lost = heard2.get(timeout=20)
    assert (lost.code, lost.lost, lost.ends) == (1, True, 0)
    assert lost.title == "node 1 (127.0.0.1, processes 2 to 3)"
    assert (lost.title, lost.says) == ((event := heard0.get(timeout=20)).title, event.says)
    for party, _ in met:
        party.close(1)


def test_stacks_are_wanted_where_another_node_ran_out_of_time(address):
    met = [future.result() for future in meet_all(address, [(1, 1)] * 3)]
    met[1][0].close(124)
    for _, heard in (met[0], met[2]):
        left = heard.get(timeout=20)
        assert (left.title, left.code, left.lost) == ("node 1's launcher", 124, True)
    for party, _ in met:
        party.close(124)


def test_a_node_that_is_started_again_takes_its_place(address, capfd):
    """Its launcher was ended while others were still to come."""
    with ThreadPoolExecutor() as pool:
        events = [queue.SimpleQueue() for _ in range(3)]
        nodes = [Nodes(3, node, address, join_timeout=20) for node in range(3)]
        futures = [pool.submit(meeting.meet, nodes[0], start(), 1234, events[0])]
        wire = Wire(connected(address), 5)
        wire.send(format=meeting._FORMAT, node=1, **start().as_message(nodes[1]))
        wire.close()
        futures += [pool.submit(meeting.meet, nodes[i], start(), 1, events[i]) for i in (1, 2)]
        parties = [future.result() for future in futures]
    assert [party.service_port for party in parties] == [1234] * 3
    assert "node 1 was started again, by 127.0.0.1" in capfd.readouterr().err
    for party in parties:
        party.close(0)


def test_two_nodes_with_one_number_are_refused(address):
    events = [queue.SimpleQueue() for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        futures = [
            pool.submit(meeting.meet, Nodes(3, node, address, join_timeout=8), start(), 1, events[i])
            for i, node in enumerate((0, 1, 1))
        ]
        errors = [future.exception() for future in futures]
    text = "node=1 must be another on each node; 127.0.0.1 gave it; correct one"
    assert str(errors[0]) == text
    assert {str(error) for error in errors[1:]} == {f"node 0 refused node 1: {text}"}


def test_a_look_for_open_ports_ends_nothing(address):
    """A connection that is reset before it is taken has no peer's name any more."""
    with ThreadPoolExecutor() as pool:
        futures = pool.submit(meet_all, address, [(1, 1)], 2, 20.0)
        host, port = address.split(":")
        for _ in range(20):
            with socket.socket() as scan:
                scan.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                scan.connect_ex((host, int(port)))
        second = meeting.meet(Nodes(2, 1, address, join_timeout=20), start(), 0, queue.SimpleQueue())
        first, _ = futures.result()[0].result()
    first.close(0)
    second.close(0)


def meet_two(address, first, second):
    """What two launchers that were started so raise."""
    with ThreadPoolExecutor() as pool:
        futures = [
            pool.submit(meeting.meet, Nodes(2, i, address, join_timeout=20), of_node, 1, queue.SimpleQueue())
            for i, of_node in enumerate((first, second))
        ]
        return [future.exception() for future in futures]


@pytest.mark.parametrize(
    ("different", "theirs", "ours"),
    [
        ({"nprocs": 3, "devices": 2}, "nprocs=3, devices_per_process=2", "nprocs=1, devices_per_process=1"),
        ({"platform": "cpu"}, "platform='cpu'", "platform=None"),
        ({"script": "other.py"}, "script='other.py'", "script='train.py'"),
        ({"script": "-m train"}, "script='-m train'", "script='train.py'"),
    ],
)
def test_nodes_that_were_started_differently_are_told_both_values(address, different, theirs, ours):
    first, second = meet_two(address, start(), start(**different))
    assert isinstance(first, ConfigError)
    text = f"node 1 (127.0.0.1) was started with {theirs}, node 0 with {ours}; start all nodes alike"
    assert str(first) == text
    assert str(second) == f"node 0 refused node 1: {first}"


@pytest.mark.parametrize(
    ("theirs", "ours", "name"),
    [
        (("--steps=5", "a"), ("--steps=4", "b"), "argument 1={!r}"),
        (("x", "y \udcff"), ("x",), "argument 2={!r}"),  # with a byte that is no text
        ((), ("x",), "argument 1={!r}"),
        # As many as the kernel lets a process have.
        (("x" * 100_000,) * 20, (*("x" * 100_000,) * 19, "y"), "argument 20={!r}"),
    ],
)
def test_the_first_other_argument_is_told_with_a_way_out(address, theirs, ours, name):
    first, second = meet_two(address, start(arguments=ours), start(arguments=theirs))
    assert isinstance(first, ConfigError)
    i = int(name.split("=")[0].split()[1]) - 1
    their, our = (name.format(dict(enumerate(of)).get(i)) for of in (theirs, ours))
    assert str(first) == (
        f"node 1 (127.0.0.1) was started with {their}, node 0 with {our}; start all nodes alike; "
        "what is to be another on each goes by an environment variable"
    )
    assert str(second) == f"node 0 refused node 1: {first}"


def test_another_version_of_the_launcher_is_refused(address, monkeypatch):
    with ThreadPoolExecutor() as pool:
        first = pool.submit(meeting.meet, Nodes(2, 0, address), start(), 1, queue.SimpleQueue())
        with connected(address) as old:
            old.sendall(b'{"format": "jax-moriep launch 1", "node": 1, "nodes": 2, "nprocs": 1}\n')
            said = old.makefile().readline()
        error = first.exception()
    assert isinstance(error, ConfigError)
    text = "speaks 'jax-moriep launch 1', node 0 'jax-moriep launch 2'; install one version everywhere"
    assert str(error) == f"node 1 (127.0.0.1) {text}"
    assert json.loads(said) == {"refused": str(error)}


def test_a_node_that_does_not_come_is_named(address):
    first, second = (future.exception() for future in meet_all(address, [(2, 1)] * 2, count=4, seconds=1.5))
    assert isinstance(first, TransportError)
    assert f"of 4 nodes these did not come to {address} within 1.5 s: [2, 3]" in str(first)
    assert "did not come" in str(second) or "no launcher of node 0" in str(second)


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"[" * 100_000 + b"\n", b'{"node": 1e999, "format": ""}\n']
)
def test_a_stranger_is_ignored(address, said, capfd):
    with ThreadPoolExecutor() as pool:
        futures = pool.submit(meet_all, address, [(1, 1)], 2)
        with connected(address) as stranger:
            stranger.sendall(said)
            assert stranger.recv(1) == b""
        events = queue.SimpleQueue()
        second = meeting.meet(Nodes(2, 1, address), start(), 0, events)
        first, _ = futures.result()[0].result()
    assert "ignores 127.0.0.1, which is no launcher of this version" in capfd.readouterr().err
    first.close(0)
    assert events.get(timeout=20).verdict
    second.close(0)


def test_who_is_silent_holds_up_nobody(address, capfd):
    """One says nothing, one half a line, and one begins before another and ends after it."""
    said = {"format": meeting._FORMAT, "node": 2, **start().as_message(Nodes(3, 2, address))}
    greeting = json.dumps(said).encode() + b"\n"
    with ThreadPoolExecutor() as pool:
        futures = pool.submit(meet_all, address, [(1, 1)], 3)
        with connected(address), connected(address) as half, connected(address) as slow:
            half.sendall(greeting[:-1])
            slow.sendall(greeting[:20])
            begin = time.monotonic()
            joined = pool.submit(meeting.meet, Nodes(3, 1, address), start(), 0, queue.SimpleQueue())
            time.sleep(0.5)
            slow.sendall(greeting[20:])
            second = joined.result(20)
            first, _ = futures.result()[0].result()
            assert time.monotonic() - begin < meeting._GREETING_SECONDS / 2
            assert slow.makefile().readline() == '{"service_port": 1234}\n'
    assert "ignores" not in capfd.readouterr().err
    first.close(0)
    second.close(0)


def test_who_stays_silent_is_ignored(address, capfd, monkeypatch):
    monkeypatch.setattr(meeting, "_GREETING_SECONDS", 0.2)
    with ThreadPoolExecutor() as pool:
        futures = pool.submit(meet_all, address, [(1, 1)], 2)
        with connected(address) as silent:
            assert silent.recv(1) == b""
        second = meeting.meet(Nodes(2, 1, address), start(), 0, queue.SimpleQueue())
        first, _ = futures.result()[0].result()
    assert "ignores 127.0.0.1, which is no launcher of this version" in capfd.readouterr().err
    first.close(0)
    second.close(0)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0, 0, "host:1"), "nodes=0 must be at least 1"),
        ((2, 2, "host:1"), "node=2 must be from 0 to nodes-1=1"),
        ((2, 0, "host"), "coordinator='host' must be HOST:PORT"),
        ((2, 0, "host:70000"), "coordinator='host:70000' must be HOST:PORT"),
        ((2, 0, "a..b:1"), "coordinator='a..b:1' must be HOST:PORT"),
        ((2, 0, "::1:29400"), "must be HOST:PORT, with brackets around an IPv6 address"),
        ((2, 0, "host:1", 0.0), "lost_after=0.0 must be positive"),
        ((2, 0, "host:1", 1.0, float("inf")), r"join_timeout=inf must be positive, and at most 1e\+09"),
    ],
)
def test_wrong_values_are_refused(values, text):
    with pytest.raises(ConfigError, match=text):
        Nodes(*values)


def test_a_coordinator_of_another_machine_is_refused():
    # An address that is kept for documentation and is nobody's.
    with pytest.raises(ConfigError, match="must be an address of node 0's machine with a free port"):
        meeting.meet(Nodes(2, 0, "192.0.2.1:4000"), start(), 0, queue.SimpleQueue())


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (["10.1.2.3"], "must mean an address of this machine"),
        (["127.0.1.1"], "must not be this machine's loopback 127.0.1.1"),
        ([], "must resolve on its own machine"),
    ],
)
def test_a_name_that_others_cannot_use_is_explained(monkeypatch, found, text):
    def getaddrinfo(name, port, **kwargs):
        if not found:
            raise socket.gaierror("unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert text in why_name_misleads()
