"""`rm-scale data`: read, check and encode preference files as a run would, and report."""

from __future__ import annotations

import argparse

HELP = "read, check and encode preference files as a run would, and report"
DESCRIPTION = "Takes the settings of rm_scale/train.py, such as --dataset_path FILE --model_name_or_path DIR."
EXAMPLE = "rm-scale data --dataset_path pairs.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B"
TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: all options are settings of a run."""


def run(options: argparse.Namespace, settings: list[str]) -> int:
    """Prepare the data and report on every row; return 0.

    Raises:
        UserError: a setting is wrong, or more rows were refused than `max_rejected_share` allows.
    """
    from rm_scale.config_parsing import parse_config
    from rm_scale.distributed import name_accelerator

    parsed = parse_config(settings)
    parsed.raise_problems()
    name_accelerator()

    from rm_scale.data.data_report import raise_if_too_many
    from rm_scale.data.preparation import prepare_data
    from rm_scale.training_run import load_text_encoder

    _, encoder = load_text_encoder(parsed.config)
    data = prepare_data(parsed.config, encoder)
    raise_if_too_many(data.report, parsed.config.max_rejected_share, data.rejected.files())
    return 0
