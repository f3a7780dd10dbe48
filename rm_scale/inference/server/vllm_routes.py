"""vLLM's routes (/classify, /pooling, /v1/score, /rerank, /v1/models) and SGLang's /v1/embeddings, by the contract."""

from __future__ import annotations

import base64
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import FastAPI, Request

from rm_scale.data.message_content import content_text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.inference.server import vllm_protocols as form
from rm_scale.inference.server.read_items import read_items
from rm_scale.inference.server.request_limits import Refused, require_few_texts
from rm_scale.inference.server.service import Service

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def add_vllm_routes(app: FastAPI, service: Service) -> None:
    """Add the routes to an application; `/score` is where our own form of it is."""

    @app.post("/pooling")
    @app.post("/v1/pooling")
    async def pooling(request: Request, body: form.PoolingRequest) -> form.PoolingResponse:
        """Answer as vLLM's pooling endpoint."""
        scores, usage = await _pooled(service, request, body)
        data = [form.PoolingData(index=number, data=_written(score, body)) for number, score in enumerate(scores)]
        return form.PoolingResponse(**_envelope(service, "pooling"), data=data, usage=usage)

    @app.post("/classify")
    @app.post("/v1/classify")
    async def classify(request: Request, body: form.PoolingRequest) -> form.ClassificationResponse:
        """Answer as vLLM's classification endpoint."""
        scores, usage = await _pooled(service, request, body)
        data = [form.ClassificationData(index=n, label="reward", probs=[score]) for n, score in enumerate(scores)]
        return form.ClassificationResponse(**_envelope(service, "classify"), data=data, usage=usage)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request, body: form.EmbeddingsRequest) -> form.EmbeddingsResponse:
        """Answer as SGLang's embeddings endpoint of a reward model: the score is the embedding's only number."""
        scores, tokens = await _score_inputs(service, request, body.input)
        data = [form.EmbeddingData(index=n, embedding=_written(score, body)) for n, score in enumerate(scores)]
        return form.EmbeddingsResponse(**_envelope(service, "embd"), data=data, usage=_usage(tokens))

    @app.post("/v1/score")
    async def score(request: Request, body: form.PairScoreRequest) -> form.PairScoreResponse:
        """Answer as vLLM's score endpoint: the first text is the prompt, the second the completion."""
        return await score_pairs(service, request, body)

    @app.post("/rerank")
    @app.post("/v1/rerank")
    @app.post("/v2/rerank")
    async def rerank(request: Request, body: form.RerankRequest) -> form.RerankResponse:
        """Answer as vLLM's rerank endpoint: the query is the prompt, a document a completion."""
        documents = _listed(body.documents)
        scores, tokens = await _score_pairs(service, request, [body.query], documents, body.use_activation)
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        results = [
            form.RerankResult(index=n, document=_shown(documents[n]), relevance_score=scores[n])
            for n in order[: body.top_n or len(order)]
        ]
        usage = form.RerankUsage(prompt_tokens=tokens, total_tokens=tokens)
        return form.RerankResponse(id=_id("score"), model=service.name, usage=usage, results=results)

    created = int(time.time())

    @app.get("/v1/models")
    async def models() -> form.ModelList:
        """List the one model that is served."""
        length = service.scorer.encoder.rules.max_length
        card = form.ModelCard(id=service.name, created=created, root=service.name, max_model_len=length)
        return form.ModelList(data=[card])


# --- Texts and token ids ---------------------------------------------------------------------------------------------


async def _pooled(service: Service, request: Request, body: form.PoolingRequest) -> tuple[list[float], form.Usage]:
    if (body.input is None) == (body.messages is None):
        raise Refused(422, "invalid", "input or messages, one of the two. Fix: give input.")
    if body.chat_template and body.chat_template != service.scorer.encoder.chat_template:
        raise Refused(422, "invalid", "chat_template: is not the scoring contract's. Fix: leave it out.")
    if body.messages is not None:
        _require_no_second_bos(service, body)
        items = read_items([{"messages": body.messages, "tools": body.tools}])
        scores, tokens = await service.score(request, items)
    elif body.tools:
        raise Refused(422, "unread_context", "tools need messages, which a chat template renders. Fix: give messages.")
    else:
        scores, tokens = await _score_inputs(service, request, body.input, body.add_special_tokens is False)
    return _activated(scores, body.use_activation), _usage(tokens)


def _require_no_second_bos(service: Service, body: form.PoolingRequest) -> None:
    if body.add_special_tokens and service.scorer.encoder.adds_bos:
        raise Refused(
            422,
            "invalid",
            "add_special_tokens: true would add a BOS to what the chat template writes. Fix: leave it out.",
        )


async def _score_inputs(
    service: Service, request: Request, inputs: Any, whole: bool = False
) -> tuple[list[float], int]:
    """Score one text or one list of token ids, or several of a kind; return raw scores and their tokens."""
    many = inputs if isinstance(inputs, list) and not (inputs and isinstance(inputs[0], int)) else [inputs]
    require_few_texts(len(many), service.options)
    if not many:
        raise Refused(422, "invalid", "input is empty. Fix: give at least one text.")
    if isinstance(many[0], str):
        texts = [_without_bos(service, number, text) for number, text in enumerate(many)] if whole else many
        return await service.score(request, read_items([{"text": text} for text in texts]))
    vocabulary, longest = service.scorer.contract.vocab_size, service.scorer.encoder.rules.max_length
    for number, ids in enumerate(many):
        if not 1 <= len(ids) <= longest:
            raise Refused(422, "over_long", f"item {number}: {len(ids)} tokens, from 1 to {longest} can be scored.")
        if not all(0 <= token < vocabulary for token in ids) or ids[-1] == service.scorer.contract.pad_token_id:
            text = f"item {number}: token ids are from 0 to {vocabulary - 1}, and the last one is not padding."
            raise Refused(422, "token_ids", text)
    return await service.score_tokens(request, many, shared_beginnings(many))


