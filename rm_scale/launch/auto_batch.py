"""Find the largest packed row that trains, by short real runs."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rm_scale.config_parsing import ParsedConfig
from rm_scale.errors import ConfigError, UserError
from rm_scale.files import read_json_lines, write_whole
from rm_scale.launch.deepspeed_command import launch_command, run_command
from rm_scale.launch.kill_evidence import KillEvidence, was_killed, watched
from rm_scale.launch.machine import Machine
from rm_scale.logs import get_logger
from rm_scale.planning.plan import Plan
from rm_scale.version import __version__

logger = get_logger(__name__)

TRIAL_STEPS = 2
MAX_TRIALS = 6
_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")


def auto_batch(settings: Sequence[str], parsed: ParsedConfig, plan: Plan, machine: Machine) -> list[str]:
    """Find the largest token budget that trains, by short real runs that begin at the plan's.

    A row larger than a rank's share of the global batch brings nothing, so the search ends there.

    Raises:
        ConfigError: the run has padded rows, or not even the longest group's row trains.
    """
    start = plan.max_tokens_per_device
    if start is None:
        raise ConfigError(["auto_batch with packing=none: it searches tokens of packed rows. Fix: leave it out."])
    folder = Path(parsed.config.output_dir).with_name(Path(parsed.config.output_dir).name + ".auto_batch")
    _begin(folder)
    best, failed, budget = 0, math.inf, float(start)
    for number in range(MAX_TRIALS):
        tokens = int(budget) // 8 * 8
        works, used = _trial(settings, machine, folder / str(number), tokens)
        logger.info(f"auto_batch: rows of {tokens:,} tokens {'train' if works else 'do not train'}{used}")
        if works:
            best = tokens
            if tokens >= _share_tokens(plan, parsed):
                break
        else:
            failed = tokens
        budget = _next_budget(best, failed, tokens)
        if failed - best <= max(64, 0.1 * best):
            break
    shutil.rmtree(folder, ignore_errors=True)
    if not best:
        raise ConfigError(
            [
                f"auto_batch: not even rows of {int(failed):,} tokens train. Fix: a smaller --max_length, "
                "LoRA, or more devices."
            ]
        )
    return ["--max_tokens_per_device", str(best)]


def _begin(folder: Path) -> None:
    """Make the folder for the trials, marked as ours, without what a killed search has left in it.

    It is removed at the end.

    Raises:
        ConfigError: it is there and holds anything else; names the folder.
    """
    _require_free(folder)
    for number in _TRIALS:
        shutil.rmtree(folder / number, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MARK_FILE, f"Short runs of rm_scale {__version__}; removed when the search has ended.\n")


def _require_free(folder: Path) -> None:
    """Refuse a folder for the trials that holds anything but those of an earlier search, as our mark shows.

    Raises:
        ConfigError: names the folder.
    """
    if not os.path.lexists(folder):
        return
    names = [path.name for path in folder.iterdir()] if folder.is_dir() and not folder.is_symlink() else [""]
    if names and (MARK_FILE not in names or any(name not in {MARK_FILE, *_TRIALS} for name in names)):
        raise ConfigError([f"auto_batch: {folder} exists, and trials would go there. Fix: move it away."])


MARK_FILE = "rm_scale_trials.txt"
"""In the folder of trials: it tells that a search has made it."""
_TRIALS = [str(number) for number in range(MAX_TRIALS)]


def _next_budget(best: int, failed: float, tried: int) -> float:
    if not best:
        return tried / 2
    return best * 2 if failed == math.inf else (best + failed) / 2


def _share_tokens(plan: Plan, parsed: ParsedConfig) -> float:
    return 2 * parsed.config.max_length * plan.global_batch_size / plan.world_size


def _trial(settings: Sequence[str], machine: Machine, folder: Path, tokens: int) -> tuple[bool, str]:
    """Two steps with rows of so many tokens; did they work, and with how much memory?"""
    extra = ["--max_tokens_per_device", str(tokens), "--max_steps", str(TRIAL_STEPS), "--output_dir", str(folder)]
    extra += ["--save_strategy", "no", "--eval_strategy", "no", "--logging_steps", "1", "--disable_tqdm", "true"]
    command, environment = launch_command(machine, [*settings, *extra, "--sample_scores", "0"])
    with watched() as evidence:
        done = run_command(command, environment, capture_output=True)
    if done.returncode:
        _require_memory(done.stdout + done.stderr, done.returncode, evidence)
    metrics = folder / "run" / "metrics.jsonl"
    lines = read_json_lines(metrics) if metrics.is_file() else []
    peaks = [line["peak_memory_bytes"] for line in lines if "peak_memory_bytes" in line]
    limit = machine.device.memory_bytes * 0.97
    fits = done.returncode == 0 and bool(peaks) and max(peaks) <= limit
    return fits, f", {max(peaks) / 1e9:.1f} GB at most" if peaks else ""


def _require_memory(output: str, code: int, evidence: KillEvidence) -> None:
    """Let a failed trial pass as one whose rows were too large only where it says so, or the system does.

    Raises:
        UserError: it failed for something else.
    """
    if any(text in output.lower() for text in _MEMORY_TEXTS):
        return
    if not was_killed(code):
        raise UserError(f"auto_batch: a trial failed, and not for memory:\n{output[-2000:]}")
    if not evidence.is_memory():
        raise UserError(f"auto_batch: a rank of a trial was killed (signal 9) {evidence.text()}")
