"""Every kind of file gives the same rows; dirty rows are kept and named; what can't be read says why."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_scale import files
from rm_scale.data import sources, text_files
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.sources import Source, local_sources
from rm_scale.errors import DataError

Jsonl = Callable[[Path, Iterable[Any]], str]


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Question {number}? ", "chosen": f"good {number}", "rejected": f"bad {number}", **more}


ROWS = [pair(number, margin=number / 2) for number in range(5)]


def read(source: Source, tmp_path: Path) -> list[tuple[int, Any]]:
    """All rows with their indexes."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    raw = source.load(work)
    return raw.decode(raw.dataset[:], range(len(raw.dataset)))


def new_folder(path: Path) -> Path:
    """Another file's work folder: what was read into one before is taken from it again."""
    path.mkdir()
    return path


def read_path(path: Path | str, tmp_path: Path, split: str = "train") -> list[tuple[int, Any]]:
    return [row for source in local_sources([str(path)], split) for row in read(source, tmp_path)]


def write(kind: str, folder: Path) -> Path:
    path = folder / f"rows.{kind}"
    listing = json.dumps(ROWS, indent=1).encode()
    table = datasets.Dataset.from_list(ROWS)
    if kind.startswith("jsonl"):
        lines = "\n".join(map(json.dumps, ROWS)).encode()
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    elif kind == "json":
        path.write_bytes(listing)
    elif kind == "json.gz":
        path.write_bytes(gzip.compress(listing))
    elif kind == "csv":
        table.to_csv(path)
    elif kind == "csv.gz":
        table.to_csv(folder / "plain")
        path.write_bytes(gzip.compress((folder / "plain").read_bytes()))
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.data.table.schema) as writer:
            writer.write_table(table.data.table)
    elif kind == "file.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.data.table.schema) as writer:
            writer.write_table(table.data.table)
    elif kind == "saved":
        table.save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "kind",
    ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet", "arrow", "file.arrow", "saved"],
)
def test_every_kind_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    assert read_path(write(kind, tmp_path), tmp_path) == list(enumerate(ROWS))


def test_json_with_one_row_per_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in ROWS))
    assert read_path(path, tmp_path) == list(enumerate(ROWS))


def test_dirty_lines_are_kept_with_their_line_numbers(tmp_path: Path, jsonl: Jsonl) -> None:
    deep = b"[" * 100_000
    lines = [
        b'{"prompt": "a\xe2\x80\xa8b"}',
        b"",
        b"{not json",
        b'{"prompt": "\xff"}',
        b"[1]",
        b"null",
        deep,
        b'{"a": "\\ud800"}',
    ]
    rows = dict(read_path(jsonl(tmp_path / "rows.jsonl", lines), tmp_path))
    assert sorted(rows) == [0, 2, 3, 4, 5, 6, 7]
    assert rows[0] == {"prompt": "a\u2028b"}
    assert (rows[4], rows[5]) == ([1], None)
    reasons = {index: row.reason for index, row in rows.items() if isinstance(row, RejectedRow)}
    assert reasons == {2: "bad_json", 3: "bad_unicode", 6: "bad_json", 7: "bad_unicode"}
    assert "byte 12 of the row is not UTF-8" in rows[3].detail


def test_json_lists_larger_than_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_READ_CHARACTERS", 7)
    path = tmp_path / "rows.json"
    values = [{"text": "x" * 50, "list": [1, 2]}, 12345678901234, "ü]}", {}, 1]
    for number, indent in enumerate((None, 2)):
        path.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert [row for _, row in read_path(path, new_folder(tmp_path / f"{number}"))] == values
    path.write_bytes(b'[{"a": "\xff"}, {"a": "b"}]')
    (_, bad), (_, good) = read_path(path, new_folder(tmp_path / "bad"))
    assert (bad.reason, good) == ("bad_unicode", {"a": "b"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}, {"a": }]', "is not valid JSON near character 11: .*Fix: correct the file there, or store one row"),
        ('[{"a": 1} {"a": 2}]', "near character 10: expected ',' or ']', found '{'"),
        ('[{"a": 1}', "expected ',' or ']', found the end of the file. Fix: .*complete"),
        ('{\n "a": [1]\n}', "one JSON object spread over several lines.*Fix: store a list"),
        ("[]", "has no rows. Fix: give a file with at least one preference"),
        ("", "has no rows"),
        ("\n\n", "has no rows"),
    ],
)
def test_broken_json_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_path(path, tmp_path)


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    header = "prompt,chosen,rejected,margin,scores\r\n"
    path.write_bytes((header + 'NA,None,007,0.5,"[1, 2]"\r\n"a\r\nb","say ""x""",,,oops\r\n').encode())
    assert [row for _, row in read_path(path, tmp_path)] == [
        {"prompt": "NA", "chosen": "None", "rejected": "007", "margin": 0.5, "scores": [1, 2]},
        {"prompt": "a\r\nb", "chosen": 'say "x"', "rejected": "", "margin": None, "scores": "oops"},
    ]


