"""Which row layout a run gets, decided from settings and the model's config.json alone."""

from __future__ import annotations

from typing import Any, Literal

from rm_scale.config import RunConfig
from rm_scale.planning.shape import text_config

Packing = Literal["none", "padding_free", "prefix_shared"]

TESTED_RECURRENT_TYPES = frozenset(["jamba", "qwen3_5_text", "qwen3_next", "zamba", "zamba2"])
"""Tested architectures with layers that carry a state along a row (`rm_scale.modeling.recurrent_layers`)."""

# Architectures whose packed rows a test compares with padded ones (tests/unit/modeling/test_packed_model.py).
TESTED_MODEL_TYPES = frozenset(
    [
        "arcee",
        "axk1",
        "biogpt",
        "deepseek_v2",
        "deepseek_v3",
        "diffllama",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "jetmoe",
        "llama",
        "minicpm3",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
        *TESTED_RECURRENT_TYPES,
    ]
)

# What can't be expressed by "a response sees its prompt and itself", with the reason.
REFUSED_MODEL_TYPES = {
    "bloom": "its attention adds a bias by distance in the row (ALiBi)",
    "mpt": "its attention adds a bias by distance in the row (ALiBi)",
    "falcon": "its attention does not go through transformers' attention interface",
    "modernbert-decoder": "it has a layer between backbone and head that packed rows don't go through",
    "doge": "its attention adds a bias of its own",
    "gpt_neo": "its attention does not go through transformers' attention interface",
    "gptj": "its attention does not go through transformers' attention interface",
    "openai-gpt": "its attention does not go through transformers' attention interface",
    "axk2": "an index chooses the keys that its attention sees, which packed rows don't know",
    "minimax": "its linear attention carries a state along the row, which can't be told from the rest of the layer",
}
# A state or a convolution that runs along the row would carry one response into the next.
_RECURRENT_WORDS = (
    "mamba",
    "rwkv",
    "recurrent",
    "xlstm",
    "lfm2",
    "jamba",
    "zamba",
    "falcon_h1",
    "bamba",
    "hybrid",
    "next",
)

_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def refusal(model: dict[str, Any]) -> str | None:
    """Say why a model can't take packed rows; `None` when nothing in its config.json says so."""
    text = model.get("text_config", model)
    kind = _model_type(model)
    if kind in REFUSED_MODEL_TYPES:
        return f"{kind}: {REFUSED_MODEL_TYPES[kind]}"
    if kind in TESTED_RECURRENT_TYPES:
        return None
    if any(word in kind for word in _RECURRENT_WORDS):
        return f"{kind}: a state runs along the row and would carry one response into the next"
    layers = sorted(set(text.get("layer_types") or []) - {"full_attention", "sliding_attention"})
    if layers:
        return f"{kind}: layers of kind {', '.join(layers)} can't be cut into responses"
    if text.get("alibi"):
        return f"{kind}: its attention adds a bias by distance in the row (ALiBi)"
    if text.get("use_bidirectional_attention"):
        return f"{kind}: its attention is not causal"
    return None


def is_tested(model: dict[str, Any]) -> bool:
    """Tell whether this is an architecture whose packed rows are known to be exact."""
    return refusal(model) is None and _model_type(model) in TESTED_MODEL_TYPES


def _model_type(model: dict[str, Any]) -> str:
    return text_config(model)[1]


def attention_dropout(model: dict[str, Any]) -> float:
    """Return the dropout on attention weights that the model's config asks for."""
    text = model.get("text_config", model)
    return max((float(text.get(name) or 0.0) for name in _ATTENTION_DROPOUTS), default=0.0)


def packing_problems(config: RunConfig, model: dict[str, Any]) -> list[str]:
    """Say why the layout asked for by name can't be had, one sentence each."""
    if config.packing == "none":
        return []
    if config.packing == "auto":
        return _lost_settings(config, model)
    problems = []
    reason = refusal(model)
    if reason is None and not is_tested(model) and "packing" not in config.force:
        problems.append(
            f"packing={config.packing}: {_model_type(model)} models are not tested with packed rows; rewards could be "
            "wrong without an error. Fix: set packing: none, or add --force packing after comparing a short run's "
            "losses with packing: none."
        )
    if reason is not None:
        problems.append(f"packing={config.packing} with {reason}. Fix: set packing: none.")
    dropout = attention_dropout(model)
    if dropout and not config.disable_dropout:
        problems.append(
            f"packing={config.packing} with attention dropout {dropout:g} (the model's config) and "
            "disable_dropout=False: packed attention has no dropout. Fix: set disable_dropout: true or packing: none."
        )
    return problems


def _lost_settings(config: RunConfig, model: dict[str, Any]) -> list[str]:
    """Report settings of packed rows that would have no effect, since padded rows were chosen for the user."""
    packing, note = choose_packing(config, model)
    lost = [
        f"{name}={getattr(config, name)}"
        for name, unset in (("max_tokens_per_device", None), ("packed_attention", "auto"))
        if getattr(config, name) != unset
    ]
    if packing != "none" or not lost:
        return []
    return [
        f"{', '.join(lost)}: belongs to packed rows, but {str(note).removeprefix('packing not given: ')}. Fix: "
        "leave it out, or set packing by name."
    ]


def changing_rope(model: dict[str, Any]) -> int | None:
    """Return the length from which rotary frequencies depend on the longest sequence of a batch; `None`: never."""
    text = model.get("text_config", model)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if not any((kind.get("rope_type") or kind.get("type")) in {"dynamic", "longrope"} for kind in kinds):
        return None
    original = [
        kind["original_max_position_embeddings"] for kind in kinds if "original_max_position_embeddings" in kind
    ]
    found = original[0] if original else text.get("original_max_position_embeddings")
    limit = found or text.get("max_position_embeddings")
    return int(limit) if limit else None


def rope_problems(config: RunConfig, model: dict[str, Any]) -> list[str]:
    """Report a max_length at which a text's reward would depend on what it is batched with, in any layout."""
    limit = changing_rope(model)
    if limit is None or config.max_length <= limit or "rope" in config.force:
        return []
    return [
        f"max_length={config.max_length}: beyond {limit} positions this model changes its rotary frequencies by the "
        "longest sequence of a batch, so that a reward would depend on its neighbours. Fix: "
        f"--max_length {limit} or less, or add --force rope."
    ]


def choose_packing(config: RunConfig, model: dict[str, Any]) -> tuple[Packing, str | None]:
    """Return the layout that runs, and a note when it was decided for the user.

    `auto` is the fastest layout that is known to be exact for the model: shared prompts, else padded rows.
    """
    if config.packing != "auto":
        return config.packing, None
    kind = _model_type(model)
    reason = refusal(model)
    if reason is not None:
        return "none", f"packing not given: none, since packed rows can't be used with {reason}"
    if attention_dropout(model) and not config.disable_dropout:
        return "none", "packing not given: none, since packed attention has no dropout and disable_dropout is off"
    if config.attn_implementation is not None:
        return "none", f"packing not given: none, since attn_implementation={config.attn_implementation} was asked for"
    if kind not in TESTED_MODEL_TYPES:
        return "none", (
            f"packing not given: none, since {kind} models are not tested with packed rows; "
            "packing: prefix_shared with --force packing tries it"
        )
    return "prefix_shared", "packing not given: prefix_shared, the fastest layout for this model"


def default_max_tokens(config: RunConfig, micro_batch_size: int) -> int:
    """Return the token budget of a packed row: what a padded micro-batch of pairs could hold at most."""
    return 2 * micro_batch_size * config.max_length
