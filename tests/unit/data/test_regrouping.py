"""Rows put together before they are read: nothing is lost, everything is told, and memory does not grow with rows."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from rm_scale.config import RunConfig
from rm_scale.data.column_maps import regrouping
from rm_scale.data.column_maps.column_map import ColumnMap
from rm_scale.data.column_maps.regrouping import Regrouping
from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.data.preparation import prepare_data
from rm_scale.data.reading import Reading
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_readers import choose_reader, open_source
from rm_scale.data.sources import local_sources
from rm_scale.errors import DataError

BY_PROMPT = {
    "group_by": ["q", "meta.set"],
    "prompt": "rows[0].q",
    "responses": "rows[*].a",
    "scores": "rows[*].s",
}
TREE = {
    "tree": {"id": "id", "parent": "parent", "where": {"role": "assistant"}, "ranked_by": "rank"},
    "prompt": "thread[*]",
    "responses": "replies[*].text",
    "ranks": "replies[*].rank",
    "messages": {"content": "text"},
    "as_messages": True,
}


def rated(prompt: Any, answer: str, score: Any, of: str = "x") -> dict[str, Any]:
    return {"q": prompt, "meta": {"set": of}, "a": answer, "s": score}


def regrouped(columns: dict[str, Any], rows: Sequence[Any]) -> tuple[list[tuple[int, Any, str]], str]:
    def read(places: Sequence[int]) -> list[tuple[int, Any]]:
        return [(place + 10, rows[place]) for place in places]

    made = Regrouping(ColumnMap(columns), read, len(rows))
    found = [(number, json.loads(raw) if raw else None, problem) for number, raw, problem in made.rows()]
    return found, made.told


def test_rows_of_one_prompt_wherever_they_stand() -> None:
    rows = [
        rated("b", "1", 3), rated("a", "2", 1), rated("b", "3", 2), "no row", rated(None, "4", 1), rated("a", "5", 2),
        rated("b", "6", 0, of="y"), RejectedRow("bad_json", "broken"),
    ]  # fmt: skip
    found, told = regrouped(BY_PROMPT, rows)
    assert [(number, problem) for number, row, problem in found if row is None] == [
        (0, "wrong_type: the row is text, not an object with columns (row 13 of the file)"),
        (1, "missing_key: q (row 14 of the file)"),
        (2, "bad_json: broken (row 17 of the file)"),
    ]
    assert [number for number, _, _ in found] == list(range(6))
    groups = [(row["first_row"], [part["a"] for part in row["rows"]]) for _, row, _ in found if row is not None]
    assert groups == [(10, ["1", "3"]), (11, ["2", "5"]), (16, ["6"])]
    assert told == "5 rows with the same q and meta.set were put together to 3 groups"


def test_keys_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regrouping, "_hash", lambda key: np.uint64(7))
    found, _ = regrouped(BY_PROMPT, [rated("a", "1", 1), rated("b", "2", 1), rated("a", "3", 2)])
    assert [[part["a"] for part in row["rows"]] for _, row, _ in found] == [["1", "3"], ["2"]]


def test_a_group_that_is_too_large_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regrouping, "MAX_ROW_BYTES", 150)
    found, _ = regrouped(BY_PROMPT, [rated("a", "1", 1), rated("a", "2" * 200, 1), rated("b", "3", 2)])
    assert [problem.partition(":")[0] for _, _, problem in found] == ["too_large", ""]


def message(id: str, parent: str | None, role: str, rank: int | None = None) -> dict[str, Any]:
    return {"id": id, "parent": parent, "role": role, "text": f"text {id}", "rank": rank}


def test_messages_of_a_tree_in_any_order() -> None:
    rows = [
        message("d", "c", "assistant", 1), message("c", "b", "user", 0), message("b", "a", "assistant", 0),
        message("a", None, "user"), message("e", "c", "assistant", 0), message("f", "a", "assistant", 1),
        message("g", "a", "assistant", None), message("h", "gone", "assistant", 0), {"role": "user"},
    ]  # fmt: skip
    found, told = regrouped(TREE, rows)
    assert found[0] == (0, None, "missing_key: id (row 18 of the file)")
    threads = [[part["id"] for part in row["thread"]] for _, row, problem in found if not problem]
    replies = [[part["id"] for part in row["replies"]] for _, row, problem in found if not problem]
    assert (threads, replies) == ([["a", "b", "c"], ["a"]], [["d", "e"], ["b", "f"]])
    assert told == (
        "8 messages became 2 groups of 4 ranked replies, and no other message has two of them, 1 answer a message that "
        "is not in the file"
    )


def test_messages_that_answer_each_other_in_a_circle_end() -> None:
    rows = [message("a", "b", "user"), message("b", "a", "user"), message("c", "a", "assistant", 0),
            message("d", "a", "assistant", 1)]  # fmt: skip
    found, _ = regrouped(TREE, rows)
    assert len(found) == 1 and len(found[0][1]["thread"]) <= 500


def test_memory_does_not_grow_with_the_text_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regrouping, "_ROWS_AT_ONCE", 50)

    def peak(num_rows: int) -> int:
        def read(places: Sequence[int]) -> list[tuple[int, Any]]:
            return [(place, rated(f"prompt {place // 2}", "x" * 2000, place)) for place in places]

        made = Regrouping(ColumnMap(BY_PROMPT), read, num_rows)
        tracemalloc.start()
        assert sum(1 for _ in made.rows()) == num_rows // 2
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    small, large = peak(500), peak(2_500)
    assert (large - small) / 2_000 < 200  # bytes a row; the rows themselves have 2,000


def test_a_run_reads_groups_and_tells_what_they_are_of(
    tmp_path: Path,
    jsonl: Callable[[Path, Iterable[Any]], str],
    make_config: Callable[..., RunConfig],
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [rated(f"prompt {n % 7}", f" answer {n}", n) for n in range(21)]
    rows += [rated("alone", " one", 1), {"a": "no key"}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    config = make_config(path, dataset_columns=BY_PROMPT, dataset_num_proc=1)
    prepared = prepare_data(config, TextEncoder(tokenizer, EncodingRules(max_length=128)))
    (source,) = prepared.report.sources
    assert (source.rows_read, source.rows_used, source.rows_rejected) == (9, 7, 2)
    assert source.format == "ranked"
    assert "dataset_columns says so; 22 rows with the same q and meta.set were put together to 8 groups" in caplog.text
    assert {reason: entry.count for reason, entry in source.rejected.items()} == {"missing_key": 1, "no_preference": 1}
    details = {row["detail"] for row in prepared.rejected}
    assert "q (row 22 of the file)" in details and any("(row 21 of the file)" in detail for detail in details)
    again = prepare_data(config, TextEncoder(tokenizer, EncodingRules(max_length=128)))
    assert again.report.sources == prepared.report.sources


def test_typed_files_are_put_together_too(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([rated(f"prompt {n % 2}", f" answer {n}", n) for n in range(6)]), path)
    (source,) = local_sources([str(path)])
    source = dataclasses.replace(source, reading=Reading(columns=BY_PROMPT))
    raw = open_source(source, tmp_path)
    sample = raw.sample()
    reader, _ = choose_reader(source, raw, sample)
    assert [reader.read(row, 0).ranks for row in sample] == [(2, 1, 0), (2, 1, 0)]
    # A second process, or a second start, finds the rows in the same folder.
    assert open_source(source, tmp_path).sample() == sample
    assert open_source(source, tmp_path).told == raw.told != ""


def test_columns_that_rows_are_put_together_by_must_be_there(
    tmp_path: Path, jsonl: Callable[[Path, Iterable[Any]], str]
) -> None:
    (source,) = local_sources([jsonl(tmp_path / "a.jsonl", [{"question": "a", "a": "1", "s": 1}])])
    source = dataclasses.replace(source, reading=Reading(columns=BY_PROMPT))
    with pytest.raises(DataError, match=r"dataset_columns: .*a\.jsonl has no meta\.set and no q in any of its first 1"):
        open_source(source, tmp_path)