def _without_bos(service: Service, number: int, text: str) -> str:
    """Return a text to which nothing is to be added in the form to which the tokenizer adds its BOS: the same tokens.

    Raises:
        Refused: 422, training began its texts with a BOS, and this one has none.
    """
    bos = service.scorer.tokenizer.bos_token
    if not service.scorer.encoder.adds_bos or not isinstance(bos, str):
        return text
    if not text.startswith(bos):
        raise Refused(
            422,
            "invalid",
            f"item {number}: add_special_tokens is false and the text does not begin with {bos!r}, as all of training "
            f"did. Fix: begin it with {bos!r}, or leave add_special_tokens out.",
        )
    return text.removeprefix(bos)


def shared_beginnings(sequences: Sequence[Sequence[int]]) -> list[str]:
    """Return keys that are the same for neighbours that begin alike for at least half the shorter one's length.

    They are computed with their common beginning once; token ids don't say what of them is the prompt.
    """
    keys: list[str] = []
    first: Sequence[int] = []
    for ids in sequences:
        shorter = min(len(first), len(ids))
        half = -(-shorter // 2)
        begins_alike = bool(shorter) and list(first[:half]) == list(ids[:half])
        if not begins_alike:
            first = ids
        keys.append(keys[-1] if begins_alike else uuid.uuid4().hex)
    return keys


# --- Pairs -----------------------------------------------------------------------------------------------------------


async def score_pairs(service: Service, request: Request, body: form.PairScoreRequest) -> form.PairScoreResponse:
    """Score pairs of texts in vLLM's form.

    Raises:
        Refused: their numbers don't fit, or a text can't be scored.
    """
    match body:
        case form.TextScoreRequest():
            first, second = body.text_1, body.text_2
        case form.DocumentScoreRequest():
            first, second = body.queries, body.documents
        case form.ItemScoreRequest():
            first, second = body.queries, body.items
        case form.DataScoreRequest():
            first, second = body.data_1, body.data_2
    scores, tokens = await _score_pairs(service, request, _listed(first), _listed(second), body.use_activation)
    data = [form.PairScore(index=number, score=score) for number, score in enumerate(scores)]
    return form.PairScoreResponse(**_envelope(service, "score"), data=data, usage=_usage(tokens))


async def _score_pairs(
    service: Service,
    request: Request,
    prompts: list[form.ScoreInput],
    completions: list[form.ScoreInput],
    use_activation: bool | None,
) -> tuple[list[float], int]:
    if not prompts or not completions or len(prompts) not in {1, len(completions)}:
        seen = f"{len(prompts)} and {len(completions)} texts"
        raise Refused(422, "invalid", f"{seen}: must be as many, or one and any number. Fix: pair them.")
    require_few_texts(len(completions), service.options)
    asked = [_text(one, f"text {number} of the first") for number, one in enumerate(prompts)]
    said = [_text(one, f"text {number} of the second") for number, one in enumerate(completions)]
    pairs = zip(asked * (len(said) if len(asked) == 1 else 1), said, strict=True)
    scores, tokens = await service.score(request, read_items([{"prompt": p, "completion": c} for p, c in pairs]))
    return _activated(scores, use_activation), tokens


def _listed(texts: form.ScoreInputs) -> list[form.ScoreInput]:
    return texts if isinstance(texts, list) else [texts]


def _text(given: form.ScoreInput, where: str) -> str:
    if isinstance(given, str):
        return given
    try:
        return content_text(given.content, where) or ""
    except RejectedRow as rejected:
        raise Refused(422, rejected.reason, str(rejected)) from None


def _shown(document: form.ScoreInput) -> form.RerankDocument:
    if isinstance(document, str):
        return form.RerankDocument(text=document)
    return form.RerankDocument(multi_modal=document.content)


# --- Numbers ---------------------------------------------------------------------------------------------------------


def _activated(scores: list[float], asked: bool | None) -> list[float]:
    if not asked:
        return scores
    return [1 / (1 + math.exp(-score)) if score >= 0 else 1 - 1 / (1 + math.exp(score)) for score in scores]


def _written(score: float, body: form.PoolingRequest | form.EmbeddingsRequest) -> list[float] | str:
    """Return a score as a vector of one, or as the base64 text of its bytes in the type and order that were asked for.

    The order of "native" is this machine's, for OpenAI's clients too: little-endian wherever torch runs.
    """
    if body.encoding_format == "float":
        return [score]
    kind = _DTYPES[body.embed_dtype or "float32"]
    raw = bytes(torch.tensor([score], dtype=torch.float32).to(kind).view(torch.uint8).tolist())
    return base64.b64encode(raw[::-1] if body.endianness == "big" else raw).decode("ascii")


def _usage(tokens: int) -> form.Usage:
    return form.Usage(prompt_tokens=tokens, total_tokens=tokens)


def _id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _envelope(service: Service, prefix: str) -> dict[str, Any]:
    return {"id": _id(prefix), "created": int(time.time()), "model": service.name}
