"""Training rows that are in benchmarks or evaluation files, planted and in real data."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rm_scale.contamination.benchmark_texts import read_benchmark_texts
from rm_scale.contamination.clean_files import CleanFiles, kept_stem
from rm_scale.contamination.compare import compare_with_files
from rm_scale.contamination.figures import Contamination
from rm_scale.data.plain_keys import said
from rm_scale.data.reading import Reading
from rm_scale.data.sources import local_sources
from rm_scale.errors import DataError

needs_hh = pytest.mark.skipif("RM_SCALE_HH_DATA" not in os.environ, reason="RM_SCALE_HH_DATA does not name the HH file")
Row = dict[str, Any]


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sentence(generator: random.Random, words: int = 25) -> str:
    return " ".join(f"w{generator.randrange(3_000)}" for _ in range(words))


def pairs(count: int, seed: int) -> list[Row]:
    generator = random.Random(seed)
    return [{name: sentence(generator) for name in ("prompt", "chosen", "rejected")} for _ in range(count)]


def compare(train: str, *against: str) -> Contamination:
    return compare_with_files(local_sources([train]), against)


def counted(rows: Mapping[str, int]) -> dict[str, int]:
    return {kind: count for kind, count in rows.items() if count}


def test_planted_rows_are_all_found_and_no_other(tmp_path: Path) -> None:
    benchmark, train = pairs(100, seed=1), pairs(200, seed=2)
    train[3] = benchmark[7]
    train[50] = {**benchmark[8], "prompt": benchmark[8]["prompt"].upper() + "!"}
    train[60]["prompt"] = f"Please answer this question: {benchmark[9]['prompt']}"
    train[70]["chosen"] = benchmark[10]["rejected"]
    train[80]["prompt"] = benchmark[7]["prompt"]
    found = compare(write(tmp_path / "train.jsonl", train), write(tmp_path / "benchmark.jsonl", benchmark))
    (file,) = found.files
    assert (found.train_rows, found.train_rows_matched) == (200, 5)
    assert (file.num_rows, file.train_rows, file.benchmark_rows) == (100, 5, 4)
    assert file.benchmark_share == 0.04
    assert counted(file.prompts.train_rows) == {"exact": 2, "normalised": 1, "ngram": 1}
    assert counted(file.prompts.benchmark_rows) == {"exact": 1, "normalised": 1, "ngram": 1}
    assert counted(file.responses.train_rows) == {"exact": 3}
    assert counted(file.responses.benchmark_rows) == {"exact": 3}
    places = {(example.side, example.row, example.benchmark_row) for example in file.examples}
    assert {("prompt", 3, 7), ("prompt", 50, 8), ("prompt", 60, 9), ("response", 70, 10)} <= places


def test_each_file_has_its_own_figures(tmp_path: Path) -> None:
    train = pairs(20, seed=3)
    first, second = pairs(5, seed=4), [*pairs(5, seed=5), train[2]]
    names = [write(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((first, second))]
    found = compare(write(tmp_path / "train.jsonl", train), *names, names[1])
    assert [(file.name, file.train_rows) for file in found.files] == [(names[0], 0), (names[1], 1)]
    assert json.loads(json.dumps(found.to_dict()))["files"][1]["benchmark_share"] == pytest.approx(1 / 6, abs=1e-4)


def test_short_answers_are_no_contamination(tmp_path: Path) -> None:
    train, benchmark = pairs(5, seed=6), pairs(5, seed=7)
    train[0]["chosen"] = benchmark[1]["chosen"] = "You're welcome! Is there anything else?"
    found = compare(write(tmp_path / "train.jsonl", train), write(tmp_path / "benchmark.jsonl", benchmark))
    assert found.train_rows_matched == 0


def test_the_same_question_in_other_forms(tmp_path: Path) -> None:
    """Roles, system messages and the marks of HH's dialogues are no part of what is compared."""
    question, first, second = "Why is the sky blue?", "It scatters light of short waves.", "No idea."
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    answers = [[{"role": "assistant", "content": text}] for text in (first, second)]
    hh = f"\n\nHuman: {question}\n\nAssistant: "
    train = write(
        tmp_path / "train.jsonl",
        [{"chosen": hh + first, "rejected": hh + second}, {"chosen": hh + "Yes.", "rejected": hh + "Maybe."}],
    )
    benchmark = write(tmp_path / "b.jsonl", [{"prompt": messages, "chosen": answers[0], "rejected": answers[1]}])
    (file,) = compare(train, benchmark).files
    assert counted(file.prompts.train_rows) == {"exact": 2}
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    assert said([{"role": "user", "content": "a"}, call]) == 'a\n\n[{"name": "f"}]'


