"""Killed, hung, moved to another number of ranks, signalled while starting: each from outside, with real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rm_scale.training.attempts import read_attempts
from tests.support.kill_runner import start, wait_until_begun
from tests.support.launching import (
    FAULT_RUNNER,
    REPOSITORY,
    TRAIN,
    case_log,
    deepspeed_command,
    environment,
    losses,
    run,
    run_faulty_cases,
    scores,
)

pytestmark = pytest.mark.e2e

AUTO = ["--resume_from_checkpoint", "auto"]
METHODS: dict[str, list[str]] = {
    "full": ["--weight_decay", "0.1"],
    "lora": ["--use_peft", "--lora_dropout", "0"],
    "qlora": ["--use_peft", "--load_in_4bit", "--lora_dropout", "0"],
}


@pytest.fixture(scope="module")
def common(tiny_model: Path, pairs_file: Path) -> list[str]:
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--eval_split_size", "8"]
    words += ["--logging_steps", "1", "--disable_tqdm", "--sample_scores", "0", "--learning_rate", "3e-3"]
    return [*words, "--global_batch_size", "8", "--max_steps", "12"]


@pytest.mark.long
def test_two_four_and_one_ranks_are_one_run(common: list[str], tmp_path: Path) -> None:
    """fp32: 2 ranks (ZeRO-2), then 4 (ZeRO-3), then 1 (ZeRO-1, or none), across an epoch's end; losses to 1e-5.

    Two parameter groups with weight decay, where DeepSpeed's universal checkpoint gives all groups one Adam step.
    """
    words = [*common, "--bf16", "false", "--force", "qlora_fp32"]
    attempts: dict[int, dict[str, dict[str, Any]]] = {2: {}, 4: {}, 1: {}}
    for method, flags in METHODS.items():
        stop = [{"do": "signal", "name": "SIGTERM", "step": 4, "rank": 1}]
        later = [{"do": "signal", "name": "SIGUSR1", "step": 8, "rank": 3}]
        mine = [*words, *flags]
        last = mine if method == "lora" else [*mine, "--deepspeed", "zero1"]
        attempts[2][f"{method}_whole"] = {"flags": [*mine, "--deepspeed", "zero2"]}
        attempts[2][method] = {"flags": [*mine, *AUTO, "--deepspeed", "zero2"], "faults": stop}
        attempts[4][f"{method}_4"] = {"in": method, "flags": [*mine, *AUTO, "--deepspeed", "zero3"], "faults": later}
        attempts[1][f"{method}_1"] = {"in": method, "flags": [*last, *AUTO]}
    for ranks, cases in attempts.items():
        finished, codes = run_faulty_cases(tmp_path, cases, ranks=ranks)
        wanted = {name: 0 if "whole" in name or ranks == 1 else 85 for name in cases}
        assert finished.code == 0 and codes[:ranks] == [wanted] * ranks, finished.output[-6000:]
    worst = 0.0
    for method in METHODS:
        whole, moved = losses(tmp_path / f"{method}_whole"), losses(tmp_path / method)
        assert len(whole) == len(moved) == 12
        worst = max(worst, *(abs(a - b) / abs(a) for a, b in zip(whole, moved, strict=True)))
        assert moved == pytest.approx(whole, rel=1e-5), method
        assert scores(tmp_path / method) == pytest.approx(scores(tmp_path / f"{method}_whole"), abs=1e-4)
    print(f"largest relative difference of a loss: {worst:.2e}")


def test_a_hung_rank_is_named_before_the_collective_gives_up(common: list[str], tmp_path: Path) -> None:
    """Rank 1 sleeps in step 3. Not zero, soon after ddp_timeout, with its name, the step, and the line it stands at."""
    case = {"flags": [*common, "--ddp_timeout", "20", "--deepspeed", "zero3", "--output_dir", str(tmp_path / "hung")]}
    case["faults"] = [{"do": "sleep", "seconds": 600, "step": 3, "rank": 1}]  # type: ignore[list-item]
    (tmp_path / "cases.json").write_text(json.dumps({"hung": case}))
    finished = run(deepspeed_command(FAULT_RUNNER, str(tmp_path / "cases.json")), timeout=600)
    (tmp_path / "log.txt").write_text(finished.output)
    assert finished.code != 0
    log = case_log(tmp_path, "hung")
    assert "step 3: nothing has moved for" in log, finished.output[-4000:]
    assert "rank 1 did not reach the collective: rank 1 stands at" in log and "fault_runner.py" in log
    assert re.search(r"given \d+ of \d+ collectives of group \d+ \(gloo\)\. Rank 0 waited for it", log)
    (events,) = [[e for e in read_attempts(tmp_path / "hung" / "run") if e["event"] == "end"]]
    assert "rank 1 did not reach" in events[-1]["reason"]
    began = next(e for e in read_attempts(tmp_path / "hung" / "run") if e["event"] == "first_step")
    assert events[-1]["time"] - began["time"] < 300, "rank 1 would sleep for 600 s"
    stacks = sorted((tmp_path / "hung" / "run" / "hang-attempt1").glob("rank-*.txt"))
    assert len(stacks) == 2 and "fault_runner.py" in stacks[1].read_text()


def test_a_signal_before_torch_is_imported_is_remembered(common: list[str], tmp_path: Path) -> None:
    """To one of two ranks, half a second after its start: both leave with 85 before the first step."""
    words = [*common, *AUTO, "--max_steps", "2", "--deepspeed", "zero2", "--output_dir", str(tmp_path / "out")]
    ranks = start(words, tmp_path / "log.txt")
    time.sleep(0.5)
    os.kill(ranks[1].pid, signal.SIGTERM)
    ended = [rank.wait(timeout=600) for rank in ranks]
    assert ended == [85, 85], (tmp_path / "log.txt").read_text()[-3000:]
    assert "asked to stop (SIGTERM on rank 1): all ranks stop at step 0" in (tmp_path / "log.txt").read_text()


@pytest.mark.long
def test_a_dead_rank_is_named_by_the_others(common: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    ranks = start(
        [*common, "--max_steps", "2000", "--deepspeed", "zero2", "--output_dir", str(output)], tmp_path / "log"
    )
    wait_until_begun(output, 1, ranks)
    ranks[1].kill()
    assert ranks[0].wait(timeout=600) == 1
    log = (tmp_path / "log").read_text()
    assert "the connection to another rank broke: rank 1 does not answer (dead, frozen, or its node is lost)" in log
    assert "rank 1 does not answer" in read_attempts(output / "run")[-1]["reason"]


def test_the_deepspeed_launcher_passes_the_exit_code_on(common: list[str], tmp_path: Path) -> None:
    """A clock that has all but run out: nothing is trained, and the launcher's own code asks for another start."""
    words = [*common, *AUTO, "--deepspeed", "zero2", "--output_dir", str(tmp_path / "out")]
    soon = environment(RM_SCALE_END_TIME=str(time.time() + 30))
    finished = run(deepspeed_command(TRAIN, *words), env=soon)
    assert finished.code == 85, finished.output[-3000:]


@pytest.mark.long
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """`RM_SCALE_KILLS=30` for the long form; the script says where each kill struck."""
    kills = os.environ.get("RM_SCALE_KILLS", "1")
    steps = str(max(12, 4 * int(kills)))  # an attempt ends after a few of them
    words = ["--kills", kills, "--steps", steps, "--output", str(tmp_path / "runs"), str(tiny_model), str(pairs_file)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.kill_runner", *words, "--deepspeed", "zero2", "--use_peft"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60 + 60 * int(kills) + 300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert report["same_weights"] and report["same_losses"] and len(report["kills"]) == int(kills)
