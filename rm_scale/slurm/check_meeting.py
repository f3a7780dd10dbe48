"""How the nodes of a job meet for their check: the first listens at the port of rank 0, the others report to it.

The first node greets whoever connects with the name of the attempt, hears what each node has seen, and at the end tells
all of them that it has heard enough. So a node knows another program at the port by its words, the first node knows a
stranger by the lack of a report, and none keeps the others waiting.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from rm_scale.network import listen
from rm_scale.slurm.job_start import Start

Findings = dict[str, Any]
"""What a node has seen, to be written as JSON."""

_GREETING_SECONDS = 5.0
"""So long a node waits for the greeting before it connects anew."""
_ENOUGH = b"heard\n"
_LONGEST_LINE = 65_536


def greeting(start: Start) -> bytes:
    """Return the line by which nodes of one attempt know each other."""
    return f"rm_scale job {start.job_id} attempt {start.attempt}\n".encode()


# --- The other nodes -------------------------------------------------------------------------------------------------


class Stranger(ConnectionError):
    """Another program answers at the address and port of the first node: it is not the first node's, or not ours."""


def report(start: Start, findings: Findings, deadline: float, failed: Callable[[str], None]) -> bool:
    """Report to the first node until it has heard; return whether it has.

    Args:
        start: this attempt.
        findings: of this node.
        deadline: on `time.monotonic`; until then the first node may come.
        failed: called with the trouble after each attempt that failed.
    """
    strangers = 0
    while time.monotonic() < deadline and strangers < 2:
        try:
            _report_once(start, findings, deadline)
            return True
        except Stranger as error:
            strangers += 1
            failed(str(error))
        except OSError as error:
            failed(str(error))
        time.sleep(0.2)
    return False


def _report_once(start: Start, findings: Findings, deadline: float) -> None:
    with socket.create_connection((start.master_addr, start.master_port), timeout=5) as link:
        link.settimeout(_GREETING_SECONDS)
        wanted = greeting(start)
        heard = b""
        while len(heard) < len(wanted) and wanted.startswith(heard):
            if not (block := link.recv(len(wanted) - len(heard))):
                raise ConnectionError("the connection was ended without a word")
            heard += block
        if heard != wanted:
            raise Stranger("another program answers there")
        link.sendall(json.dumps({**findings, "address": link.getsockname()[0]}).encode() + b"\n")
        link.settimeout(max(0.1, deadline - time.monotonic()))
        if not link.recv(1):
            raise ConnectionError("the first node has ended the connection")


# --- The first node --------------------------------------------------------------------------------------------------


def hear_nodes(start: Start, deadline: float) -> dict[str, Findings]:
    """Return the reports of the other nodes by name, of as many as come in time.

    Raises:
        OSError: another program has taken the port.
    """
    server = listen(start.master_port)
    with server, selectors.DefaultSelector() as selector:
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ, None)
        hearing = _Hearing(start, selector)
        while len(hearing.heard) < len(start.nodes) - 1 and time.monotonic() < deadline:
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                if key.data is None:
                    hearing.accept(server)
                else:
                    hearing.read(key.data)
        hearing.close()
    return hearing.heard


class _Hearing:
    """The connections of the first node."""

    def __init__(self, start: Start, selector: selectors.BaseSelector) -> None:
        self.heard: dict[str, Findings] = {}
        self._start = start
        self._selector = selector
        self._read_so_far: dict[socket.socket, bytes] = {}
        self._reported: list[socket.socket] = []

    def accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it may have gone again
            link, _ = server.accept()
            link.setblocking(False)
            self._read_so_far[link] = b""
            self._selector.register(link, selectors.EVENT_READ, link)
            try:
                link.sendall(greeting(self._start))
            except OSError:
                self._drop(link)

    def read(self, link: socket.socket) -> None:
        """Read what has come; a whole line must be the report of a node, whose last one counts."""
        try:
            block = link.recv(_LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError:
            block = b""
        text = self._read_so_far[link] + block
        self._read_so_far[link] = text
        if b"\n" not in text:
            if not block or len(text) > _LONGEST_LINE:
                self._drop(link)
            return
        try:
            findings = json.loads(text.partition(b"\n")[0])
            name = findings["node"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = None
        if name not in self._start.nodes[1:]:
            self._drop(link)
            return
        self.heard[name] = findings
        self._selector.unregister(link)
        del self._read_so_far[link]
        self._reported.append(link)  # it waits to be told that enough was heard

    def close(self) -> None:
        """Tell the nodes that have reported that enough was heard, and end all connections."""
        for link in self._reported:
            with contextlib.suppress(OSError):
                link.sendall(_ENOUGH)
        for link in (*self._reported, *self._read_so_far):
            link.close()

    def _drop(self, link: socket.socket) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(link)
        self._read_so_far.pop(link, None)
        link.close()
