"""`RetryingClient`: requests to a server of scores, tried again while it is busy or not there; the token goes along."""

from __future__ import annotations

import math
import os
import random
import re
import threading
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from rm_scale.errors import UserError
from rm_scale.inference.serve_token import TOKEN_VARIABLE, token_of_variable
from rm_scale.logs import get_logger
from rm_scale.texts import one_line, printable, typed_line

logger = get_logger(__name__)

RETRIED_STATUSES = {429, 502, 503, 504}
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_LONGEST_WAIT_SECONDS = 120.0
_CONNECT_SECONDS = 10.0
"""An address that nothing answers at is not waited for as long as an answer is."""
_SLOW = (httpx.ReadTimeout, httpx.WriteTimeout)
"""The server is there, but does not answer in time."""
# Training's random state must not depend on how often a server was busy.
_jitter = random.SystemRandom()


class RemoteError(UserError):
    """A reward server can't be reached, refuses, or answers what it should not."""


@dataclass
class RetryingClient:
    """Asks one server. Nothing is sent before the first request; each process has connections of its own.

    Attributes:
        url: of the server, http://HOST:PORT.
        token_env: environment variable that holds the token, read at each request; unset: none is sent. One that is
            set but empty, or can't stand in a header, is refused.
        timeout_seconds: for one answer; where none comes in it, the request is sent once more, and no more often.
        max_retries: further tries after a failed connection or status 429, 502, 503 or 504.
        backoff_seconds: wait before the first of them; doubles each time up to `max_backoff_seconds`, with jitter. A
            longer Retry-After of the server is kept.
        max_backoff_seconds: longest wait of our own.
        alive: how a person sees that the server runs, for the message when it does not answer.
    """

    url: str
    token_env: str = TOKEN_VARIABLE
    timeout_seconds: float = 120.0
    max_retries: int = 8
    backoff_seconds: float = 0.5
    max_backoff_seconds: float = 30.0
    alive: str = "see that rm-scale serve runs there (curl {url}/ready)"
    _client: httpx.Client | None = field(default=None, repr=False)
    _pid: int = 0

    def ask(
        self, method: str, route: str, body: bytes | None = None, stop: threading.Event | None = None
    ) -> httpx.Response:
        """Return the answer, whatever its status, after as many tries as allowed; threads may ask at the same time.

        Args:
            method: of HTTP.
            route: its path, from the first slash.
            body: what is sent.
            stop: once set, nothing more is sent: the answer is no longer wanted.

        Raises:
            RemoteError: the connection failed, or the status was one that is tried again, each time; no answer came
                within `timeout_seconds` twice; or `stop` was set.
        """
        stop = stop or threading.Event()
        num_slow = 0
        for tries in range(self.max_retries + 1):
            if stop.is_set():
                raise RemoteError(f"{self.url}{route}: no longer asked, since another request has failed.")
            try:
                response = self._http().request(method, self.url + route, content=body, headers=self._headers())
            except httpx.TransportError as error:
                problem, asked = typed_line(error), None
                num_slow += isinstance(error, _SLOW)
                if num_slow == 2:
                    raise self._too_slow(route) from error
            else:
                if response.status_code not in RETRIED_STATUSES:
                    return response
                problem, asked = f"status {response.status_code}, {detail_of(response)}", _retry_after(response)
            if tries < self.max_retries:
                seconds = self._wait_seconds(tries, asked)
                logger.warning(f"{self.url}{route}: {problem}; trying again in {seconds:.1f} s")
                stop.wait(seconds)
        raise RemoteError(
            f"{self.url}{route}: no score after {self.max_retries + 1} tries, the last one ended with {problem}. Fix: "
            f"{self.alive.format(url=self.url)}, or allow more max_retries or timeout_seconds."
        )

    def _too_slow(self, route: str) -> RemoteError:
        return RemoteError(
            f"{self.url}{route}: no answer within {self.timeout_seconds:g} s, twice. Fix: "
            f"{self.alive.format(url=self.url)}; where it is only slow, send less at once or allow more "
            "timeout_seconds (--request_timeout)."
        )

    def refusal(self, response: httpx.Response, route: str) -> RemoteError:
        """Return the error for an answer that is none: its status, what the server says, and what to do."""
        status = response.status_code
        return RemoteError(f"{self.url}{route}: status {status}, {detail_of(response)} {self._advice(status)}".strip())

    def _advice(self, status: int) -> str:
        if status in {401, 403}:
            state = "is set, but not what the server wants" if os.environ.get(self.token_env) else "is not set"
            return f"Fix: {self.token_env} in the environment {state}."
        if status == 404:
            return "Fix: give the server's address without a path, http://HOST:PORT."
        if 300 <= status < 400:
            return "Fix: give the address that this one points to; it is not followed, since the token would go along."
        return "" if status == 422 else "Fix: see the server's log."

    def _wait_seconds(self, tries: int, asked: float | None) -> float:
        own = min(self.max_backoff_seconds, self.backoff_seconds * 2.0**tries) * _jitter.uniform(0.5, 1.0)
        # Ranks that were told the same moment must not all come back at it.
        return own if asked is None else min(asked, _LONGEST_WAIT_SECONDS) + own

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        try:
            token = token_of_variable(self.token_env, "put the server's token there, or unset it for a server without.")
        except UserError as error:
            raise RemoteError(str(error)) from None
        return headers if token is None else {**headers, "Authorization": f"Bearer {token}"}

    def _http(self) -> httpx.Client:
        # Connections can't be shared with the process that this one was forked from.
        if self._client is None or self._pid != os.getpid():
            local = urlsplit(self.url).hostname in _LOOPBACK
            # A proxy that is set up for the outside can't reach this machine's own loopback.
            timeout = httpx.Timeout(self.timeout_seconds, connect=min(_CONNECT_SECONDS, self.timeout_seconds))
            self._client = httpx.Client(timeout=timeout, trust_env=not local)
            self._pid = os.getpid()
        return self._client

    def close(self) -> None:
        """Close the connections; another request opens new ones."""
        if self._client is not None and self._pid == os.getpid():
            self._client.close()
        self._client = None

    def __getstate__(self) -> dict[str, Any]:
        """Take the address to other processes, not the connections."""
        return {**self.__dict__, "_client": None}


