"""The application: routes over a model and its batcher."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

import rm_scale
from rm_scale.data.encoding import unscorable_text
from rm_scale.data.groups import RejectedRow
from rm_scale.inference.rows import Scorable, scorable
from rm_scale.inference.scorer import RewardScorer, prompt_keys
from rm_scale.inference.server import protocols as form
from rm_scale.inference.server.batcher import Batcher
from rm_scale.inference.server.gate import Doors, Gate
from rm_scale.inference.server.limits import Limits, Refused
from rm_scale.inference.server.metrics import Metrics
from rm_scale.modeling.contract import allowed_drift
from rm_scale.modeling.scoring import as_in_training

_MOST_PROBLEMS = 6


class Service:
    """A model that answers requests.

    Args:
        scorer: the model.
        name: what it is called in answers.
        limits: bounds.
        scores_in_thread: score in a thread of its own; else whoever serves runs `batcher.run`.
    """

    def __init__(self, scorer: RewardScorer, name: str, limits: Limits, scores_in_thread: bool = True) -> None:
        self.scorer = scorer
        self.name = name
        self.limits = limits
        self.metrics = Metrics()
        self.batcher = Batcher(scorer, limits, self.metrics)
        self.scores_in_thread = scores_in_thread
        self.doors = Doors()
        # One thread, off the event loop: tokenizers of the fast kind keep state while they encode.
        self.encoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoding")
        self.ready = False

    def start(self) -> None:
        """Start scoring, and see whether the model gives its golden scores.

        Raises:
            RuntimeError: it doesn't.
        """
        if self.scores_in_thread:
            self.batcher.start()
        golden = self.scorer.contract.golden_scores
        with as_in_training(self.scorer.contract, torch.device(self.scorer.device).type):
            found = self.scorer.score_tokens([score.input_ids for score in golden])
        contract = self.scorer.contract
        allowed = max(allowed_drift(contract, kind) for kind in (contract.dtype, contract.compute_dtype, self._dtype()))
        worst = max((abs(a - b.score) for a, b in zip(found, golden, strict=True)), default=0.0)
        if not worst <= allowed:
            raise RuntimeError(f"the model does not give its golden scores (off by {worst:.3g}): not served")
        self.ready = True

    def _dtype(self) -> str:
        """Type of the backbone as it was loaded."""
        return str(next(self.scorer.model.parameters()).dtype).removeprefix("torch.")

    def close(self) -> None:
        """Finish what waits, and stop."""
        self.ready = False
        self.batcher.stop(self.limits.drain_seconds)
        self.encoding.shutdown(wait=False, cancel_futures=True)

    # --- Texts to scores ---------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[Scorable]) -> list[list[int]]:
        """Token ids; runs in the encoding thread.

        Raises:
            Refused: a text can't be scored.
        """
        encoder = self.scorer.encoder
        found: list[list[int] | RejectedRow] = [[] for _ in texts]
        pairs = [number for number, text in enumerate(texts) if text.text is None]
        encoded = encoder.encode_many(
            [texts[number].prompt for number in pairs],
            [texts[number].completion for number in pairs],
            [texts[number].tools for number in pairs],
        )
        for number, ids in zip(pairs, encoded, strict=True):
            found[number] = ids
        for number, text in enumerate(texts):
            if text.text is not None:
                found[number] = encoder.encode_rendered(text.text)
        return require_tokens(found)

    async def score(self, request: Request, texts: Sequence[Scorable]) -> tuple[list[float], int]:
        """Raw scores of texts, and their tokens.

        Raises:
            Refused: too many, one can't be scored, the queue is full, or it took too long.
        """
        self.require_few(len(texts))
        loop = asyncio.get_running_loop()
        sequences = await loop.run_in_executor(self.encoding, self.encode, texts)
        keys = prompt_keys([text.prompt or uuid.uuid4().hex for text in texts], [text.tools for text in texts])
        return await self.score_tokens(request, sequences, keys)

    async def score_tokens(
        self, request: Request, sequences: Sequence[Sequence[int]], keys: Sequence[str]
    ) -> tuple[list[float], int]:
        """The same for token ids. Equal ones are computed once, so that they tie to the last digit."""
        places: dict[tuple[int, ...], int] = {}
        which = [places.setdefault(tuple(ids), len(places)) for ids in sequences]
        first = {place: number for number, place in reversed(list(enumerate(which)))}
        future = self.batcher.submit(list(places), [keys[first[place]] for place in range(len(places))])
        found = await self._wait(request, future)
        scores = [found[place] for place in which]
        if not all(math.isfinite(score) for score in scores):
            raise Refused(422, "not_finite", "a score is not finite. Fix: --dtype float32 or bfloat16 on the server.")
        return scores, sum(map(len, sequences))

    def require_few(self, num_items: int) -> None:
        """Raise `Refused` for more texts than a request may hold."""
        if num_items > self.limits.max_items:
            text = f"{num_items} texts, at most {self.limits.max_items} in a request. Fix: several requests."
            raise Refused(413, "items", text)

    async def _wait(self, request: Request, future: Future[list[float]]) -> list[float]:
        """For the scores, the clock or the client's leaving, whichever comes first; then nothing is scored in vain."""
        waiting = asyncio.wrap_future(future)
        # Nothing polls here: each look would take the interpreter from the thread that scores.
        leaving = asyncio.create_task(_client_leaves(request))
        try:
            seconds = self.limits.request_timeout_seconds
            either: list[asyncio.Future[Any]] = [waiting, leaving]
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            if leaving.done():
                raise Refused(499, "client_left", "the client has left")
            raise Refused(504, "timeout", f"not scored in {seconds:g} s. Fix: fewer texts, or later.")
        finally:
            leaving.cancel()
            if not waiting.done():
                future.cancel()

    def normalized(self, scores: Sequence[float]) -> list[float] | None:
        """Normalised scores, where the contract knows how."""
        contract = self.scorer.contract
        return self.scorer.normalize(scores) if contract.score_mean is not None and contract.score_std else None

    def query(self, text: str) -> str:
        """An OpenRLHF query as this contract reads texts: without padding, ended as in training, no second BOS."""
        tokenizer = self.scorer.tokenizer
        pad, eos, bos = tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token
        while pad and (text.startswith(pad) or text.endswith(pad)):
            text = text.removeprefix(pad).removesuffix(pad)
        if bos and self.scorer.encoder.adds_bos:
            text = text.removeprefix(bos)
        # A conversation that the model ended is ended by its template's own token; everything else by EOS.
        if eos and self.scorer.encoder.rules.append_eos and not text.rstrip("\n").endswith(eos):
            text += eos
        return text


