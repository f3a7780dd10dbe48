"""Each format read from good rows, each reason met by a bad one, and the guess which format a file has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rm_scale.data.conversations import check_conversation, message_text
from rm_scale.data.format_detection import choose_format
from rm_scale.data.formats import NEEDED_COLUMNS, RowReader
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.rejected_rows import REJECTION_REASONS, RejectedRow
from rm_scale.errors import DataError
from tests.support.launching import read_lines

HH_PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Hello"}
BAD = {"role": "assistant", "content": "Go away"}
SYSTEM = {"role": "system", "content": "Be kind"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "time", "arguments": "{}"}}]}
TOOL = {"role": "tool", "content": "12:00"}


def read(format: str, row: Any, **options: Any) -> PreferenceGroup:
    return RowReader(format, source="file", **options).read(row, 7)


def refused(format: str, row: Any) -> RejectedRow:
    with pytest.raises(RejectedRow) as caught:
        read(format, row)
    assert caught.value.reason in REJECTION_REASONS
    return caught.value


# --- Good rows -----------------------------------------------------------------------------------------------------


def test_explicit_prompt() -> None:
    row = {"prompt": "2+2? ", "chosen": "4", "rejected": "5", "margin": 2, "subset": "maths", "id": 11}
    group = read("explicit_prompt", row)
    assert (group.prompt, group.responses, group.ranks) == ("2+2? ", ("4", "5"), (0, 1))
    assert (group.margin, group.soft_label) == (2.0, None)
    assert (group.source, group.subset, group.id) == ("file", "maths", "11")


def test_id_is_the_row_index_when_there_is_none_and_subset_comes_from_the_named_column() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "kind": 3.0, "id": None}
    group = read("explicit_prompt", row, subset_column="kind")
    assert (group.id, group.subset) == ("7", "3")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: why?\nA: the sun", "Q: why?\nA: the moon", "Q: why?\n"),
        ("The sky is blue", "The sky is green", "The sky is"),
        ("yes", "no", ""),
        ("yes", "yes indeed", ""),
        ("Go on\n", "Go on\nand on", "Go"),
        ("a\u0301b", "a\u0301c", ""),
    ],
)
def test_implicit_prompt_splits_without_changing_the_text(chosen: str, rejected: str, prompt: str) -> None:
    group = read("implicit_prompt", {"chosen": chosen, "rejected": rejected})
    assert group.prompt == prompt
    assert [prompt + response for response in group.responses] == [chosen, rejected]
    assert all(group.responses)


def test_hh_prompt_ends_with_the_last_shared_assistant_marker() -> None:
    group = read("hh_text", {"chosen": HH_PROMPT + " Because.", "rejected": HH_PROMPT + " Be quiet."})
    assert (group.prompt, group.responses) == (HH_PROMPT, (" Because.", " Be quiet."))


def test_hh_keeps_a_human_turn_that_one_response_made_up() -> None:
    made_up = " Sure.\n\nHuman: Thanks\n\nAssistant: Bye"
    group = read("hh_text", {"chosen": HH_PROMPT + " Because.", "rejected": HH_PROMPT + made_up})
    assert group.responses == (" Because.", made_up)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        {"prompt": "Hi", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        {"prompt": [SYSTEM, USER], "chosen": "Hello", "rejected": "Go away"},
        {"prompt": [SYSTEM, USER], "chosen": GOOD, "rejected": BAD},
    ],
)
def test_conversations_in_all_their_spellings(row: dict[str, Any]) -> None:
    group = read("conversational", row)
    assert (group.prompt, group.responses) == ([SYSTEM, USER], ([GOOD], [BAD]))
    assert group.is_conversational


def test_a_text_prompt_beside_messages_is_the_users_turn() -> None:
    assert read("conversational", {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}).prompt == [USER]


def test_tool_calls_and_tools_as_json_text_or_list() -> None:
    tools = [{"type": "function", "function": {"name": "time", "description": None}}]
    row = {"prompt": [USER], "chosen": [CALL, TOOL, GOOD], "rejected": [BAD], "tools": tools}
    group = read("conversational", row)
    assert group.tools == [{"type": "function", "function": {"name": "time"}}]
    assert group.responses[0] == [{key: CALL[key] for key in ("role", "tool_calls")}, TOOL, GOOD]
    row["tools"] = '[{"type": "function", "function": {"name": "time"}}]'
    assert read("conversational", row).tools == group.tools
    for nothing in (None, "", "[]", []):
        assert read("conversational", {**row, "tools": nothing}).tools is None


def test_a_tool_call_may_be_the_response() -> None:
    assert read("conversational", {"prompt": [USER], "chosen": [CALL], "rejected": [BAD]}).responses[1] == [BAD]


def test_text_parts_count_as_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert message_text({"role": "user", "content": parts}) == "ab"
    assert message_text({"role": "assistant", "content": None}) == ""
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": [GOOD], "rejected": [BAD]}
    assert read("conversational", row).prompt == row["prompt"]


@pytest.mark.parametrize(
    ("labels", "ranks"),
    [
        ({"ranks": [2, 1, 1]}, (1, 0, 0)),
        ({"ranks": [0, 5, 3.0]}, (0, 2, 1)),
        ({"scores": [0.1, 0.9, -4]}, (1, 0, 2)),
        ({"scores": [1, 1, 0]}, (0, 0, 1)),
    ],
)
@pytest.mark.parametrize("column", ["responses", "completions"])
def test_ranked(labels: dict[str, Any], ranks: tuple[int, ...], column: str) -> None:
    group = read("ranked", {"prompt": "p", column: ["a", "b", "c"], **labels})
    assert (group.responses, group.ranks, group.margin) == (("a", "b", "c"), ranks, None)


def test_ranked_conversations() -> None:
    expected = ([USER], ([GOOD], [BAD]))
    for prompt, responses in (([USER], ["Hello", [BAD]]), ("Hi", [[GOOD], [BAD]]), ("Hi", [[USER, GOOD], [USER, BAD]])):
        group = read("ranked", {"prompt": prompt, "responses": responses, "ranks": [0, 1]})
        assert (group.prompt, group.responses) == expected


@pytest.mark.parametrize("names", [("chosen", "rejected"), ("response_0", "response_1"), ("response_a", "response_b")])
@pytest.mark.parametrize("column", ["soft_label", "chosen_probability", "preference_probability"])
@pytest.mark.parametrize(("value", "ranks"), [(0.8, (0, 1)), (0.2, (1, 0)), (0.5, (0, 0)), (1, (0, 1)), (0, (1, 0))])
def test_soft_label(names: tuple[str, str], column: str, value: float, ranks: tuple[int, int]) -> None:
    group = read("soft_label", {"prompt": "p", names[0]: "a", names[1]: "b", column: value})
    assert (group.responses, group.soft_label, group.ranks) == (("a", "b"), value, ranks)


def test_scores_of_both_sides_are_no_margin() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 9.0, "score_rejected": 1.0}
    assert read("explicit_prompt", row).margin is None


# --- Bad rows ------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
TALK = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
RANKED = {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}
SOFT = {**PAIR, "soft_label": 0.7}


@pytest.mark.parametrize(
    ("format", "row", "reason", "words"),
    [
        ("explicit_prompt", [1], "wrong_type", "the row is a list"),
        ("explicit_prompt", None, "wrong_type", "the row is null"),
        ("explicit_prompt", {"prompt": "p", "chosen": "a"}, "missing_key", "rejected"),
        ("explicit_prompt", {**PAIR, "chosen": None}, "missing_key", "chosen"),
        ("explicit_prompt", {**PAIR, "chosen": 3}, "wrong_type", "chosen is a number, not text"),
        ("explicit_prompt", {**PAIR, "chosen": True}, "wrong_type", "chosen is a boolean"),
        ("explicit_prompt", {**PAIR, "chosen": b"x"}, "wrong_type", "chosen is a bytes"),
        ("explicit_prompt", {**PAIR, "chosen": " \n"}, "empty", "response 0 has no text"),
        ("explicit_prompt", {**PAIR, "prompt": ""}, "empty", "the prompt has no text"),
        ("explicit_prompt", {**PAIR, "rejected": "a"}, "identical_responses", ""),
        ("explicit_prompt", {**PAIR, "chosen": "a\ud800"}, "bad_unicode", "response 0 holds a lone surrogate at 1"),
        ("explicit_prompt", {**PAIR, "prompt": "\x00"}, "bad_unicode", "prompt holds a NUL character at 0"),
        ("explicit_prompt", {**PAIR, "id": "\ud800"}, "bad_unicode", "id holds a lone surrogate"),
        ("explicit_prompt", {**PAIR, "id": [1]}, "wrong_type", "id is a list, not text or a number"),
        ("explicit_prompt", {**PAIR, "subset": True}, "wrong_type", "subset is a boolean"),
        ("explicit_prompt", {**PAIR, "margin": -1}, "bad_label", "margin=-1.0 is negative"),
        ("explicit_prompt", {**PAIR, "margin": float("nan")}, "bad_label", "margin=nan is not finite"),
        ("explicit_prompt", {**PAIR, "margin": 10**400}, "bad_label", "margin=inf is not finite"),
        ("explicit_prompt", {**PAIR, "margin": "2"}, "wrong_type", "margin holds text, not a number"),
        ("implicit_prompt", {"chosen": "a", "rejected": "a"}, "identical_responses", ""),
        ("hh_text", {"chosen": HH_PROMPT, "rejected": HH_PROMPT}, "identical_responses", ""),
        ("hh_text", {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"},
         "prompt_mismatch", "differ before the first"),
        ("hh_text", {"chosen": HH_PROMPT + " x\n\nHuman: 1\n\nAssistant: 2",
                     "rejected": HH_PROMPT + " y\n\nHuman: 3\n\nAssistant: 4"}, "prompt_mismatch", "conversations"),
        ("hh_text", {"chosen": HH_PROMPT + " ", "rejected": HH_PROMPT + " x"}, "empty", "response 0 has no text"),
        ("conversational", {**TALK, "chosen": 3}, "wrong_type", "chosen is a number, not a list of messages"),
        ("conversational", {**TALK, "chosen": None}, "missing_key", "chosen"),
        ("conversational", {**TALK, "chosen": []}, "empty", "chosen has no messages"),
        ("conversational", {**TALK, "chosen": ["x"]}, "wrong_type", "chosen[0] is text, not a message"),
        ("conversational", {**TALK, "chosen": [{"content": "x"}]}, "bad_conversation", "chosen[0] has no role"),
        ("conversational", {**TALK, "chosen": [{"role": "assistant"}]}, "bad_conversation", "neither content nor tool"),
        ("conversational", {**TALK, "chosen": [{"role": "assistant", "content": 1}]}, "wrong_type", "neither text nor"),
        ("conversational", {**TALK, "chosen": [{"role": "assistant", "content": [{"type": "image"}]}]},
         "wrong_type", "only text parts"),
        ("conversational", {**TALK, "chosen": [{"role": "assistant", "content": "\ud800"}]}, "bad_unicode", "chosen"),
        ("conversational", {**TALK, "chosen": [{"role": "assistant", "content": " "}]}, "empty", "ends with an empty"),
        ("conversational", {**TALK, "chosen": [GOOD, GOOD]}, "bad_conversation", "2 is assistant after assistant"),
        ("conversational", {**TALK, "chosen": [GOOD, USER]}, "bad_conversation", "ends with user, not assistant"),
        ("conversational", {**TALK, "chosen": [GOOD, TOOL, GOOD]}, "bad_conversation", "tool after assistant"),
        ("conversational", {**TALK, "prompt": [USER, SYSTEM]}, "bad_conversation", "system after user"),
        ("conversational", {**TALK, "prompt": [GOOD]}, "bad_conversation", "after the start: expected developer or"),
        ("conversational", {**TALK, "rejected": [GOOD]}, "identical_responses", ""),
        ("conversational", {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "identical_responses", ""),
        ("conversational", {"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "prompt_mismatch", "no user"),
        ("conversational", {"prompt": "Other", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
         "prompt_mismatch", "don't hold the text of the prompt"),
        ("conversational", {**TALK, "tools": "{"}, "wrong_type", "tools is text that isn't JSON"),
        ("conversational", {**TALK, "tools": {"a": 1}}, "wrong_type", "tools is an object, not a list"),
        ("conversational", {**TALK, "tools": [{"a": "\x00"}]}, "bad_unicode", "tools holds a NUL"),
        ("ranked", {**RANKED, "prompt": None}, "missing_key", "prompt"),
        ("ranked", {**RANKED, "prompt": 1}, "wrong_type", "prompt is a number, neither text nor messages"),
        ("ranked", {"prompt": "p", "ranks": [0]}, "missing_key", "responses or completions"),
        ("ranked", {"prompt": "p", "responses": ["a", "b"]}, "missing_key", "ranks or scores"),
        ("ranked", {**RANKED, "responses": "ab"}, "wrong_type", "responses is text, not a list of responses"),
        ("ranked", {**RANKED, "responses": ["a"]}, "no_preference", "1 element(s), not 2"),
        ("ranked", {**RANKED, "responses": ["a", 3]}, "wrong_type", "mixes text with other values"),
        ("ranked", {**RANKED, "ranks": 1}, "wrong_type", "ranks is a number, not a list of numbers"),
        ("ranked", {**RANKED, "ranks": [0]}, "bad_label", "1 values for 2 responses"),
        ("ranked", {**RANKED, "ranks": [0, None]}, "bad_label", "ranks holds null"),
        ("ranked", {**RANKED, "ranks": [0, 0.5]}, "bad_label", "are not whole numbers"),
        ("ranked", {**RANKED, "ranks": [0, "b"]}, "wrong_type", "ranks holds text"),
        ("ranked", {**RANKED, "ranks": [1, 1]}, "no_preference", "the same rank: [0, 0]"),
        ("ranked", {**RANKED, "responses": ["a", "a"]}, "identical_responses", ""),
        ("soft_label", {**SOFT, "soft_label": 1.5}, "bad_label", "soft_label=1.5 is not a probability in [0, 1]"),
        ("soft_label", {**SOFT, "soft_label": None}, "missing_key", "soft_label or"),
        ("soft_label", {**SOFT, "rejected": None}, "missing_key", "no two responses"),
        ("soft_label", {**SOFT, "rejected": 4}, "wrong_type", "mixes text"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_with_their_reason(format: str, row: Any, reason: str, words: str) -> None:
    error = refused(format, row)
    assert (error.reason, words in error.detail) == (reason, True), error


def test_long_conversations_alternate() -> None:
    check_conversation([SYSTEM, USER, CALL, TOOL, TOOL, GOOD, USER, GOOD])


# --- Choosing a format ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (PAIR, "explicit_prompt"),
        ({"prompt": "a ", "chosen": "a b", "rejected": "a c"}, "explicit_prompt"),
        ({"chosen": "a", "rejected": "b"}, "implicit_prompt"),
        ({"chosen": HH_PROMPT + " x", "rejected": HH_PROMPT + " y"}, "hh_text"),
        (TALK, "conversational"),
        ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}, "conversational"),
        ({"prompt": [USER], "chosen": "x", "rejected": "y"}, "conversational"),
        (RANKED, "ranked"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]}, "ranked"),
        (SOFT, "soft_label"),
        ({"prompt": "p", "response_0": "a", "response_1": "b", "preference_probability": 1}, "soft_label"),
    ],
)
def test_auto_finds_the_format_despite_dirty_rows(row: dict[str, Any], name: str) -> None:
    dirty: list[dict[str, Any]] = [{}, {"chosen": None, "rejected": 3}]
    verdict = choose_format("auto", list(row), [*dirty, row, row, row], "f", "subset")
    assert verdict.name == name and verdict.why


def test_verdict_names_columns_that_are_not_read() -> None:
    row = {**PAIR, "score_chosen": 1, "kind": "x", "id": 1, "margin": 1}
    assert choose_format("auto", list(row), [row], "f", "kind").ignored_columns == ("score_chosen",)
    row = {"prompt": "a ", "chosen": "a b", "rejected": "a c"}
    assert choose_format("implicit_prompt", list(row), [row], "f", "kind").ignored_columns == ("prompt",)


@pytest.mark.parametrize("name", list(NEEDED_COLUMNS))
def test_a_named_format_that_does_not_fit_says_what_is_missing(name: str) -> None:
    with pytest.raises(DataError) as caught:
        choose_format(name, ["question", "chosen_text"], [], "file.jsonl", "subset")
    text = str(caught.value)
    for part in (
        f"dataset_format={name}",
        "file.jsonl",
        "question, chosen_text",
        "needs",
        "missing:",
        "nearest",
        "Fix:",
    ):
        assert part in text


def test_a_misfit_names_the_format_that_fits() -> None:
    with pytest.raises(DataError, match=r"nearest format is explicit_prompt .*Fix: --dataset_format explicit_prompt"):
        choose_format("ranked", list(PAIR), [PAIR], "f", "subset")


def test_no_format_fits() -> None:
    columns = ["prompt", "chosen_text", "rejected"]
    with pytest.raises(DataError) as caught:
        choose_format("auto", columns, [], "file.jsonl", "subset")
    text = str(caught.value)
    assert "file.jsonl: no known format fits the columns prompt, chosen_text, rejected" in text
    assert "is 'chosen_text' meant to be 'chosen'?" in text and "nearest format is explicit_prompt" in text


@pytest.mark.parametrize("columns", [["chosen_ids", "rejected_ids"], ["chosen_input_ids", "rejected_input_ids"]])
def test_data_that_was_tokenised_for_trl_is_refused_for_what_it_is(columns: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        choose_format("auto", [*columns, "margin"], [], "file.jsonl", "subset")
    assert str(caught.value).startswith(
        f"file.jsonl: {', '.join(columns)} hold token ids, as TRL's trainer takes them."
    )
    assert "Fix: give the rows as they were before they were tokenised" in str(caught.value)


def test_soft_label_needs_two_responses_of_one_kind() -> None:
    with pytest.raises(DataError, match=r"both responses of one kind"):
        choose_format("soft_label", ["prompt", "chosen", "response_1", "soft_label"], [], "f", "subset")


@pytest.mark.skipif("RM_SCALE_HH_DATA" not in os.environ, reason="RM_SCALE_HH_DATA does not name the HH file")
def test_real_hh_rows_keep_their_text() -> None:
    file = Path(os.environ["RM_SCALE_HH_DATA"])
    used, lines = 0, read_lines(file)
    for row in lines:
        try:
            group = read("hh_text", row)
        except RejectedRow as rejected:
            assert rejected.reason in {"empty", "identical_responses"}
            continue
        assert isinstance(group.prompt, str) and group.prompt.endswith("\n\nAssistant:")
        assert [group.prompt + str(part) for part in group.responses] == [row["chosen"], row["rejected"]]
        used += 1
    assert used > len(lines) / 2
