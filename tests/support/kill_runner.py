"""Kill a run again and again, at random moments, and let it go on each time, until it has finished.

    python -m tests.support.kill_runner --kills 30 --output FOLDER MODEL PAIRS [more settings]

Two ranks (or `--ranks 1`) are started as Slurm would start them. Once training has begun, one of them (or both) gets
SIGKILL after a random time; with a checkpoint after every step, many fall into a save. At the end the result is
compared, bit for bit, with that of a run that nobody touched.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from rm_scale.files import free_port
from tests.support.launching import TRAIN, environment, losses, weights


def start(words: list[str], log: Path, ranks: int = 2) -> list[subprocess.Popen[bytes]]:
    """The ranks of one attempt, with Slurm's variables."""
    step = {"SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_STEP_TASKS_PER_NODE": str(ranks), "SLURM_JOB_ID": "77"}
    step |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(free_port())}
    with log.open("ab") as file:
        return [
            subprocess.Popen(
                [sys.executable, str(TRAIN), *words],
                env=environment(**step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for rank in range(ranks)
        ]


def finish(ranks: list[subprocess.Popen[bytes]], timeout: float = 120) -> list[int]:
    """Wait for all ranks, and do as srun --kill-on-bad-exit does once one has died."""
    end = time.monotonic() + timeout
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
        if any(rank.poll() not in (None, 0) for rank in ranks):
            time.sleep(1.0)
            break
        time.sleep(0.05)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    return [rank.wait() for rank in ranks]


def has_begun(output: Path, attempt: int) -> bool:
    """Has this attempt done its first step?"""
    path = output / "run" / "attempts.jsonl"
    if not path.is_file():
        return False
    lines = path.read_text(errors="replace").splitlines()
    return any('"first_step"' in line and f'"attempt": {attempt},' in line for line in lines)


def wait_until_begun(output: Path, attempt: int, ranks: list[subprocess.Popen[bytes]], timeout: float = 90) -> None:
    """Return once training is under way, or a rank has ended."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and all(rank.poll() is None for rank in ranks) and not has_begun(output, attempt):
        time.sleep(0.02)


def kill_and_resume(words: list[str], output: Path, num_kills: int, seed: int, num_ranks: int) -> dict[str, object]:
    """Kill `num_kills` attempts, let the last one finish; gives what happened.

    The first half of the kills strikes within a few steps of the first; one in six during the start.
    """
    chance = random.Random(seed)
    log = output.with_suffix(".log")
    kills: list[dict[str, object]] = []
    attempt = 0
    while True:
        attempt += 1
        ranks = start([*words, "--output_dir", str(output)], log, num_ranks)
        if len(kills) < num_kills:
            early = chance.random() < 1 / 6
            if not early:
                wait_until_begun(output, attempt, ranks)
            delay = chance.uniform(0.0, 6.0 if early else 1.2)
            time.sleep(delay)
            victims = chance.choice([[0], [1], [0, 1]]) if num_ranks > 1 else [0]
            alive = [rank for rank in victims if ranks[rank].poll() is None]
            for rank in alive:
                os.kill(ranks[rank].pid, signal.SIGKILL)
            # Before an attempt has begun, such a folder is what the kill before it left.
            in_save = not early and bool(list(output.glob(".tmp-checkpoint-*")))
            codes = finish(ranks)
            kills.append({"attempt": attempt, "ranks": alive, "early": early, "in_save": in_save, "codes": codes})
            print(json.dumps(kills[-1]), flush=True)
            if not any(codes):
                return {"kills": kills, "codes": codes, "attempts": attempt}
            # A kill during the start has no attempt in the records.
            attempt = sum('"start"' in line for line in _lines(output))
            continue
        codes = finish(ranks, timeout=600)
        return {"kills": kills, "codes": codes, "attempts": attempt}


def _lines(output: Path) -> list[str]:
    path = output / "run" / "attempts.jsonl"
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=2)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("model")
    parser.add_argument("pairs")
    known, more = parser.parse_known_args()
    shutil.rmtree(known.output, ignore_errors=True)
    known.output.mkdir(parents=True)
    words = ["--model_name_or_path", known.model, "--dataset_path", known.pairs, "--eval_split_size", "8"]
    words += ["--max_steps", str(known.steps), "--per_device_train_batch_size", "4", "--logging_steps", "1"]
    words += ["--learning_rate", "1e-3", "--disable_tqdm", "--sample_scores", "0", "--save_strategy", "steps"]
    words += ["--save_steps", "1", "--save_total_limit", "2", *more]
    whole = known.output / "whole"
    untouched = start([*words, "--output_dir", str(whole)], known.output / "whole.log", known.ranks)
    assert not any(finish(untouched, timeout=600)), (known.output / "whole.log").read_text()[-3000:]
    auto = ["--resume_from_checkpoint", "auto", "--force", "idle_restarts"]
    report = kill_and_resume([*words, *auto], known.output / "killed", known.kills, known.seed, known.ranks)
    first, second = weights(whole), weights(known.output / "killed")
    report["same_weights"] = first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    report["same_losses"] = losses(whole) == losses(known.output / "killed")
    report["in_save"] = sum(bool(kill["in_save"]) for kill in report["kills"])  # type: ignore[attr-defined]
    (known.output / "report.json").write_text(json.dumps(report, indent=1))
    print({name: value for name, value in report.items() if name != "kills"})
    ended_well = report["codes"] == [0] * known.ranks
    return 0 if report["same_weights"] and report["same_losses"] and ended_well else 1


if __name__ == "__main__":
    sys.exit(main())
