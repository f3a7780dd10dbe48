"""Write what `rm-scale eval` found into a folder: JSON, Markdown, HTML, and every model's scores."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rm_scale.errors import DataError
from rm_scale.evaluation.evaluate import ScoredModel
from rm_scale.evaluation.evaluation_document import EvaluationDocument
from rm_scale.evaluation.scores_file import score_lines
from rm_scale.logs import get_logger
from rm_scale.reporting.evaluation.evaluation_page import write_page
from rm_scale.reporting.evaluation.evaluation_summary import markdown_summary

logger = get_logger(__name__)

RESULT_FILES = ("evaluation.json", "evaluation.md", "evaluation.html", "evaluation_scores.jsonl")


def write_results(document: EvaluationDocument, scored: Sequence[ScoredModel], folder: Path) -> None:
    """Write all files, or none: they are made aside and then given their names.

    Raises:
        DataError: the folder can't be written to.
    """
    aside = folder / f".{os.urandom(4).hex()}.writing"  # no folder of that name is anybody's
    try:
        aside.mkdir(parents=True)
        for number, (model, one) in enumerate(zip(document["models"], scored, strict=True), 1):
            name = "evaluation_scores.jsonl" if number == 1 else f"evaluation_scores-{number}.jsonl"
            (aside / name).write_text(score_lines(one.groups), encoding="utf-8")
            model["scores_file"] = name
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (aside / "evaluation.json").write_text(text, encoding="utf-8")
        (aside / "evaluation.md").write_text(markdown_summary(document), encoding="utf-8")
        write_page(dict(document), aside / "evaluation.html")
        for path in sorted(aside.iterdir()):
            os.replace(path, folder / path.name)
    except OSError as error:
        raise DataError(
            f"--output {folder}: can't be written ({error}). Fix: a folder with room, of your own."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    logger.info(f"results: {folder} ({', '.join(RESULT_FILES)})")
