"""`rm-scale score`: score the rows of a file with one reward model or several."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm_scale.commands.endpoint_options import (
    add_endpoint_arguments,
    endpoint_problems,
    endpoint_scorer,
    open_endpoints,
)
from rm_scale.commands.scoring_options import add_scoring_arguments, load_scorer, tokens_per_batch
from rm_scale.errors import ConfigError, UserError
from rm_scale.logs import get_logger, setup_logging
from rm_scale.output_paths import file_problem

if TYPE_CHECKING:
    from rm_scale.inference.endpoint import Endpoint
    from rm_scale.inference.scoring.contract_scorer import ContractScorer

logger = get_logger(__name__)

HELP = "score texts with one reward model or several"
EXAMPLE = "rm-scale score --model outputs/demo --input texts.jsonl --output scores.jsonl"
DESCRIPTION = (
    "Score rows with `prompt` and `completion` (text or messages), `messages` or `text`; each comes back with `score`. "
    "Started again it goes on where it was stopped. Also runs under deepspeed, torchrun and srun. See docs/using.md."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rm-scale score`."""
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model", nargs="+", required=True, metavar="DIR", help="output directories of runs, or exports"
    )
    files.add_argument("--input", required=True, metavar="FILE", help="JSONL, JSON, CSV, Parquet or Arrow")
    files.add_argument("--output", required=True, metavar="FILE", help="ends in .jsonl, .jsonl.gz, .csv or .parquet")
    files.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    files.add_argument(
        "--ignore_columns", nargs="+", default=[], metavar="COLUMN", help="carried along and not read, as in training"
    )
    files.add_argument("--restart", action="store_true", help="forget what an earlier start has scored")
    files.add_argument(
        "--on_bad_row",
        choices=("null", "stop"),
        default="null",
        help="null (default): it comes back with score null and error; stop: end at the first one",
    )
    files.add_argument(
        "--max_rejected_share", type=float, default=0.05, help="stop when more rows can't be scored (default 0.05)"
    )
    several = parser.add_argument_group("several models")
    several.add_argument("--ensemble", choices=("mean", "min"), default="mean", help="how their scores become one")
    several.add_argument("--combine_raw", action="store_true", help="raw scores instead of standard ones")
    add_scoring_arguments(parser)
    add_endpoint_arguments(parser, several=True)
    how = parser.add_argument_group("how")
    how.add_argument("--num_processes", type=int, metavar="N", help="ranks on this machine, one per GPU")
    how.add_argument("--chunk_rows", type=int, default=512, help="rows of a part: what a kill costs (default 512)")


def run(options: argparse.Namespace) -> int:
    """Score; return the exit code.

    Raises:
        UserError: an option makes no sense, or what the parts of the work raise.
    """
    _check(options)
    from rm_scale.distributed import detect_world

    world = detect_world()
    if options.num_processes is not None and options.num_processes > 1:
        if world.size > 1:
            raise UserError(
                f"num_processes={options.num_processes} under a launcher that has started {world.size} ranks. Fix: one "
                "of the two."
            )
        return _start_ranks(options.num_processes, options.device)
    setup_logging(world.rank)
    return _score(options, world)


def _check(options: argparse.Namespace) -> None:
    problems = [
        f"{name}={value}: must be at least 1. Fix: leave it out."
        for name in ("num_processes", "chunk_rows", "max_tokens_per_batch")
        if (value := getattr(options, name)) is not None and value < 1
    ]
    if not 0 <= options.max_rejected_share <= 1:
        problems.append(f"max_rejected_share={options.max_rejected_share:g}: must be from 0 to 1. Fix: 0.05.")
    if not Path(options.input).exists():
        problems.append(f"input={options.input}: there is no such file. Fix: give a file with rows to score.")
    read = [options.input, *options.model, *([options.chat_template_path] if options.chat_template_path else [])]
    problem = file_problem(f"output={options.output}", options.output, overwrite=options.overwrite, read=read)
    problems += [problem] if problem is not None else []
    problems += endpoint_problems(options)
    if problems:
        raise ConfigError(problems, "rm-scale score: the options can't be used")


