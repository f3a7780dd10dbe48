"""The HTTP routes of a served model: /score and /rank, OpenRLHF's and vLLM's endpoints, /health, /info, /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Discriminator, Tag

from rm_scale.inference.server import protocols as form
from rm_scale.inference.server import vllm_protocols as vllm
from rm_scale.inference.server.middleware import RequestMiddleware
from rm_scale.inference.server.read_items import read_items, read_once
from rm_scale.inference.server.refusals import OPENRLHF_PATH, add_refusals
from rm_scale.inference.server.request_limits import Refused, require_few_texts
from rm_scale.inference.server.service import Service
from rm_scale.inference.server.vllm_routes import add_vllm_routes, score_pairs
from rm_scale.version import __version__

ScoreBody = Annotated[
    Annotated[form.ScoreRequest, Tag("items")]
    | Annotated[form.ScoreItem, Tag("item")]
    | Annotated[vllm.TextScoreRequest, Tag("text_1")]
    | Annotated[vllm.DocumentScoreRequest, Tag("documents")]
    | Annotated[vllm.ItemScoreRequest, Tag("queries")]
    | Annotated[vllm.DataScoreRequest, Tag("data_1")],
    Discriminator(lambda body: _form_of(body)),
]
"""Our form of /score, or one of vLLM's."""


def _form_of(body: Any) -> str:
    """Return which form of /score a body has, by the names that only that form has."""
    names = body if isinstance(body, dict) else {}
    if "items" in names:
        return "queries" if "queries" in names else "items"
    if "queries" in names or "documents" in names:
        return "documents"
    pairs = {"text_1": "text_1", "text_2": "text_1", "data_1": "data_1", "data_2": "data_1"}
    return next((tag for name, tag in pairs.items() if name in names), "item")


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
    add_refusals(app, service.metrics)
    _add_own_routes(app, service)
    _add_openrlhf_route(app, service)
    add_vllm_routes(app, service)
    _add_health_routes(app, service)
    return RequestMiddleware(app, service.options, service.metrics, service.admission, token)


def _add_own_routes(app: FastAPI, service: Service) -> None:
    @app.post("/score")
    async def score(request: Request, body: ScoreBody) -> form.ScoreResponse | vllm.PairScoreResponse:
        """Return the raw scores of one text or several; or of pairs, asked and answered in vLLM's form."""
        if not isinstance(body, form.ScoreRequest | form.ScoreItem):
            return await score_pairs(service, request, body)
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
        completions = read_once(body.prompt, body.completions)
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


def _add_openrlhf_route(app: FastAPI, service: Service) -> None:
    @app.post(OPENRLHF_PATH)
    async def get_reward(request: Request, body: form.OpenRLHFRequest) -> form.OpenRLHFResponse:
        """Answer as OpenRLHF's remote reward model (`--remote_rm_url http://HOST:PORT/get_reward`)."""
        texts = read_items([{"text": service.query(query)} for query in body.query])
        scores, _ = await service.score(request, texts)
        return form.OpenRLHFResponse(rewards=scores, scores=scores)


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
