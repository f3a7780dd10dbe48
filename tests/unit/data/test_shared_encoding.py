"""Encoding in chunks that several processes share: the same result whoever made which chunk, and whoever was killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rm_scale.config import RunConfig
from rm_scale.data import cache, row_chunks, shared_work
from rm_scale.data.chunk_files import RowCounts
from rm_scale.data.data_report import RejectionCount
from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.preparation import PreparedData, prepare_data
from rm_scale.data.row_chunks import Chunk, LineRows
from rm_scale.data.text_files import jsonl_rows
from rm_scale.data.text_keys import text_hash, text_keys
from rm_scale.errors import DataError

Jsonl = Callable[[Path, Iterable[Any]], str]
MakeConfig = Callable[..., RunConfig]
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
    return TextEncoder(tokenizer, EncodingRules(max_length=60))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut a few hundred rows as if they were millions, and let worker processes encode them."""
    monkeypatch.setattr(row_chunks, "_CHUNK_BYTES", (2_000, 2_000))
    monkeypatch.setattr(row_chunks, "_SCAN_BYTES", 512)
    monkeypatch.setattr(row_chunks, "_CHUNK_ROWS", (40, 40))
    monkeypatch.setattr(row_chunks, "_BATCH_ROWS", 7)
    monkeypatch.setattr(cache, "_FEW_ROWS", 0)
    monkeypatch.setattr(shared_work, "_LOOK_AGAIN_SECONDS", 0.01)


def given_rows(count: int = 300) -> list[Any]:
    """Rows of which every seventh is refused, for three reasons, with blank lines between them."""
    rows: list[Any] = []
    for number in range(count):
        row = {"prompt": f"Question {number // 2}? ", "chosen": f"good {number}", "rejected": f"bad {number}"}
        if number % 7 == 0:
            row["chosen"] = ("", "word " * 90, row["rejected"])[number % 3]
        rows.append(b"{" if number % 50 == 9 else b"" if number % 50 == 11 else row)
    return rows


def all_of(prepared: PreparedData) -> tuple[Any, ...]:
    """Return all that a run and its report hold."""
    sides = [list(side) if side is not None else None for side in (prepared.train, prepared.eval)]
    arrays = [getattr(prepared.train_sizes, name).tolist() for name in ("num_tokens", "prompt_length", "num_responses")]
    assert prepared.eval_origins is not None
    return sides, arrays, prepared.eval_origins.content.tolist(), list(prepared.rejected), prepared.report.to_dict()


# --- Cutting -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("end", [b"\n", b"", b"\n\n\r\n"])
def test_chunks_of_lines_are_the_whole_file(tmp_path: Path, jsonl: Jsonl, end: bytes) -> None:
    path = Path(jsonl(tmp_path / "a.jsonl", [*given_rows(), {"prompt": "x" * 3_000}]))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n") + end)
    chunks = LineRows(path, "a").cut()
    assert len(chunks) > 5 and chunks[0].start == chunks[0].first_row == 0 and chunks[-1].end == path.stat().st_size
    assert all(one.end == two.start and one.first_row + one.num_rows == two.first_row for one, two in pairwise(chunks))
    assert chunks[-1].first_row + chunks[-1].num_rows == path.read_bytes().count(b"\n") + (not end)
    read = [row for chunk in chunks for row in jsonl_rows(path, chunk.start, chunk.end, chunk.first_row)]
    assert read == list(jsonl_rows(path))


def test_a_file_without_an_end_of_line_is_not_searched_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_chunks, "MOST_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + b" " * (2 << 20))
    with pytest.raises(DataError, match=r"a.jsonl: line 2 has more than .* Fix: check that the file is text"):
        LineRows(path, "a").cut()


def test_larger_files_have_larger_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" * 100_000)
    monkeypatch.setattr(row_chunks, "_CHUNK_BYTES", (100, 1 << 20))
    monkeypatch.setattr(row_chunks, "_SCAN_BYTES", 100)
    monkeypatch.setattr(row_chunks, "MOST_CHUNKS", 50)
    assert 45 <= len(LineRows(path, "a").cut()) <= 50


# --- The same result -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_any_number_of_processes_gives_the_same(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, name: str
) -> None:
    import datasets

    if name.endswith("parquet"):
        path = str(tmp_path / name)
        datasets.Dataset.from_list([row for row in given_rows() if isinstance(row, dict)]).to_parquet(path)
    else:
        path = jsonl(tmp_path / name, given_rows())
    found = []
    for processes in (1, 3):
        settings = {"dataset_cache_dir": str(tmp_path / str(processes)), "dataset_num_proc": processes}
        found.append(all_of(prepare_data(make_config(path, eval_split_size=20, **settings), encoder)))
    assert found[0] == found[1]
    (entry,) = (tmp_path / "3").glob("encoded-*/")
    assert len(list(entry.glob("chunk-*"))) > 5
    assert not [*entry.glob("raw"), *entry.glob("locks"), *entry.glob("chunk-*/counts.json"), *entry.glob("*.tmp-*")]