# --- Files to compare with -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "format", "prompt", "responses"),
    [
        ("Natural.json", {"input": "a", "output_1": "b", "output_2": "c", "label": 2}, "llmbar", "a", ("c", "b")),
        (
            "rewardbench.jsonl",
            {"prompt": "a", "chosen": "b", "rejected": "c", "subset": "alpacaeval-easy"},
            "rewardbench",
            "a",
            ("b", "c"),
        ),
        (
            "two.jsonl",
            {"prompt": "a", "chosen": ["b"], "rejected": ["c", "d"], "subset": "Focus", "num_correct": 1},
            "rewardbench2",
            "a",
            ("b", "c", "d"),
        ),
        (
            "chat_filtered.json",
            {"prompt": "a", "chosen": ["b", "c", "d"], "rejected": ["e", "f", "g"]},
            "rm_bench",
            "a",
            ("b", "c", "d", "e", "f", "g"),
        ),
        (
            "judgebench.jsonl",
            {"question": "a", "response_A": "b", "response_B": "c", "label": "B>A", "source": "mmlu-pro-x"},
            "judgebench",
            "a",
            ("c", "b"),
        ),
        (
            "own.jsonl",
            {"prompt": "a", "chosen": "b", "rejected": "c", "subset": "mine"},
            "explicit_prompt",
            "a",
            ("b", "c"),
        ),
        ("gsm.jsonl", {"question": "a", "answer": "b"}, "questions in column question", "a", ("b",)),
        (
            "chats.jsonl",
            {"messages": [{"role": "user", "content": "a"}]},
            "questions in column messages",
            "a",
            (),
        ),
    ],
)
def test_kinds_of_files(
    tmp_path: Path, name: str, row: Row, format: str, prompt: str, responses: tuple[str, ...]
) -> None:
    path = tmp_path / name
    path.write_text(json.dumps([row]) if name.endswith(".json") else json.dumps(row) + "\n", encoding="utf-8")
    (found,) = read_benchmark_texts(str(path))
    assert found.format == format
    assert [(one.row, one.prompt, one.responses) for one in found.rows] == [(0, prompt, responses)]


def test_file_of_no_known_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"height": 3, "width": 4}])
    with pytest.raises(DataError, match=r"x\.jsonl: is no benchmark or preference file.*height, width\. Fix: rename"):
        read_benchmark_texts(path)


def test_file_without_a_readable_row(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"question": 5}])
    with pytest.raises(DataError, match=r"none of its 1 rows can be read as questions in column question\. Fix: look"):
        read_benchmark_texts(path)


# --- Clean files -----------------------------------------------------------------------------------------------------


