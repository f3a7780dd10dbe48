"""What a server takes on, and what it refuses with which status."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds that keep a server answering, whatever it is sent.

    Attributes:
        max_body_bytes: of a request; larger ones get 413.
        max_items: texts of a request; more get 413.
        max_queue_tokens: tokens that wait at most; what would be above gets 429.
        max_tokens_per_batch: tokens of a forward pass.
        request_timeout_seconds: from the body to the answer; then 504.
        body_timeout_seconds: for a body to arrive; then 408.
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
    max_wait_seconds: float = 0.0
    requests_per_second: float | None = None
    drain_seconds: float = 30.0


class Refused(Exception):
    """A request that is not served.

    Args:
        status: HTTP status.
        reason: a word for the metrics.
        text: for the client: what was seen, the rule, the fix.
        retry_after_seconds: when it may try again.
    """

    def __init__(self, status: int, reason: str, text: str, retry_after_seconds: float | None = None) -> None:
        self.status = status
        self.reason = reason
        self.text = text
        self.retry_after_seconds = retry_after_seconds
        super().__init__(text)


class RateLimit:
    """A token bucket per client, of one second's size.

    Args:
        per_second: requests.
        max_clients: remembered at once; the one that was longest silent is forgotten.
    """

    def __init__(self, per_second: float, max_clients: int = 10_000) -> None:
        self.per_second = per_second
        self.size = max(1.0, per_second)
        self.max_clients = max_clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now: float | None = None) -> float:
        """Seconds until this client may send again: 0 when it may now."""
        now = time.monotonic() if now is None else now
        level, since = self._buckets.pop(client, (self.size, now))
        level = min(self.size, level + (now - since) * self.per_second)
        allowed = level >= 1.0
        self._buckets[client] = (level - 1.0 if allowed else level, now)
        while len(self._buckets) > self.max_clients:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - level) / self.per_second
