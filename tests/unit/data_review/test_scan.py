"""Reading all rows: the same in one process and in several, plain, packed and with rows that can't be read."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from rm_scale.data import row_chunks
from rm_scale.data.preference_group import Message, PreferenceGroup
from rm_scale.data.sources import local_sources
from rm_scale.data_review import scan as scanning
from rm_scale.data_review.pair_hashes import PairHashes
from rm_scale.data_review.read_groups import SourceGroups, plain_text, read_groups
from rm_scale.data_review.scan import scan
from rm_scale.errors import DataError

ROWS = [{"prompt": f"ask {n}", "chosen": f"good {n % 7}", "rejected": f"bad {n % 3}"} for n in range(700)]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[SourceGroups]:
    """A file of lines with blank and broken ones, and a packed one, each in several chunks."""
    monkeypatch.setattr(row_chunks, "_CHUNK_BYTES", (4_000, 4_000))
    monkeypatch.setattr(row_chunks, "_SCAN_BYTES", 1_000)
    monkeypatch.setattr(row_chunks, "_CHUNK_ROWS", (100, 100))
    monkeypatch.setattr(scanning, "FEW_ROWS", 0)
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:10], "", "{broken", *lines[10:]]) + "\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(["", *lines[:350]]).encode()))
    sources = local_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")])
    works = [tmp_path / "work-a", tmp_path / "work-b"]
    for work in works:
        work.mkdir()
    return [read_groups(source, work) for source, work in zip(sources, works, strict=True)]


def read(opened: list[SourceGroups], num_processes: int) -> tuple[PairHashes, list[tuple[int, int]], list[int]]:
    chosen = [np.arange(len(source)) % 50 == 3 for source in opened]
    hashes = PairHashes()
    sampled: list[tuple[int, int]] = []
    rows: list[int] = []
    for number, found in scan(opened, chosen, num_processes):
        hashes.extend(found.hashes, len(rows))
        sampled += [(number, row) for row, _ in found.sampled]
        rows += found.rows.tolist()
    return hashes, sampled, rows


def test_any_number_of_processes_finds_the_same(opened: list[SourceGroups]) -> None:
    assert [len(source.chunks) > 2 for source in opened] == [True, True]
    one, two = read(opened, 1), read(opened, 2)
    assert one == two and len(one[0]) == 1050
    assert one[0].group.tolist() == list(range(1050)), "groups are counted over all chunks and sources"
    assert one[2][:11] == [*range(10), 12], "blank and broken lines keep their numbers"
    assert one[1][:2] == [(0, 3), (0, 54)] and (1, 4) in one[1]


def test_a_row_is_found_again(opened: list[SourceGroups]) -> None:
    found = [source.at(row) for source, row in zip(opened, (502, 100), strict=True)]
    assert isinstance(opened[1].at(350), PreferenceGroup), "the last row, behind a blank line"
    assert [one.prompt for one in found if isinstance(one, PreferenceGroup)] == ["ask 500", "ask 99"]
    assert opened[0].at(10) is None and opened[0].at(10_000) is None
    assert str(opened[0].at(11)).startswith("bad_json")


def test_a_killed_process_is_told(opened: list[SourceGroups], monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()

    def killed(self: PairHashes, number: int, group: PreferenceGroup) -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(PairHashes, "add", killed)
    with pytest.raises(DataError, match=r"process that examined the data was killed.*--dataset_num_proc"):
        read(opened, 2)


def test_plain_text_of_conversations() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert plain_text([{"role": "assistant", "content": "Yes."}]) == "Yes."
    turns: list[Message] = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, call]
    assert plain_text(turns).startswith("user: Hi\n\nassistant: \n[{") and '"name": "f"' in plain_text(turns)
