"""The part of `rm-scale data` that holds the training data against benchmarks: --against, --drop and --kept."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm_scale.errors import UserError
from rm_scale.files import write_problem, write_whole
from rm_scale.logs import get_logger
from rm_scale.texts import printable

if TYPE_CHECKING:
    from rm_scale.config import RunConfig
    from rm_scale.contamination.figures import Contamination

logger = get_logger(__name__)

RESULT_FILE = "contamination.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("contamination")
    group.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="FILE",
        help="find training rows that are in these benchmarks, evaluation files or files of questions, or nearly so",
    )
    group.add_argument(
        "--drop", metavar="FILE", help="write the training rows that are in them there, as JSONL, with what they match"
    )
    group.add_argument(
        "--kept", metavar="DIR", help="write the training data without those rows there, a JSONL file per source"
    )


def problems(options: argparse.Namespace) -> Iterator[str]:
    """Yield what is wrong with the options, before anything is read."""
    for name in ("drop", "kept"):
        if getattr(options, name) and not options.against:
            yield f"--{name} {getattr(options, name)}: says nothing without --against. Fix: --against FILE."
    yield from _missing_files(options)
    if options.drop:
        path = Path(options.drop)
        refused = write_problem(path.parent)
        if not path.name.endswith(".jsonl"):
            yield f"--drop {path}: is written as JSON Lines. Fix: a name that ends in .jsonl."
        elif path.exists() and not options.overwrite:
            yield f"--drop {path}: exists. Fix: another name, or --overwrite."
        elif refused is not None:
            yield f"--drop {path}: can't be written ({refused}). Fix: a folder with room, of your own."
    if options.kept:
        folder = Path(options.kept)
        refused = None if folder.is_file() else write_problem(folder)
        if folder.is_file():
            yield f"--kept {folder}: is a file. Fix: give a folder."
        elif folder.is_dir() and any(folder.iterdir()):
            # Whoever trains on DIR/*.jsonl would train on what lay there before.
            yield f"--kept {folder}: is not empty. Fix: give a new folder."
        elif refused is not None:
            yield f"--kept {folder}: can't be written ({refused}). Fix: a folder with room, of your own."
    if options.against and options.output:
        path = Path(options.output) / RESULT_FILE
        if path.exists() and not options.overwrite:
            yield f"--output {options.output}: {RESULT_FILE} exists. Fix: another folder, or --overwrite."


def _missing_files(options: argparse.Namespace) -> Iterator[str]:
    from rm_scale.data.sources import local_sources

    for path in options.against:
        try:
            local_sources([path])
        except UserError as error:
            yield str(error).replace("dataset_path=", "--against ", 1)


def run(options: argparse.Namespace, config: RunConfig) -> Contamination | None:
    """Compare, print what was found, and write the files that were asked for; `None` without --against.

    Raises:
        DataError: a file can't be read.
    """
    if not options.against:
        return None
    from rm_scale.contamination.clean_files import CleanFiles
    from rm_scale.contamination.compare import compare_with_files
    from rm_scale.data.preparation import find_sources
    from rm_scale.reporting.data.contamination_summary import contamination_text

    sources, _ = find_sources(config)
    drop, kept = (Path(name) if name else None for name in (options.drop, options.kept))
    with CleanFiles.open(drop, kept) as files:
        found = compare_with_files(sources, options.against, files.add if drop or kept else None)
    print(printable(contamination_text(found)))
    if drop is not None:
        logger.info(f"dropped: {files.dropped:,} rows in {drop}")
    for path, count in files.kept.items():
        logger.info(f"kept: {count:,} rows in {path}")
    if kept is not None and not files.kept:
        logger.warning(f"kept: no row is left, and nothing was written to {kept}")
    if options.output:
        path = Path(options.output) / RESULT_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(found.to_dict(), indent=2) + "\n")
        logger.info(f"results: {path}")
    return found


def add_to_review(document: dict[str, Any], found: Contamination | None) -> None:
    """Put the findings before the others of the page, the files with the most rows first."""
    if found is None:
        return
    from rm_scale.reporting.data.contamination_summary import contamination_findings

    findings = sorted(contamination_findings(found), key=lambda finding: -finding.count)
    document["findings"] = [*(finding.to_dict() for finding in findings), *document["findings"]]
    document["contamination"] = found.to_dict()
