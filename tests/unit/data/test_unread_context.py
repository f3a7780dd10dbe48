"""No file is trained on less than its rows hold without a word: context in other columns, JSON text, odd rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rm_scale.config import RunConfig
from rm_scale.data.context_columns import UnreadContext, holds_context
from rm_scale.data.encoding import TextEncoder
from rm_scale.data.format_detection import choose_format
from rm_scale.data.formats import RowReader
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.preparation import prepare_data
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import DataError

USER = {"role": "user", "content": "Is it far?"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD, BAD = {"role": "assistant", "content": "No."}, {"role": "assistant", "content": "Yes, it is."}
ANSWERS = {"chosen": "No.", "rejected": "Yes, it is."}
PAIR = {"prompt": "Is it far? ", **ANSWERS}
TALK = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
CALL = {"type": "function", "function": {"name": "map"}}


def read(rows: list[dict[str, Any]], **options: Any) -> list[PreferenceGroup]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    ignore = tuple(options.pop("ignore_columns", ()))
    verdict = choose_format(options.pop("asked", "auto"), columns, rows, "f.jsonl", "subset", ignore)
    reader = RowReader(verdict.name, "subset", "f.jsonl", ignore)
    return [reader.read(row, number) for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("row", "names", "fix"),
    [
        ({**ANSWERS, "instruction": "Is it far?", "input": ""}, "instruction", "rename it"),
        ({**ANSWERS, "instruction": "Is it", "input": "far?"}, "instruction and input", "join several to one text"),
        ({**ANSWERS, "system": "Be brief.", "question": "Is it far?"}, "system and question", "join several"),
        ({**ANSWERS, "query": "Is it far?"}, "query", "column prompt"),
        ({**PAIR, "context": "The map shows 3 km."}, "context", "--ignore_columns context"),
        ({**PAIR, "history": [["Where is it?", "There."]]}, "history", "--ignore_columns history"),
        ({**PAIR, "system_prompt": "Be brief."}, "system_prompt", "--ignore_columns system_prompt"),
        ({**TALK, "messages": [SYSTEM, USER]}, "messages", "a list of messages"),
        ({**TALK, "conversations": json.dumps([SYSTEM, USER])}, "conversations", "a list of messages"),
        ({**TALK, "images": [{"bytes": b"", "path": "a.png"}]}, "images", "--ignore_columns images"),
        ({**TALK, "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs", "--chat_template_path"),
        ({**TALK, "chat_template_kwargs": '{"a": 1}'}, "chat_template_kwargs", "--chat_template_path"),
        ({**PAIR, "chosen_ids": [1, 2], "rejected_ids": [1, 3]}, "chosen_ids and rejected_ids", "token ids"),
        ({**PAIR, "tools": [CALL]}, "tools", "tools need messages"),
        ({**PAIR, "soft_label": 0.7, "margin": 1.0}, "margin", "pairs of chosen and rejected"),
    ],
)
def test_context_that_is_not_read_is_refused_by_name(row: dict[str, Any], names: str, fix: str) -> None:
    with pytest.raises(DataError) as caught:
        read([{name: row[name] for name in ("prompt", "chosen", "rejected") if name in row}, row])
    text = str(caught.value)
    assert text.startswith(f"f.jsonl: {names} would not be part of what is trained on"), text
    assert fix in text
    columns = tuple(names.split(" and "))
    assert f"--ignore_columns {' '.join(columns)}" in text
    assert len(read([row], ignore_columns=columns)) == 1, "the fix that it names works"


@pytest.mark.parametrize(
    "others",
    [
        {"messages": [USER, GOOD]},  # as in UltraFeedback: the chosen conversation again
        {"question": "Is it  far?", "instruction": None, "input": " ", "history": [], "system": ""},
        {"prompt_id": "abc", "num_turns": 3, "question_source": "web", "inputTokens": "many", "topic": "maps"},
        {"tools": [CALL], "margin": 0.5, "conversations": json.dumps([{"from": "human", "value": "Is it far?"}])},
        {"chat_template_kwargs": {"enable_thinking": None}},
        {"chat_template_kwargs": "{}", "system": "[]"},
    ],
)
def test_what_is_repeated_or_empty_or_a_label_is_no_loss(others: dict[str, Any]) -> None:
    assert read([{**TALK, **others}]) == read(
        [{**TALK, **{k: v for k, v in others.items() if k in ("tools", "margin")}}]
    )


CONTEXT = """
    instruction Question userPrompt system_prompt chat-history image documents contexts passages dialogs message turn
    article post story stories background premise persona developer functions function tool tool_definitions user
    request user_message task systemprompt image_url image_path video_urls source_document model_input queries
