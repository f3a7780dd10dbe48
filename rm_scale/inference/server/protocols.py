"""Bodies of requests and answers: this package's own, OpenRLHF's remote reward model's, vLLM's pooling endpoints'."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

Message = dict[str, JsonValue]
TextOrMessages = str | list[Message]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ScoreItem(_Strict):
    """A completion with its prompt; or `messages`, of which the last one is scored; or a whole rendered `text`.

    Prompt, messages and tools may be the JSON text of what they are, as in the cells of a table.
    """

    prompt: TextOrMessages | None = None
    completion: TextOrMessages | None = None
    messages: str | list[Message] | None = None
    text: str | None = None
    tools: str | list[JsonValue] | None = None


class ScoreRequest(_Strict):
    """Texts to score."""

    items: list[ScoreItem] = Field(min_length=1)


class ScoreResponse(_Strict):
    """Raw scores in the order of the request; normalised ones where the model knows its mean and deviation."""

    model: str
    scores: list[float]
    normalized_scores: list[float] | None
    num_tokens: int


class RankRequest(_Strict):
    """Completions of one prompt."""

    prompt: TextOrMessages = ""
    completions: list[TextOrMessages] = Field(min_length=1)
    tools: str | list[JsonValue] | None = None
    top_k: int | None = Field(default=None, ge=1)


class RankResponse(_Strict):
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


def _changes_nothing(value: Any) -> Any:
    """Let through what leaves text and number as they are: null, false, an empty object.

    Raises:
        ValueError: the value would change one of them, which is not done here.
    """
    if value is None or value is False or value == {}:
        return value
    raise ValueError("the scoring contract says how a text is scored, and this would change it. Fix: leave it out")


_Unchanged = Annotated[JsonValue, AfterValidator(_changes_nothing)]


class PoolingRequest(_Strict):
    """Rendered texts, token ids, or a conversation; `use_activation` asks for a probability, not the raw score.

    Fields that clients of vLLM send and that don't bear on a score are taken, and not used. Those that would change the
    text or the number may only say that they don't; any other field is refused.
    """

    input: str | list[str] | list[int] | list[list[int]] | None = None
    messages: list[Message] | None = None
    tools: str | list[JsonValue] | None = None
    use_activation: bool | None = None
    encoding_format: Annotated[str, Field(pattern="^float$")] = "float"
    # Not used.
    model: str | None = None
    user: str | None = None
    priority: int | None = None
    request_id: str | None = None
    rid: str | list[str] | None = None
    cache_salt: str | None = None
    endianness: str | None = None
    truncation_side: str | None = None
    task: Annotated[str, Field(pattern="^classify$")] | None = None
    embed_dtype: Annotated[str, Field(pattern="^float32$")] | None = None
    # Would change the text.
    chat_template: _Unchanged = None
    chat_template_kwargs: _Unchanged = None
    add_generation_prompt: _Unchanged = None
    continue_final_message: _Unchanged = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: _Unchanged = None
    mm_processor_kwargs: _Unchanged = None
    media_io_kwargs: _Unchanged = None
    # Would change the number; the first two are older names of `use_activation`.
    activation: _Unchanged = None
    softmax: _Unchanged = None
    normalize: _Unchanged = None
    dimensions: _Unchanged = None


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class PoolingData(BaseModel):
    """One score, as a vector of one."""

    index: int
    object: str = "pooling"
    data: list[float]


class PoolingResponse(BaseModel):
    """As vLLM's `/pooling`."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[PoolingData]
    usage: Usage


class ClassificationData(BaseModel):
    """One score, under the name that vLLM gives probabilities."""

    index: int
    label: str
    probs: list[float]
    num_classes: int = 1


class ClassificationResponse(BaseModel):
    """As vLLM's `/classify`."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[ClassificationData]
    usage: Usage


class Problem(BaseModel):
    """The answer to a refused request."""

    detail: str
    reason: str
    request_id: str | None = None


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
