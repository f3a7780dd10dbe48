"""Read benchmark files as they are published, JSON, JSONL, CSV or Parquet, and files of results with their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import DataError
from rm_scale.evaluation.benchmarks.benchmark import Benchmark, BenchmarkItem
from rm_scale.evaluation.benchmarks.benchmark_rows import BENCHMARKS, Row
from rm_scale.evaluation.benchmarks.best_of_k import PPE_DOMAINS, ppe_domain_of_file
from rm_scale.evaluation.benchmarks.pair_benchmarks import LLMBAR_SETS, llmbar_set_of_file
from rm_scale.evaluation.benchmarks.rewardbench import PRIOR_SETS, SUBSET_WEIGHTS
from rm_scale.evaluation.benchmarks.rm_bench import DOMAIN_NAMES, STYLES, domain_of_file
from rm_scale.evaluation.score_columns.result_rows import ResultRow, read_result_rows
from rm_scale.evaluation.score_columns.score_values import ScoreColumns, UnusableScores, score_columns

FORMATS = ("auto", *BENCHMARKS)
# Of these the repositories' own files say a column by their name.
_NAMED_BY_FILE: dict[str, tuple[str, Callable[[str], str | None], Sequence[str], str]] = {
    "rm_bench": ("domain", domain_of_file, DOMAIN_NAMES, "chat_filtered.json or safety-refuse_filtered.json"),
    "llmbar": ("subset", llmbar_set_of_file, LLMBAR_SETS, "Natural.json or Adversarial_GPTInst.json"),
    "ppe": ("domain", ppe_domain_of_file, PPE_DOMAINS, "PPE-MMLU-Pro-Best-of-K.parquet or mbpp_plus_best_of_k.json"),
}


@dataclass(frozen=True)
class ScoredBenchmark:
    """A benchmark with scores that were made elsewhere.

    Attributes:
        name: of the scores, by their columns.
        benchmark: items without texts, and the rule.
        scores: of each item's completions, or why they can't be used.
        rows: number of each item's row.
    """

    name: str
    benchmark: Benchmark
    scores: Sequence[list[float] | UnusableScores]
    rows: Sequence[int]


def read_benchmark(path: str | Path, format: str = "auto") -> Benchmark:
    """Read a benchmark's file, or the several files of one (`data/*_filtered.json`).

    Args:
        path: JSON, JSONL, CSV, Parquet or Arrow; may be a pattern.
        format: one of `FORMATS`; auto tells them apart by their columns.

    Raises:
        DataError: it can't be read, is none of these, or a row does not fit.
    """
    rows = _rows(str(path))
    name = _detect(rows[0].value, str(path)) if format == "auto" else format
    return BENCHMARKS[name].build([item for _, item in _items(rows, name, path)])


def read_benchmark_rows(path: str, format: str) -> list[tuple[int, BenchmarkItem]]:
    """Read what each row of a benchmark's file asks and answers, without the benchmark's rule.

    Args:
        path, format: as in `read_benchmark`, but one file and its format.

    Returns:
        The number of each row and its item.

    Raises:
        DataError: as `read_benchmark`.
    """
    return _items(_rows(path), format, path)


def benchmark_of_row(row: Row) -> str | None:
    """Return the benchmark format that a row looks like, be it complete or not; `None` when it is like none."""
    return _looks_like(row)


def _items(rows: list[ResultRow], name: str, path: str | Path) -> list[tuple[int, BenchmarkItem]]:
    rows = _with_named_column(rows, name)
    _require_columns(rows[0].value, name, str(path))
    return [(row.number, _read(path, row, name, BENCHMARKS[name].item)) for row in rows]


def read_scored_benchmark(path: str, format: str, words: Sequence[str]) -> list[ScoredBenchmark]:
    """Read a benchmark's rows together with scores that stand beside them; texts are not needed.

    Args:
        path, format: as in `read_benchmark`.
        words: which columns hold scores; see `score_columns`.

    Raises:
        DataError: the file or a column can't be read, or a row is none of the benchmark.
    """
    rows = _rows(path)
    name = _detect(rows[0].value, path, is_scored=True) if format == "auto" else format
    rows = _with_named_column(rows, name)
    _require_columns(rows[0].value, name, path, is_scored=True)
    kind = BENCHMARKS[name]
    found = []
    for columns in score_columns(words, [row.value for row in rows[:200]], path):

        def read(row: Row, number: int, columns: ScoreColumns = columns) -> Any:
            return kind.scored_item(row, number, columns)

        both = [_read(path, row, name, read) for row in rows]
        benchmark = kind.build([item for item, _ in both])
        found.append(ScoredBenchmark(columns.text, benchmark, [scores for _, scores in both], [r.number for r in rows]))
    return found


def _read(path: str | Path, row: ResultRow, name: str, read: Callable[[Row, int], Any]) -> Any:
    try:
        return read(row.value, row.number)
    except RejectedRow as error:
        seen = f"{path}, row {row.number}: can't be scored ({error})"
        raise DataError(f"{seen}. Fix: correct its prompt, or download the file again.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}, row {row.number}: is no {name} row ({error}). Fix: download it again.") from error


# --- Rows and their columns ------------------------------------------------------------------------------------------


def _rows(path: str) -> list[ResultRow]:
    rows = read_result_rows([path], "train")
    for row in rows:
        if not isinstance(row.value, Mapping):
            raise DataError(f"{row.source}, row {row.number}: {row.value}. Fix: each row is an object with columns.")
    if not rows:
        raise DataError(f"{path}: has no rows. Fix: download it again.")
    return rows


def _with_named_column(rows: list[ResultRow], name: str) -> list[ResultRow]:
    """Add the column that the files of a benchmark say by their names; rows that have it keep theirs."""
    if name not in _NAMED_BY_FILE:
        return rows
    column, read, _, _ = _NAMED_BY_FILE[name]
    named = []
    for row in rows:
        value = read(row.source)
        lacks = value is not None and row.value.get(column) in (None, "")
        named.append(row._replace(value={**row.value, column: value}) if lacks else row)
    return named


def _require_columns(row: Row, name: str, path: str, is_scored: bool = False) -> None:
    """Refuse rows that lack a column, with what helps: never a way that ends where this one began."""
    needed = BENCHMARKS[name].scored_columns if is_scored else BENCHMARKS[name].columns
    absent = [column for column in needed if column not in row]
    if not absent:
        return
    other = _looks_like(row, is_scored)
    named = _NAMED_BY_FILE.get(name)
    if other not in {None, name} and not name.startswith(str(other)):
        fix = f"--benchmark_format {other}, which these rows look like"
    elif named is not None and absent == [named[0]]:
        fix = (
            f"add a column {named[0]} ({', '.join(named[2])}), or name the file like {named[3]} (the repository's own "
            "files, of which the name says it)"
        )
    else:
        fix = f"add the columns, or give a file of {name} as its authors publish it"
    raise DataError(f"{path}: read as {name}, but its rows have no {', '.join(absent)}. Fix: {fix}.")


def _holds_styles(row: Row, columns: tuple[str, str] = ("chosen", "rejected")) -> bool:
    """Tell whether a row has RM-Bench's three answers, or scores, of each kind, which no other benchmark has."""
    both = tuple(row.get(column) for column in columns)
    return "num_correct" not in row and all(isinstance(part, list) and len(part) == STYLES for part in both)


