"""`rm-scale data`: read, check and encode preference files as a run would, and report what is in them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from rm_scale.commands import data_against
from rm_scale.errors import ConfigError
from rm_scale.files import write_problem
from rm_scale.logs import get_logger
from rm_scale.texts import printable

logger = get_logger(__name__)

HELP = "read, check and encode preference files as a run would, and report"
DESCRIPTION = (
    "Takes the settings of rm_scale/train.py, such as --dataset_path FILE --model_name_or_path DIR. Fills the cache of "
    "encoded data, and examines the training data: lengths, doubtful labels, biases, languages. See docs/data_page.md."
)
EXAMPLE = "rm-scale data --dataset_path pairs.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B --output outputs/data"
TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rm-scale data`; all others are settings of a run."""
    results = parser.add_argument_group("results")
    results.add_argument("--output", metavar="DIR", help="write data_review.json and data_review.html there")
    results.add_argument("--overwrite", action="store_true", help="replace results that are there")
    results.add_argument("--no_review", action="store_true", help="only read, check and encode")
    data_against.add_arguments(parser)


def run(options: argparse.Namespace, settings: list[str]) -> int:
    """Prepare the data, report on every row and examine them; return 0.

    Raises:
        UserError: a setting is wrong, or more rows were refused than `max_rejected_share` allows.
    """
    from rm_scale.config_parsing import parse_config
    from rm_scale.distributed import name_accelerator

    problems = [*_problems(options), *data_against.problems(options)]
    if problems:
        raise ConfigError(problems, "rm-scale data: the options can't be used")
    parsed = parse_config(settings)
    parsed.raise_problems()
    name_accelerator()

    from rm_scale.data.data_report import raise_if_too_many
    from rm_scale.data.preparation import prepare_data
    from rm_scale.training_run import load_text_encoder

    config = parsed.config
    if config.streaming and (options.against or not options.no_review):
        logger.info("streaming: all rows are read and encoded to be examined; --no_review looks at the first ones")
        config = config.model_copy(update={"streaming": False})
    _, encoder = load_text_encoder(config)
    data = prepare_data(config, encoder)
    overlap = data_against.run(options, config)
    if not options.no_review:
        from rm_scale.data_review.review import review_data
        from rm_scale.reporting.data.data_files import write_review
        from rm_scale.reporting.data.data_summary import text_summary

        document = review_data(config, encoder, data.report)
        data_against.add_to_review(document, overlap)
        print(printable(text_summary(document)))
        if options.output:
            write_review(document, Path(options.output))
    raise_if_too_many(data.report, config.max_rejected_share, data.rejected.files())
    return 0


def _problems(options: argparse.Namespace) -> Iterator[str]:
    if options.output is None:
        return
    from rm_scale.reporting.data.data_files import RESULT_FILES

    folder = Path(options.output)
    there = [name for name in RESULT_FILES if (folder / name).exists()]
    refused = write_problem(folder)
    if options.no_review and not options.against:
        yield f"--output {folder}: there is nothing to write with --no_review. Fix: leave one of them out."
    if folder.is_file():
        yield f"--output {folder}: is a file. Fix: give a folder."
    elif refused is not None:
        yield f"--output {folder}: can't be written ({refused}). Fix: a folder with room, of your own."
    elif there and not options.overwrite:
        yield f"--output {folder}: {', '.join(there)} exists. Fix: another folder, or --overwrite."
