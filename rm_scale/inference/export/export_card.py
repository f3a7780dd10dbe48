"""Write the model card (README.md) of an export: that of its run, changed to describe the exported weights.

Names of folders that exist on this machine only are shortened, results of another checkpoint are taken out, and a
section says how the export was made and verified.
"""

from __future__ import annotations

import re
from pathlib import Path

from rm_scale.texts import printable
from rm_scale.version import __version__

CARD_FILE = "README.md"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# As rm_scale.reporting.run.model_card writes it; this package may not import that one.
_EVALUATION = re.compile(r"(<!-- rm_scale:evaluation:begin -->\n).*(\n<!-- rm_scale:evaluation:end -->)", re.DOTALL)
BEGIN, _END = "<!-- rm_scale:export:begin -->", "<!-- rm_scale:export:end -->"
_FRONT = re.compile(r"---\n.*?\n---\n", re.DOTALL)
_BASE_LINES = re.compile(r"^(base_model:.*\n(?:[ \t]*- .*\n)*)", re.MULTILINE)
_BASE_ROW = re.compile(r"^(\| base model \| )(.*)( \|)$", re.MULTILINE)
_EXAMPLE = re.compile(r'(RewardScorer\.from_pretrained\(|pipeline\("text-classification", )"[^"\n]*"')
_EXPORT = re.compile(f"{BEGIN}.*{_END}\n?", re.DOTALL)
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
    """Return a hub name as it is, of a folder on this machine its last part: the rest means nothing elsewhere."""
    return Path(base_model).name if _is_local(base_model) else base_model


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
    text = _EXAMPLE.sub(lambda found: f'{found[1]}"FOLDER"', _without_local_base(text, base_model))
    if card == runs:
        note = f"## Evaluation\n\nNot evaluated: this is {source.resolve().name} of the run."
        text = _EVALUATION.sub(lambda found: found[1] + note + found[2], text)
    text = f"{_EXPORT.sub('', text).rstrip()}\n\n{_section(facts)}\n"
    path = target / CARD_FILE
    path.write_text(text, encoding="utf-8")
    return path


def _without_local_base(card: str, base_model: str) -> str:
    """Return a card that names no folder of this machine as base model, however the run's settings wrote it.

    Args:
        card: the run's.
        base_model: as the contract knows it: an absolute path where it was a folder.
    """
    was_local = _is_local(base_model)
    front = _FRONT.match(card)
    end = front.end() if front is not None else 0
    head = _BASE_LINES.sub(lambda found: "" if was_local or _names_local(found[1]) else found[0], card[:end])
    if not was_local:
        return head + _BASE_ROW.sub(lambda found: f"{found[1]}{portable_name(found[2])}{found[3]}", card[end:])
    head = "".join(line for line in head.splitlines(keepends=True) if base_model not in line)  # PEFT's tags
    body = _BASE_ROW.sub(lambda found: f"{found[1]}{Path(found[2]).name}{found[3]}", card[end:])
    return head + body.replace(base_model, Path(base_model).name)


def _names_local(lines: str) -> bool:
    """Return whether one of the values of a line `base_model:`, or of the list below it, is no name on a hub."""
    values = (line.removeprefix("base_model:").strip(" \t-'\"") for line in lines.splitlines())
    return any(_is_local(value) for value in values if value)


def _is_local(name: str) -> bool:
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None
    return bool(name) and (not is_hub_name or Path(name).is_dir())


def _section(facts: list[tuple[str, str]]) -> str:
    rows = [f"| {name} | {printable(value)} |" for name, value in [*facts, ("rm_scale", __version__)]]
    return "\n".join(
        [
            BEGIN,
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
