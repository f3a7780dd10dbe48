"""`rm-scale <command>`: thin commands over the rooms. Heavy imports happen inside a command, never for `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rm_scale import __version__
from rm_scale.distributed import name_accelerator
from rm_scale.launch import bench_hardware, doctor, launch_options, plan_command
from rm_scale.launch.guard import run_guarded
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
    assets.add_argument("name", choices=["tiny", "smollm2-135m"], help="tiny: random weights, made here in a second")
    assets.add_argument("directory", help="where to write the model folder")
    assets.add_argument("--architecture", default="llama", help="of the tiny model: llama, qwen2, qwen3, mistral, ...")
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


def _assets(options: argparse.Namespace, rest: list[str]) -> int:
    name_accelerator()
    from rm_scale.modeling.assets import fetch_smollm2, make_tiny_model

    if options.name == "tiny":
        folder = make_tiny_model(options.directory, architecture=options.architecture)
    else:
        folder = fetch_smollm2(options.directory)
    print(folder)
    return 0


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
