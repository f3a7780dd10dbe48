"""Turn batches of rows into encoded columns; a row that can't be used is left with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rm_scale.data.encoding import EncodedGroup, TextEncoder
from rm_scale.data.formats import RowReader, require_few_responses
from rm_scale.data.plain_keys import plain_prompt_key
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.text_keys import text_keys

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

_MOST_DETAIL = 500

Array = npt.NDArray[Any]
Rejected = tuple[int, str, str]
"""Index of the row, reason, detail."""

GROUP_ARRAYS = {
    "prompt_length": np.int32,
    "num_tokens": np.int32,
    "sizes": np.int32,
    "prompt_key": np.int64,
    "group_key": np.int64,
    "plain_prompt_key": np.int64,
}
"""What splitting and statistics need of each group: see `GroupArrays`."""

RESPONSE_ARRAYS = {"lengths": np.int32, "ranks": np.int32}
"""And of each response."""


@dataclass(frozen=True)
class EncodedBatch:
    """Encoded rows.

    Attributes:
        used: the usable ones, with the columns of `row_features`.
        arrays: of these, what `GROUP_ARRAYS` and `RESPONSE_ARRAYS` name.
        rejected: the others.
    """

    used: pa.RecordBatch
    arrays: Mapping[str, Array]
    rejected: list[Rejected]


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
        }
    )


def encode_batch(
    rows: Sequence[tuple[int, Any]], reader: RowReader, encoder: TextEncoder, schema: pa.Schema
) -> EncodedBatch:
    """Read and encode some rows of a source.

    Args:
        rows: index and value of each; a row that can't be read is a `RejectedRow`.
        reader: turns one row into a group.
        encoder: turns groups into token ids.
        schema: of `row_features`.
    """
    read = [(index, read_row(reader, row, index)) for index, row in rows]
    encoded = iter(encoder.encode_groups([group for _, group in read if isinstance(group, PreferenceGroup)]))
    used: list[tuple[int, PreferenceGroup, EncodedGroup]] = []
    rejected: list[Rejected] = []
    for index, group in read:
        result = next(encoded) if isinstance(group, PreferenceGroup) else group
        if isinstance(group, RejectedRow) or isinstance(result, RejectedRow):
            assert isinstance(result, RejectedRow)
            rejected.append((index, result.reason, _printable(result.detail)))
        else:
            used.append((index, group, result))
    arrays = _arrays(used)
    return EncodedBatch(_table(used, arrays, schema), arrays, rejected)


def read_row(reader: RowReader, row: Any, index: int) -> PreferenceGroup | RejectedRow:
    """Read one row as `RowReader.read` does, but return the `RejectedRow` instead of raising it."""
    if isinstance(row, RejectedRow):
        return row
    try:
        require_few_responses(row)
        return reader.read(row, index)
    except RejectedRow as rejected:
        return rejected
    except RecursionError:
        return RejectedRow("wrong_type", "the row's values are nested too deeply")


def _printable(detail: str) -> str:
    # The detail may quote text of the row that can't be written as UTF-8.
    return detail.encode("utf-8", errors="backslashreplace").decode()[:_MOST_DETAIL]


def _arrays(used: Sequence[tuple[int, PreferenceGroup, EncodedGroup]]) -> dict[str, Array]:
    keys = [text_keys(group) for _, group, _ in used]
    values: dict[str, list[int]] = {
        "prompt_length": [encoded.prompt_length for _, _, encoded in used],
        "num_tokens": [encoded.num_tokens for _, _, encoded in used],
        "sizes": [len(encoded.input_ids) for _, _, encoded in used],
        "prompt_key": [prompt for prompt, _ in keys],
        "group_key": [group for _, group in keys],
        "plain_prompt_key": [plain_prompt_key(group, key) for (_, group, _), (key, _) in zip(used, keys, strict=True)],
        "lengths": [len(ids) for _, _, encoded in used for ids in encoded.input_ids],
        "ranks": [rank for _, _, encoded in used for rank in encoded.ranks],
    }
    kinds = {**GROUP_ARRAYS, **RESPONSE_ARRAYS}
    return {name: np.array(value, kinds[name]) for name, value in values.items()}


def _table(
    used: Sequence[tuple[int, PreferenceGroup, EncodedGroup]], arrays: Mapping[str, Array], schema: pa.Schema
) -> pa.RecordBatch:
    """Return encoded groups as Arrow columns, made of flat arrays: lists of Python numbers would take far longer."""
    import pyarrow as pa

    tokens = chain.from_iterable(ids for _, _, encoded in used for ids in encoded.input_ids)
    flat = np.fromiter(tokens, np.int32, int(arrays["lengths"].sum()))
    sequences = pa.ListArray.from_arrays(_offsets(arrays["lengths"]), pa.array(flat))
    groups = _offsets(arrays["sizes"])
    columns = {
        "input_ids": pa.ListArray.from_arrays(groups, sequences),
        "prompt_length": pa.array(arrays["prompt_length"]),
        "ranks": pa.ListArray.from_arrays(groups, pa.array(arrays["ranks"])),
        "margin": pa.array([encoded.margin for _, _, encoded in used], pa.float32()),
        "soft_label": pa.array([encoded.soft_label for _, _, encoded in used], pa.float32()),
        "subset": pa.array([encoded.subset for _, _, encoded in used], pa.string()),
        "id": pa.array([encoded.id for _, _, encoded in used], pa.string()),
        "row": pa.array([index for index, _, _ in used], pa.int64()),
        "num_tokens": pa.array(arrays["num_tokens"]),
    }
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def _offsets(sizes: Array) -> Array:
    offsets = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=offsets[1:])
    return offsets
