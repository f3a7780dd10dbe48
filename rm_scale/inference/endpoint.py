"""`Endpoint`: a server that scores token ids, ours or vLLM's: which of the two, what it serves, and its scores."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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

EndpointKind = Literal["vllm", "rm_scale"]
KINDS: tuple[EndpointKind, ...] = ("vllm", "rm_scale")
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
        dtype: the type that it computes in; `None` where it does not say, as vLLM.
        chat_template_sha256: of the template that it renders by; `None` where it has none or does not say.
    """

    kind: EndpointKind
    model: str
    version: str = ""
    max_length: int | None = None
    dtype: str | None = None
    chat_template_sha256: str | None = None

    def __str__(self) -> str:
        name = {"vllm": "vLLM", "rm_scale": "rm-scale"}[self.kind]
        facts = [f"model {one_line(self.model, 80)}"]
        facts += [f"{self.max_length} tokens"] if self.max_length is not None else []
        facts += [self.dtype] if self.dtype is not None else []
        return f"{name} {self.version}".strip() + f" ({', '.join(facts)})"


class Endpoint:
    """A server of one reward model. It is asked what it is when this is made.

    Args:
        url: of the server, http://HOST:PORT.
        kind: whose server it is; `None`: found by asking.
        model: which of the models that a vLLM server has; `None`: its only one.
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
                raise self._not(response, "/info", "rm-scale serve", "--endpoint_kind vllm")
        response = self.client.ask("GET", "/v1/models")
        answer = json_object(response) or {}
        if response.status_code != 200 or not isinstance(answer.get("data"), list):
            raise self._not(response, "/v1/models", "vLLM", "--endpoint_kind rm_scale")
        return self._vllm(answer["data"], model)

    def _not(self, response: Any, route: str, name: str, other: str) -> RemoteError:
        refusal = self.client.refusal(response, route)
        return RemoteError(
            f"{refusal}\nSo it is not known to be {name}. Fix: the address of a server that rm-scale serve or vllm "
            f"serve has started; {other} where it is the other one."
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
        body = {"model": self.served.model, "input": [list(ids) for ids in sequences], "use_activation": False}
        response = self.client.ask("POST", _ROUTE, json.dumps(body).encode(), stop)
        if response.status_code in _ABOUT_TEXTS:
            detail = detail_of(response)
            not_finite = text_value(response, "reason") == "not_finite" or _NOT_FINITE in detail
            raise _Refused(response.status_code, detail, not_finite)
        if response.status_code == 404:
            raise RemoteError(
                f"{self.url}{_ROUTE}: is not served there. Fix: vllm serve MODEL --runner pooling, with a model that "
                "is a classifier with one label, as rm_scale's runs and exports are."
            )
        if response.status_code != 200:
            raise self.client.refusal(response, _ROUTE)
        return self._read(json_object(response) or {}, len(sequences))

    def _read(self, answer: dict[str, Any], num_sequences: int) -> list[float]:
        rows = answer.get("data")
        rows = rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else []
        found = {row.get("index"): row.get("probs") for row in rows}
        values = [found.get(number) for number in range(num_sequences)]
        several = next((len(probs) for probs in values if isinstance(probs, list) and len(probs) > 1), None)
        if several is not None:
            raise RemoteError(
                f"{self.url}{_ROUTE}: gives {several} numbers per text, a reward model gives 1. Fix: serve a reward "
                "model."
            )
        scores = [_as_score(probs[0]) for probs in values if isinstance(probs, list) and probs]
        if len(scores) != num_sequences or len(rows) != num_sequences or None in scores:
            good = sum(score is not None for score in scores)
            raise RemoteError(
                f"{self.url}{_ROUTE}: the answer does not hold {num_sequences} scores but {good}. Fix: a server of a "
                "reward model."
            )
        return [score for score in scores if score is not None]


def _as_score(value: Any) -> float | None:
    """Return a number of JSON, NaN for one that is not finite (some write null for it); `None` for anything else."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return math.nan
    return float(value) if is_number(value) else None
