"""Write the tables of docs/engines.md:  python tools/engines_page.py

From benchmarks/results/engines/, whose records `make test-compat` makes: after it, copy outputs/compat/NAME/record.json
to benchmarks/results/engines/NAME.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "engines.md"
RECORDS = REPOSITORY / "benchmarks" / "results" / "engines"


def vllm_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table of scores in vLLM; a row is one of `tests/compat/vllm_parity.py`."""
    yield "| model | type | prefix cache | endpoint | texts | largest difference | pairs in another order | |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        cells = [row["model"], row["dtype"], row["prefix_cache"], f"`{row['endpoint']}`", f"{row['num_texts']}"]
        cells += [f"{row['largest_difference']:.1e}", f"{row['num_swapped']}", "holds" if row["passed"] else "**off**"]
        yield f"| {' | '.join(cells)} |"


def version_line(record: dict[str, Any]) -> str:
    """Return what was run, on which data, when."""
    named = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if name != "date")
    return f"Run on {record['versions']['date']}: {named}; {record['data']}."


def page(text: str) -> str:
    """Return the page with new tables."""
    record = json.loads((RECORDS / "vllm.json").read_text(encoding="utf-8"))
    lines = ["", version_line(record), "", *vllm_table(record["rows"]), ""]
    begin, end = "<!-- vllm:begin -->", "<!-- vllm:end -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
