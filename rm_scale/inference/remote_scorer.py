"""`RemoteScorer`: the client of `rm-scale serve`, with the same calls and numbers as a model in this process."""

from __future__ import annotations

import json
import math
import os
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, cast
from urllib.parse import urlsplit

import httpx

from rm_scale.data.preference_group import Text
from rm_scale.data.rejected_rows import REJECTION_REASONS
from rm_scale.errors import DataError, UserError
from rm_scale.inference.scoring.encode_completions import tools_per_prompt
from rm_scale.inference.serve_token import TOKEN_VARIABLE, token_of_variable
from rm_scale.logs import get_logger
from rm_scale.texts import one_line, typed_line

logger = get_logger(__name__)

RETRIED_STATUSES = {429, 502, 503, 504}
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_LONGEST_WAIT_SECONDS = 120.0
_NAMED_ITEM = re.compile(r"item (\d+): (.*)", re.DOTALL)
# Training's random state must not depend on how often a server was busy.
_jitter = random.SystemRandom()


class RemoteError(UserError):
    """A reward server can't be reached, refuses, or answers what it should not."""


@dataclass(frozen=True)
class Unscorable:
    """Why a completion has no score.

    Attributes:
        reason: a key of `rm_scale.data.rejected_rows.REJECTION_REASONS`.
        text: what was seen, and what to do.
    """

    reason: str
    text: str


class _TooLarge(Exception):
    """The server takes fewer texts, or fewer bytes, at once."""


class _Refused(Exception):
    """One item of a request can't be scored."""

    def __init__(self, place: int, why: Unscorable) -> None:
        self.place = place
        self.why = why


