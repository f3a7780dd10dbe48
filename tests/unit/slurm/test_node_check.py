"""The check of a job's nodes before any rank starts, played by threads: what they see, how they meet, strangers."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rm_scale.files import free_port
from rm_scale.meeting import EXIT_PORT_TAKEN
from rm_scale.slurm.check_meeting import greeting
from rm_scale.slurm.job_start import Start
from rm_scale.slurm.node_check import _missing, check_node, judge, look_around, mark_folders, token_path

GENEROUS = "600"
"""Seconds that nodes may take where all of them come."""


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Two nodes, played by two threads."""
    monkeypatch.setenv("RM_SCALE_CHECK_SECONDS", GENEROUS)
    train = tmp_path / "train.py"
    train.touch()
    folder = tmp_path / "logs" / "7" / "attempt-0"
    folder.mkdir(parents=True)
    words: dict[str, Any] = {"job_id": 7, "attempt": 0, "nodes": ("a", "b"), "ranks_per_node": 2, "gpus_per_node": 0}
    words |= {"master_addr": "127.0.0.1", "master_port": free_port(), "train": str(train), "settings": (), "asked": ()}
    start = Start(**words, output_dir=str(tmp_path / "out"), folder=str(folder))
    mark_folders(start)
    return start


@contextmanager
def beside(*played: Callable[[], object]) -> Iterator[None]:
    """Run these in threads beside the block, and wait for them."""
    threads = [threading.Thread(target=one, daemon=True) for one in played]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(600)
        assert not thread.is_alive()


def connect(start: Start) -> socket.socket:
    """A connection to the first node, as soon as it listens, after its greeting."""
    end = time.monotonic() + 600
    while True:
        try:
            link = socket.create_connection((start.master_addr, start.master_port), timeout=600)
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.02)
        else:
            assert link.makefile("rb").readline() == greeting(start)
            return link


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_nodes_meet_and_leave_nothing(pair: Start, capsys: pytest.CaptureFixture[str], address: str) -> None:
    if address == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    there = replace(pair, master_addr=address)
    with beside(lambda: check_node(there, 1)):
        assert check_node(there, 0) == 0
    assert not token_path(Path(pair.output_dir), pair).exists()
    assert capsys.readouterr().err == ""


