"""What a script beside this one found, as a table: printed, and written to record.json for docs/engines.md."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tools.engines_page import lines_of


def write_record(
    path: Path, requirements: str, theirs: Sequence[str], what: str, heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Write and print a table.

    Args:
        path: of the record.
        requirements: file beside this one that pins the other software.
        theirs: names of its packages that the page names.
        what: was run, in a few words.
        heads: of the columns.
        rows: cells, as many in each row as there are heads.
    """
    record = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": {**pinned(requirements, theirs), **ours()},
        "what": what,
        "heads": list(heads),
        "rows": [list(row) for row in rows],
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(lines_of(record)))


def pinned(requirements: str, names: Sequence[str]) -> dict[str, str]:
    """Return the versions that a file of requirements pins."""
    text = (Path(__file__).parent / requirements).read_text(encoding="utf-8")
    return {name: re.search(rf"^{re.escape(name)}==(\S+)", text, re.MULTILINE)[1] for name in names}  # type: ignore[index]


def ours() -> dict[str, str]:
    """Return the versions of rm_scale and of what it runs on."""
    names = {"rm-scale": "rm_scale", "transformers": "transformers here", "torch": "torch"}
    return {shown: importlib.metadata.version(name) for name, shown in names.items()}