def test_one_chunk_gives_the_same_as_many(
    tmp_path: Path,
    jsonl: Jsonl,
    make_config: MakeConfig,
    encoder: TextEncoder,
    request: pytest.FixtureRequest,
) -> None:
    path = jsonl(tmp_path / "a.jsonl", given_rows())
    config = make_config(path, eval_split_size=20)
    whole = all_of(prepare_data(config, encoder))
    request.getfixturevalue("small_chunks")
    cut = make_config(path, eval_split_size=20, dataset_cache_dir=str(tmp_path / "other"))
    assert all_of(prepare_data(cut, encoder)) == whole


def _prepare(config: RunConfig, encoder: TextEncoder, log: Path, slow_seconds: float, started: Any) -> None:
    """Encode in a process of its own, as a rank does, noting each chunk that it begins."""
    os.setpgrp()
    write = cache.write_chunk

    def noted(folder: Path, batches: Any) -> Any:
        with log.open("a") as stream:
            stream.write(folder.name.partition(".")[0] + "\n")
        time.sleep(slow_seconds)
        return write(folder, batches)

    cache.write_chunk = noted
    started.wait()
    prepare_data(config, encoder)


@pytest.mark.usefixtures("small_chunks")
def test_ranks_share_the_work(tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder) -> None:
    path = jsonl(tmp_path / "a.jsonl", given_rows())
    whole = all_of(prepare_data(make_config(path, eval_split_size=20), encoder))
    config = make_config(path, eval_split_size=20, dataset_cache_dir=str(tmp_path / "two"), dataset_num_proc=2)
    together = FORK.Barrier(2)
    logs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    ranks = [FORK.Process(target=_prepare, args=(config, encoder, log, 0.02, together)) for log in logs]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    made = [log.read_text().split() if log.exists() else [] for log in logs]
    (entry,) = (tmp_path / "two").glob("encoded-*/")
    assert sorted(made[0] + made[1]) == sorted(path.name for path in entry.glob("chunk-*")), "each is made once"
    assert all_of(prepare_data(config, encoder)) == whole


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("chunks_before", [0, 1, 3, 6, 9])
def test_a_killed_run_goes_on_where_it_was(
    chunks_before: int, tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    """Killed with its two workers, at five moments: no more than a chunk for each of them is made again."""
    path = jsonl(tmp_path / "a.jsonl", given_rows())
    whole = all_of(prepare_data(make_config(path, eval_split_size=20), encoder))
    folder = tmp_path / "killed"
    config = make_config(path, eval_split_size=20, dataset_cache_dir=str(folder), dataset_num_proc=2)
    log = tmp_path / "log.txt"
    run = FORK.Process(target=_prepare, args=(config, encoder, log, 0.05, FORK.Barrier(1)))
    run.start()
    assert run.pid is not None
    while run.is_alive() and len(_complete(folder)) < chunks_before:
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    assert run.exitcode == -signal.SIGKILL, "it was still at work"
    _wait_until_gone(run.pid)
    before = _complete(folder)
    log.write_text("")
    again = FORK.Process(target=_prepare, args=(config, encoder, log, 0.0, FORK.Barrier(1)))
    again.start()
    again.join()
    made = log.read_text().split()
    (entry,) = folder.glob("encoded-*/")
    assert not before & set(made), "nothing that was complete is made again"
    assert before | set(made) == {chunk.name for chunk in entry.glob("chunk-*")}
    assert not list(entry.glob("*.tmp-*"))
    assert all_of(prepare_data(config, encoder)) == whole


def _complete(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("encoded-*/chunk-*") if ".tmp-" not in path.name}


def _wait_until_gone(group: int) -> None:
    """Wait until no process of a group is left: workers end with the process that started them."""
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.002)


# --- What goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
def test_an_error_in_a_worker_process_is_the_runs(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder = TextEncoder(tokenizer, EncodingRules(max_length=60, overlong_policy="error"))
    config = make_config(jsonl(tmp_path / "a.jsonl", given_rows()), dataset_num_proc=2)
    with pytest.raises(DataError, match=r"a.jsonl, row \d+: .*max_length is 60"):
        prepare_data(config, encoder)
    assert not list((tmp_path / "cache").glob("encoded-*/meta.json"))


@pytest.mark.usefixtures("small_chunks")
def test_a_worker_process_that_is_killed_is_named(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(jsonl(tmp_path / "a.jsonl", given_rows()), dataset_num_proc=2)
    with monkeypatch.context() as patched:
        patched.setattr(cache, "write_chunk", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(
            DataError, match=r"a.jsonl: a process that encoded it ended with signal 9.*Fix: --dataset_n"
        ):
            prepare_data(config, encoder)
    assert len(prepare_data(config, encoder).train) > 200


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "a.jsonl", given_rows(20))
    encode = cache.encode_batch

    def changing(*given: Any) -> Any:
        with open(path, "ab") as stream:
            stream.write(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}).encode() + b"\n")
        return encode(*given)

    with monkeypatch.context() as patched:
        patched.setattr(cache, "encode_batch", changing)
        with pytest.raises(DataError, match=r"a.jsonl: has changed while it was read .*Fix: start again when"):
            prepare_data(make_config(path), encoder)
    assert not list((tmp_path / "cache").glob("encoded-*/chunk-*")), "nothing of it may count"
    prepared = prepare_data(make_config(path), encoder)
    assert prepared.train[len(prepared.train) - 1]["row"] == 20


