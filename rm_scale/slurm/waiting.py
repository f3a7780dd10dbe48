"""Why a job waits: what will never let it start, what somebody must lift, and what passes by itself.

The reasons are Slurm's own ("JOB REASON CODES" of squeue's manual, and its page on resource limits).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rm_scale.slurm.time_limits import seconds_of

Ask = Callable[[Sequence[str]], str]
"""Runs one of Slurm's commands and returns what it printed; nothing where it failed."""

_UNSETTLED = ("", "None", "WaitingForScheduling", "PartitionConfig")
"""Reasons before the scheduler's first look; it replaces PartitionConfig by the limit that was broken."""
_FIRST_LOOK_SECONDS = 6.0
_FORMAT = "%T|%P|%D|%l|%r"

_NEVER = (
    ("PartitionConfig", "no node of the partition has the cores, GPUs or memory that it asks of one", ""),
    ("PartitionTimeLimit", "its time limit is longer than the partition allows", "--time"),
    ("BadConstraints", "no nodes have what --constraint, --nodelist or the requests ask for together", ""),
    ("InvalidAccount", "there is no such account, or it may not be used here", "--account"),
    ("InvalidQOS", "there is no such quality of service, or it may not be used here", "--qos"),
    ("AccountNotAllowed", "the partition does not take this account", "--account"),
    ("QOSNotAllowed", "the partition does not take this quality of service", "--qos"),
    ("DependencyNeverSatisfied", "a job that it depends on has ended otherwise", "--dependency"),
    ("DeadLine", "it can't end before its deadline", ""),
    ("MaxMemPerLimit", "it asks for more memory than the partition gives a node or core", ""),
    ("ReservationDeleted", "its reservation is gone", "--reservation"),
    ("Assoc(iation)?TimeLimit", "its time limit is longer than the account allows", "--time"),
    ("QOSTimeLimit", "its time limit is longer than the quality of service allows", "--time"),
    (r"(Assoc|QOS)Max\w*Wall\w*", "its time limit is longer than {whose} allows", "--time"),
    (r"(Assoc|QOS)Max\w*NodePerJob\w*", "it asks for more nodes than {whose} allows", "--nodes"),
    (r"(Assoc|QOS)Max(?!Jobs|Submit)\w*Per(Job|Node)\w*", "one job of {whose} may not have so much", ""),
    (r"QOSMin\w*", "it asks for less than the quality of service wants", "--qos"),
)
_SOMEBODY = (
    ("JobHeldUser", "it is held: scontrol release {job}"),
    ("JobHeldAdmin", "an administrator holds it"),
    ("JobHoldMaxRequeue", "it was requeued too often and is held: scontrol release {job}"),
    ("launch failed requeued held", "a node could not start it and it is held: scontrol release {job}"),
    ("PartitionDown", "the partition {partition} is down"),
    ("PartitionInactive", "the partition {partition} takes no jobs"),
    ("NodeDown", "a node that it needs is down: sinfo -R"),
    ("FrontEndDown", "the front end is down"),
    ("BadNodeState|Nodes required for job are DOWN.*", "nodes that it needs are down or drained: sinfo -R"),
    (r"ReqNodeNotAvail,\s*UnavailableNodes:.*", "nodes that it needs are down or drained: sinfo -R"),
    # Its own limits were not broken, so Slurm means nodes that it does not have now.
    ("PartitionNodeLimit", "the partition {partition} lacks nodes for it, some may be down or drained: sinfo -R"),
    # Not RunMinutes: what running jobs have left of their limits is given back as they go on.
    (r"(Assoc|QOS)Grp(?!\w*Run)\w*Minutes\w*", "{whose} has no time left: sshare, or sreport, says how much was used"),
    ("AccountingPolicy|AssociationResourceLimit", "the account has reached a limit"),
)


@dataclass(frozen=True)
class Seen:
    """A job as squeue shows it.

    Attributes:
        state: Slurm's, such as PENDING.
        partition: its name, or several with commas.
        nodes: how many it asks for.
        limit: its time limit, as Slurm writes it.
        reason: why it waits.
    """

    state: str = "SUBMITTED"
    partition: str = ""
    nodes: int = 0
    limit: str = ""
    reason: str = ""


def first_look(job: str, ask: Ask, seconds: float = _FIRST_LOOK_SECONDS) -> Seen:
    """Return how a job that was just submitted stands, once the scheduler has looked at it, or some seconds later."""
    deadline = time.monotonic() + seconds
    while True:
        seen = _seen(ask(["squeue", "--noheader", "--jobs", job, "--format", _FORMAT]))
        if seen.state != "PENDING" or seen.reason not in _UNSETTLED or time.monotonic() >= deadline:
            return seen
        time.sleep(0.3)


