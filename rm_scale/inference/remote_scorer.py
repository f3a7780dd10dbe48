"""`RemoteScorer`: the client of `rm-scale serve`, with the same calls and numbers as a model in this process."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rm_scale.data.preference_group import Text
from rm_scale.data.rejected_rows import REJECTION_REASONS
from rm_scale.errors import DataError
from rm_scale.inference.http_client import (
    RemoteError,
    RetryingClient,
    checked_url,
    detail_of,
    is_number,
    json_object,
    text_value,
)
from rm_scale.inference.scoring.encode_completions import tools_per_prompt
from rm_scale.inference.serve_token import TOKEN_VARIABLE

_NAMED_ITEM = re.compile(r"item (\d+): (.*)", re.DOTALL)


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
        self.url = checked_url(url).removesuffix("/score")
        self.client = RetryingClient(
            self.url, token_env, timeout_seconds, max_retries, backoff_seconds, max_backoff_seconds
        )
        self.items_per_request = items_per_request
        self.bytes_per_request = bytes_per_request

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
        if not isinstance(scores, list) or len(scores) != len(items) or not all(map(is_number, scores)):
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
        response = self.client.ask(method, route, body)
        status, detail = response.status_code, detail_of(response)
        if status == 200:
            answer = json_object(response)
            if answer is not None:
                return answer
            raise RemoteError(
                f"{self.url}{route}: the answer is no JSON object ({detail}). Fix: is it rm-scale serve that answers "
                "there?"
            )
        if status == 413:
            raise _TooLarge(f"status 413, {detail}")
        named = _NAMED_ITEM.fullmatch(detail)
        reason = text_value(response, "reason")
        if status == 422 and named and reason in REJECTION_REASONS:
            raise _Refused(int(named[1]), Unscorable(reason, named[2]))
        raise self.client.refusal(response, route)

    def close(self) -> None:
        """Close the connections; another score opens new ones."""
        self.client.close()


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