def test_dropped_and_kept_rows_are_all_rows(tmp_path: Path) -> None:
    benchmark, train = pairs(10, seed=8), pairs(30, seed=9)
    train[4] = {**benchmark[2], "my_own_column": "stays"}
    first = write(tmp_path / "train.jsonl", train)
    with Path(first).open("a", encoding="utf-8") as stream:
        stream.write("{broken\n")
    (tmp_path / "more").mkdir()
    sources = local_sources([first, write(tmp_path / "more" / "train.jsonl", pairs(3, seed=10))])
    drop, kept = tmp_path / "dropped.jsonl", tmp_path / "kept"
    with CleanFiles.open(drop, kept) as files:
        compare_with_files(sources, [write(tmp_path / "benchmark.jsonl", benchmark)], files.add)
    dropped = [json.loads(line) for line in drop.read_text().splitlines()]
    assert [(row["row"], row.get("unreadable")) for row in dropped] == [(4, None), (30, "bad_json")]
    assert dropped[0]["value"] == train[4]
    assert dropped[0]["num_matches"] == 3
    assert {(match["side"], match["kind"], match["row"]) for match in dropped[0]["matches"]} == {
        ("prompt", "exact", 2),
        ("response", "exact", 2),
    }
    rows = [json.loads(line) for line in (kept / "train.jsonl").read_text().splitlines()]
    assert rows == [row for number, row in enumerate(train) if number != 4]
    assert len((kept / "train-2.jsonl").read_text().splitlines()) == 3
    assert files.dropped == 2
    assert sum(files.kept.values()) == 32
    again = compare_with_files(local_sources([str(kept / "train.jsonl")]), [str(tmp_path / "benchmark.jsonl")])
    assert again.train_rows_matched == 0


def test_rows_behind_blank_lines_are_written_under_their_line(tmp_path: Path) -> None:
    benchmark, train = pairs(3, seed=8), pairs(40, seed=9)
    train[25] = benchmark[1]
    lines = [json.dumps(row) for row in train]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([*lines[:10], "", *lines[10:30], "", "", *lines[30:]]) + "\n", encoding="utf-8")
    drop, kept = tmp_path / "dropped.jsonl", tmp_path / "kept"
    sources = local_sources([str(path)])
    with CleanFiles.open(drop, kept) as files, pytest.MonkeyPatch.context() as patch:
        patch.setattr("rm_scale.contamination.compare._ROWS_AT_ONCE", 7)
        compare_with_files(sources, [write(tmp_path / "benchmark.jsonl", benchmark)], files.add)
    (dropped,) = [json.loads(line) for line in drop.read_text().splitlines()]
    assert (dropped["row"], dropped["value"]) == (26, train[25])
    rows = [json.loads(line) for line in (kept / "train.jsonl").read_text().splitlines()]
    assert rows == [*train[:25], *train[26:]]


def test_a_failure_leaves_no_half_file(tmp_path: Path) -> None:
    benchmark = write(tmp_path / "b.jsonl", pairs(2, seed=1))
    with pytest.raises(RuntimeError), CleanFiles.open(tmp_path / "d.jsonl", tmp_path / "kept") as files:
        compare_with_files(local_sources([benchmark]), [benchmark], files.add)
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["b.jsonl"]


def test_names_of_kept_files() -> None:
    assert kept_stem("data/pairs.jsonl.gz") == "pairs"
    assert kept_stem("owner/name[train]") == "name-train"
    assert kept_stem(".jsonl") == "rows"


# --- Real data -------------------------------------------------------------------------------------------------------


