"""Run the application under uvicorn, and stop it so that nothing that was accepted is lost."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from typing import Any

import uvicorn

from rm_scale.errors import UserError
from rm_scale.inference.server.http_protocol import protocol_with_header_limit
from rm_scale.inference.server.service import Service
from rm_scale.logs import get_logger
from rm_scale.texts import one_line

logger = get_logger(__name__)

_NOTICE_SECONDS = 0.5
"""A load balancer that asks /ready is told first; requests that are on their way still come in."""


class DrainingServer(uvicorn.Server):
    """Stop accepting at the first signal, answer what was accepted, then end; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to drain at the first signal, end at the second; runs in the event loop, see `serve`."""
        if self._draining is not None or not self.started:
            self.force_exit = True
            self.should_exit = True
            return
        self.service.admission.accepting = False
        logger.info(f"signal {sig}: {self.service.admission.in_flight} requests are answered first")
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve as uvicorn does, and remember the event loop for `stop_soon`."""
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def stop_soon(self, sig: int, frame: Any) -> None:
        """Handle a signal in the main thread, while the loop runs in another."""
        if self.loop is not None and self.loop.is_running():
            self.loop.call_soon_threadsafe(self.handle_exit, sig, frame)
        else:
            self.should_exit = True

    async def _drain(self) -> None:
        await asyncio.sleep(_NOTICE_SECONDS)
        until = asyncio.get_running_loop().time() + self.service.options.drain_seconds
        while self.service.admission.in_flight and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.05)
        if self.service.admission.in_flight:
            logger.warning(f"{self.service.admission.in_flight} requests are not answered in time")
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket and return it.

    Raises:
        UserError: the address can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (socket.gaierror, UnicodeError) as error:  # the latter: a part of the name is empty or too long
        bound.close()
        raise UserError(
            f"host={one_line(host, 80)}: is no address of this machine, and no name that can be resolved "
            f"({one_line(error, 80)}). Fix: an address of this machine, or 0.0.0.0 for all of them."
        ) from error
    except OSError as error:
        bound.close()
        raise UserError(
            f"host={host} port={port}: can't be listened on ({error.strerror}). Fix: another --port, or 0 for any."
        ) from error
    return bound


def serve(app: Any, service: Service, host: str, port: int) -> int:
    """Serve until a signal comes; return 0, or 1 when the server could not start.

    Raises:
        UserError: the address can't be had.
    """
    bound = listen(host, port)
    address = bound.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    logger.info(f"serving {service.name} on http://{shown}:{address[1]}")
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        http=protocol_with_header_limit(service.options.header_timeout_seconds),
        # What is not answered by then is cut; the drain has waited already.
        timeout_graceful_shutdown=1,
        timeout_keep_alive=30,
    )
    server = DrainingServer(config, service)
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, server.stop_soon)
    thread = threading.Thread(target=_run, args=(server, service, bound), name="http", daemon=True)
    thread.start()
    # Scoring has the main thread: on processors a forward pass in another one takes half as long again.
    service.batcher.run()
    thread.join()
    bound.close()
    return 0 if server.started else 1


def _run(server: DrainingServer, service: Service, bound: socket.socket) -> None:
    try:
        server.run(sockets=[bound])
    finally:
        service.batcher.stop(0.0)
