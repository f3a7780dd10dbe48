"""`rm-scale slurm render|submit|status|pack`: write a job script, submit it, watch the job, pack the environment."""

from __future__ import annotations

import argparse

from rm_scale.commands.help_formatter import HelpFormatter
from rm_scale.slurm.job_options import add_job_options

HELP = "job scripts: render, submit, watch; pack the environment for the nodes"
DESCRIPTION = (
    "Write a ready job script, submit a job, show what became of one, or pack the environment. See docs/slurm.md."
)
EXAMPLE = "rm-scale slurm submit --tier 13b --config configs/llama_2_13b_lora.yaml --dry_run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands."""
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    further = "All other options are settings of rm_scale/train.py, such as --config FILE.yaml."

    render = commands.add_parser(
        "render",
        help="write a ready job script",
        description=f"Write a ready job script. {further}",
        epilog="example: rm-scale slurm render --tier 7b --nodes 2 --output rm_7b.sh",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    render.add_argument("--tier", required=True, help="1b, 3b, 7b or 13b")
    render.add_argument("--output", metavar="FILE.sh", help="default: standard output")
    add_job_options(render)
    render.set_defaults(run=_render)

    submit = commands.add_parser(
        "submit",
        help="submit a job, checked",
        description=f"Check the settings, plan the run, and submit the job. {further}",
        epilog=f"example: {EXAMPLE}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    submit.add_argument("--tier", help="1b, 3b, 7b or 13b")
    submit.add_argument("--script", metavar="FILE.sh", help="a rendered script instead")
    submit.add_argument("--test_only", action="store_true", help="ask Slurm whether and when it would start")
    submit.add_argument("--dry_run", action="store_true", help="print the sbatch command and stop")
    add_job_options(submit)
    submit.set_defaults(run=_submit)

    text = "state, progress, restarts and last errors of a job"
    status = commands.add_parser(
        "status",
        help=text,
        description=f"Show {text}.",
        epilog="example: rm-scale slurm status 123_4",
        formatter_class=HelpFormatter,
    )
    status.add_argument("job", help="Slurm's number of it, such as 123 or 123_4")
    status.add_argument("--logs", help="RM_SCALE_LOGS of the job; default: what Slurm knows, else logs/ here")
    status.add_argument("--json", action="store_true", help="for scripts")
    status.set_defaults(run=_status)
    _add_pack(commands)


def _add_pack(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pack = commands.add_parser(
        "pack",
        help="one file of the virtual environment, which each node of a job unpacks to its own disk",
        description="Pack a virtual environment into one file for RM_SCALE_PACKED_ENV, from which each node of a job "
        "unpacks it once to its own disk: Python then imports nothing over the shared disk.",
        epilog="example: rm-scale slurm pack --output /shared/me/env.tar",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    pack.add_argument("--output", required=True, metavar="FILE.tar", help="or FILE.tar.zst, FILE.tar.gz")
    pack.add_argument("--venv", metavar="DIR", help="default: the environment that this command runs in")
    pack.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names below DIR to leave out, such as 'lib/*/site-packages/onnx*'; may be given several times",
    )
    pack.set_defaults(run=_pack)


def _render(options: argparse.Namespace, settings: list[str]) -> int:
    from rm_scale.slurm import render

    return render.run(options, settings)


def _submit(options: argparse.Namespace, settings: list[str]) -> int:
    from rm_scale.slurm import submit

    return submit.run(options, settings)


def _status(options: argparse.Namespace) -> int:
    from rm_scale.slurm import status

    return status.run(options)


def _pack(options: argparse.Namespace) -> int:
    from rm_scale.slurm import packed_environment

    return packed_environment.run(options)
