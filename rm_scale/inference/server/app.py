"""The HTTP routes of a served model: /score and /rank, OpenRLHF's and vLLM's endpoints, /health, /info, /metrics."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from rm_scale.data.formats import without_text_prompt
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.inference.scoring.row_files import Scorable, scorable
from rm_scale.inference.server import protocols as form
from rm_scale.inference.server.middleware import RequestMiddleware
from rm_scale.inference.server.request_limits import Refused, require_few_texts
from rm_scale.inference.server.service import Service
from rm_scale.version import __version__

_MOST_PROBLEMS = 6


def read_items(items: Sequence[dict[str, Any]]) -> list[Scorable]:
    """Read what a request asks to be scored.

    Raises:
        Refused: an item has nothing to score.
    """
    found = []
    for number, item in enumerate(items):
        try:
            found.append(scorable(item, cells=False))
        except RejectedRow as rejected:
            raise Refused(422, rejected.reason, f"item {number}: {rejected}") from None
    return found


def _read_once(prompt: Any, completions: list[Any]) -> list[Any]:
    """Return completions without a prompt that all of them repeat, as in training.

    Raises:
        Refused: only some of them repeat it.
    """
    if not isinstance(prompt, str) or not all(isinstance(one, str) for one in completions):
        return completions
    try:
        return list(without_text_prompt(prompt, completions))
    except RejectedRow as rejected:
        raise Refused(422, rejected.reason, f"completions: {rejected}") from None


def build_app(service: Service, token: str | None = None) -> Any:
    """Build the ASGI application.

    Args:
        service: the model, not started.
        token: what clients must show; `None`: nothing.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.start)
        yield
        await asyncio.to_thread(service.close)

    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": form.Problem} for status in (400, 401, 408, 413, 422, 429, 503, 504, 507)
    }
    app = FastAPI(title="rm_scale", version=__version__, lifespan=lifespan, responses=refusals)
    app.add_exception_handler(Refused, _refused(service))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    _add_own_routes(app, service)
    _add_others_routes(app, service)
    _add_health_routes(app, service)
    return RequestMiddleware(app, service.options, service.metrics, service.admission, token)


def _refused(service: Service) -> Callable[[Request, Exception], Any]:
    async def answer(request: Request, refused: Exception) -> Response:
        assert isinstance(refused, Refused)
        service.metrics.refused.labels(refused.reason).inc()
        problem = form.Problem(
            detail=refused.text, reason=refused.reason, request_id=request.scope["state"]["request_id"]
        )
        headers = {}
        if refused.retry_after_seconds is not None:
            headers["Retry-After"] = str(max(1, math.ceil(refused.retry_after_seconds)))
        return JSONResponse(problem.model_dump(), status_code=refused.status, headers=headers)

    return answer


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Never what was sent: it may be long, or not even JSON. A body that may have several forms fits none of them.
    seen = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:_MOST_PROBLEMS]]
    problem = form.Problem(
        detail=f"{'; '.join(seen)}. Fix: see /docs.",
        reason="invalid",
        request_id=request.scope["state"]["request_id"],
    )
    return JSONResponse(problem.model_dump(), status_code=422)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = form.Problem(detail=str(error.detail), reason="http", request_id=request.scope["state"]["request_id"])
    return JSONResponse(problem.model_dump(), status_code=error.status_code, headers=error.headers)


def _add_own_routes(app: FastAPI, service: Service) -> None:
    @app.post("/score")
    async def score(request: Request, body: form.ScoreRequest | form.ScoreItem) -> form.ScoreResponse:
        """Return the raw scores of one text or several."""
        items = body.items if isinstance(body, form.ScoreRequest) else [body]
        require_few_texts(len(items), service.options)
        texts = read_items([item.model_dump() for item in items])
        scores, num_tokens = await service.score(request, texts)
        return form.ScoreResponse(
            model=service.name, scores=scores, normalized_scores=service.normalized(scores), num_tokens=num_tokens
        )

    @app.post("/rank")
    async def rank(request: Request, body: form.RankRequest) -> form.RankResponse:
        """Rank completions of one prompt, best first."""
        require_few_texts(len(body.completions), service.options)
        completions = _read_once(body.prompt, body.completions)
        rows = [{"prompt": body.prompt, "completion": one, "tools": body.tools} for one in completions]
        scores, _ = await service.score(request, read_items(rows))
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        values = sorted(set(scores), reverse=True)
        return form.RankResponse(
            model=service.name,
            scores=scores,
            order=order[: body.top_k],
            ranks=[values.index(value) for value in scores],
        )