def _looks_like(row: Row, is_scored: bool = False) -> str | None:
    """Return the format that a row looks like, be it complete or not."""
    if "num_correct" in row:
        return "rewardbench2"
    if "sampled_conflict_pairs" in row or ("response_1" in row and isinstance(row.get("scores"), list)):
        return "ppe"
    if row.get("label") in ("A>B", "B>A"):
        return "judgebench"
    if "output_1" in row and "output_2" in row:
        return "llmbar"
    scored = is_scored and _holds_styles(row, ("score_chosen", "score_rejected"))
    if _holds_styles(row) or scored or ("domain" in row and isinstance(row.get("chosen"), list)):
        return "rm_bench"
    if is_scored:
        return "rewardbench" if row.get("subset") in (*SUBSET_WEIGHTS, *PRIOR_SETS) else None
    return "rewardbench" if "subset" in row and isinstance(row.get("chosen"), str) else None


def _detect(row: Row, path: str, is_scored: bool = False) -> str:
    found = _looks_like(row, is_scored)
    if found is not None:
        return found
    needs = "; ".join(f"{name}: {', '.join(kind.columns)}" for name, kind in BENCHMARKS.items() if "-" not in name)
    raise DataError(
        f"{path}: is no benchmark that is known here (its rows have {', '.join(row)}). They have {needs}. Fix: "
        "--dataset_path for preference files."
    )
