"""Check an export by the rules of TEI (text-embeddings-inference), and write what its ONNX backend reads.

Its other backend, Candle, has no classifier for decoders (Llama, Mistral, Qwen, Gemma), so the ONNX one is the only
way; TEI builds it into the image for processors, not into those for GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rm_scale.errors import ModelError
from rm_scale.files import read_json_object, write_whole
from rm_scale.inference.export.engine_facts import FOLDER, PAIRS, EngineFacts, EngineReady
from rm_scale.inference.export.onnx_export import INPUTS, ONNX_FILE, OUTPUT, write_onnx

TEI_VERSION = "1.9.3"
LIMIT_FILE = "sentence_bert_config.json"
_DEFAULT_BATCH_TOKENS = 16384
_INSTEAD = "Fix: serve it with vLLM (--engine vllm), or with rm-scale serve."


def prepare_tei(facts: EngineFacts, trust_remote_code: bool = False) -> EngineReady:
    """Write ONNX and the longest length, and check what TEI's router and ONNX backend read.

    Rules: router/src/lib.rs (`ModelConfig`, lengths), backends/ort/src/lib.rs (`Config`, `TokenizerConfig`, `predict`),
    core/src/tokenization.rs. Of several end-of-text ids config.json keeps the contract's: TEI reads a number there.

    Raises:
        ModelError: TEI would not start with it, or would score it differently; or it can't be written as ONNX.
        CheckpointError: ONNX Runtime scores differently.
    """
    _name_one_eos(facts)
    problems = [*_config_problems(read_json_object(facts.folder / "config.json")), *_tokenizer_problems(facts)]
    if problems:
        raise ModelError(f"--engine tei: {' '.join(problems)}")
    num_texts = _check_texts(facts)
    difference = write_onnx(facts.folder, trust_remote_code)
    _check_graph(facts)
    limit = {"max_seq_length": facts.max_length, "do_lower_case": False}
    write_whole(facts.folder / LIMIT_FILE, json.dumps(limit, indent=2) + "\n")
    batch_tokens = max(_DEFAULT_BATCH_TOKENS, facts.max_length)
    return EngineReady(
        engine="tei",
        version=f"text-embeddings-inference {TEI_VERSION}",
        checked=(
            "config.json: a classifier with one label, and every field that TEI needs, in the type that it reads",
            f"{ONNX_FILE}: float32, output {OUTPUT} of shape (batch, 1), off by {difference:.2g} at most",
            f"tokenizer.json: {num_texts} texts have the token ids of the contract",
            "tokenizer_config.json: batches are padded on the right",
            f"{LIMIT_FILE}: a text over {facts.max_length} tokens is refused",
        ),
        files=(ONNX_FILE, f"{ONNX_FILE}.data", LIMIT_FILE),
        serve=(
            *("text-embeddings-router", "--model-id", FOLDER, "--dtype", "float32", "--auto-truncate", "false"),
            *("--max-batch-tokens", str(batch_tokens)),
        ),
        path="/predict",
        body={"inputs": facts.example_text(), "raw_scores": True},
        answer="[0].score",
        port=3000,
        notes=(
            "take an image with TEI's ONNX backend (cpu-1.9): those for GPUs hold Candle alone, which has no "
            "classifier for this model",
            'several texts are a list of lists, {"inputs": [["..."], ["..."]]}: two strings in one list are a pair',
        ),
    )


# --- config.json -----------------------------------------------------------------------------------------------------


def _name_one_eos(facts: EngineFacts) -> None:
    """Keep the contract's of several end-of-text ids in config.json; a classifier uses none of them."""
    path = facts.folder / "config.json"
    config = read_json_object(path)
    if isinstance(config.get("eos_token_id"), list):
        config["eos_token_id"] = facts.contract.encoding["eos_token_id"]
        write_whole(path, json.dumps(config, indent=2) + "\n")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_count_or_none(value: Any) -> bool:
    return value is None or _is_count(value)


