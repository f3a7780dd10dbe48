"""The result of a check, running one so that it can neither hang nor crash the others, and merging many results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rm_scale.errors import UserError
from rm_scale.texts import typed_line

Status = Literal["pass", "warn", "fail", "skip"]

GB = 1e9


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was looked at, in one to three words.
        status: pass; warn: works, with a catch; fail: a run would break; skip: could not or need not be looked at.
        seen: what was found.
        fix: what to do about it; empty when there is nothing to do.
    """

    name: str
    status: Status
    seen: str
    fix: str = ""


@dataclass(frozen=True)
class Finding:
    """A check and where it was made: a node's name, "rank 3 on node2", or empty for the whole world."""

    where: str
    check: Check

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"where": self.where, **asdict(self.check)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Finding:
        """Read back what `to_dict` returned."""
        fields = dict(values)
        where = fields.pop("where")
        return cls(where, Check(**fields))


@dataclass(frozen=True)
class Asked:
    """What the doctor was asked; every rank gets the same.

    Attributes:
        output_dir: where runs will write.
        model: folder or hub name, or `None`.
        method: full, lora or qlora.
        lora_r: LoRA rank.
        save_total_limit: checkpoints that a run keeps.
        min_free_gb: free disk space to ask for, in 1e9 bytes; `None` for what the model needs.
        ranks_on_node: ranks on this machine.
        spans_nodes: ranks on several machines will talk to each other.
        timeout_seconds: most time that one check may take.
    """

    output_dir: str = "."
    model: str | None = None
    method: str = "full"
    lora_r: int = 16
    save_total_limit: int = 1
    min_free_gb: float | None = None
    ranks_on_node: int = 1
    spans_nodes: bool = False
    timeout_seconds: float = 60.0


CheckFunction = Callable[[], Check | list[Check]]


def run_check(name: str, check: CheckFunction, timeout_seconds: float) -> list[Check]:
    """Run one check in a thread of its own; return its results, or a failure when it crashes or takes too long.

    Args:
        name: what a check that crashes or hangs is called.
        check: returns one result or several.
        timeout_seconds: a check that takes longer is given up. Its thread goes on, and must be left behind by ending
            the process.
    """
    given: list[list[Check]] = []

    def target() -> None:
        try:
            result = check()
            given.append(result if isinstance(result, list) else [result])
        except UserError as error:
            given.append([_from_user_error(name, error)])
        except BaseException as error:  # also a library that calls sys.exit
            given.append([_crashed(name, error)])

    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if given:
        return given[0]
    seen = f"did not finish within {timeout_seconds:.0f} s"
    return [Check(name, "fail", seen, f"See what hangs: {name}. --timeout_seconds allows more time.")]


def _from_user_error(name: str, error: UserError) -> Check:
    seen, _, fix = str(error).partition("Fix: ")
    return Check(name, "fail", seen.strip(), fix.strip())


def _crashed(name: str, error: BaseException) -> Check:
    seen = f"the check ended with {typed_line(error, 400)}"
    return Check(name, "fail", seen, "Put right what the message names; report it if that is not in your hands.")


def merge(findings: Sequence[Finding]) -> list[Check]:
    """Merge findings to one for each check and status, naming the places where not all saw the same.

    The order is that of first appearance.
    """
    groups: dict[tuple[str, Status], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.check.name, finding.check.status), []).append(finding)
    num_statuses: dict[str, int] = {}
    for name, _ in groups:
        num_statuses[name] = num_statuses.get(name, 0) + 1
    return [_merged(group, alone=num_statuses[name] == 1) for (name, _), group in groups.items()]


def _merged(group: Sequence[Finding], alone: bool) -> Check:
    first = group[0].check
    places: dict[str, list[str]] = {}
    for finding in group:
        places.setdefault(finding.check.seen, []).append(finding.where)
    if alone and len(places) == 1:
        return first
    # One example is enough of what passed or was skipped.
    shown = list(places.items())[: 1 if first.status in {"pass", "skip"} else 3]
    num_left = len(group) - sum(len(wheres) for _, wheres in shown)
    text = "; ".join(_at(wheres, seen) for seen, wheres in shown) + (f" ({num_left} more alike)" if num_left else "")
    return Check(first.name, first.status, text, first.fix)


def _at(wheres: Sequence[str], seen: str) -> str:
    """Put the places that saw something before what they saw."""
    named = sorted({where for where in wheres if where})
    if not named:
        return seen
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    return f"{', '.join(named[:3])}{more}: {seen}"
