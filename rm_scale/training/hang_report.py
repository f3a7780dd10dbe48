"""Explain a hang: which rank the others wait for, judged from the reports of all ranks that answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rm_scale.training.collective_progress import (
    Comparison,
    GroupCount,
    compare_counts,
)


def explain_hang(reports: list[dict[str, Any]], world_size: int, what: str) -> str:
    """Return which rank is missing and at which step, in words.

    Args:
        reports: of the ranks that still answer; `collectives` holds the fields of `GroupCount`s.
        world_size: ranks of the run.
        what: what was seen.
    """
    step = min(report["step"] for report in reports)
    reports = [{"collectives": [], **report} for report in reports]
    counts = {report["rank"]: [GroupCount(**count) for count in report["collectives"]] for report in reports}
    silent = sorted(set(range(world_size)) - counts.keys())
    text = f"step {step}: {what}: "
    if silent:
        text += f"rank {_listed(silent)} does not answer (dead, frozen, or its node is lost). "
    text += (
        _explain_numbers(reports, compare_counts(counts), silent)
        if any(counts.values())
        else _explain_stacks(reports, silent)
    )
    return f"{text}; a longer wait is allowed by --ddp_timeout."


_LOOK_AT_RANK = "Fix: look at that rank's node and its stack"


_LOOK_AT_ALL = "Fix: look at the stacks, at the GPUs, and at the network (rm-scale doctor tests it)"


def _explain_numbers(reports: list[dict[str, Any]], compared: Comparison, silent: list[int]) -> str:
    """Return who lacks a collective, by the number each rank was given."""
    if compared.is_crossed:
        lacking = "; ".join(f"rank {lag.rank} was given {lag}" for lag in compared.behind[:8])
        return (
            f"rank {_listed([lag.rank for lag in compared.behind])} wait for each other, each in another group: they "
            f"don't call the same collectives in the same order: {lacking}. {_standing(reports)} {_LOOK_AT_ALL}"
        )
    text = ""
    at = {report["rank"]: f"{report['at']} in {report['place']}" for report in reports}
    missing, behind = [lag.rank for lag in compared.missing], [lag.rank for lag in compared.behind]
    waiting = [report for report in reports if report["rank"] not in {*missing, *behind} and report["collectives"]]
    if missing:
        standing = "; ".join(f"rank {lag.rank} stands at {at[lag.rank]}, given {lag}" for lag in compared.missing[:8])
        text += f"rank {_listed(missing)} did not reach the collective: {standing}. "
        text += f"It may itself wait for rank {_listed(silent)}. " if silent else ""
    if behind:
        text += f"Rank {_listed(behind)} lacks one too, but is ahead of it: it waits itself, or is late as well. "
    if not missing and not silent:
        totals = ", ".join(f"{given} of group {key}" for key, given in compared.totals.items())
        return (
            f"no rank lacks a collective, all were given as many: {totals}. So it is the network, a kernel on a GPU, "
            f"or what they all do there. {_standing(reports)} {_LOOK_AT_ALL}"
        )
    if waiting:
        text += f"Rank {_listed([report['rank'] for report in waiting])} waited for it in {waiting[0]['place']}. "
    return text + _LOOK_AT_RANK


def _explain_stacks(reports: list[dict[str, Any]], silent: list[int]) -> str:
    """Return who lacks a collective, by the stacks: for backends that don't count. Right only where waiting blocks."""
    behind = [report for report in reports if report["state"] == "work"]
    waiting = [report for report in reports if report["state"] != "work"]
    text = ""
    if behind and waiting:
        standing = "; ".join(f"rank {r['rank']} stands at {r['at']} in {r['place']}" for r in behind[:8])
        text += f"rank {_listed([r['rank'] for r in behind])} did not reach the collective: {standing}. "
    if not silent and not behind:
        places = sorted({f"{r['place']} at {r['at']}" for r in waiting})
        return f"all ranks wait in a collective, at: {'; '.join(places[:4])}. {_LOOK_AT_ALL}"
    if not waiting and not silent:
        return f"which rank lacks a collective is not known. {_standing(reports)} {_LOOK_AT_ALL}"
    if waiting:
        text += f"Rank {_listed([r['rank'] for r in waiting])} waited for it in {waiting[0]['place']}. "
    return text + _LOOK_AT_RANK


def _standing(reports: Iterable[dict[str, Any]]) -> str:
    """Return where ranks stand, those at the same line together."""
    places: dict[str, list[int]] = {}
    for report in reports:
        places.setdefault(f"{report['at']} in {report['place']}", []).append(report["rank"])
    return f"{'; '.join(f'Rank {_listed(ranks)}: {at}' for at, ranks in list(places.items())[:8])}."


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16]))
    return shown if len(ranks) <= 16 else f"{shown} and {len(ranks) - 16} more"