def _seen(text: str) -> Seen:
    parts = (text.splitlines() or [""])[0].strip().split("|", 4)
    if len(parts) < 5:
        return Seen()
    state, partition, nodes, limit, reason = parts
    reason = reason.strip("()")
    return Seen(state, partition, int(nodes) if nodes.isascii() and nodes.isdigit() else 0, limit, reason)


def outlook(job: str, seen: Seen, ask: Ask) -> str:
    """Say how a job stands, and whether it can ever start: "is pending (Resources)", "will not start: ..."."""
    state = f"is {seen.state.lower()}" if seen.state != "SUBMITTED" else "was submitted"
    if seen.reason in {"", "None"}:
        return state
    if seen.state != "PENDING":
        return f"{state} ({seen.reason})"
    limits = [_fields(ask(["scontrol", "--oneliner", "show", "partition", name])) for name in _names(seen.partition)]
    why = broken_limit(seen, limits) or _told(_NEVER_PATTERNS, seen)
    if why is not None:
        return f"{state}, and will not start: {why} ({seen.reason}). To take it back: scancel {job}"
    why = _told(_SOMEBODY_PATTERNS, seen)
    if why is not None:
        return f"{state}, and will not start by itself: {why.replace('{job}', job)} ({seen.reason})"
    return f"{state} ({seen.reason})"


def broken_limit(seen: Seen, partitions: Sequence[Mapping[str, str]]) -> str | None:
    """Return which limit a job breaks in every partition that it may run in, and what to ask for; `None` without."""
    if seen.reason not in {"PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit"}:
        return None
    found = [_of_partition(seen, partition) for partition in partitions]
    return "; ".join(text for text in found if text) if found and all(found) else None


def _of_partition(seen: Seen, partition: Mapping[str, str]) -> str | None:
    name = partition.get("PartitionName", "")
    total, most = (_number(partition.get(key, "")) for key in ("TotalNodes", "MaxNodes"))
    fewest = min((count for count in (total, most) if count is not None), default=None)
    if fewest is not None and seen.nodes > fewest:
        what = f"has {total} nodes" if fewest == total else f"gives one job {most} nodes"
        return f"the partition {name} {what}, and it asks for {seen.nodes}. Fix: --nodes {fewest}"
    longest, asked = seconds_of(partition.get("MaxTime", "")), seconds_of(seen.limit)
    if longest is not None and asked is not None and asked > longest:
        allowed = partition["MaxTime"]
        return f"the partition {name} allows {allowed}, and its time limit is {seen.limit}. Fix: --time {allowed}"
    return None


def partition_limits(name: str, ask: Ask) -> str:
    """Return what a partition gives, for a message about a job that sbatch refused; empty when it is not known.

    Args:
        name: of the partition; empty for the default one.
        ask: runs Slurm's commands.
    """
    shown = [
        _fields(line) for line in ask(["scontrol", "--oneliner", "show", "partition", *_names(name)[:1]]).splitlines()
    ]
    for partition in shown:
        if name or partition.get("Default") == "YES":
            gives = f"{partition.get('TotalNodes', '?')} nodes, a time limit of {partition.get('MaxTime', '?')}"
            if _number(partition.get("MaxNodes", "")) is not None:
                gives += f", {partition['MaxNodes']} nodes to one job"
            if partition.get("State", "UP") != "UP":
                gives += f", and is {partition['State'].lower()}"
            return f"the partition {partition.get('PartitionName', name)} has {gives}"
    return ""


def _names(partition: str) -> list[str]:
    return [name for name in partition.split(",") if name]


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", line))


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _compiled(rules: Sequence[tuple[str, str, str]]) -> tuple[tuple[re.Pattern[str], str], ...]:
    fixes = {option: f". Fix: another {option}" for _, _, option in rules if option}
    return tuple((re.compile(pattern), text + fixes.get(option, "")) for pattern, text, option in rules)


_NEVER_PATTERNS = _compiled(_NEVER)
_SOMEBODY_PATTERNS = _compiled([(pattern, text, "") for pattern, text in _SOMEBODY])


def _told(patterns: Sequence[tuple[re.Pattern[str], str]], seen: Seen) -> str | None:
    for pattern, text in patterns:
        if pattern.fullmatch(seen.reason):
            whose = "the quality of service" if seen.reason.startswith("QOS") else "the account"
            return text.replace("{whose}", whose).replace("{partition}", seen.partition)
    return None
