"""The model card of an export: its run's, made true for what was exported and fit to be read elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

from rm_scale import __version__

CARD_FILE = "README.md"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# As rm_scale.reporting.model_card writes it, in a room further on.
_EVALUATION = re.compile(r"(<!-- rm_scale:evaluation:begin -->\n).*(\n<!-- rm_scale:evaluation:end -->)", re.DOTALL)
_BEGIN, _END = "<!-- rm_scale:export:begin -->", "<!-- rm_scale:export:end -->"
_EXPORT = re.compile(f"{_BEGIN}.*{_END}\n?", re.DOTALL)
_NEW = """---
library_name: transformers
pipeline_tag: text-classification
tags:
- reward-model
- rm_scale
---

# Reward model

One scalar per text, higher is better.
"""


def portable_name(base_model: str) -> str:
    """A hub name as it is; of a folder on this machine its last part, since the rest means nothing elsewhere."""
    is_here = Path(base_model).is_absolute() or Path(base_model).is_dir()
    return Path(base_model).name if is_here else base_model


def write_export_card(source: Path, target: Path, base_model: str, facts: list[tuple[str, str]]) -> Path:
    """Write the export's card.

    A base model that is a folder here means nothing elsewhere, and a hub refuses it: its name alone is kept, outside
    the front matter. A checkpoint's card is its run's, without the results, which are the finished model's.

    Args:
        source: the run or checkpoint.
        target: the export.
        base_model: what training started from.
        facts: rows of the section on the export.
    """
    is_checkpoint = _CHECKPOINT.fullmatch(source.resolve().name) is not None
    runs = source.resolve().parent / CARD_FILE
    # What lies in a checkpoint is PEFT's empty form.
    card = runs if is_checkpoint and runs.is_file() else source / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else _NEW
    text = text.replace("library_name: peft", "library_name: transformers", 1)
    if portable_name(base_model) != base_model:
        text = text.replace(f"base_model: {base_model}\n", "", 1).replace(base_model, portable_name(base_model))
    if card == runs:
        note = f"## Evaluation\n\nNot evaluated: this is {source.resolve().name} of the run."
        text = _EVALUATION.sub(lambda found: found[1] + note + found[2], text)
    text = f"{_EXPORT.sub('', text).rstrip()}\n\n{_section(facts)}\n"
    path = target / CARD_FILE
    path.write_text(text, encoding="utf-8")
    return path


def _section(facts: list[tuple[str, str]]) -> str:
    rows = [f"| {name} | {value} |" for name, value in [*facts, ("rm_scale", __version__)]]
    return "\n".join(
        [
            _BEGIN,
            "## Export",
            "",
            "| | |",
            "| --- | --- |",
            *rows,
            "",
            "A plain `transformers` sequence classifier; `scoring_contract.json` says which text to give it:",
            "",
            "```python",
            "import torch",
            "from transformers import pipeline",
            "",
            'rewarder = pipeline("text-classification", "FOLDER", function_to_apply="none", dtype=torch.float32)',
            'rewarder(text)[0]["score"]',
            "```",
            _END,
        ]
    )
