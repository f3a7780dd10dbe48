"""ASGI middleware around the routes: check the token, the client's rate and the body's size, then count the answer.

It gives each request an id and reads the body as a whole before anybody parses it, within a limit of bytes and of time,
so that a slow or endless client holds nothing but its own connection. Which size and rate are too much is decided in
`request_limits.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from rm_scale.inference.serve_token import checked_token
from rm_scale.inference.server.prometheus_metrics import Metrics
from rm_scale.inference.server.refusals import phrase_headers, problem_body
from rm_scale.inference.server.request_limits import RateLimit, Refused, require_small_body, slow_body
from rm_scale.inference.server.server_options import ServerOptions
from rm_scale.logs import get_logger

logger = get_logger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ALWAYS_OPEN = ("/health", "/ready")
"""Asked by load balancers, which have no token."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CLIENT_LEFT = 499
_MOST_DROPPED_BYTES = 64 * 2**20
"""Of the rest of a refused request's body that is read and dropped: clients that write it all first get the answer."""


@dataclass
class Admission:
    """Whether new requests are accepted, and how many are being answered.

    Attributes:
        accepting: False once the server has been asked to stop.
        in_flight: requests that were accepted and are not answered.
    """

    accepting: bool = True
    in_flight: int = 0


class ClientLeft(Exception):
    """The client closed the connection before it had sent all."""


class RequestMiddleware:
    """An ASGI application that checks each request and hands it to another.

    Args:
        app: the routes.
        options: how large a body may be, how long it may take, how often a client may ask.
        metrics: where requests are counted.
        admission: whether requests are accepted; kept up to date here.
        token: what `Authorization: Bearer` must hold; `None`: anybody may ask.
    """

    def __init__(
        self, app: Any, options: ServerOptions, metrics: Metrics, admission: Admission, token: str | None
    ) -> None:
        self.app = app
        self.options = options
        self.metrics = metrics
        self.admission = admission
        self.token = None if token is None else checked_token(token, "token", "a token that is not empty, or none.")
        self.rate = RateLimit(options.requests_per_second) if options.requests_per_second is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await _Request(self, scope, receive, send).serve()


class _Request:
    """One request, from its headers to its answer."""

    def __init__(self, middleware: RequestMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        self.middleware, self.scope, self._receive, self._send = middleware, scope, receive, send
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = self.headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.started = time.perf_counter()
        self.status = 0
        self.is_read = False

    async def serve(self) -> None:
        """Check the request, read its body and hand both to the routes; refuse it where a check fails."""
        around = self.middleware
        around.metrics.in_flight.inc()
        around.admission.in_flight += 1
        self.scope.setdefault("state", {})["request_id"] = self.request_id
        try:
            self._check()
            body = await self._read_body()
            await around.app(self.scope, self._replay(body), self.send)
        except Refused as refused:
            await self.refuse(refused)
        except ClientLeft:
            self.status = _CLIENT_LEFT
        finally:
            around.metrics.in_flight.dec()
            around.admission.in_flight -= 1
            self._count()

    def _check(self) -> None:
        """Refuse a request without the token, one that comes while the server stops, or one that comes too soon."""
        if self.scope["path"] in ALWAYS_OPEN:
            return
        if self.middleware.token is not None:
            scheme, _, given = self.headers.get("authorization", "").partition(" ")
            # In constant time, so that nobody can find it letter by letter.
            good = hmac.compare_digest(given.strip().encode(), self.middleware.token.encode())
            if scheme.lower() != "bearer" or not good:
                raise Refused(401, "unauthorized", "no valid token. Fix: Authorization: Bearer TOKEN.")
        if not self.middleware.admission.accepting:
            raise Refused(503, "stopping", "the server is stopping. Fix: ask another one.", retry_after_seconds=1.0)
        if self.middleware.rate is not None:
            self.middleware.rate.require((self.scope.get("client") or ("unknown",))[0])

    async def _read_body(self) -> bytes:
        options = self.middleware.options
        length = self.headers.get("content-length", "")
        if length.isdigit():
            require_small_body(int(length), options)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(options.body_timeout_seconds):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    part = message.get("body", b"")
                    size += len(part)
                    require_small_body(size, options)
                    parts.append(part)
                    if not message.get("more_body", False):
                        self.is_read = True
                        return b"".join(parts)
        except TimeoutError:
            raise slow_body(options) from None

    def _replay(self, body: bytes) -> Receive:
        """Return a `receive` that yields the body once, then whatever the connection says."""
        given = False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await self._receive()

        return receive

    async def send(self, message: Message) -> None:
        """Hand on what the application sends, with the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        """Answer with what is wrong."""
        self.middleware.metrics.refused.labels(refused.reason).inc()
        path = self.scope["path"]
        body = json.dumps(problem_body(path, refused.status, refused.text, refused.reason, self.request_id)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(key.encode(), value.encode()) for key, value in phrase_headers(path, refused.text).items()]
        if refused.retry_after_seconds is not None:
            headers.append((b"retry-after", str(max(1, round(refused.retry_after_seconds))).encode()))
        if refused.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if refused.status in {408, 413}:
            # The body is not read to its end; the connection can't be used again.
            headers.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": True})
        await self._drop_rest()
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drop_rest(self) -> None:
        """Read what is left of a refused body, within bounds of size and time, and keep nothing of it.

        A connection that is closed while its client still writes is reset, and the client may never see the answer.
        """
        asks_first = self.headers.get("expect", "").lower() == "100-continue"  # it was not told to go on
        if self.is_read or asks_first or self.status == 408:
            return
        left = _MOST_DROPPED_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.middleware.options.body_timeout_seconds):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return

    def _count(self) -> None:
        route = getattr(self.scope.get("route"), "path", "other")
        seconds = time.perf_counter() - self.started
        self.middleware.metrics.requests.labels(route, str(self.status)).inc()
        self.middleware.metrics.seconds.labels(route).observe(seconds)
        logger.debug(f"{self.request_id} {self.scope['method']} {route} {self.status} {seconds:.3f} s")
