"""Each preset on a small file of the shape that its set has; the texts are made up."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from rm_scale.config import RunConfig
from rm_scale.config_columns import map_problems, preset_entries
from rm_scale.config_sources import sources_in
from rm_scale.data.column_maps.presets import fitting_presets, presets, recognised_preset
from rm_scale.data.column_maps.regrouping import Regrouping
from rm_scale.data.encoded_rows import read_row
from rm_scale.data.formats import RowReader
from rm_scale.data.measure_lengths import measure_lengths
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.reading import Reading
from rm_scale.data.rejected_rows import FILTERED, RejectedRow
from rm_scale.data.row_readers import choose_reader, open_source
from rm_scale.data.sources import local_sources
from rm_scale.data.text_files import parse_row
from rm_scale.data.text_keys import text_keys
from rm_scale.errors import DataError
from rm_scale.evaluation.score_columns.group_texts import preference_reader, row_keys

USER = {"role": "user", "content": "Name a prime."}
GOOD, BAD = {"role": "assistant", "content": "7"}, {"role": "assistant", "content": "9"}
EARLIER = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
TOOL = {"type": "function", "function": {"name": "is_prime", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "is_prime", "arguments": {"n": 7}}}

ROWS: dict[str, list[dict[str, Any]]] = {
    "hh_rlhf": [
        {
            "chosen": "\n\nHuman: Name a prime.\n\nAssistant: 7",
            "rejected": "\n\nHuman: Name a prime.\n\nAssistant: 9",
        }
    ],
    "sharegpt": [
        {
            "conversations": [{"from": "human", "value": "Name a prime."}],
            "chosen": {"from": "gpt", "value": "7"},
            "rejected": {"from": "gpt", "value": "9"},
        }
    ],
    "ultrafeedback_binarized": [
        {
            "prompt": "Name a prime.",
            "prompt_id": "f0e3",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "messages": [USER, GOOD],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        }
    ],
    "skywork_reward_preference": [{"chosen": [USER, GOOD], "rejected": [USER, BAD], "source": "magpie_pro"}],
    "openai_messages": [
        {
            "messages": [USER],
            "tools": json.dumps([TOOL]),
            "parallel_tool_calls": True,
            "chosen": [{"role": "assistant", "content": "", "tool_calls": [CALL]},
                       {"role": "tool", "tool_call_id": "c1", "content": "true"}, GOOD],
            "rejected": [BAD],
        }
    ],
    "openai_preference": [
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        }
    ],
    "anthropic_messages": [
        {
            "system": "Be brief.",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Name a prime."}]}],
            "tools": [{"name": "is_prime", "description": "Tests.", "input_schema": {"type": "object"}}],
            "chosen": [
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "Let me test 7."},
                        {"type": "tool_use", "id": "t1", "name": "is_prime", "input": {"n": 7}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "true"}]}
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "7"}]},
            ],
            "rejected": [{"type": "text", "text": "9"}],
        }
    ],
    "llmbar": [{"input": "Name a prime.", "output_1": "9", "output_2": "7", "label": 2}],
    "helpsteer2_preference": [
        {
            "split": "train",
            "prompt": "Hello.\n\n<extra_id_1>Assistant\nHello!\n\n<extra_id_1>User\nName a prime.",
            "response_1": "7",
            "response_2": "9",
            "preference_strength": -2,
            "preference_statement": "Response 1 is better.",
            "preference_elaboration": "9 is no prime.",
            "three_most_similar_preferences": [],
            "all_preferences_unprocessed": [],
        },
        {"split": "val", "prompt": "Name a prime.", "response_1": "7", "response_2": "11", "preference_strength": 0},
    ],
    "helpsteer3": [
        {
            "domain": "stem",
            "language": "english",
            "context": [*EARLIER, USER],
            "response1": "9",
            "response2": "7",
            "overall_preference": 3,
            "individual_preference": [{"score": 3, "reasoning": "...", "feedback1": "...", "feedback2": "..."}],
        },
        {"domain": "stem", "context": [USER], "response1": "7", "response2": "11", "overall_preference": 0},
    ],
    "shp": [
        {
            "post_id": "qt3nxl",
            "domain": "askscience_train",
            "upvote_ratio": 0.98,
            "history": "Name a prime.",
            "c_root_id_A": "hkh1",
            "c_root_id_B": "hkh2",
            "created_at_utc_A": 1636822112,
            "created_at_utc_B": 1636822110,
            "score_A": 340,
            "score_B": 166,
            "human_ref_A": "7",
            "human_ref_B": "9",
            "labels": 1,
            "seconds_difference": 2.0,
            "score_ratio": 2.04,
        }
    ],
    "summarize_from_feedback": [
        {
            "info": {"id": "t3_1", "post": "Long.", "title": "Help", "subreddit": "AskReddit", "article": None},
            "summaries": [
                {"text": " Short.", "policy": "sup1", "note": "ok"},
                {"text": " Shorter.", "policy": "ref", "note": "ok"},
            ],
            "choice": 1,
            "worker": "w",
            "batch": "batch3",
            "split": "train",
            "extra": {"confidence": None},
        },
        {
            "info": {"id": "c1", "post": None, "title": "News", "subreddit": None, "site": "cnn", "article": "Long."},
            "summaries": [
                {"text": " Short.", "policy": "sup1", "note": "ok"},
                {"text": " Shorter.", "policy": "ref", "note": "ok"},
            ],
            "choice": 0,
            "worker": "w",
            "batch": "cnndm0",
            "split": "valid2",
            "extra": {"confidence": 8},
        },
    ],
    "webgpt": [
        {
            "question": {"dataset": "eli5", "id": "ts1", "full_text": "Name a prime."},
            "quotes_0": {"title": ["Primes"], "extract": ["7 is one."]},
            "answer_0": "7",
            "tokens_0": {"prefix": [1], "completion": [2]},
            "score_0": 0.75,
            "quotes_1": {"title": [], "extract": []},
            "answer_1": "9",
            "tokens_1": {"prefix": [1], "completion": [3]},
            "score_1": -0.75,
        },
        {
            "question": {"dataset": "eli5", "id": "ts2", "full_text": "Name another."},
            **{"answer_0": "11", "answer_1": "13", "score_0": 0.0, "score_1": 0.0},
        },
    ],
    "pandalm": [
        {
            "idx": number,
            "motivation_app": "Grammarly",
            "cmp_key": "bloom-7b_llama-7b",
            "instruction": "Name a prime.",
            "input": under,
            "response1": "7",
            "response2": "9",
            **{f"annotator{place + 1}": vote for place, vote in enumerate(votes)},
        }
        for number, (under, votes) in enumerate([("Under ten.", [1, 1, 2]), (float("nan"), [1, 0, 0])])
    ],
    "nectar": [
        {
            "prompt": "\n\nHuman: Name a prime.\n\nAssistant: ",
            "answers": [{"answer": str(n), "model": "m", "rank": float(n)} for n in (3, 1, 7, 5, 2, 6, 4)],
            "turns": 1,
            "num_responses": 7,
            "source": ["sharegpt"],
            "good_natured": True,
        }
    ],
    "ultrafeedback": [
        {
            "source": "evol_instruct",
            "instruction": "Name a prime.",
            "models": ["alpaca-7b", "gpt-4"],
            "completions": [
                {
                    "model": model,
                    "principle": "helpfulness",
                    "custom_system_prompt": "Be helpful.",
                    "response": text,
                    "annotations": {"honesty": {"Rating": "4", "Rationale": "..."}},
                    "critique": "...",
                    "overall_score": 7.5,
                    "fine-grained_score": score,
                }
                for model, text, score in [("alpaca-7b", "9", 2.25), ("gpt-4", "7", 4.75)]
            ],
            "correct_answers": ["None"],
            "incorrect_answers": ["None"],
        }
    ],
    "chatbot_arena": [
        {
            "question_id": f"q{winner}",
            "model_a": "a",
            "model_b": "b",
            "winner": winner,
            "judge": "arena_user_1",
            "conversation_a": [USER, GOOD, {"role": "user", "content": "Sure?"}, GOOD],
            "conversation_b": [USER, BAD, {"role": "user", "content": "Sure?"}, BAD],
            "turn": 2,
            "anony": True,
            "language": "English",
            "tstamp": 1682351591.1,
            "openai_moderation": {"flagged": False},
            "toxic_chat_tag": {},
        }
        for winner in ("model_a", "model_b", "tie", "tie (bothbad)")
    ],
    "helpsteer2_attributes": [
        {"prompt": prompt, "response": response, "helpfulness": score, **dict.fromkeys(
            ("correctness", "coherence", "complexity", "verbosity"), 2)}
        for prompt, response, score in [
            ("Name a prime.", "7", 4), ("Name a prime.", "9", 1), ("And another.", "11", 3), ("And another.", "13", 3),
        ]
    ],
    "topical_chat": [
        {
            "source": f"hello {context}\n",
            "system_id": system,
            "system_output": f"reply {system}",
            "context": f"facts {context}",
            "scores": {"understandability": 1.0, "naturalness": 3.0, "overall": score},
        }
        for context in ("x", "y")
        for system, score in [("Argmax", 2.0), ("Human", 4.666), ("Nucleus", 2.0)]
    ],
}  # fmt: skip
_PKU = {
    "prompt": "Name a prime.",
    "prompt_source": "alpaca",
    "response_0": "7",
    "response_1": "No.",
    "response_0_source": "a",
    "is_response_0_safe": True,
    "response_0_harm_category": {"Violence": False},
    "better_response_id": 0,
    "safer_response_id": 1,
}
ROWS["pku_saferlhf_better"] = ROWS["pku_saferlhf_safer"] = [_PKU]


def _message(id: str, parent: str | None, role: str, text: str, rank: int | None = None) -> dict[str, Any]:
    others = {"message_tree_id": "m1", "lang": "en", "deleted": False, "emojis": {"name": ["+1"], "count": [2]}}
    return {"message_id": id, "parent_id": parent, "role": role, "text": text, "rank": rank, **others}


MESSAGES = [
    _message("m1", None, "prompter", "Name a prime."),
    _message("m2", "m1", "assistant", "7", 0),
    _message("m3", "m1", "assistant", "9", 1),
    _message("m4", "m2", "prompter", "And another.", 0),
    _message("m5", "m2", "prompter", "Why?", 1),
    _message("m6", "m4", "assistant", "15", 1),
    _message("m7", "m4", "assistant", "11", 0),
    _message("m8", "m5", "assistant", "It has no divisor."),
]
ROWS["oasst_messages"] = MESSAGES


def _tree(message: dict[str, Any]) -> dict[str, Any]:
    own = {key: message[key] for key in ("message_id", "text", "role", "lang", "rank")}
    return {**own, "replies": [_tree(other) for other in MESSAGES if other["parent_id"] == message["message_id"]]}


ROWS["oasst_trees"] = [{"message_tree_id": "m1", "tree_state": "ready_for_export", "prompt": _tree(MESSAGES[0])}]

KNOWN_BY_FORMAT = {"hh_rlhf", "sharegpt", "ultrafeedback_binarized", "skywork_reward_preference"}
MUST_BE_NAMED = {"pku_saferlhf_better", "pku_saferlhf_safer", "openai_messages", "anthropic_messages"}


def groups_of(path: str, **reading: Any) -> list[PreferenceGroup | RejectedRow]:
    """Read a file as training does."""
    import dataclasses

    (source,) = local_sources([path])
    source = dataclasses.replace(source, reading=Reading(**reading))
    work = Path(path).with_suffix(".work")
    work.mkdir(exist_ok=True)
    raw = open_source(source, work)
    sample = raw.sample()
    reader, _ = choose_reader(source, raw, sample)
    indices = range(len(raw.dataset))
    return [read_row(reader, row, index) for index, row in raw.decode(raw.dataset[:], indices)]


@pytest.fixture
def read(tmp_path: Path, jsonl: Callable[[Path, Iterable[Any]], str]) -> Callable[..., list[PreferenceGroup]]:
    """Read rows through a file; every row must be used."""

    def read_rows(rows: Sequence[Any], **reading: Any) -> list[PreferenceGroup]:
        groups = groups_of(jsonl(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", rows), **reading)
        assert all(isinstance(group, PreferenceGroup) for group in groups), groups
        return [group for group in groups if isinstance(group, PreferenceGroup)]

    return read_rows


Read = Callable[..., list[PreferenceGroup]]


def test_every_preset_has_a_row_here_and_a_sound_map() -> None:
    assert set(ROWS) == set(presets())
    assert [problem for entry in preset_entries().values() for problem in map_problems(entry["columns"])] == []


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_preset_fits_its_own_set(name: str) -> None:
    assert name in fitting_presets(ROWS[name])
    columns = {column for row in ROWS[name] for column in row}
    recognised = recognised_preset(columns)
    if name in KNOWN_BY_FORMAT | MUST_BE_NAMED:
        assert recognised is None
    else:
        assert recognised is not None and recognised.name == name


def test_columns_of_a_format_come_before_those_of_a_set(read: Read) -> None:
    """As in copies of public sets to which somebody has added chosen and rejected."""
    summary = ROWS["summarize_from_feedback"][0]
    (group,) = read([{**summary, "prompt": "q", "chosen": " a", "rejected": " b"}])
    assert (group.prompt, group.responses) == ("q", (" a", " b"))


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_named_preset_and_no_flag_read_the_same(name: str, read: Read) -> None:
    groups = read(ROWS[name], preset=name)
    assert groups
    if name not in MUST_BE_NAMED:
        same = [(g.prompt, g.responses, g.ranks, g.soft_label, g.margin, g.tools) for g in read(ROWS[name])]
        assert same == [(g.prompt, g.responses, g.ranks, g.soft_label, g.margin, g.tools) for g in groups]


@pytest.mark.parametrize(
    "name", [*sorted(KNOWN_BY_FORMAT - {"hh_rlhf"}), "llmbar", "shp", "openai_preference", "pku_saferlhf_better"]
)
def test_pairs_whose_first_is_better(name: str, read: Read) -> None:
    (group,) = read(ROWS[name], preset=name)
    assert group.prompt == [USER]
    better = group.responses[group.ranks.index(0)]
    assert better == [GOOD]
    assert group.soft_label is None and group.margin is None


def test_hh_keeps_its_dialogue_as_text(read: Read) -> None:
    (group,) = read(ROWS["hh_rlhf"], preset="hh_rlhf")
    assert (group.prompt, group.responses) == ("\n\nHuman: Name a prime.\n\nAssistant:", (" 7", " 9"))


def test_the_cleaned_ultrafeedback_has_whole_conversations_and_ratings(read: Read) -> None:
    row = {"source": "evol_instruct", "prompt": "Name a prime.", "chosen": [USER, GOOD], "chosen-rating": 4.75,
           "chosen-model": "gpt-4",
           "rejected": [USER, BAD], "rejected-rating": 2.0, "rejected-model": "alpaca"}  # fmt: skip
    (group,) = read([row], preset="ultrafeedback_binarized")
    assert (group.prompt, group.responses, group.margin) == ([USER], ([GOOD], [BAD]), None)
    columns = preset_entries()["ultrafeedback_binarized"]["columns"]
    columns = columns | {"margin": {"difference": ["chosen-rating", "rejected-rating"]}}
    assert read([row], columns=columns)[0].margin == 2.75


def test_the_safer_response_is_another_preference(read: Read) -> None:
    (group,) = read(ROWS["pku_saferlhf_safer"], preset="pku_saferlhf_safer")
    assert group.ranks == (1, 0)


def test_strengths_of_helpsteer(read: Read) -> None:
    first, tie = read(ROWS["helpsteer2_preference"], preset="helpsteer2_preference")
    assert first.prompt == [*EARLIER, USER]
    assert (first.ranks, tie.ranks, tie.soft_label) == ((0, 1), (0, 0), 0.5)
    second, tie = read(ROWS["helpsteer3"], preset="helpsteer3")
    assert second.prompt == [*EARLIER, USER]
    assert (second.ranks, second.subset, second.margin, tie.soft_label) == ((1, 0), "stem", None, 0.5)
    columns = dict(preset_entries()["helpsteer3"]["columns"])
    columns["better"] = {**columns["better"], "margin": True}
    assert read(ROWS["helpsteer3"], columns=columns)[0].margin == 3.0


def test_the_filter_on_the_page_leaves_out_the_validation_rows_of_helpsteer2(
    tmp_path: Path, jsonl: Callable[[Path, Iterable[Any]], str], make_config: Callable[..., RunConfig]
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "data_formats.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(datasets:\n.*?preset: helpsteer2_preference\n.*?)```", page, re.S)
    path = jsonl(tmp_path / "preference.jsonl", ROWS["helpsteer2_preference"])
    (entry,) = yaml.safe_load(block)["datasets"]
    (settings,) = sources_in(make_config(datasets=[{**entry, "path": path}]), "datasets")
    train, validation = groups_of(path, preset=entry["preset"], filters=settings.filters)
    assert isinstance(train, PreferenceGroup)
    assert isinstance(validation, RejectedRow) and validation.reason == FILTERED
    assert "train and validation rows in one file" in presets()["helpsteer2_preference"].about


def test_the_rows_of_a_prompt_of_helpsteer2(read: Read) -> None:
    first, tie = read(ROWS["helpsteer2_attributes"], preset="helpsteer2_attributes")
    assert (first.responses, first.ranks) == (([GOOD], [BAD]), (0, 1))
    assert (tie.ranks, tie.soft_label) == ((0, 0), 0.5)


def test_summaries_of_posts_and_of_articles(read: Read) -> None:
    post, article = read(ROWS["summarize_from_feedback"], preset="summarize_from_feedback")
    assert post.prompt == "SUBREDDIT: r/AskReddit\nTITLE: Help\nPOST: Long.\nTL;DR:"
    assert article.prompt == "TITLE: News\nARTICLE: Long.\nTL;DR:"
    assert (post.responses, post.ranks, post.id, article.ranks) == ((" Short.", " Shorter."), (1, 0), "t3_1", (0, 1))


def test_ties_of_the_arena(read: Read) -> None:
    groups = read(ROWS["chatbot_arena"], preset="chatbot_arena")
    assert [(group.ranks, group.soft_label) for group in groups] == [
        ((0, 1), None), ((1, 0), None), ((0, 0), 0.5), ((0, 0), 0.5)
    ]  # fmt: skip
    assert groups[0].prompt == [USER] and [len(response) for response in groups[0].responses] == [3, 3]


def test_scores_of_webgpt(read: Read) -> None:
    first, tie = read(ROWS["webgpt"], preset="webgpt")
    assert (first.prompt, first.responses, first.ranks) == ([USER], ([GOOD], [BAD]), (0, 1))
    assert (tie.soft_label, tie.subset) == (0.5, "eli5")


def test_votes_of_pandalm(read: Read) -> None:
    first, second = read(ROWS["pandalm"], preset="pandalm")
    assert first.prompt == [{"role": "user", "content": "Name a prime.\nUnder ten."}] and second.prompt == [USER]
    assert first.soft_label == pytest.approx(2 / 3) and second.soft_label == pytest.approx(2 / 3)


def test_seven_answers_of_nectar(read: Read) -> None:
    (group,) = read(ROWS["nectar"], preset="nectar")
    assert (group.responses, group.ranks) == (tuple("3175264"), (2, 0, 6, 4, 1, 5, 3))


def test_completions_of_ultrafeedback(read: Read) -> None:
    (group,) = read(ROWS["ultrafeedback"], preset="ultrafeedback")
    assert (group.prompt, group.responses, group.ranks) == ([USER], ([BAD], [GOOD]), (1, 0))


def test_replies_to_one_context_of_topical_chat(read: Read) -> None:
    first, second = read(ROWS["topical_chat"], preset="topical_chat")
    assert (first.ranks, second.ranks, len(first.responses)) == ((1, 0, 1), (1, 0, 1), 3)
    assert isinstance(first.prompt, list) and "facts x" in first.prompt[0]["content"]
    assert "hello y" in second.prompt[0]["content"]  # type: ignore[operator,index]


@pytest.mark.parametrize("name", ["oasst_trees", "oasst_messages"])
def test_trees_of_openassistant(name: str, read: Read) -> None:
    first, deeper = read(ROWS[name], preset=name)
    assert (first.prompt, first.responses, first.ranks) == ([USER], ([GOOD], [BAD]), (0, 1))
    assert deeper.prompt == [USER, GOOD, {"role": "user", "content": "And another."}]
    assert (deeper.ranks, deeper.id, deeper.subset) == ((1, 0), "m4", "en")


def test_tools_of_openai(read: Read) -> None:
    (group,) = read(ROWS["openai_messages"], preset="openai_messages")
    assert group.tools == [TOOL] and group.prompt == [USER]
    assert isinstance(group.responses[0], list) and group.responses[0][0]["tool_calls"] == [CALL]


def test_content_blocks_of_anthropic(read: Read) -> None:
    (group,) = read(ROWS["anthropic_messages"], preset="anthropic_messages")
    assert group.prompt == [{"role": "system", "content": "Be brief."}, USER]
    assert group.tools == [
        {
            "type": "function",
            "function": {"name": "is_prime", "description": "Tests.", "parameters": {"type": "object"}},
        }
    ]
    call = {"id": "t1", "type": "function", "function": {"name": "is_prime", "arguments": {"n": 7}}}
    assert group.responses == (
        [
            {"role": "assistant", "content": "Let me test 7.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "t1", "content": "true"},
            GOOD,
        ],
        [BAD],
    )


# --- Presets that do not fit -----------------------------------------------------------------------------------------


def test_a_preset_that_does_not_fit_names_those_that_do(read: Read) -> None:
    with pytest.raises(DataError) as error:
        read(ROWS["shp"], preset="llmbar")
    assert "has no input and no output_1 and no output_2 and no label in any of its first 1 rows" in str(error.value)
    assert "Fix: --dataset_preset shp, whose columns these are." in str(error.value)


def test_a_preset_that_puts_rows_together_is_checked_before(read: Read) -> None:
    with pytest.raises(DataError, match=r"has no context and no scores and no system_output in any"):
        read(ROWS["nectar"], preset="topical_chat")


def test_columns_of_a_set_whose_preset_must_be_named(read: Read) -> None:
    rows = [{key: value for key, value in _PKU.items() if key != "better_response_id"}]
    with pytest.raises(DataError, match=r"Fix: --dataset_preset pku_saferlhf_safer, whose columns these are\."):
        read(rows)


def _map_to_paste(read: Read, one: str, other: str, labels: Sequence[Any]) -> tuple[Any, str]:
    """Return the map that the error suggests for two responses and a column `winner`, and the error."""
    rows = [
        {"question": f"{number} + 2?", one: "4", other: "5", "winner": label} for number, label in enumerate(labels)
    ]
    with pytest.raises(DataError) as error:
        read(rows)
    _, _, pasted = str(error.value).partition("dataset_columns:")
    return yaml.safe_load("dataset_columns:" + pasted)["dataset_columns"], str(error.value)


def test_columns_of_no_set_give_a_map_to_paste(read: Read) -> None:
    rows = [{"question": "2 + 2?", "answer_a": "4", "answer_b": "5", "winner": label} for label in ("A", "B")]
    columns, _ = _map_to_paste(read, "answer_a", "answer_b", ["A", "B"])
    assert columns == {
        "prompt": "question",
        "responses": ["answer_a", "answer_b"],
        "better": {"path": "winner", "first": ["A"], "second": ["B"]},
        "as_messages": True,
    }
    assert map_problems(columns) == []
    assert [group.ranks for group in read(rows, columns=columns)] == [(0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("endings", "labels", "sides"),
    [
        ("_1 _2", [2, 1], {"first": [1], "second": [2]}),
        ("1 2", ["2", "1", "tie"], {"first": ["1"], "second": ["2"], "tie": ["tie"]}),
        ("_1 _2", [2.0, 1.0], {"first": [1.0], "second": [2.0]}),
        ("_a _b", ["tie", "model_b", "model_a"], {"first": ["model_a"], "second": ["model_b"], "tie": ["tie"]}),
        ("_A _B", ["b", "A", "a"], {"first": ["A", "a"], "second": ["b"]}),
        ("_0 _1", ["answer_1", "answer_0"], {"first": ["answer_0"], "second": ["answer_1"]}),
        ("_first _second", ["second", "first"], {"first": ["first"], "second": ["second"]}),
    ],
)
def test_a_suggested_map_says_what_labels_mean_that_name_a_side(
    endings: str, labels: Sequence[Any], sides: dict[str, Any], read: Read
) -> None:
    one, other = (f"answer{ending}" for ending in endings.split())
    columns, _ = _map_to_paste(read, one, other, labels)
    assert columns["better"] == {"path": "winner", **sides}
    assert map_problems(columns) == []


@pytest.mark.parametrize(
    ("endings", "labels", "seen"),
    [
        ("_a _b", [0, 1], "0, 1"),
        ("_0 _1", [0, 1], "0, 1"),  # the number of the better one, or whether it is the first
        ("_1 _2", [0, 1, 2], "0, 1, 2"),
        ("_1 _2", [1, 1], "1"),
        ("_1 _2", [True, False], "False, True"),
        ("_a _b", ["left", "right"], "'left', 'right'"),
        ("_1 _2", ["1", "2", "-"], "'-', '1', '2'"),
        ("_a _b", list("abcdefg"), "'a', 'b', 'c', 'd', 'e' and 2 more"),
    ],
)
def test_a_suggested_map_does_not_guess_what_labels_mean(
    endings: str, labels: Sequence[Any], seen: str, read: Read
) -> None:
    one, other = (f"answer{ending}" for ending in endings.split())
    columns, error = _map_to_paste(read, one, other, labels)
    assert columns["better"] == {"path": "winner", "first": ["VALUE"], "second": ["VALUE"]}
    assert f"  # winner holds {seen} in the first {len(labels)} rows: fill in which mean the first" in error
    assert map_problems(columns) == [
        f"dataset_columns.better.{side}='VALUE': is still to be filled in. Fix: a list of the values that mean {side}."
        for side in ("first", "second")
    ]
    rows = [{"question": "2 + 2?", one: "4", other: "5", "winner": labels[0]}]
    with pytest.raises(DataError, match=r"better\.first='VALUE': is still to be filled in"):
        read(rows, columns=columns)


def test_numbers_around_0_may_favour_either_side(read: Read) -> None:
    columns, error = _map_to_paste(read, "answer_a", "answer_b", [-1, 0, 1])
    assert columns["better"] == {"signed": "winner", "negative": "first|second"}
    assert "  # winner holds -1, 0, 1 in the first 3 rows: fill in which response those below 0 favour" in error
    (problem,) = map_problems(columns)
    assert problem == "dataset_columns.better.negative='first|second': Fix: first or second."
    columns["better"]["negative"] = "second"
    assert map_problems(columns) == []


def test_a_suggested_map_without_a_column_for_the_label_names_none(read: Read) -> None:
    with pytest.raises(DataError) as error:
        read([{"question": "2 + 2?", "answer_a": "4", "answer_b": "5"}])
    assert str(error.value).endswith("  better: {path: COLUMN, first: [VALUE], second: [VALUE]}\n  as_messages: true")


# --- Real files ------------------------------------------------------------------------------------------------------

real_data = pytest.mark.skipif(
    "RM_SCALE_PREFERENCE_DATA" not in os.environ,
    reason="RM_SCALE_PREFERENCE_DATA does not name the folder of real sets",
)


def _real(name: str, tmp_path: Path) -> str:
    link = tmp_path / Path(name).name
    link.symlink_to(Path(os.environ["RM_SCALE_PREFERENCE_DATA"]) / name)
    return str(link)


@real_data
@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("llmbar/Natural.json", 100, "messages"),
        ("llmbar/Adversarial_GPTInst.json", 92, "messages"),
        ("llmbar/Adversarial_GPTOut.json", 47, "messages"),
        ("llmbar/Adversarial_Manual.json", 46, "messages"),
        ("llmbar/Adversarial_Neighbor.json", 134, "messages"),
        ("topical_chat/topical_chat.json.gz", 60, "messages"),
        ("dpo_demo/dpo_en_demo.json.gz", 300, "messages"),
        ("dpo_demo/dpo_zh_demo.json.gz", 300, "messages"),
        ("hh-rlhf/harmless-base.jsonl.gz", 1894, "text"),
    ],
)
def test_real_sets_are_read_with_no_flag(name: str, count: int, kind: str, tmp_path: Path) -> None:
    groups = groups_of(_real(name, tmp_path))
    used = [group for group in groups if isinstance(group, PreferenceGroup)]
    assert len(groups) == count
    assert {group.reason for group in groups if isinstance(group, RejectedRow)} <= {"empty", "identical_responses"}
    assert len(used) >= 0.98 * count
    assert {group.is_conversational for group in used} == {kind == "messages"}


@real_data
def test_labels_of_real_sets(tmp_path: Path) -> None:
    llmbar = groups_of(_real("llmbar/Natural.json", tmp_path))
    assert [group.ranks for group in llmbar].count((0, 1)) == 42  # type: ignore[union-attr]
    replies = groups_of(_real("topical_chat/topical_chat.json.gz", tmp_path))
    assert {len(group.responses) for group in replies} == {6}  # type: ignore[union-attr]


# --- Where else rows are read ----------------------------------------------------------------------------------------


def test_planning_measures_the_groups_that_training_reads(
    tmp_path: Path, jsonl: Callable[[Path, Iterable[Any]], str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS["topical_chat"])
    mix = measure_lengths([path], None)
    assert [len(group.responses) for group in mix.groups] == [3, 3]
    columns = preset_entries()["topical_chat"]["columns"] | {"responses": "rows[*].system_id"}
    assert measure_lengths([path], None, Reading(columns=columns)).groups != mix.groups


def test_scores_beside_the_columns_of_a_set_belong_to_the_groups_of_a_models_evaluation(read: Read) -> None:
    (group,) = read(ROWS["llmbar"])
    row = {**ROWS["llmbar"][0], "reward": [0.1, 0.9]}
    assert row_keys(row, 0, preference_reader([row], "scores.jsonl", ["reward"])) == text_keys(group)


def test_a_source_with_unread_context_is_refused_with_where_it_could_go(read: Read) -> None:
    rows = [{**row, "system": "You are a pirate."} for row in ROWS["llmbar"]]
    with pytest.raises(DataError, match=r"system would not be part of .* say in dataset_columns where system belongs"):
        read(rows)
    (group,) = read(rows, ignore_columns=("system",))
    assert group.prompt == [USER]
    (group,) = read(rows, columns=preset_entries()["llmbar"]["columns"] | {"system": "system"})
    assert group.prompt == [{"role": "system", "content": "You are a pirate."}, USER]


def test_context_in_rows_that_are_put_together(read: Read) -> None:
    rows = [{**row, "instruction": "Be rude."} for row in ROWS["topical_chat"]]
    with pytest.raises(DataError, match=r"instruction would not be part of what is trained on"):
        read(rows)
    assert len(read(rows, ignore_columns=("instruction",))) == 2


def test_a_map_to_a_column_that_is_not_there(read: Read) -> None:
    columns = preset_entries()["llmbar"]["columns"] | {"prompt": "inputs"}
    with pytest.raises(DataError) as error:
        read(ROWS["llmbar"], columns=columns)
    assert "dataset_columns: " in str(error.value) and "has no inputs in any of its first 1 rows" in str(error.value)
    assert str(error.value).endswith("its columns are input, output_1, output_2, label. Fix: did you mean input?")


def test_a_map_that_fits_no_row(read: Read) -> None:
    rows = [{**row, "label": "A"} for row in ROWS["llmbar"]]
    with pytest.raises(DataError, match=r"dataset_preset=llmbar fits none of the first 1 rows \(bad_label: label='A'"):
        read(rows, preset="llmbar")


def test_the_page_of_formats_names_every_preset_and_its_maps_are_sound() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data_formats.md").read_text(encoding="utf-8")
    table = page[page.index("### Presets") : page.index("### The map")]
    first_cells = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| "))
    assert set(re.findall(r"`(\w+)`", first_cells)) == {"dataset_preset", *presets()}
    blocks = re.findall(r"```yaml\n(dataset_columns:.*?)```", page, re.S)
    maps = [yaml.safe_load(block)["dataset_columns"] for block in blocks]
    assert len(maps) == 3 and [map_problems(columns) for columns in maps] == [[], [], []]


ODD = (
    None,
    True,
    3,
    -1.5,
    float("nan"),
    "",
    "text",
    "[1, 2]",
    '{"role": "user"}',
    [],
    [None],
    [[1], "a"],
    {},
    {"role": 1},
)


def _with_odd_values(value: Any, random: Random) -> Any:
    """Return a copy of which about one part has another value, or is gone."""
    if random.random() < 0.1:
        return random.choice(ODD)
    if isinstance(value, dict):
        return {key: _with_odd_values(part, random) for key, part in value.items() if random.random() > 0.02}
    if isinstance(value, list):
        return [_with_odd_values(part, random) for part in value]
    return value


@pytest.mark.parametrize("name", sorted(ROWS))
def test_rows_of_any_values_are_used_or_refused_with_a_reason(name: str) -> None:
    random = Random(name)
    column_map = presets()[name].columns
    rows = [_with_odd_values(random.choice(ROWS[name]), random) for _ in range(150)]
    if column_map.regroups:
        made = Regrouping(column_map, lambda places: [(place, rows[place]) for place in places], len(rows))
        rows = [parse_row(raw, problem) for _, raw, problem in made.rows()]
    format = "conversational" if column_map.format == "auto" else column_map.format
    reader = RowReader(format, column_map=column_map)
    found = [read_row(reader, row, number) for number, row in enumerate(rows)]
    assert any(isinstance(one, RejectedRow) for one in found)
