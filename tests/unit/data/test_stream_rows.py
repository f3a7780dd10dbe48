"""Rows of files and data sets read one after the other, from any row on."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from rm_scale.data.hub_sources import HubSplit, hub_source
from rm_scale.data.sources import local_sources
from rm_scale.errors import DataError

ROWS = [{"prompt": f"question {n}", "chosen": f" yes {n}", "rejected": " no"} for n in range(700)]


def write(folder: Path, kind: str) -> str:
    import datasets

    path = folder / f"rows.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    table = datasets.Dataset.from_list(ROWS)
    match kind:
        case "jsonl":
            path.write_text(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(ROWS))
        case "csv":
            table.to_csv(str(path), index=False)
        case "parquet":
            table.to_parquet(str(path), batch_size=100)
        case "arrow":
            table.save_to_disk(str(folder / "saved"))
            path.write_bytes(next((folder / "saved").glob("*.arrow")).read_bytes())
        case "folder":
            table.save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "arrow", "folder"])
@pytest.mark.parametrize("start", [0, 99, 100, 650, 700])
def test_rows_from_any_one_on(kind: str, start: int, tmp_path: Path) -> None:
    (source,) = local_sources([write(tmp_path, kind)])
    assert source.stream is not None
    assert list(source.stream(start)) == list(enumerate(ROWS))[start:]


def test_a_hub_data_set_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*unused: Any, **also_unused: Any) -> None:
        raise AssertionError("downloaded whole")

    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", refuse)
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, "jsonl")
    source = hub_source(HubSplit(str(folder)), streamed=True)
    assert source.stream is not None
    assert [row for row, _ in itertools.islice(source.stream(650), 3)] == [650, 651, 652]
    assert next(source.stream(650))[1] == ROWS[650]


def test_a_file_that_ends_early_says_at_which_row(tmp_path: Path) -> None:
    path = Path(write(tmp_path, "jsonl.gz"))
    path.write_bytes(path.read_bytes()[:-600])
    (source,) = local_sources([str(path)])
    assert source.stream is not None
    with pytest.raises(DataError, match=r"rows.jsonl.gz: ends early or is damaged, at row \d+: .*Fix: check that"):
        list(source.stream(0))
