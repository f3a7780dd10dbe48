"""`rm-scale report`: a run, or a set of benchmark records, as one self-contained page."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from rm_scale.errors import ConfigError
from rm_scale.files import write_whole
from rm_scale.logs import get_logger
from rm_scale.output_paths import PAGE_MARK, all_that_is_read, file_problem, is_our_page

logger = get_logger(__name__)

HELP = "a run or benchmark records as one self-contained page"
EXAMPLE = "rm-scale report outputs/demo --output demo.html"
DESCRIPTION = (
    "Write one HTML file that needs no network, from a run's output directory (curves, throughput, memory, restarts, "
    "data, evaluation) or from benchmark records (tables per tier, plots, predicted beside measured; with --baseline, "
    "what has become slower). See docs/results.md and benchmarks/README.md."
)
EXIT_REGRESSION = 1
_MOST_SECONDS = 86_400
REPORT_FILE = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rm-scale report`."""
    parser.add_argument("path", nargs="+", type=Path, metavar="RUN_DIR|RECORDS", help="an output directory, or records")
    page = parser.add_argument_group("page")
    page.add_argument("--output", type=Path, metavar="FILE.html", help="default: report.html in the run, or here")
    page.add_argument("--overwrite", action="store_true", help="replace a file that exists and is no report of ours")
    page.add_argument("--title", help="of the page")
    run = parser.add_argument_group("of a run")
    run.add_argument("--watch", action="store_true", help="write the page again until the run has ended")
    run.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="how often, with --watch")
    records = parser.add_argument_group("of benchmark records")
    records.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the tables as Markdown too")
    records.add_argument(
        "--baseline", type=Path, nargs="+", metavar="RECORDS", help="compare with these; exit code 1 on a regression"
    )


def run(options: argparse.Namespace) -> int:
    """Write the page; return the exit code: 1 when --baseline shows a regression."""
    if options.output is None:
        options.output = (options.path[0] if _is_run(options.path[0]) else Path()) / REPORT_FILE
    _check(options)
    if _is_run(options.path[0]):
        return _report_run(options)
    return _report_records(options)


def _check(options: argparse.Namespace) -> None:
    problems = []
    is_run = _is_run(options.path[0])
    if is_run and len(options.path) > 1:
        problems.append(f"RUN_DIR: {len(options.path)} given. Fix: one run per page.")
    for name in ("markdown", "baseline"):
        if is_run and getattr(options, name):
            problems.append(f"--{name}: is for benchmark records. Fix: leave it out for a run.")
    if options.watch and not is_run:
        problems.append("--watch: is for a run. Fix: leave it out for benchmark records.")
    if not 0 < options.every <= _MOST_SECONDS:
        problems.append(f"--every {options.every:g}: must be above 0, and at most {_MOST_SECONDS}. Fix: 10, say.")
    problems += _output_problems(options)
    if problems:
        raise ConfigError(problems)


def _output_problems(options: argparse.Namespace) -> Iterator[str]:
    read = [*options.path, *(options.baseline or [])]
    for name, path in (("output", options.output), ("markdown", options.markdown)):
        if path is not None:
            # A page in the run itself under the name that we give it is a page, whatever lies there.
            is_page = any(path.resolve() == (place / REPORT_FILE).resolve() for place in all_that_is_read(read))
            inputs = [place for place in read if not (is_page and place.is_dir())]
            problem = file_problem(f"{name}={path}", path, overwrite=options.overwrite, read=inputs, ours=is_our_page)
            yield from [problem] if problem is not None else []
    if options.markdown is not None and options.markdown.resolve() == options.output.resolve():
        yield f"markdown={options.markdown}: is the page's own name. Fix: another name."


def _is_run(path: Path) -> bool:
    return any((path / place / "run_config.yaml").is_file() for place in ("", "run"))


def _report_run(options: argparse.Namespace) -> int:
    from rm_scale.reporting.run.run_page import RunRecords, build_run_page

    refresh = max(1, round(options.every)) if options.watch else None
    while True:
        found = RunRecords(options.path[0])
        page = build_run_page(found, refresh)
        page.title = options.title or page.title
        page.write(options.output)
        if not options.watch or found.has_ended:
            break
        time.sleep(options.every)
    logger.info(f"report: {options.output}")
    return 0


def _report_records(options: argparse.Namespace) -> int:
    from rm_scale.reporting.benchmarks.benchmark_page import build_page, markdown
    from rm_scale.reporting.benchmarks.record_tables import changes
    from rm_scale.reporting.benchmarks.sealed_lines import RecordError
    from rm_scale.reporting.benchmarks.sealed_records import read_records

    found = read_records(options.path)
    baseline = read_records(options.baseline) if options.baseline else None
    for file, reason in [*found.refused, *(baseline.refused if baseline else ())]:
        logger.warning(f"{file} is left out: {reason}")
    if not found.records:
        places = ", ".join(map(str, options.path))
        raise RecordError(
            f"{places}: no record that can be shown, and no run. Fix: python benchmarks/throughput.py writes records, "
            "rm_scale/train.py runs."
        )
    page = build_page(found, baseline, *([options.title] if options.title else []))
    page.write(options.output)
    if options.markdown:
        write_whole(options.markdown, f"<!-- {PAGE_MARK} -->\n\n{markdown(found, baseline)}")
    logger.info(f"report of {len(found.records)} records: {options.output}")
    if baseline is None:
        return 0
    worse = [one for one in changes(baseline.records, found.records)[0] if one.verdict.startswith("regression")]
    for change in worse:
        logger.warning(f"regression: {change.case.model} {change.case.method} {change.case.packing}")
    return EXIT_REGRESSION if worse else 0
