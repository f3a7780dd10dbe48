"""The doctor's findings as a table for people and as one JSON object for programs."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rm_scale.doctor.findings import Check, Finding, Status, merge
from rm_scale.version import __version__

_STATUSES: tuple[Status, ...] = ("pass", "warn", "fail", "skip")


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 when something fails, else 0."""
    return int(any(finding.check.status == "fail" for finding in findings))


def as_table(findings: Sequence[Finding]) -> str:
    """Return a line per check: status, name, what was seen; below it the fix, where one is needed."""
    checks = merge(findings)
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    name_width = max((len(check.name) for check in checks), default=0)
    lines = [line for check in checks for line in _lines(check, name_width, width)]
    counts = Counter(check.status for check in checks)
    total = ", ".join(f"{counts[status]} {status}" for status in _STATUSES)
    return "\n".join([*lines, f"{len(checks)} checks: {total}"])


def _lines(check: Check, name_width: int, width: int) -> list[str]:
    head = f"{check.status}  {check.name:<{name_width}}  "
    indent = " " * len(head)
    lines = textwrap.wrap(check.seen or "-", width, initial_indent=head, subsequent_indent=indent)
    if check.fix:
        lines += textwrap.wrap(f"Fix: {check.fix}", width, initial_indent=indent, subsequent_indent=indent)
    return lines


def as_json(findings: Sequence[Finding], world: dict[str, Any]) -> str:
    """Return one object: `ok`, `counts`, `checks` as in the table, `findings` of every node and rank, and the world.

    Args:
        findings: in the order in which they came in.
        world: what is known of the ranks: `size`, `launcher`, `hostfile`.
    """
    checks = merge(findings)
    counts = Counter(check.status for check in checks)
    content = {
        "ok": exit_code(findings) == 0,
        "counts": {status: counts[status] for status in _STATUSES},
        "rm_scale": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "world": world,
        "checks": [
            {"name": check.name, "status": check.status, "seen": check.seen, "fix": check.fix} for check in checks
        ],
        "findings": [finding.to_dict() for finding in findings],
    }
    return json.dumps(content, indent=2, ensure_ascii=False)
