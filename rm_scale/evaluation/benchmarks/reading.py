"""Benchmark files to items: JSON, JSONL, CSV or Parquet, as the benchmarks publish them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rm_scale.data.groups import Text
from rm_scale.data.sources import RawRows, local_sources
from rm_scale.errors import DataError
from rm_scale.evaluation.benchmarks.items import Benchmark, BenchmarkItem
from rm_scale.evaluation.benchmarks.rewardbench import SUBSET_WEIGHTS, SUBSETS_2, RewardBench, RewardBench2
from rm_scale.evaluation.benchmarks.rm_bench import DOMAINS, SAFETY_PARTS, STYLES, RMBench

FORMATS = ("auto", "rewardbench", "rewardbench2", "rm_bench")
_NEEDED = {
    "rewardbench": ("prompt", "chosen", "rejected", "subset"),
    "rewardbench2": ("prompt", "chosen", "rejected", "subset", "num_correct"),
    "rm_bench": ("prompt", "chosen", "rejected", "domain"),
}
Row = Mapping[str, Any]


def read_benchmark(path: str | Path, format: str = "auto") -> Benchmark:
    """Read a benchmark's file.

    Args:
        path: JSON, JSONL, CSV, Parquet or Arrow.
        format: one of `FORMATS`; auto tells them apart by their columns.

    Raises:
        DataError: it can't be read, is none of these, or a row does not fit.
    """
    rows = _rows(str(path))
    name = _detect(rows[0], str(path)) if format == "auto" else format
    absent = [column for column in _NEEDED[name] if column not in rows[0]]
    if absent:
        raise DataError(
            f"{path}: read as {name}, but its rows have no {', '.join(absent)}. Fix: --benchmark_format auto, or "
            "another file."
        )
    build, read = _READERS[name]
    items = []
    for number, row in enumerate(rows):
        try:
            items.append(read(row, number))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, row {number}: is no {name} row ({error}). Fix: download it again.") from error
    return build(items)


def _rows(path: str) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="rm_scale_benchmark_") as work:
        rows = [row for source in local_sources([path]) for _, row in _decoded(source.load(Path(work)))]
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{path}, row {number}: {row}. Fix: each row is an object with columns.")
    if not rows:
        raise DataError(f"{path}: has no rows. Fix: download it again.")
    return rows


def _decoded(raw: RawRows) -> list[tuple[int, Any]]:
    count = len(raw.dataset)
    return raw.decode(raw.dataset[:count], range(count))


def _detect(row: Row, path: str) -> str:
    if "num_correct" in row:
        return "rewardbench2"
    if "domain" in row and isinstance(row.get("chosen"), list):
        return "rm_bench"
    if "subset" in row and isinstance(row.get("chosen"), str):
        return "rewardbench"
    needs = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in _NEEDED.items())
    raise DataError(
        f"{path}: is no benchmark that is known here (its rows have {', '.join(row)}). They have {needs}. Fix: "
        "--dataset_path for preference files."
    )


def _conversation(prompt: Any) -> Text:
    """RewardBench's prompts are a user's text; conversations are lists of messages."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and all(isinstance(message, Mapping) and "role" in message for message in prompt):
        return [dict(message) for message in prompt]
    raise ValueError("prompt is neither text nor a conversation")


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
    domain = _known(row["domain"], (*DOMAINS[:-1], *SAFETY_PARTS), "domain")
    completions = (*_texts(row, "chosen", STYLES), *_texts(row, "rejected", STYLES))
    return BenchmarkItem(_conversation(row["prompt"]), completions, STYLES, domain, str(row.get("id", number)))


_READERS: dict[str, tuple[type[Benchmark], Callable[[Row, int], BenchmarkItem]]] = {
    "rewardbench": (RewardBench, _read_rewardbench),
    "rewardbench2": (RewardBench2, _read_rewardbench2),
    "rm_bench": (RMBench, _read_rm_bench),
}