def test_bad_csv_records_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,chosen,rejected\na,b\n\na,b,c,d\na,"b"x,c\na,\xff,c\na,b,c\n"open,b,c\n')
    rows = dict(read_path(path, tmp_path))
    reasons = {index: row.reason for index, row in rows.items() if isinstance(row, RejectedRow)}
    assert reasons == {0: "bad_csv", 1: "bad_csv", 2: "bad_csv", 3: "bad_unicode", 5: "bad_csv"}
    assert rows[0].detail == "2 cells, the header has 3" and "line" in rows[2].detail
    assert rows[4] == {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_csv_header_with_a_repeated_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,chosen\na,b,c\n")
    with pytest.raises(DataError, match=r"the header names chosen twice. Fix: rename"):
        read_path(path, tmp_path)


# --- Paths ---------------------------------------------------------------------------------------------------------


def test_several_files_and_patterns(tmp_path: Path, jsonl: Jsonl) -> None:
    paths = [jsonl(tmp_path / f"part-{number}.jsonl", [pair(number)]) for number in (1, 0)]
    assert [source.name for source in local_sources(paths)] == paths
    assert [source.name for source in local_sources([str(tmp_path / "part-*.jsonl")])] == sorted(paths)
    with pytest.raises(DataError, match=r"no-\*.jsonl: the pattern matches no file. Fix: check it with ls"):
        local_sources([str(tmp_path / "no-*.jsonl")])


def test_missing_file_names_the_nearest(tmp_path: Path, jsonl: Jsonl) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"there is no such file. Did you mean .*train.jsonl. Fix: correct the path"):
        local_sources([str(tmp_path / "trian.jsonl")])
    with pytest.raises(DataError, match=r"The folder .*/nowhere does not exist either"):
        local_sources([str(tmp_path / "nowhere" / "x.jsonl")])


def test_only_data_is_offered_for_a_missing_file(tmp_path: Path, jsonl: Jsonl) -> None:
    for name in ("env.sh", "nosuch.txt"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"there is no such file\. Fix: correct the path"):
        local_sources([str(tmp_path / "nosuch")])


def test_patterns_that_lead_everywhere(tmp_path: Path, jsonl: Jsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8):
        (tmp_path / f"{number}" / "deep").mkdir(parents=True)
        jsonl(tmp_path / f"{number}" / "deep" / "a.jsonl", ROWS)
    (tmp_path / "round").symlink_to(tmp_path)
    for pattern in ("[0-7]/deep/*.jsonl", "[0-7]/*/a.jsonl", "?/**/a.jsonl"):
        assert len(local_sources([str(tmp_path / pattern)])) == 8
    (tmp_path / "round").unlink()
    assert len(local_sources([str(tmp_path / "**" / "*.jsonl")])) == 8
    monkeypatch.chdir(tmp_path)
    assert len(local_sources(["**/*.jsonl"])) == 8
    monkeypatch.setattr(files, "_MOST_FOLDERS", 10)
    for pattern in ("**/*.jsonl", "**/**/*.jsonl", "[0-7]/*/*.jsonl"):
        with pytest.raises(DataError, match=r"the pattern leads through more than 10 folders\. Fix: begin it with"):
            local_sources([str(tmp_path / pattern)])
    with pytest.raises(DataError, match="leads through more than"):
        local_sources(["/**/*.jsonl"])
    monkeypatch.setattr(files, "_MOST_FOLDERS", 100)
    monkeypatch.setattr(files, "_MOST_FILES", 5)
    with pytest.raises(DataError, match=r"matches more than 5 files\. Fix: "):
        local_sources([str(tmp_path / "**" / "*.jsonl")])


