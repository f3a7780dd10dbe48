"""`Endpoint`: a server that scores token ids, ours, vLLM's or SGLang's: whose it is, what it serves, and its scores."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.inference.http_client import (
    RemoteError,
    RetryingClient,
    checked_url,
    detail_of,
    is_number,
    json_object,
    text_value,
)
from rm_scale.logs import get_logger
from rm_scale.texts import one_line

logger = get_logger(__name__)

EndpointKind = Literal["vllm", "rm_scale", "sglang"]
_NAMES: dict[EndpointKind, str] = {"vllm": "vLLM", "rm_scale": "rm-scale", "sglang": "SGLang"}
_ROUTE = "/classify"
_ALIVE = "see that a server runs there (curl {url}/health)"


_ABOUT_TEXTS = {400, 413, 422, 507}
"""Statuses of an answer that refuses what was sent: a text, too many of them, or one too large for its memory."""
_NOT_FINITE = "not JSON compliant"
"""Words of Python's JSON, which vLLM answers with (400) where a score is not finite."""


class _Refused(Exception):
    """The server refuses some of the texts, or so many at once.

    Attributes:
        status: of its answer.
        detail: what it says.
        not_finite: that a score is not finite.
    """

    def __init__(self, status: int, detail: str, not_finite: bool) -> None:
        self.status = status
        self.detail = detail
        self.not_finite = not_finite

    def score(self) -> float | RejectedRow:
        """Return what a text gets that is refused alone."""
        if self.not_finite:
            return math.nan
        # A text that was sent alone has no number that anybody knows.
        return RejectedRow("refused_by_server", f"status {self.status}, {self.detail.removeprefix('item 0: ')}")


@dataclass(frozen=True)
class Served:
    """What an endpoint says of itself.

    Attributes:
        kind: whose server it is.
        model: the name of the model there.
        version: of the server; "" where it does not say.
        max_length: longest text in tokens; `None` where it does not say.
        dtype: the type that it computes in; `None` where it does not say, as vLLM and SGLang.
        chat_template_sha256: of the template that it renders by; `None` where it has none or does not say.
    """

    kind: EndpointKind
    model: str
    version: str = ""
    max_length: int | None = None
    dtype: str | None = None
    chat_template_sha256: str | None = None

    def __str__(self) -> str:
        name = _NAMES[self.kind]
        facts = [f"model {one_line(self.model, 80)}"]
        facts += [f"{self.max_length} tokens"] if self.max_length is not None else []
        facts += [self.dtype] if self.dtype is not None else []
        return f"{name} {self.version}".strip() + f" ({', '.join(facts)})"


