"""A real byte-level BPE tokenizer, trained in a moment, and helpers to write preference files."""

from __future__ import annotations

import copy
import gzip
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rm_scale.config import RunConfig

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "How do I bake bread? Mix flour, water, salt and yeast.",
    "\n\nHuman: What is the capital of France?\n\nAssistant: Paris.",
    "user assistant system tool 0123456789",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if message.content is string else '' }}"
    "{% for call in message.tool_calls or [] %}[call {{ call.function.name }}]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if tools %}[tools {{ tools | tojson }}]\n{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS_TEMPLATE = "{{ bos_token }}" + CHAT_TEMPLATE


def build_tokenizer(adds_bos: bool = False, template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(SENTENCES * 3, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = template
    return tokenizer


_PLAIN = build_tokenizer()
_WITH_BOS = build_tokenizer(adds_bos=True, template=BOS_TEMPLATE)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Adds no special tokens; its chat template is ChatML without BOS."""
    return copy.deepcopy(_PLAIN)


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Adds a BOS to every text, and its chat template writes one too (as Llama 3 does)."""
    return copy.deepcopy(_WITH_BOS)


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    """Write rows, one per line; bytes go in as they are. Returns the path as text."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.fixture
def jsonl() -> Callable[[Path, Iterable[Any]], str]:
    """`write_jsonl`."""
    return write_jsonl


@pytest.fixture(autouse=True)
def _logs_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    """`setup_logging`, called by another test, takes rm_scale's logger off the root."""
    logger = logging.getLogger("rm_scale")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()  # type: ignore[attr-defined]


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """Build a `RunConfig` whose cache lies in the test's folder."""

    def make(*paths: str, **values: Any) -> RunConfig:
        defaults = {"dataset_path": list(paths) or None, "dataset_cache_dir": str(tmp_path / "cache")}
        return RunConfig(model_name_or_path="none", **{**defaults, **values})

    return make
