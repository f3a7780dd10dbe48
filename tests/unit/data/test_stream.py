"""Groups of a stream: in blocks, in an order that a resumed run finds again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.data.formats import RowReader
from rm_scale.data.stream import GroupStream, StreamSource
from rm_scale.errors import DataError
from tests.unit.data.conftest import build_tokenizer

READ: list[int] = []


@pytest.fixture
def text_encoder() -> TextEncoder:
    return TextEncoder(build_tokenizer(), EncodingRules(max_length=64))


def source(name: str, count: int, bad: tuple[int, ...] = ()) -> StreamSource:
    def rows(start: int) -> Iterator[tuple[int, Any]]:
        for number in range(start, count):
            READ.append(number)
            prompt = None if number in bad else f"question {number} of {name}"
            yield number, {"prompt": prompt, "chosen": " yes", "rejected": " no", "id": f"{name}{number}"}

    return StreamSource(name, RowReader("explicit_prompt", source=name), rows)


def stream(encoder: TextEncoder, *sources: StreamSource, seed: int | None = 7, **options: Any) -> GroupStream:
    return GroupStream(sources, encoder, 8, seed, **options)


def ids(groups: list[dict[str, Any]]) -> list[str]:
    return [group["id"] for group in groups]


def test_every_row_once_a_pass_then_again(text_encoder: TextEncoder) -> None:
    got = ids(stream(text_encoder, source("a", 13), source("b", 5)).groups(0, 36))
    assert sorted(got[:18]) == sorted(got[18:]) == sorted([f"a{n}" for n in range(13)] + [f"b{n}" for n in range(5)])
    assert got[:18] != got[18:] and got[:8] != [f"a{n}" for n in range(8)]
    assert set(got[:8]) == {f"a{n}" for n in range(8)}  # shuffled within the block alone


def test_the_order_of_the_rows_without_a_seed(text_encoder: TextEncoder) -> None:
    assert ids(stream(text_encoder, source("a", 13), seed=None).groups(3, 12)) == [f"a{n % 13}" for n in range(3, 15)]


def test_an_order_that_does_not_depend_on_how_it_is_asked_for(text_encoder: TextEncoder) -> None:
    whole = ids(stream(text_encoder, source("a", 30, bad=(3, 17))).groups(0, 60))
    other = stream(text_encoder, source("a", 30, bad=(3, 17)))
    assert [one for first in range(0, 60, 7) for one in ids(other.groups(first, 7))][:60] == whole
    assert ids(stream(text_encoder, source("a", 30, bad=(3, 17))).groups(41, 10)) == whole[41:51]


def test_a_resumed_run_reads_nothing_before_its_block(text_encoder: TextEncoder, tmp_path: Path) -> None:
    record = tmp_path / "stream.jsonl"
    first = stream(text_encoder, source("a", 100, bad=(2, 50)), record_path=record, identity=["a", 1])
    before = ids(first.groups(0, 70))
    first.close()
    again = stream(text_encoder, source("a", 100, bad=(2, 50)), record_path=record, identity=["a", 1])
    READ.clear()
    assert ids(again.groups(60, 10)) == before[60:]
    assert min(READ) == 56, "the block of group 60 begins at row 56"
    again.close()
    with record.open("a") as file:
        file.write('{"number": 99, "sou')  # killed while writing
    third = stream(text_encoder, source("a", 100, bad=(2, 50)), record_path=record, identity=["a", 1])
    assert ids(third.groups(60, 10)) == before[60:]


def test_a_run_killed_between_two_blocks_goes_on_at_the_next(text_encoder: TextEncoder, tmp_path: Path) -> None:
    """The record ends with the very group that the checkpoint ends with; then it is cut short, twice."""
    record = tmp_path / "stream.jsonl"
    first = stream(text_encoder, source("a", 40), record_path=record, identity=1)
    whole = ids(first.groups(0, 40))
    first.close()
    lines = record.read_bytes().splitlines(keepends=True)
    for kept in (3, 2):
        record.write_bytes(b"".join(lines[: kept + 1]) + b'{"number": 9')
        for _ in range(2):
            again = stream(text_encoder, source("a", 40), record_path=record, identity=1)
            assert ids(again.groups(8 * kept, 8)) == whole[8 * kept : 8 * kept + 8]
            again.close()
    written = [json.loads(line) for line in record.read_text().splitlines()[1:]]
    assert [line["number"] for line in written] == list(range(len(written)))


def test_other_rows_than_those_on_record_end_the_run(text_encoder: TextEncoder, tmp_path: Path) -> None:
    record = tmp_path / "stream.jsonl"
    stream(text_encoder, source("a", 40), record_path=record, identity=1).groups(0, 40)
    changed = stream(text_encoder, source("a", 40, bad=(12,)), record_path=record, identity=1)
    with pytest.raises(DataError, match="block 1 of the stream holds 7 usable rows, and held 8"):
        changed.groups(8, 8)


def test_a_whole_block_without_a_usable_row(text_encoder: TextEncoder) -> None:
    found = stream(text_encoder, source("a", 20, bad=tuple(range(8))))
    assert sorted(ids(found.groups(0, 12))) == sorted(f"a{n}" for n in range(8, 20))
    assert "20 rows read, 12 used, 8 left out (missing_key 8)" in found.summary()
    with pytest.raises(DataError, match=r"ends without a usable row\. 9 of the first 9 rows"):
        stream(text_encoder, source("a", 9, bad=tuple(range(9)))).groups(0, 1)


def test_refused_rows_are_counted(text_encoder: TextEncoder) -> None:
    found = stream(text_encoder, source("a", 16, bad=(1, 9)))
    found.groups(0, 14)
    assert found.rejected() == {"missing_key": 2} and sum(block.used for block in found.blocks[:2]) == 14


def test_too_many_refused_rows_end_it(text_encoder: TextEncoder) -> None:
    text = r"1 of the first 8 rows of the stream can't be used \(by reason: missing_key 1\); at most 10.0%"
    with pytest.raises(DataError, match=text):
        stream(text_encoder, source("a", 8, bad=(0,)), max_rejected_share=0.1).groups(0, 1)


def test_no_rows_at_all(text_encoder: TextEncoder) -> None:
    with pytest.raises(DataError, match="no row at all"):
        stream(text_encoder, source("a", 0)).groups(0, 1)


def test_other_files_than_those_of_the_record(text_encoder: TextEncoder, tmp_path: Path) -> None:
    record = tmp_path / "stream.jsonl"
    stream(text_encoder, source("a", 9), record_path=record, identity={"size": 1}).groups(0, 9)
    assert json.loads(record.read_text().splitlines()[1])["used"] == 8
    with pytest.raises(DataError, match="other files or settings"):
        stream(text_encoder, source("a", 9), record_path=record, identity={"size": 2})


def test_tokens_as_an_encoded_data_set_has_them(text_encoder: TextEncoder) -> None:
    (group,) = stream(text_encoder, source("a", 3), seed=None).groups(0, 1)
    wanted = text_encoder.encode("question 0 of a", " yes")
    assert np.array_equal(group["input_ids"][0], wanted) and group["num_tokens"] > 0
