"""Answer what is refused: a JSON object that says why, and says it again where a known client would not show that.

OpenAI's clients show `error.message`. OpenRLHF's (0.11.2, `openrlhf/utils/agent.py`) logs nothing of an answer but its
status and the reason phrase beside it, so there the phrase is our text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from rm_scale.inference.server.http_protocol import REASON_HEADER
from rm_scale.inference.server.prometheus_metrics import Metrics
from rm_scale.inference.server.protocols import OpenAIError, Problem
from rm_scale.inference.server.request_limits import Refused
from rm_scale.inference.server.vllm_protocols import VLLM_PATHS
from rm_scale.texts import one_line

OPENRLHF_PATH = "/get_reward"
_MOST_PROBLEMS = 6
_LONGEST_PHRASE = 400


def problem_body(path: str, status: int, text: str, reason: str, request_id: str) -> dict[str, Any]:
    """Return the JSON object of a refusal.

    Args:
        path: of the request.
        status: of HTTP.
        text: for the client: what was seen, the rule, the fix.
        reason: a short name.
        request_id: of the request.
    """
    name = HTTPStatus(status).phrase.title().replace(" ", "") if status in set(HTTPStatus) else "Error"
    error = OpenAIError(message=text, type=f"{name}Error", code=status) if path in VLLM_PATHS else None
    problem = Problem(detail=text, reason=reason, request_id=request_id, error=error)
    return problem.model_dump(exclude={"error"} if error is None else None)


def phrase_headers(path: str, text: str) -> dict[str, str]:
    """Return the header that makes a text the answer's reason phrase, where OpenRLHF asks; else none."""
    if path != OPENRLHF_PATH:
        return {}
    phrase = one_line(text, _LONGEST_PHRASE).encode("ascii", errors="replace").decode("ascii")
    return {REASON_HEADER: "".join(one if one.isprintable() else "?" for one in phrase)}


def add_refusals(app: FastAPI, metrics: Metrics) -> None:
    """Let an application answer `Refused`, bodies that are not what they should be, and wrong paths and methods."""
    app.add_exception_handler(Refused, _refused(metrics))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)


def _answer(request: Request, status: int, text: str, reason: str, headers: dict[str, str]) -> Response:
    path = request.scope["path"]
    body = problem_body(path, status, text, reason, request.scope["state"]["request_id"])
    return JSONResponse(body, status_code=status, headers={**headers, **phrase_headers(path, text)})


def _refused(metrics: Metrics) -> Callable[[Request, Exception], Any]:
    async def answer(request: Request, refused: Exception) -> Response:
        assert isinstance(refused, Refused)
        metrics.refused.labels(refused.reason).inc()
        headers = {}
        if refused.retry_after_seconds is not None:
            headers["Retry-After"] = str(max(1, math.ceil(refused.retry_after_seconds)))
        return _answer(request, refused.status, refused.text, refused.reason, headers)

    return answer


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Never what was sent: it may be long, or not even JSON.
    seen = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:_MOST_PROBLEMS]]
    return _answer(request, 422, f"{'; '.join(seen)}. Fix: see /docs.", "invalid", {})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _answer(request, error.status_code, str(error.detail), "http", dict(error.headers or {}))
