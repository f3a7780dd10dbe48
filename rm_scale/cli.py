"""`rm-scale <command>`: thin commands over the rooms. Heavy imports happen inside a command, never for `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rm_scale import __version__
from rm_scale.distributed import name_accelerator
from rm_scale.launch import (
    bench_hardware,
    doctor,
    eval_command,
    export_command,
    launch_options,
    plan_command,
    rank_command,
    report_command,
    score_command,
    serve_command,
)
from rm_scale.launch.guard import run_guarded
from rm_scale.launch.slurm import commands as slurm_commands
from rm_scale.logs import setup_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives its exit code.

    Args:
        argv: words of the command line; default `sys.argv[1:]`.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and not getattr(options, "takes_settings", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    setup_logging(debug=options.debug)
    return run_guarded(lambda: int(options.run(options, rest)), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rm-scale", description="Train reward models from a laptop to many GPU nodes."
    )
    parser.add_argument("--version", action="version", version=f"rm-scale {__version__}")
    parser.add_argument("--debug", action="store_true", help="full tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    assets = commands.add_parser("assets", help="make or fetch a model folder to try things with, without a hub")
    what = "tiny: random weights, made here in a second; random: those of a large model's shape, to measure with"
    assets.add_argument("name", choices=["tiny", "smollm2-135m", "random"], help=what)
    assets.add_argument("directory", help="where to write the model folder")
    assets.add_argument("--architecture", default="llama", help="of the tiny model: llama, qwen2, qwen3, mistral, ...")
    assets.add_argument("--tier", default="1b", help="shape of the random model: 1b, 3b, 7b, 13b")
    assets.add_argument("--model_config", metavar="CONFIG.json", help="shape of the random model, instead of --tier")
    assets.set_defaults(run=_assets)

    data = commands.add_parser(
        "data",
        help="read, check and encode preference files as a run would, and report",
        description="Takes the settings of rm_scale/train.py, such as --dataset_path FILE --model_name_or_path DIR.",
    )
    data.set_defaults(run=_data, takes_settings=True)

    plan = commands.add_parser("plan", help="will it fit, how fast, for how much: before anything is queued")
    plan_command.add_arguments(plan)
    plan.set_defaults(run=lambda options, rest: plan_command.run(options))

    tiers = commands.add_parser("tiers", help="the sizes 1b to 13b, and the smallest cluster that trains each")
    tiers.add_argument("--gpu", default="h100-80g", help="kind of device")
    tiers.add_argument("--hardware", metavar="FILE.yaml", help="devices of your own")
    tiers.add_argument("--seq", type=int, default=4096, help="longest sequence")
    tiers.set_defaults(run=lambda options, rest: plan_command.run_tiers(options))

    launch = commands.add_parser(
        "launch",
        help="plan a run, check it, print the exact command, and start it",
        description="Further words are settings of rm_scale/train.py, such as --config FILE.yaml.",
        allow_abbrev=False,
    )
    launch_options.add_arguments(launch)
    launch.set_defaults(run=_launch, takes_settings=True)

    _add_uses_of_a_model(commands)

    slurm = commands.add_parser("slurm", help="job scripts: render, submit, watch")
    slurm_commands.add_commands(slurm)

    checks = commands.add_parser(
        "doctor", help="find what would break a run here or across an allocation, before it starts"
    )
    doctor.add_arguments(checks)
    checks.set_defaults(run=lambda options, rest: doctor.run(options))

    bench = commands.add_parser("bench", help="measure things").add_subparsers(required=True, metavar="WHAT")
    hardware = bench.add_parser("hardware", help="rates of the machine at hand, as a file for --hardware")
    bench_hardware.add_arguments(hardware)
    hardware.set_defaults(run=lambda options, rest: bench_hardware.run(options))
    return parser


def _add_uses_of_a_model(commands: Any) -> None:
    """The commands for a model that has been trained."""
    modules = {
        "score": score_command,
        "rank": rank_command,
        "eval": eval_command,
        "serve": serve_command,
        "export": export_command,
        "report": report_command,
    }
    for name, module in modules.items():
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(command)
        command.set_defaults(run=lambda options, rest, module=module: module.run(options))


def _assets(options: argparse.Namespace, rest: list[str]) -> int:
    name_accelerator()
    from rm_scale.modeling.assets import fetch_smollm2, make_tiny_model

    if options.name == "tiny":
        folder = make_tiny_model(options.directory, architecture=options.architecture)
    elif options.name == "random":
        folder = _random_model(options)
    else:
        folder = fetch_smollm2(options.directory)
    print(folder)
    return 0


def _random_model(options: argparse.Namespace) -> Any:
    from rm_scale.modeling.random_weights import make_random_model
    from rm_scale.planning.shape import read_model_config
    from rm_scale.tiers import model_tier

    if options.model_config is not None:
        return make_random_model(options.directory, read_model_config(options.model_config), "config")
    tier = model_tier(options.tier)
    return make_random_model(options.directory, tier.config, tier.name)


def _launch(options: argparse.Namespace, rest: list[str]) -> int:
    from rm_scale.launch import launch_command

    return launch_command.run(options, rest)


def _data(options: argparse.Namespace, rest: list[str]) -> int:
    from rm_scale.config import parse_config

    parsed = parse_config(rest)
    parsed.raise_problems()
    name_accelerator()

    from rm_scale.data.checks import raise_if_too_many
    from rm_scale.data.preparation import prepare_data
    from rm_scale.launch.steps import load_text_encoder

    _, encoder = load_text_encoder(parsed.config)
    data = prepare_data(parsed.config, encoder)
    raise_if_too_many(data.report, parsed.config.max_rejected_share)
    return 0


if __name__ == "__main__":
    sys.exit(main())
