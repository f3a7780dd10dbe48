"""`rm-scale score`: score the rows of a file with one reward model or several."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from rm_scale.errors import ConfigError, UserError
from rm_scale.logs import get_logger, setup_logging

logger = get_logger(__name__)

HELP = "score texts with one reward model or several"
DESCRIPTION = (
    "Score rows with `prompt` and `completion` (text or messages), `messages` or `text`; each comes back with `score`. "
    "Started again it goes on where it was stopped. Also runs under deepspeed, torchrun and srun. See docs/using.md."
)
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Default tokens per forward pass."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rm-scale score`."""
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model", nargs="+", required=True, metavar="DIR", help="output directories of runs, or exports"
    )
    files.add_argument("--input", required=True, metavar="FILE", help="JSONL, JSON, CSV, Parquet or Arrow")
    files.add_argument("--output", required=True, metavar="FILE", help="ends in .jsonl, .jsonl.gz, .csv or .parquet")
    files.add_argument("--overwrite", action="store_true", help="replace an output that exists")
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
    how = parser.add_argument_group("how")
    how.add_argument("--num_processes", type=int, metavar="N", help="ranks on this machine, one per GPU")
    how.add_argument("--chunk_rows", type=int, default=512, help="rows of a part: what a kill costs (default 512)")


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Options on how a model is loaded and run."""
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--max_tokens_per_batch", type=int, metavar="N", help="tokens of a forward pass")
    scoring.add_argument("--dtype", choices=DTYPES, default="auto", help="of the backbone; auto: as it was saved")
    scoring.add_argument("--device", help="default: the GPU when there is one")
    scoring.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    scoring.add_argument("--no_contract", action="store_true", help="take a model without scoring_contract.json")
    scoring.add_argument("--chat_template_path", metavar="FILE", help="must be the template of the contract")
    scoring.add_argument("--force", action="append", default=[], choices=["template"], help="template: another one")


def run(options: argparse.Namespace) -> int:
    """Score; gives the exit code.

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
        return _start_ranks(options.num_processes)
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
    output = Path(options.output)
    if output.exists() and not options.overwrite:
        problems.append(f"output={output}: exists. Fix: --overwrite, or another --output.")
    elif output.exists() and Path(options.input).exists() and output.samefile(options.input):
        problems.append(f"output={output}: is the input. Fix: another --output.")
    if problems:
        raise ConfigError(problems, "rm-scale score: the options can't be used")


def _start_ranks(num_ranks: int) -> int:
    """This command again, on several ranks of this machine."""
    from rm_scale.launch.ranks import free_port, launcher_environment

    words = sys.argv[1:]
    place = next(place for place, word in enumerate(words) if word.startswith("--num_processes"))
    del words[place : place + (1 if "=" in words[place] else 2)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(num_ranks)]
    launcher += ["--master_port", str(free_port()), "--no_local_rank", "--module", "rm_scale.cli", *words]
    code = subprocess.run(launcher, env=launcher_environment(), check=False).returncode
    if code:
        # The rank's own words are above; the launcher ends the others, and a kill leaves no words at all.
        killed = " (killed: out of memory?)" if code in {-9, 137} else ""
        print(
            f"rm-scale score: a rank ended with code {code}{killed}, and the others with it. What has been scored is "
            "kept. Fix: see above; then the same command again, it goes on from there.",
            file=sys.stderr,
        )
    return code


def _score(options: argparse.Namespace, world: Any) -> int:
    from rm_scale.distributed import prepare_environment

    prepare_environment(world)
    from rm_scale.inference.batch_scoring import ScoringJob, forget_parts, run_job
    from rm_scale.inference.ensemble import Ensemble
    from rm_scale.inference.rows import open_rows, output_suffix

    output_suffix(options.output)
    device = rank_device(options, world)
    with open_rows(options.input) as rows:
        job = ScoringJob(
            output=Path(options.output),
            facts=_facts(options, rows.identity),
            chunk_rows=options.chunk_rows,
            max_tokens=options.max_tokens_per_batch or MAX_TOKENS[device.split(":")[0]],
            max_rejected_share=options.max_rejected_share,
            stop_at_bad_row=options.on_bad_row == "stop",
        )
        if options.restart and world.is_main:
            forget_parts(job)
        scorers = [load_scorer(folder, options, device) for folder in options.model]
        ensemble = Ensemble(scorers, options.ensemble, options.combine_raw)
        with _progress(len(rows), world.is_main) as bar:
            summary = run_job(job, rows, ensemble, world, lambda done: bar.update(done - bar.n))
    if summary is not None:
        for line in summary.lines():
            logger.warning(line)
        print(f"{summary.num_scored:,} of {summary.num_rows:,} rows scored: {options.output}")
    return 0


def rank_device(options: argparse.Namespace, world: Any) -> str:
    """Where this rank's model goes."""
    from rm_scale.distributed import has_gpu

    if options.device:
        return str(options.device)
    return f"cuda:{world.local_rank}" if has_gpu() else "cpu"


def load_scorer(folder: str, options: argparse.Namespace, device: str) -> Any:
    """A model as `add_scoring_arguments` describes it."""
    from rm_scale.inference.scorer import RewardScorer

    template = None
    if options.chat_template_path is not None:
        try:
            template = Path(options.chat_template_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"chat_template_path={options.chat_template_path}: can't be read ({error}). Fix: give a Jinja file."
            ) from error
    return RewardScorer.from_pretrained(
        folder,
        device=device,
        dtype=None if options.dtype == "auto" else options.dtype,
        trust_remote_code=options.trust_remote_code,
        chat_template=template,
        force_template="template" in options.force,
        allow_missing_contract=options.no_contract,
    )


def _facts(options: argparse.Namespace, identity: dict[str, Any]) -> dict[str, Any]:
    """What decides the scores."""
    from rm_scale.inference.batch_scoring import model_facts
    from rm_scale.inference.identify import local_folder, require_reward_model

    models = {}
    for name in options.model:
        folder = local_folder(name)
        require_reward_model(folder)
        models[str(folder.resolve())] = model_facts(folder)
    names = ("ensemble", "combine_raw", "dtype", "chat_template_path", "force")
    return {"input": identity, "models": models, "settings": {name: getattr(options, name) for name in names}}


def _progress(num_rows: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=num_rows, unit=" rows", desc="scoring", mininterval=1.0, disable=None if shown else True)