def test_unreadable_file(tmp_path: Path, jsonl: Jsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(DataError, match=r"rows.jsonl: may not be read by this user. Fix: chmod"):
        local_sources([path])


def test_unsupported_suffix(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(
        DataError, match=r"rows.xlsx: files of this kind can't be read; supported are .json, .*Fix: convert"
    ):
        local_sources([str(tmp_path / "rows.xlsx")])


def test_folders(tmp_path: Path, jsonl: Jsonl) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "a.jsonl", ROWS)
    with pytest.raises(
        DataError, match=r"not one written by datasets' save_to_disk. It holds .*a.jsonl. Fix: .*\*.jsonl"
    ):
        local_sources([str(folder)])
    saved = tmp_path / "saved"
    dataset = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": dataset, "validation": dataset.select([0])}).save_to_disk(str(saved))
    assert len(read_path(saved, tmp_path)) == 5 and len(read_path(saved, tmp_path, "validation")) == 1
    with pytest.raises(DataError, match=r"holds no split 'test', but train, validation. Fix: --dataset_train_split"):
        read_path(saved, tmp_path, "test")
    (saved / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"saved: can't be read: .*Fix: check that the file is complete"):
        read_path(saved, tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl.gz"])
def test_files_that_are_not_what_they_say(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(b"this is something else entirely, and long enough to have a footer")
    with pytest.raises(DataError, match=f"rows.{kind}: can't be read: .*Fix: check that the file is complete"):
        read_path(path, tmp_path)


def test_truncated_gzip(tmp_path: Path, jsonl: Jsonl) -> None:
    path = Path(jsonl(tmp_path / "rows.jsonl.gz", [pair(number) for number in range(1000)]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"can't be read: Compressed file ended"):
        read_path(path, tmp_path)


def test_empty_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"chosen": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet: has no rows"):
        read_path(tmp_path / "rows.parquet", tmp_path)


def test_wide_and_swollen_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = tmp_path / "wide.parquet"
    pq.write_table(pa.table({f"c{number}": ["x"] for number in range(30)}), wide)
    monkeypatch.setattr(sources, "MAX_COLUMNS", 20)
    with pytest.raises(DataError, match=r"wide.parquet: has 30 columns, more than 20\. Fix: keep the columns"):
        read_path(wide, tmp_path)
    arrow = tmp_path / "wide.arrow"
    with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_stream(sink, pq.read_table(wide).schema) as writer:
        writer.write_table(pq.read_table(wide))
    with pytest.raises(DataError, match=r"wide.arrow: has 30 columns, more than 20"):
        read_path(arrow, tmp_path)
    monkeypatch.setattr(text_files, "_MAX_UNPACKED_BYTES", 100_000)
    swollen, repeated = tmp_path / "swollen.parquet", tmp_path / "repeated.parquet"
    pq.write_table(pa.table({"a": ["x" * 4_000_000]}), swollen, compression="zstd", use_dictionary=False)
    pq.write_table(pa.table({"a": ["x"] * 4_000_000}), repeated, compression="zstd")
    for path in (swollen, repeated):
        with pytest.raises(DataError, match=r"unpacks to [\d,]+ bytes or more, from a file of [\d,]+\. Fix: look"):
            read_path(path, tmp_path)


def test_rows_with_too_many_columns_are_rejected(tmp_path: Path, jsonl: Jsonl) -> None:
    path = jsonl(tmp_path / "a.jsonl", [pair(0), {f"c{number}": 1 for number in range(10_001)}])
    good, bad = (row for _, row in read_path(path, tmp_path))
    assert good == pair(0)
    assert isinstance(bad, RejectedRow) and bad.reason == "too_large"
    assert "10,001 columns, more than 10,000" in str(bad)


def test_sample_needs_a_readable_row(tmp_path: Path, jsonl: Jsonl) -> None:
    (source,) = local_sources([jsonl(tmp_path / "rows.jsonl", [b"<html>", b"</html>"])])
    with pytest.raises(
        DataError, match=r"none of the first 2 rows is a readable object; the first is bad_json.*Fix: check"
    ):
        source.load(new_folder(tmp_path / "text")).sample()
    (source,) = local_sources([jsonl(tmp_path / "rows.jsonl", [[1]])])
    with pytest.raises(DataError, match=r"the first is a value that is no object: \[1\]"):
        source.load(new_folder(tmp_path / "list")).sample()


def test_identity_follows_the_file(tmp_path: Path, jsonl: Jsonl) -> None:
    path = Path(jsonl(tmp_path / "rows.jsonl", ROWS))
    before = local_sources([str(path)])[0].identity
    assert local_sources([str(path)])[0].identity == before
    jsonl(path, ROWS[:-1])
    assert local_sources([str(path)])[0].identity != before
    json.dumps(before)