class Endpoint:
    """A server of one reward model. It is asked what it is when this is made.

    Args:
        url: of the server, http://HOST:PORT.
        kind: whose server it is; `None`: found by asking.
        model: which of the models that a server has; `None`: its only one.
        client: options of `RetryingClient`: `token_env`, `timeout_seconds`, `max_retries`, ...

    Raises:
        RemoteError: it can't be reached, is another kind of server, or has no such model.
    """

    def __init__(self, url: str, kind: EndpointKind | None = None, model: str | None = None, **client: Any) -> None:
        self.client = RetryingClient(checked_url(url).removesuffix(_ROUTE), alive=_ALIVE, **client)
        self.url = self.client.url
        self.served = self._ask_what_it_is(kind, model)
        found = "found" if kind is None else "as was said"
        logger.info(f"{self.url}: {self.served}, {found}")

    # --- What it is --------------------------------------------------------------------------------------------------

    def _ask_what_it_is(self, kind: EndpointKind | None, model: str | None) -> Served:
        if kind in {None, "rm_scale"}:
            response = self.client.ask("GET", "/info")
            answer = json_object(response) or {}
            if response.status_code == 200 and "rm_scale" in answer:
                return self._ours(answer, model)
            if kind == "rm_scale" or response.status_code in {401, 403}:
                raise self._not(response, "/info", "rm-scale serve", "--endpoint_kind vllm or sglang")
        if kind in {None, "sglang"}:
            response = self.client.ask("GET", "/model_info")
            answer = json_object(response) or {}
            if response.status_code == 200 and "is_generation" in answer:
                return self._sglang(answer, model)
            if kind == "sglang":
                raise self._not(response, "/model_info", "SGLang", "--endpoint_kind vllm or rm_scale")
        response = self.client.ask("GET", "/v1/models")
        answer = json_object(response) or {}
        if response.status_code != 200 or not isinstance(answer.get("data"), list):
            raise self._not(response, "/v1/models", "vLLM", "--endpoint_kind rm_scale or sglang")
        return self._vllm(answer["data"], model)

    def _not(self, response: Any, route: str, name: str, other: str) -> RemoteError:
        refusal = self.client.refusal(response, route)
        return RemoteError(
            f"{refusal}\nSo it is not known to be {name}. Fix: the address of a server that rm-scale serve, vllm serve "
            f"or SGLang's launch_server has started; {other} where it is another one."
        )

    def _ours(self, answer: dict[str, Any], model: str | None) -> Served:
        name = str(answer.get("model"))
        if model not in {None, name}:
            raise self._no_such_model(model, [name])
        template, length = answer.get("chat_template_sha256"), answer.get("max_length")
        return Served(
            "rm_scale",
            name,
            str(answer["rm_scale"]),
            length if isinstance(length, int) else None,
            str(answer["dtype"]) if "dtype" in answer else None,
            template if isinstance(template, str) else None,
        )

    def _vllm(self, cards: Sequence[Any], model: str | None) -> Served:
        names = {str(card["id"]): card for card in cards if isinstance(card, dict) and "id" in card}
        if model is None and len(names) != 1:
            raise self._no_such_model(model, list(names))
        name = model if model is not None else next(iter(names))
        if name not in names:
            raise self._no_such_model(model, list(names))
        length = names[name].get("max_model_len")
        version = (json_object(self.client.ask("GET", "/version")) or {}).get("version", "")
        return Served("vllm", name, one_line(version, 40), length if isinstance(length, int) else None)

    def _sglang(self, answer: dict[str, Any], model: str | None) -> Served:
        name = str(answer.get("served_model_name") or answer.get("model_path"))
        if model not in {None, name}:
            raise self._no_such_model(model, [name])
        if answer["is_generation"]:
            raise RemoteError(
                f"{self.url}: serves a language model ({one_line(name, 80)}), which gives no scores. Fix: python -m "
                "sglang.launch_server --model-path EXPORT --is-embedding."
            )
        cards = (json_object(self.client.ask("GET", "/v1/models")) or {}).get("data")
        card = cards[0] if isinstance(cards, list) and cards and isinstance(cards[0], dict) else {}
        length = card.get("max_model_len")
        return Served("sglang", name, max_length=length if isinstance(length, int) else None)

    def _no_such_model(self, model: str | None, names: Sequence[str]) -> RemoteError:
        asked = "which model of it is not said" if model is None else f"has no model {one_line(model, 80)}"
        there = ", ".join(one_line(name, 80) for name in names) or "none"
        return RemoteError(f"{self.url}: {asked}; there: {there}. Fix: --endpoint_model with one of these names.")

    # --- Scores ------------------------------------------------------------------------------------------------------

    def try_score(
        self, sequences: Sequence[Sequence[int]], stop: threading.Event | None = None
    ) -> list[float | RejectedRow]:
        """Return the raw scores of token sequences, in their order, or why there is none.

        What is refused (status 400, 413, 422 or 507) is sent again in halves, until it is a single text.

        Args:
            sequences: token ids of each.
            stop: once set, nothing more is asked.

        Returns:
            A number each, NaN where the score is not finite; `refused_by_server` for a text that is refused alone.

        Raises:
            RemoteError: the server fails, or its answer does not hold one number per sequence; or `stop` was set.
        """
        try:
            return [*self._score(sequences, stop)]
        except _Refused as refused:
            if len(sequences) == 1:
                return [refused.score()]
        half = len(sequences) // 2
        return [*self.try_score(sequences[:half], stop), *self.try_score(sequences[half:], stop)]

    def _score(self, sequences: Sequence[Sequence[int]], stop: threading.Event | None) -> list[float]:
        response = self.client.ask("POST", _ROUTE, json.dumps(self._body(sequences)).encode(), stop)
        if response.status_code in _ABOUT_TEXTS:
            detail = detail_of(response)
            not_finite = text_value(response, "reason") == "not_finite" or _NOT_FINITE in detail
            raise _Refused(response.status_code, detail, not_finite)
        if response.status_code == 404:
            start = "vllm serve MODEL --runner pooling"
            start = "python -m sglang.launch_server --is-embedding" if self.served.kind == "sglang" else start
            raise RemoteError(
                f"{self.url}{_ROUTE}: is not served there. Fix: {start}, with a model that is a classifier with one "
                "label, as rm_scale's runs and exports are."
            )
        if response.status_code != 200:
            raise self.client.refusal(response, _ROUTE)
        return self._read(self._numbers(response), len(sequences))

    def _body(self, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
        inputs = [list(ids) for ids in sequences]
        if self.served.kind == "sglang":
            return {"input_ids": inputs}
        return {"model": self.served.model, "input": inputs, "use_activation": False}

    def _numbers(self, response: httpx.Response) -> dict[Any, Any]:
        """Return what an answer gives for each text, by the text's place: a list of numbers, where it is in order."""
        if self.served.kind == "sglang":
            rows = _objects(_json(response))
            return {number: row.get("embedding") for number, row in enumerate(rows)}
        return {row.get("index"): row.get("probs") for row in _objects((json_object(response) or {}).get("data"))}

    def _read(self, found: dict[Any, Any], num_sequences: int) -> list[float]:
        values = [found.get(number) for number in range(num_sequences)]
        several = next((len(probs) for probs in values if isinstance(probs, list) and len(probs) > 1), None)
        if several is not None:
            raise RemoteError(
                f"{self.url}{_ROUTE}: gives {several} numbers per text, a reward model gives 1. Fix: serve a reward "
                "model."
            )
        scores = [_as_score(probs[0]) for probs in values if isinstance(probs, list) and probs]
        if len(scores) != num_sequences or len(found) != num_sequences or None in scores:
            good = sum(score is not None for score in scores)
            raise RemoteError(
                f"{self.url}{_ROUTE}: the answer does not hold {num_sequences} scores but {good}. Fix: a server of a "
                "reward model."
            )
        return [score for score in scores if score is not None]


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _objects(rows: Any) -> list[dict[str, Any]]:
    """Return a list of JSON objects; empty where it is anything else."""
    return rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else []


def _as_score(value: Any) -> float | None:
    """Return a number of JSON, NaN for one that is not finite (some write null for it); `None` for anything else."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return math.nan
    return float(value) if is_number(value) else None
