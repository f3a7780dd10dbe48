"""Read benchmark files as they are published: JSON, JSONL, CSV or Parquet."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rm_scale.data.conversations import as_text, check_answered
from rm_scale.data.preference_group import Message
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.sources import RawRows, local_sources
from rm_scale.errors import DataError
from rm_scale.evaluation.benchmarks.benchmark import Benchmark, BenchmarkItem
from rm_scale.evaluation.benchmarks.rewardbench import SUBSET_WEIGHTS, SUBSETS_2, RewardBench, RewardBench2
from rm_scale.evaluation.benchmarks.rm_bench import DOMAIN_NAMES, STYLES, RMBench, domain_of_file

FORMATS = ("auto", "rewardbench", "rewardbench2", "rm_bench")
_NEEDED = {
    "rewardbench": ("prompt", "chosen", "rejected", "subset"),
    "rewardbench2": ("prompt", "chosen", "rejected", "subset", "num_correct"),
    "rm_bench": ("prompt", "chosen", "rejected", "domain"),
}
_NAMED_LIKE = (
    "chat_filtered.json or safety-refuse_filtered.json (the repository's own files, of which the name says the domain)"
)
Row = Mapping[str, Any]


def read_benchmark(path: str | Path, format: str = "auto") -> Benchmark:
    """Read a benchmark's file, or the several files of one (`data/*_filtered.json`).

    Args:
        path: JSON, JSONL, CSV, Parquet or Arrow; may be a pattern.
        format: one of `FORMATS`; auto tells them apart by their columns.

    Raises:
        DataError: it can't be read, is none of these, or a row does not fit.
    """
    rows = _rows(str(path))
    name = _detect(rows[0], str(path)) if format == "auto" else format
    _require_columns(rows[0], name, str(path))
    build, read = _READERS[name]
    items = []
    for number, row in enumerate(rows):
        try:
            items.append(read(row, number))
        except RejectedRow as error:
            seen = f"{path}, row {number}: can't be scored ({error})"
            raise DataError(f"{seen}. Fix: correct its prompt, or download the file again.") from error
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, row {number}: is no {name} row ({error}). Fix: download it again.") from error
    return build(items)


def _require_columns(row: Row, name: str, path: str) -> None:
    """Refuse rows that lack a column, with what helps: never a way that ends where this one began."""
    absent = [column for column in _NEEDED[name] if column not in row]
    if not absent:
        return
    other = _looks_like(row)
    if other not in {None, name}:
        fix = f"--benchmark_format {other}, which these rows look like"
    elif absent == ["domain"]:
        fix = f"add a column domain ({', '.join(DOMAIN_NAMES)}), or name the file like {_NAMED_LIKE}"
    else:
        fix = f"add the columns, or give a file of {name} as its authors publish it"
    raise DataError(f"{path}: read as {name}, but its rows have no {', '.join(absent)}. Fix: {fix}.")


def _rows(path: str) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="rm_scale_benchmark_") as work:
        for source in local_sources([path]):
            domain = domain_of_file(source.name)
            for number, (_, row) in enumerate(_decoded(source.load(Path(work)))):
                if not isinstance(row, Mapping):
                    raise DataError(f"{source.name}, row {number}: {row}. Fix: each row is an object with columns.")
                lacks_domain = domain is not None and "domain" not in row and _holds_styles(row)
                rows.append({**row, "domain": domain} if lacks_domain else row)
    if not rows:
        raise DataError(f"{path}: has no rows. Fix: download it again.")
    return rows


def _decoded(raw: RawRows) -> list[tuple[int, Any]]:
    count = len(raw.dataset)
    return raw.decode(raw.dataset[:count], range(count))


def _holds_styles(row: Row) -> bool:
    """Tell whether a row has RM-Bench's three answers of each kind, which no other benchmark has."""
    both = (row.get("chosen"), row.get("rejected"))
    return "num_correct" not in row and all(isinstance(texts, list) and len(texts) == STYLES for texts in both)


def _looks_like(row: Row) -> str | None:
    """Return the format that a row looks like, be it complete or not."""
    if "num_correct" in row:
        return "rewardbench2"
    if _holds_styles(row) or ("domain" in row and isinstance(row.get("chosen"), list)):
        return "rm_bench"
    return "rewardbench" if "subset" in row and isinstance(row.get("chosen"), str) else None


def _detect(row: Row, path: str) -> str:
    found = _looks_like(row)
    if found is not None:
        return found
    needs = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in _NEEDED.items())
    raise DataError(
        f"{path}: is no benchmark that is known here (its rows have {', '.join(row)}). They have {needs}. Fix: "
        "--dataset_path for preference files."
    )


def _conversation(prompt: Any) -> list[Message]:
    """Make messages of a prompt: a user's text, as published, or messages in any form that training reads.

    Raises:
        RejectedRow: it is neither, or no conversation to which an assistant answers.
    """
    found = as_text(prompt, "prompt")
    messages: list[Message] = [{"role": "user", "content": found}] if isinstance(found, str) else found
    check_answered([*messages, {"role": "assistant"}])
    return messages


def _texts(row: Row, column: str, count: int | None = None) -> list[str]:
    value = row[column]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{column} holds no texts")
    if count is not None and len(texts) != count:
        raise ValueError(f"{column} holds {len(texts)} texts, not {count}")
    return texts


def _known(name: Any, names: tuple[str, ...] | Mapping[str, Any], column: str) -> str:
    if name not in names:
        raise ValueError(f"{column}={name!r} is not one of {', '.join(names)}")
    return str(name)


def _read_rewardbench(row: Row, number: int) -> BenchmarkItem:
    completions = (*_texts(row, "chosen", 1), *_texts(row, "rejected", 1))
    subset = _known(row["subset"], SUBSET_WEIGHTS, "subset")
    return BenchmarkItem(_conversation(row["prompt"]), completions, 1, subset, str(row.get("id", number)))


def _read_rewardbench2(row: Row, number: int) -> BenchmarkItem:
    subset = _known(row["subset"], SUBSETS_2, "subset")
    chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
    if int(row["num_correct"]) != len(chosen):
        raise ValueError(f"num_correct={row['num_correct']} with {len(chosen)} chosen")
    name = str(row.get("id", number))
    if subset == "Ties":
        kind, colon, _ = name.partition(":")
        if not colon or kind not in {"ref", "tied"}:
            raise ValueError(f"id={name!r} of a Ties row is not ref:N or tied:N")
    return BenchmarkItem(_conversation(row["prompt"]), (*chosen, *rejected), len(chosen), subset, name)


def _read_rm_bench(row: Row, number: int) -> BenchmarkItem:
    domain = _known(row["domain"], DOMAIN_NAMES, "domain")
    completions = (*_texts(row, "chosen", STYLES), *_texts(row, "rejected", STYLES))
    return BenchmarkItem(_conversation(row["prompt"]), completions, STYLES, domain, str(row.get("id", number)))


_READERS: dict[str, tuple[type[Benchmark], Callable[[Row, int], BenchmarkItem]]] = {
    "rewardbench": (RewardBench, _read_rewardbench),
    "rewardbench2": (RewardBench2, _read_rewardbench2),
    "rm_bench": (RMBench, _read_rm_bench),
}
