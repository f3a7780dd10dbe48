"""uvicorn's HTTP/1.1 connection, with a limit on the time until a request's headers are complete, and reason phrases.

uvicorn has no such limit: who sends a byte of a header now and then holds a connection for ever, and no middleware sees
it. Nor can an application say what stands beside the status in an answer's first line, which some clients show alone.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REASON_HEADER = "x-reason-phrase"
"""A header of an answer that becomes its reason phrase, and is not sent."""


class _PhrasedConnection(h11.Connection):
    """Puts the text of `REASON_HEADER` beside the status."""

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        if isinstance(event, h11.Response):
            name = REASON_HEADER.encode()
            phrase = next((value for key, value in event.headers if key == name), None)
            if phrase is not None:
                headers = [(key, value) for key, value in event.headers if key != name]
                event = h11.Response(status_code=event.status_code, headers=headers, reason=phrase)
        return super().send_with_data_passthrough(event)


def protocol_with_header_limit(seconds: float) -> type[asyncio.Protocol]:
    """Return the class of a connection that is closed when a request's headers take longer than so many seconds.

    The time begins with the connection, and with the first byte of each further request on it. Between requests
    uvicorn's own limit for idle connections holds.
    """

    class TimedProtocol(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.conn.__class__ = _PhrasedConnection

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._waiting = self.loop.call_later(seconds, self._close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:  # headers are complete
                self._stop_waiting()
            elif self._waiting is None and not self.transport.is_closing():
                self._waiting = self.loop.call_later(seconds, self._close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _stop_waiting(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        def _close(self) -> None:
            self._waiting = None
            self.transport.close()

    return TimedProtocol