def _start_ranks(num_ranks: int, device: str | None) -> int:
    """Run this command again, on several ranks of this machine; return the launcher's exit code.

    Raises:
        UserError: there are fewer GPUs than ranks, and no device was named for all of them.
    """
    from rm_scale.files import free_port
    from rm_scale.launch.devices import num_gpus
    from rm_scale.launch.kill_evidence import was_killed, watched
    from rm_scale.launch.ranks import device_flags, launcher_environment

    gpus = num_gpus()
    if device in (None, "cuda") and 0 < gpus < num_ranks:
        raise UserError(
            f"num_processes={num_ranks}: this machine shows {gpus} GPUs, and each rank takes one. Fix: --num_processes "
            f"{gpus} or less, or --device cuda:0 for all of them."
        )
    arguments = sys.argv[1:]
    place = next(place for place, word in enumerate(arguments) if word.startswith("--num_processes"))
    del arguments[place : place + (1 if "=" in arguments[place] else 2)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *device_flags(num_ranks, gpus > 0)]
    launcher += ["--master_port", str(free_port()), "--no_local_rank", "--module", "rm_scale.cli", *arguments]
    with watched() as evidence:
        code = subprocess.run(launcher, env=launcher_environment(), check=False).returncode
    if code:
        # What the rank itself said is above; the launcher ends the others, and a killed rank says nothing.
        killed = f" (killed by signal 9, {evidence.text(fix='fewer --num_processes')})" if was_killed(code) else ""
        print(
            f"rm-scale score: a rank ended with code {code}{killed}, and the others with it. What has been scored is "
            "kept. Fix: see above; then the same command again, it goes on from there.",
            file=sys.stderr,
        )
    return code


def _score(options: argparse.Namespace, world: Any) -> int:
    from rm_scale.distributed import prepare_environment

    prepare_environment(world)
    # Before torch is imported. Else MKL may add in another order with another number of threads, and so of ranks.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    from rm_scale.inference.scoring.batch_scoring import BLOCK_ROWS, ScoringJob, forget_parts, parts_held, run_job
    from rm_scale.inference.scoring.ensemble import Ensemble
    from rm_scale.inference.scoring.row_files import open_rows, output_suffix
    from rm_scale.launch.devices import rank_device

    output_suffix(options.output)
    endpoints = open_endpoints(options)
    device = "cpu" if endpoints else rank_device(options.device, world)
    with open_rows(options.input, options.ignore_columns) as rows:
        job = ScoringJob(
            output=Path(options.output),
            facts=_facts(options, rows.identity, endpoints),
            chunk_rows=options.chunk_rows,
            # A server has batches of its own, and is kept busy by as many texts as there are.
            block_rows=options.chunk_rows if endpoints else BLOCK_ROWS,
            max_tokens=tokens_per_batch(options, device),
            max_rejected_share=options.max_rejected_share,
            stop_at_bad_row=options.on_bad_row == "stop",
        )
        with parts_held(job, world):
            if world.is_main:
                _check(options)  # once more: another start may have written the output meanwhile
            if options.restart and world.is_main:
                forget_parts(job)
            ensemble = Ensemble(_scorers(options, endpoints, device), options.ensemble, options.combine_raw)
            with _progress(len(rows), world.is_main) as bar:
                summary = run_job(job, rows, ensemble, world, lambda done: bar.update(done - bar.n))
    if summary is not None:
        for line in summary.lines():
            logger.warning(line)
        print(f"{summary.num_scored:,} of {summary.num_rows:,} rows scored: {options.output}")
    return 0


def _scorers(options: argparse.Namespace, endpoints: Sequence[Endpoint], device: str) -> list[ContractScorer]:
    if not endpoints:
        return [load_scorer(folder, options, device) for folder in options.model]
    return [endpoint_scorer(folder, one, options) for folder, one in zip(options.model, endpoints, strict=True)]


def _facts(options: argparse.Namespace, identity: dict[str, Any], endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Return all that decides the scores: input, models, settings, and whose servers compute them.

    Not where: a server may come back at another address, and is held to the golden scores again.
    """
    from rm_scale.inference.model_folder import local_folder, require_reward_model
    from rm_scale.inference.scoring.batch_scoring import model_facts

    models = {}
    for name in options.model:
        folder = local_folder(name)
        if not endpoints:  # else its weights are somewhere else
            require_reward_model(folder)
        models[str(folder.resolve())] = model_facts(folder)
    names = ("ensemble", "combine_raw", "dtype", "chat_template_path", "force", "ignore_columns")
    settings = {name: getattr(options, name) for name in names}
    if endpoints:
        settings["endpoints"] = [{"kind": one.served.kind, "model": one.served.model} for one in endpoints]
    return {"input": identity, "models": models, "settings": settings}


def _progress(num_rows: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=num_rows, unit=" rows", desc="scoring", mininterval=1.0, disable=None if shown else True)
