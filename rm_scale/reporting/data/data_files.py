"""Write what an examination of the data found into a folder: `data_review.json` and `data_review.html`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rm_scale.files import write_whole
from rm_scale.logs import get_logger
from rm_scale.reporting.data.data_page import build_page

logger = get_logger(__name__)

RESULT_FILES = ("data_review.json", "data_review.html")


def write_review(document: Mapping[str, Any], folder: Path) -> None:
    """Write both files; the folder is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(folder / RESULT_FILES[0], text + "\n")
    build_page(document).write(folder / RESULT_FILES[1])
    logger.info(f"results: {folder} ({', '.join(RESULT_FILES)})")
