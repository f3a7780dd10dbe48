"""Check an export by vLLM's own rules, and write the chat template by which its /score reads a prompt and an answer."""

from __future__ import annotations

import json
from typing import Any

from rm_scale.errors import ModelError
from rm_scale.inference.export.engine_architectures import (
    VLLM_CLASSES,
    VLLM_NOT,
    VLLM_OVERRIDES,
    VLLM_THROUGH_TRANSFORMERS,
    VLLM_VERSION,
)
from rm_scale.inference.export.engine_facts import FOLDER, EngineFacts, EngineReady, architecture_of
from rm_scale.inference.export.vllm_chat_template import TEMPLATE_FILE, write_chat_template

_INSTEAD = "Fix: serve it with rm-scale serve."
_ONE_KIND_OF_LAYER = ("qwen2", "qwen3")
"""Model types whose class in vLLM (models/qwen2.py) runs no mixture of layers with and without a window."""

_NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
"""Model types that vLLM's config/model.py refuses in float16."""


def vllm_class_problem(config: dict[str, Any]) -> str | None:
    """Return why vLLM has no class for a model, with what to do instead; `None` when it has one.

    Args:
        config: values of its config.json.
    """
    name = architecture_of(config)
    if "vision_config" in config or "text_config" in config:
        return (
            f"vLLM {VLLM_VERSION} loads {name} with its tower for pictures, which an export for text does not have. "
            f"{_INSTEAD}"
        )
    if name in VLLM_CLASSES or name in VLLM_OVERRIDES or name in VLLM_THROUGH_TRANSFORMERS:
        return None
    known = "can't run" if name in VLLM_NOT else "is not known here to run"
    return f"vLLM {VLLM_VERSION} {known} the architecture {name or '(config.json names none)'}. {_INSTEAD}"


def prepare_vllm(facts: EngineFacts) -> EngineReady:
    """Check all that vLLM's loader, pooler and scoring read, and write `vllm_chat_template.jinja`.

    Rules: model_executor/models/adapters.py (one linear layer `score`), layers/pooler/activations.py (what is done to
    its output), config/model.py (types, architectures), entrypoints/pooling/scoring/io_processor.py (texts).

    Raises:
        ModelError: vLLM would not load it, or would score it differently.
    """
    problems = [problem for problem in (vllm_class_problem(facts.config), *_config_problems(facts)) if problem]
    if problems:
        raise ModelError(f"--engine vllm: {' '.join(problems)}")
    num_texts = write_chat_template(facts)
    dtype = facts.contract.dtype
    return EngineReady(
        engine="vllm",
        version=f"vLLM {VLLM_VERSION}",
        checked=(
            _how_it_runs(facts.architecture),
            "config.json: one label, problem_type regression, so that scores are raw",
            "weights: score.weight of one row, computed in float32 whatever --dtype is",
            f"{TEMPLATE_FILE}: /score and /rerank give {num_texts} texts the token ids of the contract",
        ),
        files=(TEMPLATE_FILE,),
        serve=(
            *("vllm", "serve", FOLDER, "--runner", "pooling", "--dtype", dtype),
            *("--chat-template", f"{FOLDER}/{TEMPLATE_FILE}", "--max-model-len", str(facts.max_length)),
            *_override(facts.architecture),
        ),
        path="/score",
        body={"text_1": "What is 2 + 2?", "text_2": "4" if facts.reads_conversations else " 4"},
        answer="data[0].score",
        port=8000,
        notes=_notes(facts),
    )


def _config_problems(facts: EngineFacts) -> list[str]:
    """Return where config.json and weights break a rule of vLLM's."""
    config, found = facts.config, []
    if len(config.get("id2label") or {}) != 1:
        found.append(f"id2label={config.get('id2label')}: a head of one output needs one label. Fix: export again.")
    if config.get("problem_type") != "regression":
        found.append(
            f"problem_type={config.get('problem_type')!r}: vLLM would put the score through a sigmoid. Fix: export "
            "again, or write regression in config.json."
        )
    if config.get("head_dtype") not in (None, "float32"):
        found.append(f"head_dtype={config['head_dtype']!r}: it would round the head. Fix: take it out of config.json.")
    for name in ("method", "classifier_from_token"):
        if name in config:
            found.append(
                f"{name}: vLLM would make the head from the language model's. Fix: take it out of config.json."
            )
    if facts.contract.dtype == "float16" and config.get("model_type") in _NO_FLOAT16:
        found.append(f"vLLM refuses {config['model_type']} in float16. Fix: --dtype bfloat16 or float32.")
    if config.get("model_type") in _ONE_KIND_OF_LAYER and len(set(config.get("layer_types") or ())) > 1:
        found.append(
            f"layer_types: vLLM runs {config['model_type']} with a window in all layers or in none. {_INSTEAD}"
        )
    place = facts.tensors.get("score.weight")
    if place is None or place.shape[0] != 1:
        shape = "none" if place is None else "x".join(map(str, place.shape))
        found.append(f"score.weight: {shape}, where vLLM loads a head of one row by this name. {_INSTEAD}")
    return found


def _how_it_runs(name: str) -> str:
    if name in VLLM_THROUGH_TRANSFORMERS:
        return f"architecture: {name} runs with transformers' code (slower than a class of vLLM's own)"
    return f"architecture: {name} runs as {(VLLM_CLASSES | VLLM_OVERRIDES)[name]}"


def _override(name: str) -> tuple[str, ...]:
    """Return the options by which vLLM takes the class that it does not find by the export's architecture."""
    if name not in VLLM_OVERRIDES:
        return ()
    return "--convert", "classify", "--hf-overrides", json.dumps({"architectures": [VLLM_OVERRIDES[name]]})


def _notes(facts: EngineFacts) -> tuple[str, ...]:
    found = []
    if facts.contract.encoding["overlong_policy"] == "truncate_prompt_left":
        found.append(
            "vLLM refuses a text longer than --max-model-len, where rm-scale cuts the prompt; its "
            "truncate_prompt_tokens cuts the whole text and moves scores"
        )
    if facts.architecture in VLLM_THROUGH_TRANSFORMERS:
        found.append("vLLM's own transformers must know this architecture: it may be older than the one here")
    return tuple(found)
