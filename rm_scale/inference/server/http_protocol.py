"""uvicorn's HTTP/1.1 connection, with a limit on the time until a request's headers are complete.

uvicorn has none: who sends a byte of a header now and then holds a connection for ever, and no middleware sees it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol_with_header_limit(seconds: float) -> type[asyncio.Protocol]:
    """Return the class of a connection that is closed when a request's headers take longer than so many seconds.

    The time begins with the connection, and with the first byte of each further request on it. Between requests
    uvicorn's own limit for idle connections holds.
    """

    class TimedProtocol(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

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
