"""Steps that need several ranks: equal losses on one and on all, and a rank that stops and is named."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time

import psutil

from benchmarks.gpu_proof.checks import trained
from benchmarks.gpu_proof.context import Context, StepError
from benchmarks.gpu_proof.processes import MARK, marked
from rm_scale.files import read_json_lines

_LOSS_TOLERANCE = 1e-4
_STEPS_BEFORE_STOP = 3


def parity(context: Context) -> None:
    """Run the same fp32 training on one rank and on all: the batch stays, so its losses do."""
    ranks = context.settings.num_gpus
    more = ["--bf16", "false", "--deepspeed", "zero2", "--global_batch_size", str(4 * ranks)]
    outputs = {name: context.settings.work / name for name in ("one", "all")}
    commands = {
        name: context.launch(context.tiny_settings(output, context.sizes.tiny_steps + 2, *more), number)
        for (name, output), number in zip(outputs.items(), (1, ranks), strict=True)
    }
    done = context.run_together(commands)
    found = {name: trained(context, name, done[name], output) for name, output in outputs.items()}
    pairs = list(zip(found["one"]["losses"], found["all"]["losses"], strict=True))
    off = max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs)
    context.say(
        f"{len(pairs)} losses of 1 and {ranks} ranks differ by {off:.2g} at most (allowed {_LOSS_TOLERANCE:g})",
        losses={name: found[name]["losses"] for name in outputs},
        largest_relative_difference=off,
    )
    if off > _LOSS_TOLERANCE:
        raise StepError(f"losses of 1 and {ranks} ranks differ by {off:.2g}, allowed {_LOSS_TOLERANCE:g}: {pairs}")


def stopped_rank(context: Context) -> None:
    """SIGSTOP the last rank in the middle of a run; the others must end and name it."""
    ranks, output = context.settings.num_gpus, context.settings.work / "stopped"
    more = [
        "--deepspeed",
        "zero3",
        "--global_batch_size",
        str(4 * ranks),
        "--ddp_timeout",
        str(context.sizes.ddp_timeout),
    ]
    arguments = context.tiny_settings(output, 100_000, *more)
    process = context.start("train", context.launch(arguments, ranks))
    while len(read_json_lines(output / "run" / "steps.jsonl")) < _STEPS_BEFORE_STOP:
        if process.poll() is not None:
            raise StepError(
                f"the run ended before its third step: {context.done('train', process.returncode, 0).why()}"
            )
        time.sleep(0.2)
    victim = _process_of_rank(ranks - 1)
    os.kill(victim, signal.SIGSTOP)
    stopped = time.monotonic()
    context.say(f"rank {ranks - 1} stopped; not named yet", stopped_rank=ranks - 1)
    named = _wait_for_name(context, process, ranks - 1)
    seconds = time.monotonic() - stopped
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    if named is None:
        raise StepError(
            f"rank {ranks - 1} was stopped and not named: {context.done('train', process.poll() or 0, 0).why()}"
        )
    context.say(
        f"rank {ranks - 1} of {ranks} named {seconds:.0f} s after it stopped (ddp_timeout {context.sizes.ddp_timeout})",
        seconds_to_name=round(seconds, 1),
        said=named[:600],
    )


def _process_of_rank(rank: int) -> int:
    """Find a rank among this step's own trainings."""
    for process in marked(os.environ[MARK]):
        with contextlib.suppress(psutil.Error, OSError):
            arguments = " ".join(process.cmdline())
            if process.environ().get("RANK") == str(rank) and "train.py" in arguments and "launcher" not in arguments:
                return process.pid
    raise StepError(f"rank {rank} has no process")


def _wait_for_name(context: Context, process: object, rank: int) -> str | None:
    """Return the line that names the rank; `None` when the run ended without, or time is up."""
    while context.seconds_left > 3:
        text = context.done("train", 0, 0).text
        found = re.search(rf"^.*\brank {rank} (?:does not answer|did not reach).*$", text, re.MULTILINE)
        if found is not None:
            return found.group(0).strip()
        if process.poll() is not None and not _still_writes(context):  # type: ignore[attr-defined]
            return None
        time.sleep(0.3)
    return None


def _still_writes(context: Context) -> bool:
    """Look whether lines still come: the launcher may be gone a moment before a rank's last one is in the file."""
    before = len(context.done("train", 0, 0).text)
    time.sleep(1.0)
    return len(context.done("train", 0, 0).text) > before
