"""Write the tables of docs/engines.md:  python tools/engines_page.py [--copy]

From the records in benchmarks/results/engines/. `--copy` first takes those that `make test-compat` has made, from
outputs/compat/NAME/record.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "engines.md"
RECORDS = REPOSITORY / "benchmarks" / "results" / "engines"
MADE = REPOSITORY / "outputs" / "compat"
NAMES = ("vllm", "openrlhf", "verl", "home_scores", "rewardbench", "ppo")


def lines_of(record: dict[str, Any]) -> Iterator[str]:
    """Yield what a record says: what was run on what, and a Markdown table."""
    named = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    yield f"{record['what']}. Run on {record['date']}: {named}."
    yield ""
    yield f"| {' | '.join(record['heads'])} |"
    yield f"|{'---|' * len(record['heads'])}"
    for row in record["rows"]:
        yield f"| {' | '.join(row)} |"


def read_record(name: str) -> dict[str, Any]:
    """Return the committed record of one script in tests/compat/."""
    record: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    return record


def page(text: str) -> str:
    """Return the page with new tables."""
    for name in NAMES:
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        table = "\n".join(lines_of(read_record(name)))
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    if "--copy" in sys.argv[1:]:
        for name in NAMES:
            shutil.copy(MADE / name / "record.json", RECORDS / f"{name}.json")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