def checked_url(url: str) -> str:
    """Return the address of a server without a slash at its end.

    Raises:
        RemoteError: it is no http address, or holds a password.
    """
    if not _is_readable(url):
        shown = one_line(printable(re.sub(r"//.*@", "//", url)), 200)  # what stands before @ may be a password
        raise RemoteError(
            f"url={shown}: is no address of a server, its host or port can't be read. Fix: http://HOST:PORT"
        )
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.hostname}" if parts.password or parts.username else url
    if parts.password or parts.username:
        raise RemoteError(f"url={shown}: holds a name or password. Fix: put the token into the environment, token_env.")
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise RemoteError(f"url={shown}: is no address of a server. Fix: http://HOST:PORT")
    return url.rstrip("/")


def _is_readable(url: str) -> bool:
    try:
        # Each library refuses what the other takes, and some parts only when they are asked for.
        _ = urlsplit(url).port, httpx.URL(url).host
    except (ValueError, httpx.InvalidURL):
        return False
    return True


def json_object(response: httpx.Response) -> dict[str, Any] | None:
    """Return an answer's JSON object; `None` where it is none."""
    try:
        found = response.json()
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def text_value(response: httpx.Response, key: str) -> str:
    """Return a text of an answer's JSON object; "" where there is none."""
    value = (json_object(response) or {}).get(key)
    return value if isinstance(value, str) else ""


def detail_of(response: httpx.Response) -> str:
    """Return what the server says is wrong, in a line: `detail` of our server, or `error.message` of OpenAI's form."""
    error = (json_object(response) or {}).get("error")
    message = error.get("message") if isinstance(error, dict) else None
    theirs = one_line(message, 400) if isinstance(message, str) else ""
    return text_value(response, "detail") or theirs or one_line(response.text, 200) or "without a word."


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds to wait by the server's header, which may also hold a date."""
    value = response.headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
