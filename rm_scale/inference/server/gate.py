"""What every request passes before its route: identity, permission, pace, and a body that is small enough and comes.

A plain ASGI application around another, since it must see the body before anybody parses it. The body is read here as a
whole, within a limit of bytes and of time, so that a slow or endless client holds nothing but its own connection.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from rm_scale.inference.server.limits import Limits, RateLimit, Refused
from rm_scale.inference.server.metrics import Metrics
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


@dataclass
class Doors:
    """Whether new work is taken on, and how much is being done.

    Attributes:
        open: False once the server has been asked to stop.
        in_flight: requests that were let in and are not answered.
    """

    open: bool = True
    in_flight: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class ClientLeft(Exception):
    """The client closed the connection before it had sent all."""


class Gate:
    """The application behind its gate.

    Args:
        app: what answers.
        limits: bounds.
        metrics: what is counted.
        doors: open or not.
        token: what `Authorization: Bearer` must hold; `None`: anybody may ask.
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics, doors: Doors, token: str | None) -> None:
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self.doors = doors
        self.token = token
        self.rate = RateLimit(limits.requests_per_second) if limits.requests_per_second is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await _Passage(self, scope, receive, send).go()


class _Passage:
    """One request on its way through."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self.gate, self.scope, self._receive, self._send = gate, scope, receive, send
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = self.headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.started = time.perf_counter()
        self.status = 0

    async def go(self) -> None:
        gate = self.gate
        gate.metrics.in_flight.inc()
        gate.doors.in_flight += 1
        self.scope.setdefault("state", {})["request_id"] = self.request_id
        try:
            self._check()
            body = await self._read_body()
            await gate.app(self.scope, self._replay(body), self.send)
        except Refused as refused:
            await self.refuse(refused)
        except ClientLeft:
            self.status = _CLIENT_LEFT
        finally:
            gate.metrics.in_flight.dec()
            gate.doors.in_flight -= 1
            if not gate.doors.in_flight:
                gate.doors.idle.set()
            self._count()

    def _check(self) -> None:
        """Who asks, whether anything is taken on, and how often the client has asked."""
        if self.scope["path"] in ALWAYS_OPEN:
            return
        if self.gate.token is not None:
            scheme, _, given = self.headers.get("authorization", "").partition(" ")
            # In constant time, so that nobody can find it letter by letter.
            good = hmac.compare_digest(given.strip().encode(), self.gate.token.encode())
            if scheme.lower() != "bearer" or not good:
                raise Refused(401, "unauthorized", "no valid token. Fix: Authorization: Bearer TOKEN.")
        if not self.gate.doors.open:
            raise Refused(503, "stopping", "the server is stopping. Fix: ask another one.", retry_after_seconds=1.0)
        if self.gate.rate is not None:
            client = (self.scope.get("client") or ("unknown",))[0]
            wait = self.gate.rate.take(client)
            if wait > 0:
                text = f"more than {self.gate.rate.per_second:g} requests per second. Fix: slower."
                raise Refused(429, "rate", text, retry_after_seconds=wait)

    async def _read_body(self) -> bytes:
        limit = self.gate.limits.max_body_bytes
        too_large = Refused(413, "body", f"the body is larger than {limit} bytes. Fix: send fewer texts at once.")
        length = self.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.gate.limits.body_timeout_seconds):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    part = message.get("body", b"")
                    size += len(part)
                    if size > limit:
                        raise too_large
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            seconds = self.gate.limits.body_timeout_seconds
            raise Refused(408, "slow_body", f"the body did not arrive in {seconds:g} s. Fix: send it faster.") from None

    def _replay(self, body: bytes) -> Receive:
        """Give the body once, then whatever the connection says."""
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
        self.gate.metrics.refused.labels(refused.reason).inc()
        body = json.dumps({"detail": refused.text, "reason": refused.reason, "request_id": self.request_id}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if refused.retry_after_seconds is not None:
            headers.append((b"retry-after", str(max(1, round(refused.retry_after_seconds))).encode()))
        if refused.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if refused.status in {408, 413}:
            # The rest of the body is not read; the connection can't be used again.
            headers.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def _count(self) -> None:
        route = getattr(self.scope.get("route"), "path", "other")
        seconds = time.perf_counter() - self.started
        self.gate.metrics.requests.labels(route, str(self.status)).inc()
        self.gate.metrics.seconds.labels(route).observe(seconds)
        logger.debug(f"{self.request_id} {self.scope['method']} {route} {self.status} {seconds:.3f} s")
