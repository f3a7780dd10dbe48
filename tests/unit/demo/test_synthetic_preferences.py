"""The synthetic set: the same everywhere, nothing shared between the splits, and no way to win without the prompt."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from rm_scale.demo.synthetic_preferences import SUBSETS, SyntheticFormat, generate_pairs, generate_rows, write_synthetic
from rm_scale.demo.synthetic_sentences import PROMPTS, RESPONSES
from rm_scale.demo.synthetic_tasks import Split
from rm_scale.errors import DataError

FORMATS: tuple[SyntheticFormat, ...] = ("explicit_prompt", "conversational", "hh_text", "ranked")


def test_the_same_seed_gives_the_same_rows() -> None:
    first = list(generate_pairs(200, 3, "train"))
    assert first == list(generate_pairs(200, 3, "train"))
    assert first[:50] == list(generate_pairs(50, 3, "train"))
    assert first != list(generate_pairs(200, 4, "train"))


def test_rows_have_the_documented_keys_and_balanced_subsets() -> None:
    rows = list(generate_pairs(10 * len(SUBSETS), 0, "heldout"))
    assert all(set(row) == {"prompt", "chosen", "rejected", "subset", "id"} for row in rows)
    assert Counter(row["subset"] for row in rows) == dict.fromkeys(SUBSETS, 10)
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["chosen"] != row["rejected"] for row in rows)


def test_splits_share_no_template() -> None:
    for wording in [*PROMPTS.values(), *RESPONSES.values()]:
        assert not set(wording.train) & set(wording.heldout)


@pytest.mark.parametrize("subset", SUBSETS)
def test_splits_share_no_prompt(subset: str) -> None:
    train = {row["prompt"] for row in generate_pairs(3000, 0, "train", [subset])}
    heldout = {row["prompt"] for row in generate_pairs(1000, 0, "heldout", [subset])}
    assert not train & heldout


def test_operands_of_the_held_out_split_are_never_seen_in_training() -> None:
    def operands(split: Split) -> set[tuple[str, ...]]:
        rows = generate_pairs(4000, 0, split, ["arithmetic"])
        return {tuple(sorted(filter(str.isdigit, row["prompt"]))) for row in rows}

    assert operands("train")
    assert operands("heldout")
    assert not operands("train") & operands("heldout")


def test_held_out_words_are_known_from_training() -> None:
    def words(split: Split) -> set[str]:
        rows = generate_pairs(4000, 1, split)
        text = " ".join(row["prompt"] + row["chosen"] for row in rows)
        return {word.lower() for word in "".join(c if c.isalpha() else " " for c in text).split()}

    assert words("heldout") - words("train") == set()


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_length_alone_does_not_tell_the_chosen_response(subset: str, split: Split) -> None:
    rows = list(generate_pairs(3000, 0, split, [subset]))
    wins = sum((len(r["chosen"]) > len(r["rejected"])) + 0.5 * (len(r["chosen"]) == len(r["rejected"])) for r in rows)
    assert wins / len(rows) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_response_is_preferred_as_often_as_not(subset: str) -> None:
    """Even the best scorer that never sees the prompt, fitted to one half of the rows, is a coin toss on the other."""
    rows = list(generate_pairs(6000, 0, "train", [subset]))
    balance: dict[str, int] = defaultdict(int)
    for row in rows[:3000]:
        for word in row["chosen"].split():
            balance[word] += 1
        for word in row["rejected"].split():
            balance[word] -= 1

    def score(response: str) -> int:
        return sum(balance[word] for word in response.split())

    right = sum(score(row["chosen"]) > score(row["rejected"]) for row in rows[3000:])
    ties = sum(score(row["chosen"]) == score(row["rejected"]) for row in rows[3000:])
    assert (right + ties / 2) / 3000 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("subset", ["arithmetic", "comparison", "format", "length", "refusal"])
def test_the_same_response_is_chosen_for_one_prompt_and_rejected_for_another(subset: str) -> None:
    rows = list(generate_pairs(3000, 0, "train", [subset]))
    chosen = Counter(row["chosen"] for row in rows)
    rejected = Counter(row["rejected"] for row in rows)
    common = [text for text in chosen if chosen[text] + rejected[text] >= 20]
    assert all(rejected[text] for text in common)


@pytest.mark.parametrize("dataset_format", FORMATS)
def test_rows_of_every_format_have_the_same_ids(dataset_format: SyntheticFormat) -> None:
    pairs = generate_pairs(70, 5, "train")
    rows = generate_rows(70, 5, "train", None, dataset_format)
    assert [(row["subset"], row["id"]) for row in rows] == [(pair["subset"], pair["id"]) for pair in pairs]


def test_conversational_rows_are_messages() -> None:
    pair, row = next(generate_pairs(1, 0, "train")), next(generate_rows(1, 0, "train", None, "conversational"))
    question = pair["prompt"].removeprefix("Human: ").removesuffix("\nAssistant:")
    assert row["prompt"] == [{"role": "user", "content": question}]
    assert row["chosen"] == [{"role": "assistant", "content": pair["chosen"].strip()}]
    assert row["rejected"] == [{"role": "assistant", "content": pair["rejected"].strip()}]


def test_hh_rows_are_whole_dialogues() -> None:
    pair, row = next(generate_pairs(1, 0, "train")), next(generate_rows(1, 0, "train", None, "hh_text"))
    assert row["chosen"].startswith("\n\nHuman: ")
    assert row["chosen"].endswith("\n\nAssistant:" + pair["chosen"])
    assert row["rejected"].endswith("\n\nAssistant:" + pair["rejected"])


def test_ranked_rows_hold_four_responses_and_one_tie() -> None:
    pairs, rows = generate_pairs(140, 2, "train"), generate_rows(140, 2, "train", None, "ranked")
    places = set()
    for pair, row in zip(pairs, rows, strict=True):
        assert sorted(row["ranks"]) == [0, 1, 1, 2]
        assert len(set(row["responses"])) == 4
        best = row["ranks"].index(0)
        places.add(best)
        assert row["responses"][best] == pair["chosen"]
        assert row["ranks"][row["responses"].index(pair["rejected"])] == 1
    assert places == {0, 1, 2, 3}


def test_files_are_written_whole_and_say_what_was_generated(tmp_path: Path) -> None:
    train, heldout = write_synthetic(tmp_path / "new", 21, 14, 7)
    assert (train.name, heldout.name) == ("train.jsonl", "heldout.jsonl")
    assert [json.loads(line) for line in train.read_text().splitlines()] == list(generate_pairs(21, 7, "train"))
    assert [json.loads(line) for line in heldout.read_text().splitlines()] == list(generate_pairs(14, 7, "heldout"))
    assert sorted(path.name for path in train.parent.iterdir()) == ["heldout.jsonl", "train.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = write_synthetic(tmp_path, 7, 7, 0)
    before = train.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(DataError, match=r"can't be written there \(No space left on device\). Fix: give a directory"):
        write_synthetic(tmp_path, 14, 7, 1)
    assert train.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout.jsonl", "train.jsonl"]


def test_wrong_requests_say_what_there_is() -> None:
    with pytest.raises(DataError, match=r"subsets=poetry: .* Fix: choose from arithmetic, comparison, format"):
        generate_pairs(1, 0, "train", ["poetry", "format"])
    with pytest.raises(DataError, match=r"subsets=nothing: .* Fix: choose from arithmetic"):
        generate_pairs(1, 0, "train", [])
    with pytest.raises(DataError, match=r"split=test: .* Fix: choose from train, heldout"):
        generate_pairs(1, 0, "test")  # type: ignore[arg-type]
    with pytest.raises(
        DataError, match=r"format=csv: .* Fix: choose from explicit_prompt, conversational, hh_text, ranked"
    ):
        generate_rows(1, 0, "train", None, "csv")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"number of rows=-1: must be 0 or more. Fix: ask for a positive number"):
        generate_pairs(-1, 0, "train")
