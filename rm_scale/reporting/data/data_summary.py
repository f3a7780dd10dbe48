"""What an examination of the data found, as lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rm_scale.texts import one_line

_MARKS = {"problem": "!", "note": "-"}


def share_text(share: float | None) -> str:
    """Return a share as percent, with enough digits that a few of many don't look like none."""
    if share is None:
        return "–"
    if 0 < share < 0.0001:
        return "under 0.01%"
    return f"{share:.2%}" if 0 < share < 0.01 else f"{share:.1%}"


def text_summary(document: Mapping[str, Any]) -> str:
    """Return what `rm-scale data` prints."""
    sample = document["sample"]
    lines = [
        f"{document['num_groups']:,} groups, {document['num_pairs']:,} pairs; looked at closely: "
        f"{sample['num_groups']:,} groups",
    ]
    for finding in document["findings"]:
        if finding["level"] in _MARKS:
            lines += _finding_lines(finding)
    nothing = [finding["title"] for finding in document["findings"] if finding["level"] == "nothing"]
    if nothing:
        lines.append(f"looked for and not found: {'; '.join(nothing)}")
    return "\n".join(lines)


def _finding_lines(finding: Mapping[str, Any]) -> list[str]:
    where = ", sampled" if finding["sampled"] else ""
    first = next(iter(finding["examples"]), None)
    rows = f"; e.g. {first['source']} rows {', '.join(map(str, first['rows']))}" if first else ""
    lines = [
        f"{_MARKS[finding['level']]} {finding['title']}: {finding['count']:,} of {finding['out_of']:,} "
        f"{finding['unit']} ({share_text(finding['share'])}{where}){rows}"
    ]
    suggestion = finding["suggestion"]
    if suggestion:
        lines.append(f"    {one_line(suggestion['text'])}")
        if suggestion["settings"]:
            lines.append(f"    {suggestion['settings']}")
    return lines
