"""Bodies of vLLM's pooling endpoints and of SGLang's embeddings, field by field: what is acted on, and what is refused.

By vLLM 0.33.0, `vllm/entrypoints/pooling/*/protocol.py` (0.32.0 has the same fields), and SGLang 0.5.23,
`sglang/srt/entrypoints/openai/protocol.py`. A field that would change text or number is refused by name unless it says
what is done anyway: the scoring contract decides both. `tests/data/vllm_answers.json` holds the answers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, JsonValue

from rm_scale.inference.server.protocols import Message, Strict

VLLM_PATHS = frozenset(
    [f"{version}/{name}" for version in ("", "/v1") for name in ("pooling", "classify", "score", "rerank")]
    + ["/v2/rerank", "/v1/embeddings", "/v1/models"]
)
"""Where answers have vLLM's or OpenAI's form, refusals too."""


def _changes_nothing(value: Any) -> Any:
    """Let through what leaves text and number as they are: null, false, an empty object.

    Raises:
        ValueError: the value would change one of them, which is not done here.
    """
    if value is None or value is False or value == {}:
        return value
    raise ValueError("the scoring contract says how a text is scored, and this would change it. Fix: leave it out")


def _cuts_nothing(value: Any) -> Any:
    """Let through 0, which is no limit.

    Raises:
        ValueError: the value is a limit.
    """
    return value if value == 0 and value is not False else _changes_nothing(value)


NoLimit = Annotated[JsonValue, AfterValidator(_cuts_nothing)]
Unchanged = Annotated[JsonValue, AfterValidator(_changes_nothing)]
Inputs = str | list[str] | list[int] | list[list[int]]
EmbedDtype = Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]


class _Common(Strict):
    """What every request may hold. The first ones don't bear on a score: they are taken, and not used."""

    model: str | None = None
    user: str | None = None
    priority: int | None = None
    request_id: str | None = None
    rid: str | list[str] | None = None
    cache_salt: str | None = None
    truncation_side: Literal["left", "right"] | None = None
    truncate_prompt_tokens: Unchanged = None
    padding: Literal["do_not_pad"] | None = None
    mm_processor_kwargs: Unchanged = None
    media_io_kwargs: Unchanged = None
    chat_template_kwargs: Unchanged = None
    dimensions: Unchanged = None
    normalize: Unchanged = None


class _Activated(_Common):
    """`use_activation` asks for the sigmoid; null, its default, for the raw score, as config.json of an export says."""

    use_activation: bool | None = None
    # Older names of it.
    activation: Unchanged = None
    softmax: Unchanged = None


class _Encoded(Strict):
    """How a number is written: as one, or as the base64 text of its bytes."""

    encoding_format: Literal["float", "base64"] = "float"
    embed_dtype: EmbedDtype | None = None
    endianness: Literal["native", "big", "little"] | None = None


class PoolingRequest(_Activated, _Encoded):
    """Rendered texts, token ids, or a conversation.

    `add_special_tokens` false: the texts are whole, and hold the BOS that the contract gives them.
    """

    input: Inputs | None = None
    messages: list[Message] | None = None
    tools: str | list[JsonValue] | None = None
    task: Literal["classify"] | None = None
    add_special_tokens: bool | None = None
    chat_template: str | Literal[False] | dict[str, JsonValue] | None = None
    add_generation_prompt: Unchanged = None
    continue_final_message: Unchanged = None


class EmbeddingsRequest(_Common, _Encoded):
    """SGLang's: rendered texts or token ids; `embedding[0]` of each is its raw score."""

    input: Inputs
    lora_path: Unchanged = None
    embed_override_token_id: Unchanged = None
    embed_overrides: Unchanged = None


class TextParts(Strict):
    """A text as a list of text parts."""

    content: list[JsonValue]


ScoreInput = str | TextParts
ScoreInputs = ScoreInput | list[ScoreInput]


class _Scoring(_Activated):
    instruction: Unchanged = None
    max_tokens_per_query: NoLimit = 0
    max_tokens_per_doc: NoLimit = 0


class TextScoreRequest(_Scoring):
    """Pairs: `text_1` is the prompt, `text_2` the completion; one to one, or one prompt for all completions."""

    text_1: ScoreInputs
    text_2: ScoreInputs


class DocumentScoreRequest(_Scoring):
    """The same under other names."""

    queries: ScoreInputs
    documents: ScoreInputs


class ItemScoreRequest(_Scoring):
    """The same under other names."""

    queries: ScoreInputs
    items: ScoreInputs


class DataScoreRequest(_Scoring):
    """The same under other names."""

    data_1: ScoreInputs
    data_2: ScoreInputs


PairScoreRequest = TextScoreRequest | DocumentScoreRequest | ItemScoreRequest | DataScoreRequest


class RerankRequest(_Scoring):
    """Completions (`documents`) of one prompt (`query`), best first; `top_n` 0: all."""

    query: ScoreInput
    documents: ScoreInputs
    top_n: int = Field(default=0, ge=0)
    return_documents: bool | None = None


# --- Answers ---------------------------------------------------------------------------------------------------------


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None
    completion_tokens_details: None = None


class _Answer(BaseModel):
    id: str
    object: str = "list"
    created: int
    model: str
    usage: Usage


class PoolingData(BaseModel):
    """One score, as a vector of one, or the base64 text of its bytes."""

    index: int
    object: str = "pooling"
    data: list[float] | str


class PoolingResponse(_Answer):
    """As vLLM's `/pooling`."""

    data: list[PoolingData]


class ClassificationData(BaseModel):
    """One score, under the name that vLLM gives probabilities."""

    index: int
    label: str
    probs: list[float]
    num_classes: int = 1


class ClassificationResponse(_Answer):
    """As vLLM's `/classify`."""

    data: list[ClassificationData]


class EmbeddingData(BaseModel):
    """One score, as a vector of one, or the base64 text of its bytes."""

    index: int
    object: str = "embedding"
    embedding: list[float] | str


class EmbeddingsResponse(_Answer):
    """As OpenAI's `/v1/embeddings`, and SGLang's for a reward model."""

    data: list[EmbeddingData]


class PairScore(BaseModel):
    """The score of a pair."""

    index: int
    object: str = "score"
    score: float


class PairScoreResponse(_Answer):
    """As vLLM's `/score`."""

    data: list[PairScore]


class RerankDocument(BaseModel):
    """A document as it came."""

    text: str | None = None
    multi_modal: list[JsonValue] | None = None


class RerankResult(BaseModel):
    """A document, its place in the request, its score."""

    index: int
    document: RerankDocument
    relevance_score: float


class RerankUsage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    total_tokens: int


class RerankResponse(BaseModel):
    """As vLLM's `/rerank`."""

    id: str
    model: str
    usage: RerankUsage
    results: list[RerankResult]


class ModelCard(BaseModel):
    """The served model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "rm_scale"
    root: str
    parent: None = None
    max_model_len: int
    permission: list[JsonValue] = []


class ModelList(BaseModel):
    """As OpenAI's `/v1/models`."""

    object: str = "list"
    data: list[ModelCard]