"""
LABELS = """
    prompt_id question_type systems chosen_score answer text n_turns title source topic model code document_url
    question_source input_model num_images image_id message_length user_id post_id error_message task_type
"""


def test_names_of_context() -> None:
    assert [name for name in CONTEXT.split() if not holds_context(name)] == []
    assert [name for name in LABELS.split() if holds_context(name)] == []


@pytest.mark.parametrize("name", ["task", "user", "turn", "tool", "request", "post", "developer"])
def test_a_vague_name_holds_context_when_its_text_has_words(name: str) -> None:
    assert len(read([{**PAIR, name: "qa"}])) == 1, "a kind, or a person"
    with pytest.raises(DataError, match=f"{name} would not be part of what is trained on"):
        read([{**PAIR, name: "Answer as a pirate would."}])


@pytest.mark.parametrize(
    ("prompt", "context"),
    [
        ("Add 15 to the input. ", "5"),
        ("Add 5 to the input. ", "5"),
        ("Is the carpet farther away? ", "the car"),
        ("Is it far? ", "Yes"),  # a response begins so
        ("Is it far? ", "Yes, it is."),
    ],
)
def test_context_that_occurs_by_chance_is_not_read(prompt: str, context: str) -> None:
    with pytest.raises(DataError, match="input would not be part of what is trained on"):
        read([{**PAIR, "prompt": prompt, "input": context}])


@pytest.mark.parametrize(
    ("prompt", "context"),
    [
        ("Add one.\n### Input:\n5\n### Response:\n", "5"),
        ("<user>Why?</user>", "Why?"),
        ("Question: Why?\nAnswer:", "Why?"),
        ("Q: Where is it?\nA: There.\nQ: Is it far? ", [["Where is it?", "There."], ["Is it  far?"]]),
        ("请问今天天气怎么样?", "今天天气怎么样"),
        ("Is it far? ", "Is it far? No."),  # the chosen conversation in one text
        ("Is it far? ", json.dumps([USER, GOOD])),
    ],
)
def test_context_that_the_prompt_holds_is_read(prompt: str, context: Any) -> None:
    assert len(read([{**PAIR, "prompt": prompt, "input": context}])) == 1


def test_a_later_row_with_context_is_refused_by_itself() -> None:
    reader = RowReader("explicit_prompt")
    assert reader.read({**PAIR, "input": ""}, 0).prompt == PAIR["prompt"]
    with pytest.raises(UnreadContext, match="unread_context: input holds 'The map', which is not read"):
        reader.read({**PAIR, "input": "The map"}, 1)


def test_a_prompt_that_the_asked_format_does_not_read_is_context() -> None:
    with pytest.raises(DataError, match="prompt would not be part"):
        read([PAIR], asked="implicit_prompt")
    whole = {"prompt": "Is it far? ", "chosen": "Is it far? No.", "rejected": "Is it far? Yes."}
    assert read([whole], asked="implicit_prompt")[0].prompt == "Is it far?"


# --- JSON text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "conversational"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "conversational"),
        ({"prompt": [USER], "chosen": GOOD, "rejected": BAD}, "conversational"),
        ({"prompt": [USER], "response_0": [GOOD], "response_1": [BAD], "soft_label": 0.9}, "soft_label"),
        ({"prompt": [USER], "responses": [[GOOD], [BAD]], "ranks": [0, 1]}, "ranked"),
        ({"conversations": [{"from": "human", "value": "Is it far?"}],
          "chosen": {"from": "gpt", "value": "No."}, "rejected": {"from": "gpt", "value": "Yes, it is."}},
         "conversational"),
    ],
)  # fmt: skip
def test_messages_as_json_text_are_messages(row: dict[str, Any], format: str) -> None:
    texts = {name: value if name in ("ranks", "soft_label") else json.dumps(value) for name, value in row.items()}
    if "responses" in row:
        texts["responses"] = [json.dumps(part) for part in row["responses"]]
    for one in (row, texts):
        assert choose_format("auto", list(one), [one] * 3, "f", "subset").name == format
        (group,) = read([one])
        assert (group.prompt, group.responses) == ([USER], ([GOOD], [BAD]))


@pytest.mark.parametrize("format", ["explicit_prompt", "implicit_prompt", "hh_text"])
def test_a_single_row_of_json_text_in_a_text_file_is_a_conversation_too(format: str) -> None:
    row = {name: json.dumps(value) for name, value in TALK.items()}
    group = RowReader(format).read(row, 0)
    assert (group.prompt, group.responses) == ([USER], ([GOOD], [BAD]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**PAIR, "chosen": str([GOOD]), "rejected": str([BAD])}, "chosen begins like a list of messages, but isn't"),
        ({**PAIR, "chosen": '[{"role": "assistant", "content": "No'}, "chosen begins like a list of messages"),
        ({**PAIR, "chosen": json.dumps([GOOD])}, "chosen is a conversation written as JSON, rejected is plain text"),
        ({**PAIR, "rejected": json.dumps([GOOD, 3])}, "element 1 no message"),
    ],
)
def test_text_that_begins_like_messages_is_never_trained_on_as_it_is(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RejectedRow, match=words):
        RowReader("explicit_prompt").read(row, 0)


@pytest.mark.parametrize("answer", ['[{"x": 1}]', '{"role": "admin"}', '[{"role": "admin", "rights": []}]', "[1, 2]"])
def test_other_json_is_an_answer_like_any_other(answer: str) -> None:
    (group,) = read([{**PAIR, "chosen": answer}])
    assert group.responses[0] == answer


# --- Repeated prompts ----------------------------------------------------------------------------------------------

WHOLE = {"prompt": "Is it far? ", "chosen": "Is it far? No.", "rejected": "Is it far? Yes, it is."}


@pytest.mark.parametrize("rows", [[*[WHOLE] * 99, PAIR], [*[PAIR] * 99, WHOLE], [WHOLE, WHOLE], [PAIR, WHOLE]])
def test_one_odd_row_does_not_double_the_prompts_of_the_others(rows: list[dict[str, Any]]) -> None:
    for group in read(rows):
        assert (group.prompt, group.responses) == ("Is it far? ", ("No.", "Yes, it is."))


@pytest.mark.parametrize(
    ("before", "after", "format"),
    [("\n\nHuman: ", "\n\nAssistant:", "hh_text"), ("<user>\n", "\n<assistant>\n", "implicit_prompt")],
)
def test_whole_dialogues_beside_their_question_are_not_joined_to_it(before: str, after: str, format: str) -> None:
    start = f"{before}Is it far?{after}"
    row = {"prompt": "Is it far?", "chosen": f"{start} No.", "rejected": f"{start} Yes."}
    assert choose_format("auto", list(row), [row, row, PAIR], "f", "subset").name == format
    group = read([row])[0]
    assert [f"{group.prompt}{text}" for text in group.responses] == [row["chosen"], row["rejected"]]
    with pytest.raises(RejectedRow, match=r"prompt_mismatch|prompt holds"):
        read([row, row, PAIR])


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "read_as"),
    [
        ("Is it far? ", "Is it far?\nNo.", "Is it far? Yes.", ("No.", "Yes.")),
        ("Is it far?", "Is it far?\nNo.", "Is  it far? Yes.", ("\nNo.", " Yes.")),
        ("Is it far", "Is it farther?", "Is it far away?", None),
        ("I", "I agree.", "It depends.", ("I agree.", "It depends.")),
        ("I", "I agree.", "I don't.", (" agree.", " don't.")),
        ("Hello", "Hello! How are you?", "Hi.", ("Hello! How are you?", "Hi.")),
        ("Is it far", "Is it farther?", "Is it farthest?", ("Is it farther?", "Is it farthest?")),
        ("Is it far? ", "Is it far? No.", "Yes.", None),
        ("Is it far? ", "No.", "Is it far?\nYes.", None),
        ("这是什么地方呢请告诉我", "这是什么地方呢请告诉我北京", "这是什么地方呢请告诉我上海", ("北京", "上海")),
    ],
)
def test_all_responses_repeat_the_prompt_or_none(
    prompt: str, chosen: str, rejected: str, read_as: tuple[str, str] | None
) -> None:
    for row in (
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"prompt": prompt, "responses": [chosen, rejected], "ranks": [0, 1]},
    ):
        reader = RowReader("explicit_prompt" if "chosen" in row else "ranked")
        if read_as is None:
            with pytest.raises(RejectedRow, match=r"prompt_mismatch: response \d repeats the prompt at its beginning"):
                reader.read(row, 0)
        else:
            assert reader.read(row, 0).responses == read_as


def test_repeated_prompts_of_other_formats() -> None:
    whole = [WHOLE["chosen"], WHOLE["rejected"]]
    for row in (
        {"prompt": PAIR["prompt"], "responses": whole, "ranks": [0, 1]},
        {"prompt": PAIR["prompt"], "response_0": whole[0], "response_1": whole[1], "soft_label": 0.9},
    ):
        assert read([row])[0].responses == ("No.", "Yes, it is.")


# --- Which response is better --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "ranks"), [(0, (0, 1)), (1, (1, 0)), ("1", (1, 0)), (1.0, (1, 0))])
def test_the_number_of_the_better_response_is_no_soft_label(value: Any, ranks: tuple[int, int]) -> None:
    row = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": value, "safer_response_id": 0}
    (group,) = read([row])
    assert (group.responses, group.ranks, group.soft_label) == (("a", "b"), ranks, None)


@pytest.mark.parametrize("value", [2, -1, True, "a", 0.5])
def test_other_numbers_of_the_better_response_are_refused(value: Any) -> None:
    with pytest.raises(RejectedRow, match=r"bad_label: better_response_id=.* is neither 0 nor 1"):
        row = {"prompt": "p", "response_a": "a", "response_b": "b", "better_response_id": value}
        RowReader("soft_label").read(row, 0)


TWO = {"prompt": "P ", "response_0": "bad", "response_1": "good"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**TWO, "chosen": "good", "rejected": "bad", "better_response_id": 1}, "chosen and rejected, and response_0"),
        ({**TWO, "chosen": "good", "rejected": "bad", "soft_label": 0.9}, "which responses the label speaks of can't"),
        ({"prompt": "P ", "chosen": "good", "rejected": "bad", "better_response_id": 1}, "numbers response_0 and resp"),
        ({**TWO, "soft_label": 0.9, "better_response_id": 1}, "soft_label 0.9 and better_response_id 1 say different"),
        ({**TWO, "soft_label": 0.9, "chosen_probability": 0.2}, "soft_label 0.9 and chosen_probability 0.2 say"),
        ({"prompt": "P ", "responses": ["a", "b"], "ranks": [0, 1], "scores": [1, 2]}, r"ranks \[0, 1\] and scores"),
        ({"prompt": "P ", "responses": ["a", "b"], "completions": ["b", "a"], "ranks": [0, 1]}, "completions differ"),
    ],
)
def test_labels_that_may_speak_of_other_responses_are_refused(row: dict[str, Any], words: str) -> None:
    verdict = choose_format("auto", list(row), [row], "f", "subset")
    with pytest.raises(RejectedRow, match=f"bad_label: .*{words}.*--ignore_columns"):
        RowReader(verdict.name).read(row, 0)


def test_labels_that_agree_are_read() -> None:
    for value, soft in ((0.9, 0), (0.2, 1), (0.5, 1)):
        (group,) = read([{**TWO, "soft_label": value, "chosen_probability": value, "better_response_id": soft}])
        assert group.soft_label == value
    (group,) = read([{"prompt": "P ", "responses": list("abc"), "ranks": [0, 1, 2], "scores": [3, 3, 1]}])
    assert group.ranks == (0, 1, 2)
    inverted = {**TWO, "chosen": "good", "rejected": "bad", "better_response_id": 1}
    (group,) = read([inverted], ignore_columns=["better_response_id", "response_0", "response_1"])
    assert (group.responses, group.ranks) == (("good", "bad"), (0, 1))


def test_no_advice_turns_labels_round() -> None:
    with pytest.raises(DataError) as caught:
        choose_format("auto", ["prompt", "response_0", "response_1", "preferred"], [], "f", "subset")
    assert "the number of the better one, 0 or 1, is better_response_id" in str(caught.value)


def test_a_file_that_fits_nothing_learns_the_columns_and_their_shape() -> None:
    with pytest.raises(DataError) as caught:
        choose_format("auto", ["instruction", "output", "rejected"], [], "f", "subset")
    text = str(caught.value)
    assert "conversational: chosen, rejected (lists of messages" in text


def test_a_whole_file(
    tmp_path: Path,
    jsonl: Callable[..., str],
    make_config: Callable[..., RunConfig],
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = TextEncoder(tokenizer)
    rows = [
        {"question": f"Is it {n} km?", "prompt": f"{n}? ", "chosen": f"Yes {n}", "rejected": "No", "soft_label": n % 2}
        for n in range(4)
    ]
    file = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"a\.jsonl: question would not be part of what is trained on"):
        prepare_data(make_config(file), encoder)
    prepared = prepare_data(make_config(file, ignore_columns=["question"]), encoder)
    assert prepared.report.sources[0].ignored_columns == ("question",)
    assert len(prepared.train) == 4
    assert "every soft label is exactly 0 or 1" in caplog.text