@needs_hh
def test_disjoint_halves_of_hh_share_what_is_there_twice_and_nothing_else(tmp_path: Path) -> None:
    """No false alarm: a match is the same question, or one dialogue that the file has up to different turns."""
    with gzip.open(os.environ["RM_SCALE_HH_DATA"], "rt", encoding="utf-8") as stream:
        lines = stream.readlines()
    random.Random(0).shuffle(lines)
    half = len(lines) // 2
    for name, part in (("one.jsonl", lines[:half]), ("two.jsonl", lines[half:])):
        (tmp_path / name).write_text("".join(part), encoding="utf-8")
    found = compare(str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl"))
    (file,) = found.files
    assert counted(file.responses.train_rows) == {}
    assert set(counted(file.prompts.train_rows)) <= {"exact", "normalised", "ngram"}
    assert 0 < file.prompts.train_rows["ngram"] < 0.05 * half
    for example in file.examples:
        if example.kind == "ngram":
            assert example.share == 1  # all of the shorter dialogue stands in the longer one


@needs_hh
def test_every_row_of_hh_is_found_in_itself_in_other_writing(tmp_path: Path) -> None:
    with gzip.open(os.environ["RM_SCALE_HH_DATA"], "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream][:400]
    loud = [{name: in_capitals(text) for name, text in row.items()} for row in rows]
    found = compare(write(tmp_path / "train.jsonl", loud), write(tmp_path / "benchmark.jsonl", rows))
    (file,) = found.files
    assert file.train_rows == found.train_rows_read > 390
    assert file.prompts.train_rows["exact"] + file.prompts.train_rows["normalised"] == found.train_rows_read


def in_capitals(dialogue: str) -> str:
    """A dialogue of HH with all but its marks in capitals."""
    return dialogue.upper().replace("\n\nHUMAN:", "\n\nHuman:").replace("\n\nASSISTANT:", "\n\nAssistant:")


def test_rows_of_one_prompt_are_kept_as_they_stood(tmp_path: Path) -> None:
    """A preset may put the rows of one prompt together: what is kept are the file's own rows."""
    rows = [
        {
            "source": sentence(random.Random(n // 2)),
            "context": "fact",
            "system_id": n,
            "system_output": sentence(random.Random(100 + n)),
            "scores": {"overall": n % 2 + 1},
        }
        for n in range(12)
    ]
    sources = local_sources([write(tmp_path / "chats.jsonl", rows)])
    benchmark = write(tmp_path / "benchmark.jsonl", [{"prompt": rows[4]["source"]}])
    with CleanFiles.open(tmp_path / "dropped.jsonl", tmp_path / "kept") as files:
        found = compare_with_files(sources, [benchmark], files.add)
    assert (found.train_rows, found.train_rows_matched) == (6, 1)
    kept = [json.loads(line) for line in (tmp_path / "kept" / "chats.jsonl").read_text().splitlines()]
    assert kept == [row for number, row in enumerate(rows) if number not in (4, 5)]


def test_trees_are_not_taken_apart(tmp_path: Path) -> None:
    replies = [
        {"text": sentence(random.Random(n)), "role": "assistant", "rank": n, "replies": [], "lang": "en"}
        for n in range(2)
    ]
    tree = {"text": "a question", "role": "prompter", "replies": replies, "lang": "en"}
    train = write(tmp_path / "trees.jsonl", [{"message_tree_id": "1", "tree_state": "ready", "prompt": tree}])
    sources = [replace(source, reading=Reading(preset="oasst_trees")) for source in local_sources([train])]
    benchmark = write(tmp_path / "benchmark.jsonl", [{"prompt": "another question"}])
    with (
        pytest.raises(DataError, match=r"trees\.jsonl: its rows are made of trees of messages.*leave out --kept"),
        CleanFiles.open(None, tmp_path / "kept") as files,
    ):
        compare_with_files(sources, [benchmark], files.add)


@pytest.mark.skipif("RM_SCALE_PREFERENCE_DATA" not in os.environ, reason="RM_SCALE_PREFERENCE_DATA names no folder")
def test_real_sets_of_different_origin_share_nothing_and_each_is_in_itself() -> None:
    data = Path(os.environ["RM_SCALE_PREFERENCE_DATA"])
    demo, llmbar = str(data / "dpo_demo" / "dpo_en_demo.json.gz"), str(data / "llmbar" / "*.json")
    found = compare(demo, llmbar, str(data / "dpo_demo" / "dpo_zh_demo.json.gz"), demo)
    assert [file.train_rows for file in found.files] == [0, 0, 0, 0, 0, 0, 300]
    assert [file.format for file in found.files][:5] == ["llmbar"] * 5
    assert found.files[-1].prompts.train_rows["exact"] == found.files[-1].benchmark_rows == 300