class RemoteScorer:
    """Scores by HTTP. Nothing is asked before the first score; each process has connections of its own.

    Args:
        url: of the server, http://HOST:PORT.
        token_env: environment variable that holds the token, read at each request; unset: none is sent. One that is
            set but empty, or can't stand in a header, is refused.
        timeout_seconds: for one answer.
        max_retries: further tries after a failed connection or status 429, 502, 503 or 504.
        backoff_seconds: wait before the first of them; doubles each time up to `max_backoff_seconds`, with jitter. A
            longer Retry-After of the server is kept.
        max_backoff_seconds: longest wait of our own.
        items_per_request: completions of one request; halved when the server finds it too large.
        bytes_per_request: of one request's texts, about.

    Raises:
        RemoteError: `url` is no http address, or holds a password.
    """

    def __init__(
        self,
        url: str,
        token_env: str = TOKEN_VARIABLE,
        timeout_seconds: float = 120.0,
        max_retries: int = 8,
        backoff_seconds: float = 0.5,
        max_backoff_seconds: float = 30.0,
        items_per_request: int = 256,
        bytes_per_request: int = 2**20,
    ) -> None:
        self.url = _checked_url(url)
        self.token_env = token_env
        self.timeout_seconds = timeout_seconds
        self.max_retries = max_retries
        self.backoff_seconds = backoff_seconds
        self.max_backoff_seconds = max_backoff_seconds
        self.items_per_request = items_per_request
        self.bytes_per_request = bytes_per_request
        self._client: httpx.Client | None = None
        self._pid = 0

    # --- Scores ------------------------------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        tools: Sequence[list[Any] | None] | None = None,
        normalized: bool = False,
    ) -> list[float]:
        """Return the rewards of `completions` given `prompts`, in their order; see `RewardScorer.score`.

        Args:
            prompts: texts or lists of messages.
            completions: as many, of the same kind.
            tools: tool descriptions for the chat template, one per prompt.
            normalized: mean 0 and standard deviation 1 over the model's evaluation set, instead of raw.

        Raises:
            DataError: the lengths differ, or a text can't be scored; says which one and why.
            RemoteError: the server can't be reached after all retries, or refuses.
        """
        found = self.try_score(prompts, completions, tools, normalized)
        for number, score in enumerate(found):
            if isinstance(score, Unscorable):
                raise DataError(f"completion {number}: {score.text}")
        return cast("list[float]", found)

    def try_score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        tools: Sequence[list[Any] | None] | None = None,
        normalized: bool = False,
    ) -> list[float | Unscorable]:
        """Score as `score` does, but return for a text that can't be scored the reason, and score the others."""
        if isinstance(prompts, str) or isinstance(completions, str):
            raise DataError("prompts and completions are lists. Fix: [prompt] and [completion] for one of each.")
        if len(prompts) != len(completions):
            raise DataError(
                f"{len(prompts)} prompts and {len(completions)} completions: give one prompt per completion."
            )
        tools = tools_per_prompt(tools, len(prompts))
        found: list[float | Unscorable] = [math.nan] * len(prompts)
        items: dict[int, bytes] = {}
        for number, values in enumerate(zip(prompts, completions, tools, strict=True)):
            item = _item(*values)
            if isinstance(item, Unscorable):
                found[number] = item
            else:
                items[number] = item
        for places in self._requests(items):
            self._score_some(places, items, found, normalized)
        return found

    def _requests(self, items: Mapping[int, bytes]) -> Iterator[list[int]]:
        """Yield the places of the texts that go into one request, for each request."""
        part: list[int] = []
        size = 0
        for place, item in items.items():
            if part and (len(part) >= self.items_per_request or size + len(item) > self.bytes_per_request):
                yield part
                part, size = [], 0
            part.append(place)
            size += len(item)
        if part:
            yield part

    def _score_some(
        self, places: list[int], items: Mapping[int, bytes], found: list[float | Unscorable], normalized: bool
    ) -> None:
        """Fill in `found`: again without an item that the server refuses, and in halves when it finds it too large."""
        while places:
            try:
                scores = self._ask_scores([items[place] for place in places], normalized)
            except _Refused as refused:
                found[places[refused.place]] = refused.why
                places = places[: refused.place] + places[refused.place + 1 :]
            except _TooLarge as error:
                if len(places) == 1:
                    raise RemoteError(f"{self.url}/score: {error} Fix: raise the server's limits.") from error
                half = len(places) // 2
                self._score_some(places[:half], items, found, normalized)
                places = places[half:]
            else:
                for place, score in zip(places, scores, strict=True):
                    found[place] = score
                return

    def _ask_scores(self, items: Sequence[bytes], normalized: bool) -> list[float]:
        answer = self._ask("POST", "/score", b'{"items": [' + b", ".join(items) + b"]}")
        key = "normalized_scores" if normalized else "scores"
        scores = answer.get(key)
        if normalized and scores is None and "scores" in answer:
            raise RemoteError(
                f"{self.url}/score: the model has no score_mean and score_std (it was saved without an evaluation), so "
                "scores can't be normalised. Fix: raw scores, or serve a model that was evaluated."
            )
        if not isinstance(scores, list) or len(scores) != len(items) or not all(map(_is_number, scores)):
            raise RemoteError(
                f"{self.url}/score: the answer does not hold {len(items)} finite {key} (it holds "
                f"{', '.join(map(str, answer)) or 'nothing'}). Fix: is it rm-scale serve that answers there?"
            )
        return [float(score) for score in scores]

    def info(self) -> dict[str, Any]:
        """Return what is served: name, longest text, score mean and deviation, limits.

        Raises:
            RemoteError: as `score`.
        """
        return self._ask("GET", "/info")

    # --- Requests ----------------------------------------------------------------------------------------------------

    def _ask(self, method: str, route: str, body: bytes | None = None) -> dict[str, Any]:
        """Return the answer's JSON, after as many tries as allowed."""
        for tries in range(self.max_retries + 1):
            try:
                response = self._http().request(method, self.url + route, content=body, headers=self._headers())
            except httpx.TransportError as error:
                problem, asked = typed_line(error), None
            else:
                if response.status_code not in RETRIED_STATUSES:
                    return self._read(response, route)
                problem, asked = f"status {response.status_code}, {_detail(response)}", _retry_after(response)
            if tries < self.max_retries:
                seconds = self._wait_seconds(tries, asked)
                logger.warning(f"{self.url}{route}: {problem}; trying again in {seconds:.1f} s")
                time.sleep(seconds)
        raise RemoteError(
            f"{self.url}{route}: no score after {self.max_retries + 1} tries, the last one ended with {problem}. Fix: "
            f"see that rm-scale serve runs there (curl {self.url}/ready), or allow more max_retries or timeout_seconds."
        )

    def _wait_seconds(self, tries: int, asked: float | None) -> float:
        own = min(self.max_backoff_seconds, self.backoff_seconds * 2.0**tries) * _jitter.uniform(0.5, 1.0)
        # Ranks that were told the same moment must not all come back at it.
        return own if asked is None else min(asked, _LONGEST_WAIT_SECONDS) + own

    def _read(self, response: httpx.Response, route: str) -> dict[str, Any]:
        status, detail = response.status_code, _detail(response)
        if status == 200:
            try:
                answer = response.json()
            except ValueError:
                answer = None
            if isinstance(answer, dict):
                return answer
            raise RemoteError(
                f"{self.url}{route}: the answer is no JSON object ({detail}). Fix: is it rm-scale serve that answers "
                "there?"
            )
        if status == 413:
            raise _TooLarge(f"status 413, {detail}")
        named = _NAMED_ITEM.fullmatch(detail)
        reason = _value(response, "reason")
        if status == 422 and named and reason in REJECTION_REASONS:
            raise _Refused(int(named[1]), Unscorable(reason, named[2]))
        raise RemoteError(f"{self.url}{route}: status {status}, {detail} {self._advice(status)}".strip())

    def _advice(self, status: int) -> str:
        if status in {401, 403}:
            state = "is set, but not what the server wants" if os.environ.get(self.token_env) else "is not set"
            return f"Fix: {self.token_env} in the environment {state}."
        if status == 404:
            return "Fix: give the server's address without a path, http://HOST:PORT."
        if 300 <= status < 400:
            return "Fix: give the address that this one points to; it is not followed, since the token would go along."
        return "" if status == 422 else "Fix: see the server's log."

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
            self._client = httpx.Client(timeout=self.timeout_seconds, trust_env=not local)
            self._pid = os.getpid()
        return self._client

    def close(self) -> None:
        """Close the connections; another score opens new ones."""
        if self._client is not None and self._pid == os.getpid():
            self._client.close()
        self._client = None

    def __getstate__(self) -> dict[str, Any]:
        """Take the address to other processes, not the connections."""
        return {**self.__dict__, "_client": None}


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.hostname}" if parts.password or parts.username else url
    if parts.password or parts.username:
        raise RemoteError(f"url={shown}: holds a name or password. Fix: put the token into the environment, token_env.")
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise RemoteError(f"url={shown}: is no address of a server. Fix: http://HOST:PORT")
    return url.rstrip("/").removesuffix("/score")


def _item(prompt: Text, completion: Text, tools: list[Any] | None) -> bytes | Unscorable:
    values: dict[str, Any] = {"prompt": prompt, "completion": completion}
    if tools is not None:
        values["tools"] = tools
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return Unscorable("bad_unicode", "a text holds lone surrogates. Fix: decode the tokens as UTF-8.")
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a prompt or completion is neither text nor messages of JSON values ({error}). Fix: text, or a list of "
            '{"role": ..., "content": ...}.'
        ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _value(response: httpx.Response, key: str) -> str:
    try:
        found = response.json()
    except ValueError:
        return ""
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, str) else ""


def _detail(response: httpx.Response) -> str:
    """Return what the server says is wrong, in a line."""
    detail = _value(response, "detail") or one_line(response.text, 200)
    return detail or "without a word."


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