def _add_others_routes(app: FastAPI, service: Service) -> None:
    @app.post("/get_reward")
    async def get_reward(request: Request, body: form.OpenRLHFRequest) -> form.OpenRLHFResponse:
        """Answer as OpenRLHF's remote reward model (`--remote_rm_url http://HOST:PORT/get_reward`)."""
        texts = read_items([{"text": service.query(query)} for query in body.query])
        scores, _ = await service.score(request, texts)
        return form.OpenRLHFResponse(rewards=scores, scores=scores)

    @app.post("/pooling")
    @app.post("/v1/pooling")
    async def pooling(request: Request, body: form.PoolingRequest) -> form.PoolingResponse:
        """Answer as vLLM's pooling endpoint."""
        scores, usage = await _pooled(service, request, body)
        data = [form.PoolingData(index=number, data=[score]) for number, score in enumerate(scores)]
        return form.PoolingResponse(**_envelope(service, "pool"), data=data, usage=usage)

    @app.post("/classify")
    @app.post("/v1/classify")
    async def classify(request: Request, body: form.PoolingRequest) -> form.ClassificationResponse:
        """Answer as vLLM's classification endpoint."""
        scores, usage = await _pooled(service, request, body)
        data = [form.ClassificationData(index=n, label="reward", probs=[score]) for n, score in enumerate(scores)]
        return form.ClassificationResponse(**_envelope(service, "classify"), data=data, usage=usage)


def _envelope(service: Service, prefix: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}


async def _pooled(service: Service, request: Request, body: form.PoolingRequest) -> tuple[list[float], form.Usage]:
    if (body.input is None) == (body.messages is None):
        raise Refused(422, "invalid", "input or messages, one of the two. Fix: give input.")
    if body.add_special_tokens is not None and body.add_special_tokens != (body.messages is None):
        # The other value would take the contract's BOS away from texts, or add one to what a template has written.
        raise Refused(422, "invalid", "add_special_tokens: the scoring contract decides this. Fix: leave it out.")
    if body.messages is not None:
        items = read_items([{"messages": body.messages, "tools": body.tools}])
        scores, tokens = await service.score(request, items)
    elif body.tools:
        raise Refused(422, "unread_context", "tools need messages, which a chat template renders. Fix: give messages.")
    else:
        scores, tokens = await _score_inputs(service, request, body.input)
    if body.use_activation:
        scores = [1 / (1 + math.exp(-score)) if score >= 0 else 1 - 1 / (1 + math.exp(score)) for score in scores]
    return scores, form.Usage(prompt_tokens=tokens, total_tokens=tokens)


async def _score_inputs(service: Service, request: Request, inputs: Any) -> tuple[list[float], int]:
    """Score one text or one list of token ids, or several of a kind; return raw scores and their tokens."""
    many = inputs if isinstance(inputs, list) and not (inputs and isinstance(inputs[0], int)) else [inputs]
    require_few_texts(len(many), service.options)
    if not many:
        raise Refused(422, "invalid", "input is empty. Fix: give at least one text.")
    if isinstance(many[0], str):
        return await service.score(request, read_items([{"text": text} for text in many]))
    vocabulary, longest = service.scorer.contract.vocab_size, service.scorer.encoder.rules.max_length
    for number, ids in enumerate(many):
        if not 1 <= len(ids) <= longest:
            raise Refused(422, "over_long", f"item {number}: {len(ids)} tokens, from 1 to {longest} can be scored.")
        if not all(0 <= token < vocabulary for token in ids) or ids[-1] == service.scorer.contract.pad_token_id:
            text = f"item {number}: token ids are from 0 to {vocabulary - 1}, and the last one is not padding."
            raise Refused(422, "token_ids", text)
    return await service.score_tokens(request, many, [uuid.uuid4().hex for _ in many])


def _add_health_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Tell that the process answers."""
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Tell that the model is loaded, returns its golden scores, and new requests are accepted."""
        if not service.ready or not service.admission.accepting:
            raise Refused(503, "not_ready", "not ready", retry_after_seconds=1.0)
        return {"status": "ready"}

    @app.get("/info")
    async def info() -> form.Info:
        """Describe what is served."""
        contract, options = service.scorer.contract, service.options
        return form.Info(
            model=service.name,
            rm_scale=__version__,
            max_length=contract.encoding["max_length"],
            overlong_policy=contract.encoding["overlong_policy"],
            score_mean=contract.score_mean,
            score_std=contract.score_std,
            chat_template_sha256=contract.encoding.get("chat_template_sha256"),
            packed=service.scorer.packed,
            dtype=service.dtype,
            exact=service.dtype == "float32",
            limits={name: getattr(options, name) for name in options.__dataclass_fields__},
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the counters in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