async def _client_leaves(request: Request) -> None:
    """Ends when the connection does; the body has been read, so nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def require_tokens(found: Sequence[list[int] | RejectedRow]) -> list[list[int]]:
    """The token ids, or a refusal that names the first text that can't be scored."""
    for number, ids in enumerate(found):
        if isinstance(ids, RejectedRow):
            raise Refused(422, ids.reason, f"item {number}: {unscorable_text(ids)}")
    return [ids for ids in found if not isinstance(ids, RejectedRow)]


def read_items(items: Sequence[dict[str, Any]]) -> list[Scorable]:
    """What requests ask to be scored.

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


def build_app(service: Service, token: str | None = None) -> Any:
    """The ASGI application.

    Args:
        service: the model, not started.
        token: what clients must show; `None`: nothing.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.start)
        yield
        await asyncio.to_thread(service.close)

    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": form.Problem} for status in (400, 401, 408, 413, 422, 429, 503, 504)
    }
    app = FastAPI(title="rm_scale", version=rm_scale.__version__, lifespan=life, responses=refusals)
    app.add_exception_handler(Refused, _refused(service))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    _add_own_routes(app, service)
    _add_others_routes(app, service)
    _add_health_routes(app, service)
    return Gate(app, service.limits, service.metrics, service.doors, token)


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
        """Raw scores of one text or several."""
        items = body.items if isinstance(body, form.ScoreRequest) else [body]
        service.require_few(len(items))
        texts = read_items([item.model_dump() for item in items])
        scores, num_tokens = await service.score(request, texts)
        return form.ScoreResponse(
            model=service.name, scores=scores, normalized_scores=service.normalized(scores), num_tokens=num_tokens
        )

    @app.post("/rank")
    async def rank(request: Request, body: form.RankRequest) -> form.RankResponse:
        """Completions of one prompt, best first."""
        service.require_few(len(body.completions))
        rows = [{"prompt": body.prompt, "completion": one, "tools": body.tools} for one in body.completions]
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
        """OpenRLHF's remote reward model (`--remote_rm_url http://HOST:PORT/get_reward`)."""
        texts = read_items([{"text": service.query(query)} for query in body.query])
        scores, _ = await service.score(request, texts)
        return form.OpenRLHFResponse(rewards=scores, scores=scores)

    @app.post("/pooling")
    @app.post("/v1/pooling")
    async def pooling(request: Request, body: form.PoolingRequest) -> form.PoolingResponse:
        """vLLM's pooling endpoint."""
        scores, usage = await _pooled(service, request, body)
        data = [form.PoolingData(index=number, data=[score]) for number, score in enumerate(scores)]
        return form.PoolingResponse(**_envelope(service, "pool"), data=data, usage=usage)

    @app.post("/classify")
    @app.post("/v1/classify")
    async def classify(request: Request, body: form.PoolingRequest) -> form.ClassificationResponse:
        """vLLM's classification endpoint."""
        scores, usage = await _pooled(service, request, body)
        data = [form.ClassificationData(index=n, label="reward", probs=[score]) for n, score in enumerate(scores)]
        return form.ClassificationResponse(**_envelope(service, "classify"), data=data, usage=usage)


