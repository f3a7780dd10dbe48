"""Why a job waits: each of Slurm's reasons is told as what it is, with the limit where it is one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rm_scale.slurm.waiting import Seen, first_look, outlook, partition_limits

PARTITION = "PartitionName=gpu Default=YES MaxNodes=UNLIMITED MaxTime=1-00:00:00 State=UP TotalNodes=4 TRES=cpu=1"


def ask(command: Sequence[str]) -> str:
    """Slurm's answer about the partition."""
    assert command[:4] == ["scontrol", "--oneliner", "show", "partition"]
    return PARTITION + "\n"


NEVER = "is pending, and will not start: "
SOMEBODY = "is pending, and will not start by itself: "


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("PartitionTimeLimit", f"{NEVER}the partition gpu allows 1-00:00:00, and its time limit is 2-00:00:00. Fix: "),
        ("PartitionConfig", f"{NEVER}the partition gpu allows 1-00:00:00"),
        ("BadConstraints", f"{NEVER}no nodes have"),
        ("InvalidAccount", f"{NEVER}there is no such account, or it may not be used here. Fix: another --account"),
        ("InvalidQOS", NEVER),
        ("DependencyNeverSatisfied", f"{NEVER}a job that it depends on has ended otherwise"),
        ("QOSMaxWallDurationPerJobLimit", f"{NEVER}its time limit is longer than the quality of service allows"),
        ("AssocMaxWallDurationPerJobLimit", f"{NEVER}its time limit is longer than the account allows. Fix: another"),
        ("QOSMaxNodePerJobLimit", f"{NEVER}it asks for more nodes than the quality of service allows. Fix: another"),
        ("QOSMaxGRESPerJob", f"{NEVER}one job of the quality of service may not have so much"),
        ("AssocMaxCpuMinutesPerJobLimit", f"{NEVER}one job of the account may not have so much"),
        ("QOSMinGRES", f"{NEVER}it asks for less"),
        ("MaxMemPerLimit", NEVER),
        ("JobHeldUser", f"{SOMEBODY}it is held: scontrol release 12"),
        ("JobHeldAdmin", SOMEBODY),
        ("PartitionDown", f"{SOMEBODY}the partition gpu is down"),
        ("PartitionInactive", SOMEBODY),
        ("NodeDown", SOMEBODY),
        ("ReqNodeNotAvail, UnavailableNodes:node[1-2]", f"{SOMEBODY}nodes that it needs are down"),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions", SOMEBODY),
        ("AssocGrpBillingMinutes", f"{SOMEBODY}the account has no time left"),
        ("AssocGrpCPUMinutesLimit", f"{SOMEBODY}the account has no time left"),
        ("AssocGrpMemMinutes", f"{SOMEBODY}the account has no time left"),
        ("QOSGrpCPUMinutesLimit", f"{SOMEBODY}the quality of service has no time left"),
        ("launch failed requeued held", SOMEBODY),
    ],
)
def test_what_will_not_start(reason: str, told: str) -> None:
    text = outlook("12", Seen("PENDING", "gpu", 2, "2-00:00:00", reason), ask)
    assert text.startswith(told) and f"({reason})" in text
    assert text.endswith("To take it back: scancel 12") == told.startswith(NEVER)


@pytest.mark.parametrize(
    "reason",
    [
        *(
            "Resources",
            "Priority",
            "BeginTime",
            "Dependency",
            "Licenses",
            "Reservation",
            "JobArrayTaskLimit",
            "Cleaning",
        ),
        *("AssocGrpGRES", "QOSGrpNodeLimit", "QOSMaxJobsPerUserLimit", "QOSMaxGRESPerUser", "AssocMaxJobsLimit"),
        *("QOSMaxNodePerUserLimit", "ReqNodeNotAvail", "SomethingNew"),
        # Running jobs use these up as they go on, and an account's usage decays.
        *("AssocGrpCPURunMinutesLimit", "QOSGrpMemRunMinutes", "AssocGrpGRESRunMinutes", "AssocGrpBillingRunMinutes"),
        "QOSUsageThreshold",
    ],
)
def test_what_waits(reason: str) -> None:
    assert outlook("12", Seen("PENDING", "gpu", 2, "1:00:00", reason), ask) == f"is pending ({reason})"


def test_a_job_may_start_in_another_partition() -> None:
    seen = Seen("PENDING", "gpu,small", 9, "1:00:00", "PartitionNodeLimit")
    assert "has 4 nodes, and it asks for 9. Fix: --nodes 4; the partition" in outlook("12", seen, ask)
    wide = {"gpu": PARTITION, "small": PARTITION.replace("TotalNodes=4", "TotalNodes=90")}
    assert "has 4 nodes" not in outlook("12", seen, lambda command: wide[command[-1]])


def test_a_partition_whose_limits_were_kept_lacks_nodes_for_now() -> None:
    """Slurm gives this reason for drained nodes, too, which come back."""
    text = outlook("12", Seen("PENDING", "gpu", 2, "1:00:00", "PartitionNodeLimit"), ask)
    assert text.startswith(f"{SOMEBODY}the partition gpu lacks nodes for it, some may be down or drained: sinfo -R (")


def test_the_first_look_is_waited_for() -> None:
    answers = iter(["PENDING|gpu|5|1:00:00|None", "PENDING|gpu|5|1:00:00|PartitionConfig"])
    last = "PENDING|gpu|5|1:00:00|PartitionNodeLimit"
    assert first_look("12", lambda command: next(answers, last), 600).reason == "PartitionNodeLimit"
    assert first_look("12", lambda command: "PENDING|gpu|5|1:00:00|None", 0).reason == "None"
    assert first_look("12", lambda command: "RUNNING|gpu|5|1:00:00|None").state == "RUNNING"
    for broken in ("", "x", "|||", "PENDING|gpu|many|x|(Priority)"):
        assert outlook("12", first_look("12", lambda command, text=broken: text, 0), ask)  # type: ignore[misc]


def test_what_a_partition_gives() -> None:
    assert partition_limits("", ask) == "the partition gpu has 4 nodes, a time limit of 1-00:00:00"
    assert partition_limits("gpu", lambda command: "") == ""
