"""`ServerOptions`: the numbers a server is started with; `request_limits.py` refuses requests by them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerOptions:
    """Bounds that keep a server answering, whatever it is sent.

    Attributes:
        max_body_bytes: of a request; larger ones get 413.
        max_items: texts of a request; more get 413.
        max_queue_tokens: tokens that wait at most; what would be above gets 429.
        max_tokens_per_batch: tokens of a forward pass.
        request_timeout_seconds: from the body to the answer; then 504.
        body_timeout_seconds: for a body to arrive; then 408.
        header_timeout_seconds: for a request's headers to arrive; then the connection is closed.
        max_wait_seconds: a batch that is not full waits so long for more, at most.
        requests_per_second: of one client, by address; `None`: any number. More get 429.
        drain_seconds: for what was accepted, after a signal to stop.
    """

    max_body_bytes: int = 4 * 2**20
    max_items: int = 1024
    max_queue_tokens: int = 1_000_000
    max_tokens_per_batch: int = 4096
    request_timeout_seconds: float = 60.0
    body_timeout_seconds: float = 20.0
    header_timeout_seconds: float = 10.0
    max_wait_seconds: float = 0.0
    requests_per_second: float | None = None
    drain_seconds: float = 30.0
