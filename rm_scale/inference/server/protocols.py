"""Bodies of requests and answers: this package's own, and OpenRLHF's remote reward model's."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Message = dict[str, JsonValue]
TextOrMessages = str | list[Message]


class Strict(BaseModel):
    """A body in which a field that is not known is refused."""

    model_config = ConfigDict(extra="forbid")


class ScoreItem(Strict):
    """A completion with its prompt; or `messages`, of which the last one is scored; or a whole rendered `text`.

    Prompt, messages and tools may be the JSON text of what they are, as in the cells of a table.
    """

    prompt: TextOrMessages | None = None
    completion: TextOrMessages | None = None
    messages: str | list[Message] | None = None
    text: str | None = None
    tools: str | list[JsonValue] | None = None


class ScoreRequest(Strict):
    """Texts to score."""

    items: list[ScoreItem] = Field(min_length=1)


class ScoreResponse(Strict):
    """Raw scores in the order of the request; normalised ones where the model knows its mean and deviation."""

    model: str
    scores: list[float]
    normalized_scores: list[float] | None
    num_tokens: int


class RankRequest(Strict):
    """Completions of one prompt."""

    prompt: TextOrMessages = ""
    completions: list[TextOrMessages] = Field(min_length=1)
    tools: str | list[JsonValue] | None = None
    top_k: int | None = Field(default=None, ge=1)


class RankResponse(Strict):
    """Scores in the order of the request; `order` holds places from the best on, at most `top_k`; equal scores have
    equal `ranks` (0 is best)."""

    model: str
    scores: list[float]
    order: list[int]
    ranks: list[int]


class OpenRLHFRequest(BaseModel):
    """`query` holds prompt and response with the template, as OpenRLHF decodes them. Other keys are ignored."""

    query: list[str] = Field(min_length=1)
    prompts: list[Any] | None = None
    labels: list[Any] | None = None


class OpenRLHFResponse(BaseModel):
    """`rewards` and `scores` are the same; `extra_logs` is logged by the trainer."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]] = {}


class OpenAIError(BaseModel):
    """What is wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: int


class Problem(BaseModel):
    """The answer to a refused request. `error` says it again in OpenAI's form, on vLLM's routes."""

    detail: str
    reason: str
    request_id: str | None = None
    error: OpenAIError | None = None


class Info(BaseModel):
    """What is served.

    `exact`: a score depends on what is computed with it by 1e-5 of a few units; in a lower type, by 0.05 and more.
    """

    model: str
    rm_scale: str
    max_length: int
    overlong_policy: str
    score_mean: float | None
    score_std: float | None
    chat_template_sha256: str | None
    packed: bool
    dtype: str
    exact: bool
    limits: dict[str, float | None]
