"""What the check of an export for an engine starts from, and what it comes to."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rm_scale.data.encoding import TextEncoder
from rm_scale.data.preference_group import Text
from rm_scale.files import read_json_object
from rm_scale.modeling.scoring_contract import ScoringContract
from rm_scale.modeling.tokenizers import read_tokenizer
from rm_scale.modeling.weight_files import TensorPlace, checkpoint_tensors

FOLDER = "FOLDER"
"""Stands for the export's place in a command that is kept, since a folder can be moved."""

PAIRS: tuple[tuple[str, str], ...] = (
    ("What is 2 + 2?", " 4"),
    ("Translate 'good morning' to German.\n", "Guten Morgen! Schöne Grüße 🌞"),
    ("  Count to three. ", "\n1, 2,\n\n3 "),
    ("", "A text without a prompt."),
    ("Say nothing.", ""),
)
"""Prompts and answers whose token ids must be the contract's in every engine."""


@dataclass(frozen=True)
class EngineFacts:
    """An export as an engine's loader sees it.

    Attributes:
        folder: where it is.
        contract: how a text becomes a score.
        tokenizer: as it is saved.
    """

    folder: Path
    contract: ScoringContract
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def read(cls, folder: Path, trust_remote_code: bool = False) -> EngineFacts:
        """Read an export.

        Raises:
            ModelError: it has no contract, or no tokenizer.
        """
        return cls(folder, ScoringContract.load(folder), read_tokenizer(str(folder), "main", trust_remote_code))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The values of config.json."""
        return read_json_object(self.folder / "config.json")

    @cached_property
    def encoder(self) -> TextEncoder:
        """The contract's encoder."""
        return TextEncoder.from_settings(self.tokenizer, self.contract.encoding)

    @cached_property
    def tensors(self) -> dict[str, TensorPlace]:
        """Names and shapes of the weights that transformers loads."""
        return checkpoint_tensors(str(self.folder))

    @property
    def architecture(self) -> str:
        """The class that config.json names first, "" where it names none."""
        return architecture_of(self.config)

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens: the contract's, or the model's own where that is shorter."""
        longest = int(self.contract.encoding["max_length"])
        positions = self.config.get("max_position_embeddings")
        return min(longest, positions) if isinstance(positions, int) else longest

    @cached_property
    def reads_conversations(self) -> bool:
        """Whether the model was trained on conversations, as its golden sequences show; else on plain text."""
        return self.encoder.are_conversations([golden.input_ids for golden in self.contract.golden_scores])

    def as_trained(self, prompt: str, answer: str) -> tuple[Text, Text]:
        """Return a prompt and an answer in the form that the model was trained on: messages, or text."""
        if not self.reads_conversations:
            return prompt, answer
        messages = [{"role": "user", "content": prompt}] if prompt else []
        return messages, [{"role": "assistant", "content": answer}]

    def example_text(self) -> str:
        """Return one whole text, as an engine is to be given it.

        Raises:
            ModelError: no text gives the token ids of training.
        """
        return self.encoder.render(*self.as_trained(*PAIRS[0]))


@dataclass(frozen=True)
class EngineReady:
    """What was found out and written for one engine.

    Attributes:
        engine: vllm, sglang or tei.
        version: of the engine whose rules were read.
        checked: what was looked at and found right.
        files: what was written into the export.
        serve: the words of the server's command; `FOLDER` stands for the export.
        path, body: of a request for the raw score, and what it sends.
        answer: where the raw score is in the answer.
        port: on which the engine listens by default.
        notes: what to know besides.
    """

    engine: str
    version: str
    checked: tuple[str, ...]
    files: tuple[str, ...]
    serve: tuple[str, ...]
    path: str
    body: dict[str, Any]
    answer: str
    port: int
    notes: tuple[str, ...] = ()

    def command(self, folder: str | Path = FOLDER) -> str:
        """Return the command that starts the server."""
        return shlex.join(word.replace(FOLDER, str(folder)) for word in self.serve)

    def request(self) -> str:
        """Return the curl line for the raw score of one text."""
        words = ["curl", "-s", f"http://localhost:{self.port}{self.path}", "-H", "Content-Type: application/json"]
        return shlex.join([*words, "-d", json.dumps(self.body, ensure_ascii=False)])

    def record(self) -> dict[str, Any]:
        """Return what is kept in `rm_scale_export.json`."""
        return {
            "rules_of": self.version,
            "checked": list(self.checked),
            "files": list(self.files),
            "serve": self.command(),
            "request": self.request(),
            "raw_score": self.answer,
            "notes": list(self.notes),
        }


def architecture_of(config: dict[str, Any]) -> str:
    """Return the class that a config.json names first, "" where it names none."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, Sequence) and not isinstance(named, str) and named else ""
