"""Inside a job, before any rank starts: settings, plan, port, and what is written down for the nodes.

Started by `slurm/common.sh` on the job's first node: `python -m rm_scale.slurm.prepare FOLDER SETTINGS...`.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rm_scale.config_parsing import parse_config
from rm_scale.errors import ConfigError, UserError, system_fault
from rm_scale.files import write_whole
from rm_scale.guard import run_guarded
from rm_scale.launch.deepspeed_command import TRAIN
from rm_scale.launch.machine import Machine, device_here, local_gpu_names
from rm_scale.launch.planned_run import PlannedRun, nearest_tier, plan_run, refuse_what_does_not_fit
from rm_scale.logs import get_logger, setup_logging
from rm_scale.meeting import PORTS_TRIED
from rm_scale.output_lock import Owner, attempt_of, can_ask_slurm, refuse, running_owner, this_process
from rm_scale.planning.hardware import find_device, known_devices
from rm_scale.slurm.allocation import Allocation, read_allocation
from rm_scale.slurm.job_options import sbatch_options_among
from rm_scale.slurm.job_start import (
    FENCE_SECONDS,
    START_FILE,
    Start,
    end_path,
    fence_path,
    read_start,
)
from rm_scale.slurm.node_check import mark_folders
from rm_scale.slurm.rendezvous import master_address, port_of_job

logger = get_logger(__name__)

EXIT_NOTHING_TO_START = 64
"""Exit code after `--dry_run`: everything was checked, and nothing is to be started."""

EXIT_ASK_SLURM = 65
"""Exit code where only Slurm, outside the container, can tell whether the job named in `asked_job` still runs."""

EXIT_TRY_AGAIN = 75
"""Exit code after a message where the system refused a file: the disk may be full or away for a while."""

ASKED_FILE = "asked_job"


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare one attempt of a job.

    Returns:
        0; 2 or `EXIT_TRY_AGAIN` after a message; `EXIT_NOTHING_TO_START` or `EXIT_ASK_SLURM`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    setup_logging()
    return run_guarded(lambda: _prepare_or_try_again(Path(arguments[0]), arguments[1:]))


def _prepare_or_try_again(folder: Path, asked: list[str]) -> int:
    """Prepare; give what the system refused, and may not refuse a minute later, an exit code of its own."""
    try:
        return prepare(folder, asked, os.environ)
    except Exception as error:
        fault = system_fault(error)
        if fault is None:
            raise
        if not isinstance(error, UserError):
            error = UserError(fault)
        error.exit_code = EXIT_TRY_AGAIN
        raise error from None


def prepare(folder: Path, asked: list[str], environ: Mapping[str, str]) -> int:
    """Check everything that can be checked on one node, and write `start.json`.

    Args:
        folder: of this attempt.
        asked: settings as given after the script's name.
        environ: variables of `slurm/site.env` and of Slurm.

    Raises:
        UserError: the allocation, the settings or the plan can't be used, or another run writes to the directory.
    """
    misplaced = sbatch_options_among(asked, after_script=True)
    if misplaced:
        raise ConfigError(misplaced)
    allocation = read_allocation(environ)
    ranks = ranks_per_node(allocation, environ)
    arguments = [*default_settings(asked, allocation, environ), *asked]
    arguments = with_resume(with_array_output(arguments, allocation), allocation.attempt, environ)
    unknown = attempt_to_ask_for(parse_config(arguments).config.output_dir, allocation, environ)
    if unknown is not None:
        write_whole(folder / ASKED_FILE, f"{unknown}\n")
        return EXIT_ASK_SLURM
    settings = _earlier_settings(folder, arguments, len(allocation.nodes) * ranks)
    if settings is not None:
        logger.info(f"attempt {allocation.attempt}: settings as in attempt 0")
    else:
        settings = _plan(arguments, allocation, ranks, environ).settings
    config = parse_config(settings).config
    if config.dry_run:
        print(f"would start {len(allocation.nodes)} x {ranks} ranks:\n{shlex.join([str(TRAIN), *settings])}")
        return EXIT_NOTHING_TO_START
    start = Start(
        job_id=allocation.job_id,
        attempt=allocation.attempt,
        nodes=allocation.nodes,
        ranks_per_node=ranks,
        gpus_per_node=allocation.gpus_per_node,
        master_addr=master_address(allocation, environ.get("RM_SCALE_INTERFACE", ""), environ),
        master_port=port_of_job(allocation.job_id + allocation.attempt, int(environ.get(PORTS_TRIED) or 0)),
        train=str(TRAIN),
        settings=tuple(settings),
        asked=tuple(arguments),
        output_dir=str(Path(config.output_dir).resolve()),
        folder=str(folder.resolve()),
    )
    _take_over(start)
    logger.info(
        f"job {start.job_id}, attempt {start.attempt}: {start.world_size} ranks on {', '.join(start.nodes)}; "
        f"they meet at {start.master_addr}:{start.master_port}; logs: {start.folder}"
    )
    return 0


def _take_over(start: Start) -> None:
    """Claim folders and disk for this attempt, and write down for the nodes what it was started with.

    Raises:
        UserError: another run writes to the output directory.
    """
    owner = other_owner(start.output_dir, start.job_id, start.attempt)
    if owner is not None:
        raise refuse(start.output_dir, owner)
    # From here on a node that still runs an earlier attempt ends its ranks.
    write_whole(fence_path(Path(start.folder).parent), str(start.attempt))
    wait_for_earlier_attempt(start)
    mark_folders(start)
    start.write()


# --- Settings --------------------------------------------------------------------------------------------------------


def default_settings(asked: Sequence[str], allocation: Allocation, environ: Mapping[str, str]) -> list[str]:
    """Return the settings that come before the user's: the script's configuration, and this array task's of a sweep.

    Raises:
        UserError: the configuration or the line of the sweep is not there.
    """
    arguments: list[str] = []
    config = environ.get("RM_SCALE_CONFIG", "")
    if config not in {"", "none"} and not any(word.split("=")[0] == "--config" for word in asked):
        arguments += ["--config", str(_find_config(config, environ))]
    if allocation.array_task is not None:
        arguments += array_settings(allocation.array_task, environ.get("RM_SCALE_SWEEP", ""), [*arguments, *asked])
    return arguments


def _find_config(name: str, environ: Mapping[str, str]) -> Path:
    path = Path(environ.get("RM_SCALE_HOME", "")) / name
    if not path.is_file():
        raise UserError(f"RM_SCALE_CONFIG={name}: no such file below {path.parent}. Fix: give it with --config FILE.")
    return path


def array_settings(task: int, sweep: str, arguments: Sequence[str]) -> list[str]:
    """Return the settings of one task of an array: line `task` of the sweep's file, or without one a seed of its own.

    Raises:
        UserError: the file has no such line.
    """
    if not sweep:
        seed = parse_config(arguments).config.seed + task
        return ["--seed", str(seed)]
    try:
        lines = Path(sweep).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"RM_SCALE_SWEEP={sweep}: can't be read ({error.strerror}). Fix: check the path.") from error
    if not 0 <= task < len(lines):
        raise UserError(
            f"array task {task}: {sweep} has {len(lines)} lines, counted from 0. Fix: --array=0-{len(lines) - 1}."
        )
    try:
        return shlex.split(lines[task])
    except ValueError as error:
        raise UserError(f"RM_SCALE_SWEEP={sweep}, line {task + 1}: {error}. Fix: close the quotes.") from error


def with_array_output(arguments: list[str], allocation: Allocation) -> list[str]:
    """Add an output directory of its own to a task of an array."""
    if allocation.array_task is None:
        return arguments
    output = parse_config(arguments).config.output_dir
    return [*arguments, "--output_dir", str(Path(output) / f"task-{allocation.array_task}")]


def with_resume(arguments: list[str], attempt: int, environ: Mapping[str, str]) -> list[str]:
    """Add the setting that resumes from the newest whole checkpoint; what the user asked counts in attempt 0 only."""
    resume = environ.get("RM_SCALE_RESUME", "auto")
    given = "resume_from_checkpoint" in parse_config(arguments).given  # by flag or file
    if resume == "none" or (given and attempt == 0):
        return arguments
    return [*arguments, "--resume_from_checkpoint", resume]


def _earlier_settings(folder: Path, arguments: Sequence[str], world_size: int) -> list[str] | None:
    """Return the settings of an earlier attempt: a resumed run keeps them, however the plan sees the machine now."""
    for attempt in range(int(folder.name.removeprefix("attempt-"))):
        try:
            start = read_start(folder.with_name(f"attempt-{attempt}") / START_FILE)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if start.world_size == world_size:
            return with_resume_of(list(start.settings), arguments)
    return None


def with_resume_of(settings: list[str], arguments: Sequence[str]) -> list[str]:
    """Return the settings followed by what `arguments` say about resuming."""
    if "--resume_from_checkpoint" not in arguments:
        return settings
    place = len(arguments) - 1 - list(arguments)[::-1].index("--resume_from_checkpoint")
    return [*settings, *arguments[place : place + 2]]


# --- Allocation and plan ---------------------------------------------------------------------------------------------


def ranks_per_node(allocation: Allocation, environ: Mapping[str, str]) -> int:
    """Return one rank for each GPU of a node; on processors as many as RM_SCALE_RANKS_PER_NODE says.

    Raises:
        UserError: there are no GPUs and nobody said to use processors, or the driver shows fewer than Slurm gave.
    """
    asked = environ.get("RM_SCALE_RANKS_PER_NODE", "")
    if asked and not (asked.isdigit() and int(asked) >= 1):
        raise UserError(f"RM_SCALE_RANKS_PER_NODE={asked!r}: must be a whole number from 1. Fix: correct or unset it.")
    if environ.get("RM_SCALE_DEVICE", "auto") == "cpu":
        return int(asked or 1)
    visible = len(local_gpu_names())
    if visible == 0:
        what = f"{allocation.gpus_per_node} GPUs" if allocation.gpus_per_node else "no GPUs"
        raise UserError(
            f"job {allocation.job_id} has {what} per node, and nvidia-smi shows none on {socket.gethostname()}. Fix: "
            "sbatch --gpus-per-node=8 in a partition with GPUs, or RM_SCALE_DEVICE=cpu to train on processors."
        )
    wanted = int(asked) if asked else (allocation.gpus_per_node or visible)
    if wanted > visible:
        raise UserError(
            f"{wanted} ranks per node, and {socket.gethostname()} shows {visible} GPUs. Fix: RM_SCALE_RANKS_PER_NODE="
            f"{visible}, or sbatch --gpus-per-node={wanted}."
        )
    return wanted


def _plan(arguments: list[str], allocation: Allocation, ranks: int, environ: Mapping[str, str]) -> PlannedRun:
    """Plan the run for this allocation, show the plan, and refuse what does not fit.

    Raises:
        ConfigError: settings are wrong, or the run does not fit.
    """
    forced = "plan" in environ.get("RM_SCALE_FORCE", "").split(",")
    hardware = parse_config(arguments).config.hardware
    if environ.get("RM_SCALE_DEVICE", "auto") == "cpu":
        device = device_here([], hardware) if hardware else known_devices()["cpu"]
    elif environ.get("RM_SCALE_GPU"):
        device = find_device(environ["RM_SCALE_GPU"], hardware)
    else:
        device = device_here(local_gpu_names(), hardware)
    machine = Machine(device, ranks, len(allocation.nodes), None)
    tier = environ.get("RM_SCALE_TIER") or None
    planned = plan_run(tier, arguments, machine, check_output=True)
    print(planned.lines(), flush=True)
    _tell_another_size(tier, planned)
    config = planned.parsed.config
    if planned.plan.global_batch_size < machine.world_size:
        raise ConfigError(
            [
                f"global_batch_size={planned.plan.global_batch_size} on {machine.nodes} nodes x {ranks} ranks: every "
                f"rank needs a group in each step. Fix: --global_batch_size {machine.world_size}, or fewer nodes."
            ]
        )
    refuse_what_does_not_fit(planned, machine, forced)
    if config.save_strategy == "no":
        logger.warning("save_strategy=no: after a crash or a lost node it begins anew. Fix: --save_strategy steps.")
    return planned


def _tell_another_size(tier: str | None, planned: PlannedRun) -> None:
    """Warn where the settings name a model that the job's script was not written for.

    Nobody has named the tier here: it is that of the script, whose model the settings may replace.
    """
    size = nearest_tier(planned.plan.num_parameters)
    if tier is not None and size != tier:
        model = planned.parsed.config.model_name_or_path
        logger.warning(
            f"model_name_or_path={model!r}: a model of tier {size}, and this job's script asks for what tier {tier} "
            f"takes. Fix: rm-scale slurm submit --tier {size}, unless that was meant."
        )


# --- Earlier attempts ------------------------------------------------------------------------------------------------


def wait_for_earlier_attempt(start: Start, most_seconds: float = 2 * FENCE_SECONDS + 1) -> None:
    """Give nodes that were lost, and may still run, the time to see that they have been replaced.

    Args:
        start: this attempt.
        most_seconds: a node that is dead will never say so.
    """
    try:
        earlier = read_start(Path(start.folder).with_name(f"attempt-{start.attempt - 1}") / START_FILE)
    except (OSError, ValueError, KeyError, TypeError):
        return
    deadline = time.monotonic() + most_seconds
    while left := [node for node in earlier.nodes if not end_path(Path(earlier.folder), node).exists()]:
        if time.monotonic() >= deadline:
            logger.info(f"attempt {earlier.attempt}: {', '.join(left)} did not say how it ended; most likely lost")
            return
        time.sleep(0.2)


# --- The output directory --------------------------------------------------------------------------------------------


def other_owner(output_dir: str, job_id: int, attempt: int) -> Owner | None:
    """Return another run that writes to the output directory, `None` without one.

    Rank 0 takes the directory as soon as it is up, under the same rules.
    """
    return running_owner(output_dir, replace(this_process(), job=job_id, attempt=attempt))


def attempt_to_ask_for(output_dir: str, allocation: Allocation, environ: Mapping[str, str]) -> str | None:
    """Return which attempt of a job may still write to the output directory, where only Slurm, not here, can tell.

    `None` where nobody is there, or where it was asked for already.
    """
    if can_ask_slurm() or not environ.get("RM_SCALE_CONTAINER"):
        return None
    owner = other_owner(output_dir, allocation.job_id, allocation.attempt)
    if owner is None or owner.job is None or environ.get("RM_SCALE_JOB_ASKED") == attempt_of(owner):
        return None
    return attempt_of(owner)


if __name__ == "__main__":
    sys.exit(main())
