"""Decide every refusal for size, number, rate, queue length, time or memory: 413, 429, and 408, 504, 507 beside them.

Who asks (401) and what a text must look like to be scored (422) are decided elsewhere: in `middleware.py`, and where
texts are read. `server_options.py` holds the numbers that are compared with here.
"""

from __future__ import annotations

import time
from collections import OrderedDict

from rm_scale.inference.server.server_options import ServerOptions


class Refused(Exception):
    """A request that is not served.

    Args:
        status: HTTP status.
        reason: a short name for the metrics.
        text: for the client: what was seen, the rule, the fix.
        retry_after_seconds: when it may try again.
    """

    def __init__(self, status: int, reason: str, text: str, retry_after_seconds: float | None = None) -> None:
        self.status = status
        self.reason = reason
        self.text = text
        self.retry_after_seconds = retry_after_seconds
        super().__init__(text)


# --- 413: one request is too large ---------------------------------------------------------------------------------


def require_small_body(num_bytes: int, options: ServerOptions) -> None:
    """Raise `Refused` with 413 for a body above `max_body_bytes`."""
    if num_bytes > options.max_body_bytes:
        text = f"the body is larger than {options.max_body_bytes} bytes. Fix: send fewer texts at once."
        raise Refused(413, "body", text)


def require_few_texts(num_texts: int, options: ServerOptions) -> None:
    """Raise `Refused` with 413 for more texts than `max_items`."""
    if num_texts > options.max_items:
        text = f"{num_texts} texts, at most {options.max_items} in a request. Fix: several requests."
        raise Refused(413, "items", text)


# --- 429: a client asks too often, or too much waits already ---------------------------------------------------------


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

    def require(self, client: str) -> None:
        """Count a request of this client; raise `Refused` with 429 when it comes too early."""
        wait = self.take(client)
        if wait > 0:
            text = f"more than {self.per_second:g} requests per second. Fix: slower."
            raise Refused(429, "rate", text, retry_after_seconds=wait)

    def take(self, client: str, now: float | None = None) -> float:
        """Return the seconds until this client may send again: 0 when it may now, which is counted."""
        now = time.monotonic() if now is None else now
        level, since = self._buckets.pop(client, (self.size, now))
        level = min(self.size, level + (now - since) * self.per_second)
        allowed = level >= 1.0
        self._buckets[client] = (level - 1.0 if allowed else level, now)
        while len(self._buckets) > self.max_clients:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - level) / self.per_second


def require_short_queue(queued_tokens: int, new_tokens: int, tokens_per_second: float, options: ServerOptions) -> None:
    """Raise `Refused` with 429 when a request would make more tokens wait than `max_queue_tokens`.

    Args:
        queued_tokens: tokens that wait already.
        new_tokens: tokens of the request.
        tokens_per_second: how fast they are scored, for the client's next try; 0 while it is not known.
        options: the server's.
    """
    # An empty queue takes any request, however large: it could never be served otherwise.
    if not queued_tokens or queued_tokens + new_tokens <= options.max_queue_tokens:
        return
    wait = queued_tokens / tokens_per_second if tokens_per_second else 1.0
    raise Refused(
        429,
        "queue_full",
        f"{queued_tokens} tokens wait already, and at most {options.max_queue_tokens} may. "
        "Fix: try again later, or send less at once.",
        retry_after_seconds=min(60.0, wait),
    )


# --- 408, 504, 507: time or memory did not suffice -------------------------------------------------------------------


def slow_body(options: ServerOptions) -> Refused:
    """Return the refusal, 408, of a body that did not arrive in `body_timeout_seconds`."""
    seconds = options.body_timeout_seconds
    return Refused(408, "slow_body", f"the body did not arrive in {seconds:g} s. Fix: send it faster.")


def late_answer(options: ServerOptions) -> Refused:
    """Return the refusal, 504, of a request that was not scored in `request_timeout_seconds`."""
    return Refused(504, "timeout", f"not scored in {options.request_timeout_seconds:g} s. Fix: fewer texts, or later.")


def text_beyond_memory(num_tokens: int) -> Refused:
    """Return the refusal, 507, of a text that the device can't hold even when it is computed alone."""
    return Refused(
        507,
        "out_of_memory",
        f"a text of {num_tokens} tokens does not fit the server's memory, not even alone. Fix: a shorter text; or a "
        "server that is started with --dtype bfloat16, or on a device with more memory.",
    )