def _envelope(service: Service, prefix: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}


async def _pooled(service: Service, request: Request, body: form.PoolingRequest) -> tuple[list[float], form.Usage]:
    if (body.input is None) == (body.messages is None):
        raise Refused(422, "invalid", "input or messages, one of the two. Fix: give input.")
    if body.messages is not None:
        scores, tokens = await service.score(request, read_items([{"messages": body.messages}]))
    else:
        scores, tokens = await _score_inputs(service, request, body.input)
    if body.use_activation:
        scores = [1 / (1 + math.exp(-score)) if score >= 0 else 1 - 1 / (1 + math.exp(score)) for score in scores]
    return scores, form.Usage(prompt_tokens=tokens, total_tokens=tokens)


async def _score_inputs(service: Service, request: Request, inputs: Any) -> tuple[list[float], int]:
    """One text or list of token ids, or several of a kind."""
    many = inputs if isinstance(inputs, list) and not (inputs and isinstance(inputs[0], int)) else [inputs]
    service.require_few(len(many))
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
        """The process answers."""
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """The model is loaded, gives its golden scores, and new work is taken on."""
        if not service.ready or not service.doors.open:
            raise Refused(503, "not_ready", "not ready", retry_after_seconds=1.0)
        return {"status": "ready"}

    @app.get("/info")
    async def info() -> form.Info:
        """What is served."""
        contract, limits = service.scorer.contract, service.limits
        return form.Info(
            model=service.name,
            rm_scale=rm_scale.__version__,
            max_length=contract.encoding["max_length"],
            overlong_policy=contract.encoding["overlong_policy"],
            score_mean=contract.score_mean,
            score_std=contract.score_std,
            chat_template_sha256=contract.encoding.get("chat_template_sha256"),
            packed=service.scorer.packed,
            limits={name: getattr(limits, name) for name in limits.__dataclass_fields__},
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
