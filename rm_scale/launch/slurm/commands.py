"""`rm-scale slurm render|submit|status`: options, apart from what they do, so that `--help` stays quick."""

from __future__ import annotations

import argparse

from rm_scale.launch.slurm.options import add_job_options


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The three commands; `options.run(options, rest)` runs the chosen one."""
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    further = "Further words are settings of rm_scale/train.py, such as --config FILE.yaml."

    render = commands.add_parser("render", help="write a ready job script", description=further, allow_abbrev=False)
    render.add_argument("--tier", required=True, help="1b, 3b, 7b or 13b")
    render.add_argument("--output", metavar="FILE.sh", help="default: standard output")
    add_job_options(render)
    render.set_defaults(run=_render, takes_settings=True)

    submit = commands.add_parser("submit", help="submit a job, checked", description=further, allow_abbrev=False)
    submit.add_argument("--tier", help="1b, 3b, 7b or 13b")
    submit.add_argument("--script", metavar="FILE.sh", help="a rendered script instead")
    submit.add_argument("--test_only", action="store_true", help="ask Slurm whether and when it would start")
    submit.add_argument("--dry_run", action="store_true", help="print the sbatch command and stop")
    add_job_options(submit)
    submit.set_defaults(run=_submit, takes_settings=True)

    status = commands.add_parser("status", help="state, progress, restarts and last errors of a job")
    status.add_argument("job", help="Slurm's number of it, such as 123 or 123_4")
    status.add_argument("--logs", help="RM_SCALE_LOGS of the job; default: what Slurm knows, else logs/ here")
    status.add_argument("--json", action="store_true", help="for scripts")
    status.set_defaults(run=_status)


def _render(options: argparse.Namespace, rest: list[str]) -> int:
    from rm_scale.launch.slurm import render

    return render.run(options, rest)


def _submit(options: argparse.Namespace, rest: list[str]) -> int:
    from rm_scale.launch.slurm import submit

    return submit.run(options, rest)


def _status(options: argparse.Namespace, rest: list[str]) -> int:
    from rm_scale.launch.slurm import status

    return status.run(options)
