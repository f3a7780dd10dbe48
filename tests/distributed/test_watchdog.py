"""Two real ranks hang where no stack says who is missing, as none does under NCCL: the numbers name the rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.support import cuda_standin
from tests.support.hang_ranks import CASES
from tests.support.launching import environment, read_json, run

pytestmark = [pytest.mark.distributed, pytest.mark.long]

LACKS = "rank {} did not reach the collective: rank {} stands at"


def start(folder: Path, cases: Iterable[str], env: dict[str, str]) -> dict[str, list[int]]:
    """One start for several cases; gives the exit codes of their ranks."""
    finished = run([sys.executable, "-m", "tests.support.hang_ranks", str(folder), *cases], timeout=900, env=env)
    assert finished.code == 0, finished.output[-4000:]
    codes: dict[str, list[int]] = json.loads(finished.output.splitlines()[-1])
    return codes


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """Where all cases lie, and the exit codes of their ranks."""
    folder = tmp_path_factory.mktemp("hung")
    return folder, start(folder, [*CASES, "count"], environment(OMP_NUM_THREADS="1"))


def reason(folder: Path, case: str) -> str:
    """What was noted for the record of attempts, and printed by one rank."""
    text = (folder / case / "reason.txt").read_text()
    logs = [(folder / case / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert sum(log.count(text) for log in logs) == 1, logs
    return text


def reports(folder: Path, case: str) -> list[dict[str, Any]]:
    """What each rank wrote down."""
    return [read_json(path) for path in sorted((folder / case / "hang-attempt1").glob("rank-*.json"))]


def test_a_rank_that_never_calls_the_collective_is_named(hung: tuple[Path, dict[str, list[int]]]) -> None:
    folder, codes = hung
    text = reason(folder, "never_called")
    assert codes["never_called"] == [1, 1]
    # The point of the case: to a reader of stacks both are at work.
    assert [report["state"] for report in reports(folder, "never_called")] == ["work", "work"]
    assert "step 3: nothing has moved for" in text and LACKS.format(1, 1) in text
    assert "(read_data_for_ever) in micro-batch 1 of 1, given 3 of 4 collectives of group 0 (gloo)" in text
    assert "Rank 0 waited for it in micro-batch 1 of 1" in text


def test_nccl_groups_and_the_device_thread_of_autograd_hide_nothing(tmp_path: Path) -> None:
    """The stand-in for CUDA: groups called nccl, and DDP's reduction called by the thread that runs the backward."""
    given = {"never_called": "3 of 4", "ddp": "6 of 7"}
    codes = start(tmp_path, given, cuda_standin.environment(devices=2, OMP_NUM_THREADS="1"))
    for case, numbers in given.items():
        text = reason(tmp_path, case)
        assert codes[case] == [1, 1] and LACKS.format(1, 1) in text and "Rank 0 waited for it" in text
        assert f"given {numbers} collectives of group 0 (nccl)" in text
        assert "collective" not in [report["state"] for report in reports(tmp_path, case)]


def test_a_rank_that_moves_but_never_comes_is_named(hung: tuple[Path, dict[str, list[int]]]) -> None:
    """Rank 0 is within its own limit; it leaves with the others, and speaks, since it is the lowest that answers."""
    folder, codes = hung
    text = reason(folder, "busy")
    assert codes["busy"] == [1, 1]
    assert LACKS.format(0, 0) in text and "in reading the step's groups, given 3 of 4" in text
    assert "nothing has moved for" in text, "what rank 1 saw"


def test_uneven_sends_before_training_do_not_count(hung: tuple[Path, dict[str, list[int]]]) -> None:
    """Rank 1 has sent more than rank 0 before, and lacks a collective of another group."""
    text = reason(hung[0], "own_group")
    assert LACKS.format(1, 1) in text and "given 1 of 2 collectives of group 1 (gloo)" in text


def test_a_rank_whose_backward_pass_never_begins_is_named(hung: tuple[Path, dict[str, list[int]]]) -> None:
    """DDP calls and waits in C++."""
    folder, codes = hung
    assert codes["ddp"] == [1, 1] and LACKS.format(1, 1) in reason(folder, "ddp")
    assert reports(folder, "ddp")[0]["state"] == "backward"


def test_equal_numbers_name_nobody(hung: tuple[Path, dict[str, list[int]]]) -> None:
    folder, codes = hung
    text = reason(folder, "same_numbers")
    assert codes["same_numbers"] == [1, 1] and "did not reach" not in text and "does not answer" not in text
    assert "no rank lacks a collective, all were given as many: 3 of group 0 (gloo)" in text
    assert "Rank 0, 1: " in text and "(read_data_for_ever) in micro-batch 1 of 1." in text


@pytest.mark.parametrize(
    ("case", "saw"), [("frozen", "nothing has moved for"), ("killed", "the connection to another rank broke")]
)
def test_a_rank_that_can_not_answer_is_named(hung: tuple[Path, dict[str, list[int]]], case: str, saw: str) -> None:
    folder, codes = hung
    text = reason(folder, case)
    assert codes[case] == [1, -9]
    assert f"step 3: {saw}" in text and "rank 1 does not answer (dead, frozen, or its node is lost). Rank 0" in text
    assert "did not reach" not in text


def test_torch_counts_every_collective_of_ddp_and_zero(hung: tuple[Path, dict[str, list[int]]]) -> None:
    """Against the calls that its profiler sees; on both ranks the same numbers, in whichever group."""
    folder, codes = hung
    assert codes["count"] == [0, 0], (folder / "count" / "rank-0.log").read_text()[-3000:]
    first, second = (read_json(folder / "count" / f"counts-{rank}.json") for rank in range(2))
    assert first == second and first.keys() == {"ddp", "zero1", "zero2", "zero3"}
    for kind, found in first.items():
        assert sum(found["given"].values()) == len(found["called"]) >= 3, kind
