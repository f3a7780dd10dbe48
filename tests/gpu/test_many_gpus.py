"""Several CUDA devices: ranks compute one batch together, a rank that stops is named, and one process uses one device.

On a machine with a single device all of this skips itself and shows nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from rm_scale.training.attempts import read_attempts
from tests.support import launching
from tests.support.gpu import (
    METHODS,
    NUM_DEVICES,
    WATCHED_RUN,
    end_ranks,
    launched,
    needs_gpu,
    needs_two,
    rm_scale,
    run,
    run_watched,
    seen,
    small_run,
    start_ranks,
)
from tests.support.kill_runner import wait_until_begun
from tests.support.launching import TRAIN, losses, read_json, read_lines
from tests.support.tiny_runs import evaluated_texts

pytestmark = [*needs_gpu, needs_two, pytest.mark.timeout(1800)]

TIMEOUT = 30
"""`ddp_timeout` of runs that hang, in seconds."""


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("stage", ["none", "zero2", "zero3"])
def test_all_devices_train_as_one_does(
    stage: str, method: str, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """fp32: the loss of a step is the mean over its pairs in the whole world, over NCCL as over gloo."""
    words = [*small_run(tiny_model, pairs_file), "--bf16", "false", "--global_batch_size", "12", *METHODS[method]]
    words += ["--lora_dropout", "0"] if method == "lora" else []
    words += [] if stage == "none" else ["--deepspeed", stage]
    found = {}
    for ranks in (1, NUM_DEVICES):
        done = run_watched(tmp_path / str(ranks), {"run": {"flags": words}}, ranks=ranks)
        assert done.code == 0, done.output[-5000:]
        records = seen(tmp_path / str(ranks), "run")
        assert [record["world_size"] for record in records] == [ranks] * ranks
        found[ranks] = losses(tmp_path / str(ranks) / "run")
    apart = max(abs(a - b) / abs(a) for a, b in zip(found[1], found[NUM_DEVICES], strict=True))
    print(f"{method} under {stage}: losses of 1 and {NUM_DEVICES} devices differ by {apart:.1e}")
    assert found[NUM_DEVICES] == pytest.approx(found[1], rel=1e-4)


def hanging_run(model: Path, pairs: Path, output: Path, stage: str) -> list[str]:
    words = [*small_run(model, pairs), "--max_steps", "100000", "--deepspeed", stage]
    return [*words, "--ddp_timeout", str(TIMEOUT), "--output_dir", str(output)]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_stopped_rank_is_named(stage: str, tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    """SIGSTOP: the process is there and answers nothing, as on a node that has frozen. The others wait inside NCCL."""
    output, log = tmp_path / "out", tmp_path / "log.txt"
    ranks = start_ranks(hanging_run(tiny_model, pairs_file, output, stage), log, NUM_DEVICES)
    try:
        wait_until_begun(output, 1, ranks, timeout=300)
        time.sleep(2.0)  # into steps that need nothing new
        os.kill(ranks[1].pid, signal.SIGSTOP)
        assert ranks[0].wait(timeout=TIMEOUT + 120) != 0
    finally:
        end_ranks(ranks)
    text = log.read_text(errors="replace")
    assert "rank 1 does not answer (dead, frozen, or its node is lost)" in text, text[-6000:]
    assert "rank 1 does not answer" in read_attempts(output / "run")[-1]["reason"]


def test_a_killed_rank_is_named(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    """SIGKILL: its connections are gone, and NCCL has words of its own for that, or none at all."""
    output, log = tmp_path / "out", tmp_path / "log.txt"
    ranks = start_ranks(hanging_run(tiny_model, pairs_file, output, "zero2"), log, NUM_DEVICES)
    try:
        wait_until_begun(output, 1, ranks, timeout=300)
        time.sleep(2.0)
        ranks[1].kill()
        assert ranks[0].wait(timeout=TIMEOUT + 120) != 0
    finally:
        end_ranks(ranks)
    text = log.read_text(errors="replace")
    assert "rank 1 does not answer (dead, frozen, or its node is lost)" in text, text[-6000:]


def test_a_lone_process_uses_one_device_and_says_how_to_use_all(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Not `nn.DataParallel`, which would cut a packed row in two, or score 8 of 64 texts."""
    cases = {"alone": {"flags": [*small_run(tiny_model, pairs_file), "--output_dir", str(tmp_path / "alone")]}}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = run([sys.executable, str(WATCHED_RUN), str(tmp_path / "cases.json")])
    assert done.code == 0, done.output[-5000:]
    (record,) = seen(tmp_path, "alone")
    assert (record["n_gpu"], record["world_size"]) == (1, 1) and record["wrapped_in"] != "DataParallel"
    if "standin" not in sys.modules:  # whose devices share one count
        assert [name for name, used in record["peak_bytes"].items() if used] == ["cuda:0"]
    assert f"{NUM_DEVICES} GPUs are visible and this is a single process: it uses cuda:0 alone" in done.output
    assert "To use all: deepspeed rm_scale/train.py" in done.output
    assert read_json(tmp_path / "alone" / "run" / "evaluation.json")["num_pairs"] == 21


def test_one_command_uses_all_devices(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    """`deepspeed rm_scale/train.py`, as the README has it."""
    words = [*small_run(tiny_model, pairs_file), "--deepspeed", "zero2", "--output_dir", str(tmp_path / "out")]
    done = run(launched(TRAIN, *words, ranks=NUM_DEVICES))
    assert done.code == 0, done.output[-5000:]
    assert read_json(tmp_path / "out" / "run" / "plan.json")["world_size"] == NUM_DEVICES


def test_a_file_is_scored_on_all_devices(full_run: Path, pairs_file: Path, tmp_path: Path) -> None:
    prompts, completions = evaluated_texts(full_run, pairs_file)
    texts = tmp_path / "texts.jsonl"
    rows = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, completions, strict=True)]
    times = 8 * NUM_DEVICES  # a part has at least 64 rows, and every device is to get some
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows * times))
    words = ["--model", str(full_run), "--input", str(texts), "--output", str(tmp_path / "scores.jsonl")]
    done = rm_scale("score", *words, "--chunk_rows", "64", "--num_processes", str(NUM_DEVICES))
    assert done.code == 0, done.output[-4000:]
    found = [row["score"] for row in read_lines(tmp_path / "scores.jsonl")]
    assert found == pytest.approx(launching.scores(full_run) * times, abs=1e-4)
