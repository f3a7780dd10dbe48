"""Turn a source's raw rows into encoded columns, in parallel; rejected rows stay, with the reason."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm_scale.config import RunConfig
from rm_scale.data.encoding import EncodedGroup, TextEncoder
from rm_scale.data.formats import RESPONSE_LIST_COLUMNS, RowReader
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.sources import RawRows
from rm_scale.data.text_keys import text_keys

if TYPE_CHECKING:
    from datasets import Dataset, Features


_BATCH_ROWS = 256
MAX_RESPONSES = 1_000


def row_features() -> Features:
    """Return the columns of encoded rows, with their types."""
    from datasets import Features, List, Value

    return Features(
        {
            "input_ids": List(List(Value("int32"))),
            "prompt_length": Value("int32"),
            "ranks": List(Value("int32")),
            "margin": Value("float32"),
            "soft_label": Value("float32"),
            "subset": Value("string"),
            "id": Value("string"),
            "row": Value("int64"),
            "num_tokens": Value("int32"),
            "lengths": List(Value("int32")),
            "prompt_key": Value("int64"),
            "group_key": Value("int64"),
            "reason": Value("string"),
            "detail": Value("string"),
        }
    )


def encode_rows(raw: RawRows, reader: RowReader, encoder: TextEncoder, config: RunConfig, work: Path) -> Dataset:
    """Read and encode all rows of a source.

    Args:
        raw: its rows.
        reader: turns one row into a group.
        encoder: turns groups into token ids.
        config: `dataset_num_proc`, the number of processes.
        work: folder for the result, a memory-mapped file.

    Returns:
        One row per raw row, in order, with the columns of `row_features`. `reason` is "" for a usable row.
    """
    num_proc = min(config.dataset_num_proc or 1, len(raw.dataset))
    return raw.dataset.map(
        _row_encoder(raw, reader, encoder),
        with_indices=True,
        batched=True,
        batch_size=_BATCH_ROWS,
        remove_columns=raw.dataset.column_names,
        features=row_features(),
        num_proc=num_proc if num_proc > 1 else None,
        cache_file_name=str(work / "mapped.arrow"),
        load_from_cache_file=False,
        # Without it `datasets` would hash the tokenizer, which is slow; our own cache key covers it.
        new_fingerprint=hashlib.sha256(str(work).encode()).hexdigest()[:16],
        desc=f"Encoding {reader.source}",
    )


def _row_encoder(
    raw: RawRows, reader: RowReader, encoder: TextEncoder
) -> Callable[[Mapping[str, Sequence[Any]], Sequence[int]], dict[str, list[Any]]]:
    """Return the function that encodes one batch of rows; it is pickled and sent to the worker processes."""
    names = list(row_features())
    decode = RawRows(None, raw.is_json).decode  # without the data set, or it would be pickled as well

    def encode_batch(batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        rows = decode(batch, indices)
        read = [read_row(reader, row, index) for index, row in rows]
        groups = [group for group in read if isinstance(group, PreferenceGroup)]
        encoded = iter(encoder.encode_groups(groups))
        records = []
        for (index, _), group in zip(rows, read, strict=True):
            if isinstance(group, RejectedRow):
                records.append(_rejected_record(index, group))
                continue
            result = next(encoded)
            if isinstance(result, RejectedRow):
                records.append(_rejected_record(index, result))
            else:
                records.append(_used_record(index, group, result))
        return {name: [record[name] for record in records] for name in names}

    return encode_batch


def read_row(reader: RowReader, row: Any, index: int) -> PreferenceGroup | RejectedRow:
    """Read one row as `RowReader.read` does, but return the `RejectedRow` instead of raising it."""
    if isinstance(row, RejectedRow):
        return row
    try:
        _require_few_responses(row)
        return reader.read(row, index)
    except RejectedRow as rejected:
        return rejected
    except RecursionError:
        return RejectedRow("wrong_type", "the row's values are nested too deeply")


def _require_few_responses(row: Any) -> None:
    """Reject a row whose pairs, which grow with the square of its responses, would keep a machine busy."""
    for column in RESPONSE_LIST_COLUMNS if isinstance(row, Mapping) else ():
        responses = row.get(column)
        if isinstance(responses, list) and len(responses) > MAX_RESPONSES:
            raise RejectedRow(
                "too_many_responses", f"{column} has {len(responses):,}, at most {MAX_RESPONSES:,} are read"
            )


def _used_record(index: int, group: PreferenceGroup, encoded: EncodedGroup) -> dict[str, Any]:
    prompt_key, group_key = text_keys(group)
    return {
        "input_ids": list(encoded.input_ids),
        "prompt_length": encoded.prompt_length,
        "ranks": list(encoded.ranks),
        "margin": encoded.margin,
        "soft_label": encoded.soft_label,
        "subset": encoded.subset,
        "id": encoded.id,
        "row": index,
        "num_tokens": encoded.num_tokens,
        "lengths": [len(ids) for ids in encoded.input_ids],
        "prompt_key": prompt_key,
        "group_key": group_key,
        "reason": "",
        "detail": "",
    }


def _rejected_record(index: int, rejected: RejectedRow) -> dict[str, Any]:
    # The detail may quote text of the row that can't be written as UTF-8.
    detail = rejected.detail.encode("utf-8", errors="backslashreplace").decode()[:500]
    empty: dict[str, Any] = {
        "input_ids": [],
        "ranks": [],
        "lengths": [],
        "margin": None,
        "soft_label": None,
        "subset": "",
        "id": "",
    }
    numbers = dict.fromkeys(("prompt_length", "num_tokens", "prompt_key", "group_key"), 0)
    return {**empty, **numbers, "row": index, "reason": rejected.reason, "detail": detail}
