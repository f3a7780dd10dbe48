"""A real server on a free port: in this process for most tests, in its own for signals."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn

from rm_scale.files import free_port
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.inference.server.app import build_app
from rm_scale.inference.server.http_protocol import protocol_with_header_limit
from rm_scale.inference.server.run_server import listen
from rm_scale.inference.server.server_options import ServerOptions
from rm_scale.inference.server.service import Service
from tests.support.launching import environment


@contextmanager
def served(
    scorer: RewardScorer, options: ServerOptions | None = None, token: str | None = None
) -> Iterator[tuple[str, Service]]:
    """Serve in a thread; gives the address and the service."""
    service = Service(scorer, "tiny", options or ServerOptions())
    bound = listen("127.0.0.1", 0)
    http = protocol_with_header_limit(service.options.header_timeout_seconds)
    server = uvicorn.Server(uvicorn.Config(build_app(service, token), log_level="error", http=http))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started or not thread.is_alive())
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(600)
        bound.close()


@contextmanager
def serving_process(model: Path, *words: str, **variables: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`rm-scale serve` as a user starts it, ready."""
    port = free_port()
    command = [sys.executable, "-m", "rm_scale.cli", "serve", "--model", str(model), "--port", str(port), *words]
    process = subprocess.Popen(
        command, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: is_ready(url) or process.poll() is not None, 120)
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        yield url, process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def is_ready(url: str) -> bool:
    """Does it take work?"""
    try:
        return httpx.get(f"{url}/ready", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def wait_for(condition: object, seconds: float = 60.0) -> None:
    """Until a condition holds."""
    assert callable(condition)
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)
