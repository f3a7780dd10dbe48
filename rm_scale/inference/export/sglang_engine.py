"""Check an export by SGLang's own rules, and write the zeros that its heads with a bias read."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file

from rm_scale.errors import ModelError
from rm_scale.inference.export.engine_architectures import SGLANG_CLASSES, SGLANG_VERSION
from rm_scale.inference.export.engine_facts import FOLDER, EngineFacts, EngineReady, architecture_of

BIAS_FILE = "sglang_score_bias.safetensors"
"""A name that `rm_scale.modeling.stored_head` knows, so that it is not taken for another head."""
_INSTEAD = "Fix: serve it with vLLM (--engine vllm), or with rm-scale serve."


def sglang_class_problem(config: dict[str, Any]) -> str | None:
    """Return why SGLang has no classifier for a model, with what to do instead; `None` when it has one.

    Args:
        config: values of its config.json.
    """
    name = architecture_of(config)
    if name in SGLANG_CLASSES:
        return None
    return (
        f"SGLang {SGLANG_VERSION} has no classifier for {name or 'a config.json without architectures'} (only "
        f"{', '.join(sorted(SGLANG_CLASSES))}): it would return a normalised hidden vector in place of a score. "
        f"{_INSTEAD}"
    )


def prepare_sglang(facts: EngineFacts) -> EngineReady:
    """Check what SGLang's classes and loader read; write one zero for those with a bias (`BIAS_FILE`).

    Its Qwen classifiers have a bias that no checkpoint of transformers fills: it keeps its random initial value, so
    that all scores are shifted by a number that changes with each start. SGLang reads every safetensors file of a
    folder without an index; transformers reads model.safetensors alone, so the zero changes nothing there.

    Rules: srt/models (llama_reward.py, qwen2_classification.py, qwen3_classification.py, gemma2_reward.py),
    srt/model_loader, srt/configs/model_config.py.

    Raises:
        ModelError: SGLang would not load it, or would score it differently.
    """
    problems = [problem for problem in (sglang_class_problem(facts.config), *_config_problems(facts)) if problem]
    if problems:
        raise ModelError(f"--engine sglang: {' '.join(problems)}")
    has_bias = SGLANG_CLASSES[facts.architecture]
    checked = [
        f"architecture: SGLang has the class {facts.architecture}; it pools the last token and normalises nothing",
        "config.json and weights: one label and score.weight of one row; no window, no bias that SGLang leaves out",
    ]
    if has_bias:
        save_file({"score.bias": torch.zeros(1)}, facts.folder / BIAS_FILE, metadata={"format": "pt"})
        checked.append(f"{BIAS_FILE}: one zero for the bias of its head")
    dtype = facts.contract.dtype
    notes = ["/v1/classify is a softmax over one label, 1.0 for every text: use /classify"]
    if dtype != "float32":
        notes.append(f"the head is rounded to {dtype} with all else; --dtype float32 computes with the exact head")
    return EngineReady(
        engine="sglang",
        version=f"SGLang {SGLANG_VERSION}",
        checked=tuple(checked),
        files=(BIAS_FILE,) if has_bias else (),
        serve=(
            *("python", "-m", "sglang.launch_server", "--model-path", FOLDER, "--is-embedding"),
            *("--dtype", dtype),
        ),
        path="/classify",
        body={"text": facts.example_text()},
        answer="embedding[0]",
        port=30000,
        notes=tuple(notes),
    )


def _config_problems(facts: EngineFacts) -> list[str]:
    """Return where config.json and weights ask for what SGLang's classes leave out."""
    config, found = facts.config, []
    if len(config.get("id2label") or {}) != 1:
        found.append(f"id2label={config.get('id2label')}: a head of one output needs one label. Fix: export again.")
    place = facts.tensors.get("score.weight")
    if place is None or place.shape[0] != 1:
        found.append(f"score.weight: not a head of one row, which SGLang loads by this name. {_INSTEAD}")
    window = config.get("sliding_window")
    is_windowed = config.get("use_sliding_window", True) and facts.architecture != "Gemma2ForSequenceClassification"
    if isinstance(window, int) and is_windowed and window < facts.max_length:
        found.append(
            f"sliding_window={window}: SGLang's class attends to everything, so texts longer than that would score "
            f"differently (max_length is {facts.max_length}). {_INSTEAD}"
        )
    if config.get("mlp_bias"):
        found.append(f"mlp_bias=true: SGLang's class leaves these biases out without a word. {_INSTEAD}")
    if SGLANG_CLASSES.get(facts.architecture) and (facts.folder / "model.safetensors.index.json").exists():
        found.append(
            "its weights are in several files, of which SGLang reads those of the index alone, so that the zero for "
            "the bias of its head can't be added. Fix: --max_shard_size 1000GB, for one file."
        )
    return found