@pytest.mark.usefixtures("small_chunks")
def test_a_lost_race_uses_the_winners_chunk(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems without locks: another node makes the same chunk first."""
    path = jsonl(tmp_path / "a.jsonl", given_rows())
    rename = Path.rename

    def beaten(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            target.mkdir()
            for part in self.iterdir():
                (target / part.name).write_bytes(part.read_bytes())
        return rename(self, target)

    whole = all_of(prepare_data(make_config(path, eval_split_size=20), encoder))
    monkeypatch.setattr(Path, "rename", beaten)
    config = make_config(path, eval_split_size=20, dataset_cache_dir=str(tmp_path / "other"), dataset_num_proc=1)
    assert all_of(prepare_data(config, encoder)) == whole


def test_what_is_not_ours_is_not_removed(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    config = make_config(jsonl(tmp_path / "a.jsonl", given_rows(20)))
    prepare_data(config, encoder)
    (entry,) = (tmp_path / "cache").glob("encoded-*/")
    (entry / "meta.json").unlink()
    (entry / "layout.json").unlink()
    (entry / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"damaged cache entry .*notes.txt in it is not ours; nothing is removed"):
        prepare_data(config, encoder)
    (entry / "notes.txt").unlink()
    assert len(prepare_data(config, encoder).train) > 10


def test_waiting_for_the_chunks_of_others_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_work, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(shared_work, "_LOOK_AGAIN_SECONDS", 0.0)
    work = shared_work.ChunkWork(tmp_path, "a.jsonl", 2, lambda number, folder: None, lambda: False)
    take = shared_work.ChunkWork.take

    def held_once(self: shared_work.ChunkWork, number: int) -> bool:
        if not caplog.text:
            return False
        return take(self, number)

    monkeypatch.setattr(shared_work.ChunkWork, "take", held_once)
    shared_work.make_all(work, 1)
    assert "a.jsonl: waiting for other processes that are encoding it, 0 of 2 parts are there" in caplog.text


# --- Counting ------------------------------------------------------------------------------------------------------


def test_counts_add_up_in_order() -> None:
    counts = RowCounts()
    for start in (0, 10, 20):
        counts.add(RowCounts(2, 4, {"empty": RejectionCount(3, (start, start + 1, start + 2), f"of {start}")}, 2, 1))
    assert counts.read == 15 and (counts.responses, counts.soft_labels, counts.hard_labels) == (12, 6, 3)
    assert counts.rejected["empty"] == RejectionCount(9, (0, 1, 2, 10, 11), "of 0")
    assert RowCounts.from_json(json.loads(json.dumps(counts.to_json()))) == counts


@pytest.mark.parametrize(
    ("labels", "warned"), [([0.0, 1.0, None], True), ([1, 1], True), ([0.0, 0.9], False), ([None], False)]
)
def test_labels_that_are_all_0_or_1_are_warned_about(
    labels: list[Any],
    warned: bool,
    tmp_path: Path,
    jsonl: Jsonl,
    make_config: MakeConfig,
    encoder: TextEncoder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [
        {"prompt": f"{number} ", "chosen": "a", "rejected": "b", "soft_label": 0.5 if label is None else label}
        for number, label in enumerate(labels)
        if label is not None or not warned
    ]
    prepare_data(make_config(jsonl(tmp_path / "f.jsonl", rows)), encoder)
    assert ("f.jsonl: every soft label is exactly 0 or 1" in caplog.text) == warned


@pytest.mark.parametrize(
    ("prompt", "responses"),
    [
        ('aé🙂\n"x', ("b", "\x00c")),
        ("", ("a", "b")),
        ("p", ("a", "b", "c")),
        ([{"role": "user", "content": "p"}], ("a", "b")),
    ],
)
def test_keys_of_texts_are_those_of_their_json(prompt: Any, responses: tuple[str, ...]) -> None:
    """They stand in records of earlier runs."""
    group = PreferenceGroup(prompt, responses, tuple(range(len(responses))))
    group_key = text_hash([prompt, list(responses), None])
    assert text_keys(group) == (text_hash([prompt, None]) if prompt else group_key, group_key)


def test_chunks_are_plain_numbers() -> None:
    chunk = Chunk(0, 10, 0, 2)
    assert Chunk(*json.loads(json.dumps(chunk))) == chunk