def _maps_to(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(is_right(one) for one in value.values())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FIELDS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("model_type",), "a text", _is_text),
    (("max_position_embeddings",), "a number", _is_count),
    (("pad_token_id",), "a number", _is_count),
    (("eos_token_id",), "one number", _is_count_or_none),
    (("hidden_size", "n_embd"), "a number", _is_count),
    (("num_hidden_layers", "n_layer"), "a number", _is_count),
    (("num_key_value_heads", "n_head"), "a number", _is_count_or_none),
    (("id2label",), "an object of texts", _maps_to(_is_text)),
    (("label2id",), "an object of numbers", _maps_to(_is_count)),
    (("auto_map",), "an object of texts", lambda value: value is None or _maps_to(_is_text)(value)),
)
"""Fields of TEI's `ModelConfig` and `Config`, each with its aliases and what it must be."""


def _config_problems(config: dict[str, Any]) -> list[str]:
    """Return which fields TEI could not parse: it would stop at the first."""
    found = []
    for names, what, is_right in _FIELDS:
        given = [name for name in names if name in config]
        if len(given) > 1:
            found.append(f"config.json names {' and '.join(given)}, which TEI takes for one field twice. {_INSTEAD}")
        value = config.get(given[0]) if given else None
        if not is_right(value):
            found.append(f"config.json: {names[0]}={value!r}, TEI needs {what}. {_INSTEAD}")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not any(str(name).endswith("Classification") for name in architectures):
        found.append(f"config.json: architectures={architectures!r}, TEI needs one that ends with Classification.")
    if len(config.get("id2label") or {}) != 1:
        found.append(f"config.json: id2label={config.get('id2label')!r}, a head of one output needs one label.")
    return found


# --- Tokenizer and graph ---------------------------------------------------------------------------------------------


def _tokenizer_problems(facts: EngineFacts) -> list[str]:
    found = []
    if not (facts.folder / "tokenizer.json").is_file():
        found.append(f"it has no tokenizer.json, and TEI reads no other tokenizer. {_INSTEAD}")
    side = read_json_object(facts.folder / "tokenizer_config.json").get("padding_side", "right")
    if side != "right":
        found.append(
            f"tokenizer_config.json: padding_side={side!r}, on which TEI would pad; the graph reads the score at the "
            "last token before padding on the right. Fix: write right there, as the scoring contract says."
        )
    return found


def _check_texts(facts: EngineFacts) -> int:
    """Compare the token ids of tokenizer.json alone, as TEI reads it, with the contract's; return how many texts.

    Raises:
        ModelError: they differ, or no text gives the token ids of training.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(facts.folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for prompt, answer in PAIRS:
        given = facts.as_trained(prompt, answer)
        text = facts.encoder.render(*given)
        found, expected = tokenizer.encode(text, add_special_tokens=True).ids, facts.encoder.encode(*given)
        if found != expected:
            raise ModelError(
                f"--engine tei: tokenizer.json alone gives {text!r} {len(found)} tokens, in training it "
                f"had {len(expected)}. {_INSTEAD}"
            )
    return len(PAIRS)


def _check_graph(facts: EngineFacts) -> None:
    """Hold the graph to what TEI's ONNX backend hands in and looks up.

    Raises:
        ModelError: it reads other inputs, or has no output called logits of shape (batch, 1).
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(facts.folder / ONNX_FILE), providers=["CPUExecutionProvider"])
    inputs = tuple(given.name for given in session.get_inputs())
    outputs = {output.name: output.shape for output in session.get_outputs()}
    shape = outputs.get(OUTPUT, ())
    if inputs != INPUTS or len(shape) != 2 or shape[1] != 1:
        raise ModelError(
            f"--engine tei: {ONNX_FILE} reads {inputs} and gives {outputs}, TEI hands in {INPUTS} "
            f"and reads {OUTPUT} of shape (batch, 1). {_INSTEAD}"
        )