def test_a_node_that_does_not_come_is_named(
    pair: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RM_SCALE_CHECK_SECONDS", "1")
    assert check_node(pair, 0) == 2
    assert "b: did not answer within 1 s and left no sign" in capsys.readouterr().err


def test_a_port_that_was_taken_meanwhile(pair: Start, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", pair.master_port)):
        assert check_node(pair, 0) == EXIT_PORT_TAKEN
    assert f"port {pair.master_port} on a: Address already in use. Fix: submit again" in capsys.readouterr().err


def test_a_node_that_runs_but_can_not_connect_says_so(pair: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RM_SCALE_CHECK_SECONDS", "1")
    assert check_node(pair, 1) == 0, "the first node speaks"
    assert "b: runs, but can't reach 127.0.0.1 on port" in _missing(pair, "b")


def test_a_node_that_reaches_another_program_says_so_at_once(pair: Start) -> None:
    """The first node's name leads somewhere else, where something listens at that port."""
    with socket.create_server(("127.0.0.1", pair.master_port)) as server, ExitStack() as links:

        def answer() -> None:
            for _ in range(2):
                link = links.enter_context(server.accept()[0])
                link.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        with beside(answer):
            assert check_node(pair, 1) == 0
    assert "b: runs, but can't reach 127.0.0.1 on port" in _missing(pair, "b")
    assert "another program answers there" in _missing(pair, "b")


def test_strangers_at_the_port_are_passed_over(pair: Start) -> None:
    """Those that talk, those that say nothing and stay, and the node of another job: none of them is waited for."""
    other_job = json.dumps({"node": "z", "gpus": 8}).encode() + b"\n"
    wild = [
        b"GET / HTTP/1.0\r\n\r\n",
        b"[1]\n",
        b'{"node": ["b"]}\n',
        b"\xff\n",
        b"x" * 70_000,
        b"[" * 60_000 + b"\n",
        other_job,
    ]
    all_here = threading.Barrier(len(wild) + 2, timeout=600)
    over = threading.Event()

    def stranger(words: bytes) -> None:
        with connect(pair) as link:
            with suppress(ConnectionError):
                link.sendall(words)
            all_here.wait()
            with suppress(ConnectionError):
                assert link.recv(100) == b""

    def stays_silent() -> None:
        with connect(pair):
            all_here.wait()
            assert over.wait(600)

    def node() -> None:
        all_here.wait()
        check_node(pair, 1)

    with beside(node, stays_silent, *(partial(stranger, words) for words in wild)):
        assert check_node(pair, 0) == 0
        over.set()


def test_a_report_may_come_in_pieces_and_twice(pair: Start) -> None:
    """A node whose connection broke comes again; what it says last counts, whoever of the two is still there."""
    three = replace(pair, nodes=("a", "b", "c"))
    seen = look_around(three, 1)

    def twice() -> None:
        first = connect(three)
        line = json.dumps({**seen, "train": False}).encode() + b"\n"
        for part in (line[:5], line[5:30], line[30:]):
            first.sendall(part)
        second = connect(three)
        second.sendall(json.dumps(seen).encode() + b"\n")
        check_node(three, 2)
        first.close()
        assert second.recv(1) == b"h", "told that enough was heard"

    with beside(twice):
        assert check_node(three, 0) == 0


def test_what_nodes_see_is_judged(pair: Start) -> None:
    first = look_around(pair, 0)
    assert judge(pair, {"a": first, "b": {**first, "node": "b"}}) == []
    token_path(Path(pair.output_dir), pair).write_text("another job's")
    blind = look_around(pair, 1)
    (told,) = judge(pair, {"a": first, "b": blind})
    assert "output_dir=" in told and "b sees another content there than a wrote" in told
    token_path(Path(pair.output_dir), pair).unlink()
    assert "b can't see what a wrote there" in judge(pair, {"a": first, "b": look_around(pair, 1)})[0]
    (told,) = judge(replace(pair, gpus_per_node=8), {"a": {**first, "gpus": 8}, "b": {**first, "gpus": 4}})
    assert told == "GPUs per node: a has 8, b has 4. Fix: ask for --gpus-per-node=N rather than --gpus=N."
    (told,) = judge(pair, {"a": first, "b": {**first, "train": False}})
    assert "not on b. Fix: install rm_scale on the shared disk" in told


@pytest.mark.parametrize(
    ("interface", "address", "told"),
    [
        ("", "10.0.0.2", ""),
        (
            "",
            "127.0.1.1",
            "b: its host name stands for 127.0.1.1, where others don't reach it. Fix: name the",
        ),
        ("ib9", "", "GLOO_SOCKET_IFNAME=ib9: b has no such interface .* RM_SCALE_INTERFACE .*; b has eth0, ib0"),
        ("ib0", "fd00::2", r"addresses for gloo: a has IPv4 \(10.0.0.1\), b has IPv6 \(fd00::2\)"),
    ],
)
def test_addresses_by_which_ranks_could_not_connect_are_told(
    pair: Start, interface: str, address: str, told: str
) -> None:
    pair = replace(pair, master_addr="a")
    first = {**look_around(pair, 0), "gloo": {"interface": "", "address": "10.0.0.1", "present": ["eth0"]}}
    gloo = {"interface": interface, "address": address, "present": ["eth0", "ib0"]}
    problems = judge(pair, {"a": first, "b": {**first, "gloo": gloo}})
    assert re.search(told, " ".join(problems)) if told else not problems
    assert not judge(replace(pair, master_addr="127.0.0.1"), {"a": first, "b": {**first, "gloo": gloo}}), "one machine"


def test_the_check_sees_what_ranks_will_use(pair: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib9")
    assert look_around(pair, 1)["gloo"]["interface"] == "ib9" and look_around(pair, 1)["gloo"]["address"] == ""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("rm_scale.network.address_of_own_name", lambda: "127.0.1.1")
    for module in ("rm_scale.network", "rm_scale.slurm.node_check"):
        monkeypatch.setattr(f"{module}.interfaces", lambda: {"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"]})
    monkeypatch.setattr("rm_scale.network.address_towards", {"a": "10.0.0.2"}.get)
    seen = look_around(replace(pair, master_addr="a"), 1)["gloo"]
    assert seen == {"interface": "eth0", "address": "10.0.0.2", "present": ["eth0"]}
    assert "gloo" not in look_around(replace(pair, nodes=("a",)), 0), "on one node it is the loopback"
