"""Rankings, choices and pairs from scores: ties, reasons, order, and that other readers take what is written."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rm_scale.data.format_detection import choose_format
from rm_scale.data.formats import RowReader
from rm_scale.data.preference_group import Text
from rm_scale.inference.ranking.candidates import CandidateGroup
from rm_scale.inference.ranking.output_rows import select
from rm_scale.inference.ranking.rank_candidates import UNSCORED_REASONS, RankedGroup, rank_group
from rm_scale.inference.ranking.rank_report import RankReport
from rm_scale.inference.ranking.selection import LEFT_OUT_REASONS, NO_PAIR_REASONS, Selection


def ranked(scores: list[float | None], texts: list[str] | None = None, prompt: Text = "Q:", **more: Any) -> RankedGroup:
    completions = texts or [f" answer {place}" for place in range(len(scores))]
    problems = tuple(None if score is not None else "over_long" for score in scores)
    return rank_group(CandidateGroup(prompt, tuple(completions), problems, (3, 3), **more), scores)


def pairs_of(group: RankedGroup, **how: Any) -> list[tuple[str, str]]:
    rows = select(group, Selection("pairs", **how)).rows
    return [(row["chosen"].strip(), row["rejected"].strip()) for row in rows]


def test_exact_ties_share_a_rank_and_the_next_rank_follows() -> None:
    group = ranked([0.5, 2.0, None, 0.5, -1.0, 2.0])
    assert group.order == (1, 5, 0, 3, 4)
    assert group.ranks == (0, 0, 1, 1, 2)
    nearly = ranked([1.0, 1.0 + 1e-15])
    assert nearly.ranks == (0, 1)


def test_ranked_rows_hold_everything_in_one_order() -> None:
    group = ranked([0.1, 0.9, 0.5], ["a", "b", "c"], columns={"id": "x"}, per_completion={"gold": (1, 2, 3)})
    (row,) = select(group, Selection()).rows
    assert row == {
        "prompt": "Q:",
        "id": "x",
        "completions": ["b", "c", "a"],
        "scores": [0.9, 0.5, 0.1],
        "ranks": [0, 1, 2],
        "order": [1, 2, 0],
        "num_completions": 3,
        "gold": [2, 3, 1],
    }


def test_top_k_cuts_and_says_so_when_it_cuts_a_tie() -> None:
    group = ranked([3.0, 1.0, 2.0, 2.0], ["a", "b", "c", "d"])
    assert select(group, Selection("top", top_k=2)).rows[0]["completions"] == ["a", "c"]
    assert select(group, Selection("top", top_k=2, ties="skip")).left_out == "tied"
    assert select(group, Selection("top", top_k=3, ties="skip")).rows[0]["completions"] == ["a", "c", "d"]
    assert select(group, Selection("top", top_k=9)).rows[0]["ranks"] == [0, 1, 1, 2]
    seen = {
        select(group, Selection("top", top_k=2, ties="random", seed=s)).rows[0]["completions"][1] for s in range(20)
    }
    assert seen == {"c", "d"}


def test_best_is_one_row_and_min_score_leaves_out_by_name() -> None:
    group = ranked([0.1, 0.9], ["a", "b"], per_completion={"model": ("m", "n")}, tools=[{"type": "function"}])
    (row,) = select(group, Selection("best", min_score=0.9)).rows
    assert row == {
        "prompt": "Q:",
        "tools": [{"type": "function"}],
        "completion": "b",
        "score": 0.9,
        "place": 1,
        "num_completions": 2,
        "model": "n",
    }
    assert select(group, Selection("best", min_score=0.91)).left_out == "below_min_score"


def test_tie_policies_of_the_best() -> None:
    group = ranked([1.0, 1.0, 0.0], ["a", "b", "c"])
    assert select(group, Selection("best")).rows[0]["completion"] == "a"
    assert select(group, Selection("best", ties="skip")).left_out == "tied"
    chosen = [select(group, Selection("best", ties="random", seed=s)).rows[0]["completion"] for s in range(40)]
    assert set(chosen) == {"a", "b"}
    same_text = ranked([1.0, 1.0, 0.0], ["a", "a", "c"])
    assert select(same_text, Selection("best", ties="skip")).rows[0]["completion"] == "a"


def test_random_choices_depend_on_seed_and_prompt_only() -> None:
    first = [pairs_of(ranked([3.0, 2.0, 1.0, 0.0], prompt=f"Q{n}"), pairs="best_random", seed=4) for n in range(30)]
    again = [pairs_of(ranked([3.0, 2.0, 1.0, 0.0], prompt=f"Q{n}"), pairs="best_random", seed=4) for n in range(30)]
    other = [pairs_of(ranked([3.0, 2.0, 1.0, 0.0], prompt=f"Q{n}"), pairs="best_random", seed=5) for n in range(30)]
    assert first == again != other
    taken = Counter(pair[0][1] for pair in first)
    assert set(taken) == {"answer 1", "answer 2", "answer 3"}


def test_pair_rules() -> None:
    group = ranked([1.0, 4.0, 2.0, 2.0], ["a", "b", "c", "d"])
    assert pairs_of(group) == [("b", "a")]
    assert pairs_of(group, pairs="adjacent") == [("b", "c"), ("d", "a")]
    assert pairs_of(group, pairs="all") == [("b", "c"), ("b", "d"), ("b", "a"), ("c", "a"), ("d", "a")]
    found = select(group, Selection("pairs", pairs="all", min_margin=1.5))
    assert [row["margin"] for row in found.rows] == [2.0, 2.0, 3.0]
    assert found.no_pairs == {"tie": 1, "below_min_margin": 2}
    assert select(group, Selection("pairs", min_margin=9.0)).left_out == "no_pair"
    many = ranked([float(n) for n in range(1001)], [str(n) for n in range(1001)])
    assert select(many, Selection("pairs", pairs="all")).left_out == "too_many_completions"
    assert len(select(many, Selection("pairs", pairs="adjacent")).rows) == 1000
    renamed = select(group, Selection("pairs", margin_column="gap")).rows[0]
    assert renamed["gap"] == 3.0 and "margin" not in renamed


def test_all_pairs_are_those_of_brute_force() -> None:
    source = random.Random(0)
    for _ in range(50):
        scores = [float(source.randrange(5)) for _ in range(source.randrange(2, 7))]
        group = ranked(list(scores))
        texts = [f"answer {place}" for place in range(len(scores))]
        expected = {
            (texts[a], texts[b]) for a, b in itertools.permutations(range(len(scores)), 2) if scores[a] > scores[b]
        }
        assert set(pairs_of(group, pairs="all")) == expected
        assert len(pairs_of(group, pairs="all")) == len(expected)


def test_ties_at_either_end_of_a_pair() -> None:
    group = ranked([5.0, 5.0, 1.0, 1.0], ["a", "b", "c", "d"])
    assert pairs_of(group) == [("a", "c")]
    assert select(group, Selection("pairs", ties="skip")).left_out == "tied"
    assert select(ranked([5.0, 1.0, 1.0]), Selection("pairs", ties="skip")).left_out == "tied"
    assert {pairs_of(group, ties="random", seed=s)[0] for s in range(60)} == set(itertools.product("ab", "cd"))


def test_the_order_of_completions_changes_nothing_without_ties() -> None:
    texts, scores = ["a", "b", "c", "d"], [0.3, -1.0, 2.0, 0.4]
    for how in (
        Selection("best"),
        Selection("top", top_k=2),
        *(Selection("pairs", pairs=rule) for rule in ("best_worst", "best_random", "adjacent", "all")),  # type: ignore[arg-type]
    ):
        results = []
        for order in itertools.permutations(range(4)):
            rows = select(ranked([scores[i] for i in order], [texts[i] for i in order]), how).rows
            results.append([{k: v for k, v in row.items() if k not in {"order", "place"}} for row in rows])
        assert all(result == results[0] for result in results)


def test_nothing_to_compare_has_a_name() -> None:
    how = Selection("pairs")
    assert select(ranked([None, None]), how).left_out == "no_scored_completion"
    assert select(ranked([1.0, None]), how).left_out == "one_completion"
    assert select(ranked([1.0, 1.0], ["a", "a"]), how).left_out == "identical_completions"
    assert select(ranked([1.0, 1.0]), how).left_out == "equal_scores"
    assert select(ranked([None]), Selection("best")).left_out == "no_scored_completion"
    assert select(ranked([1.0]), Selection("best")).rows[0]["num_completions"] == 1


def test_empty_completions_can_win_but_make_no_pair() -> None:
    group = ranked([9.0, 2.0, 1.0], [" ", "b", "c"])
    assert select(group, Selection("best")).rows[0]["completion"] == " "
    found = select(group, Selection("pairs"))
    assert [(row["chosen"], row["rejected"]) for row in found.rows] == [("b", "c")]
    assert found.no_pairs == {"empty_completion": 1}
    tie_left = select(ranked([9.0, 2.0, 2.0], [" ", "b", "c"]), Selection("pairs"))
    assert tie_left.left_out == "no_pair"
    assert tie_left.no_pairs == {"empty_completion": 1, "tie": 1}
    nul = select(ranked([9.0, 2.0, 1.0], ["a\x00", "b", "c"]), Selection("pairs"))
    assert nul.rows[0]["chosen"] == "b" and nul.no_pairs == {"nul_character": 1}
    chat = [[{"role": "assistant", "content": ""}], [{"role": "assistant", "content": "x"}], []]
    assert select(ranked([3.0, 2.0, 1.0], chat), Selection("pairs")).left_out == "no_pair"  # type: ignore[arg-type]


def test_repeated_texts_make_each_pair_once() -> None:
    group = ranked([2.0, 2.0, 1.0], ["a", "a", "b"])
    assert pairs_of(group, pairs="all") == [("a", "b")]
    assert pairs_of(group, ties="skip") == [("a", "b")]


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]


def said(*texts: str) -> list[Any]:
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize("rule", ["best_worst", "best_random", "adjacent", "all"])
@pytest.mark.parametrize("chat", [False, True])
def test_pairs_are_read_back_as_preferences(rule: Any, chat: bool) -> None:
    texts = said("4", "5", "four", "vier") if chat else [" 4", " 5", " four", " vier"]
    group = ranked([2.0, -1.0, 1.0, 1.0], texts, prompt=CHAT if chat else "2 + 2 =", columns={"id": "x", "subset": "s"})
    rows = select(group, Selection("pairs", pairs=rule)).rows
    verdict = choose_format("auto", list(rows[0]), rows, "pairs.jsonl", "subset")
    assert verdict.name == ("conversational" if chat else "explicit_prompt")
    for number, row in enumerate(rows):
        read = RowReader(verdict.name).read(row, number)
        assert read.prompt == (CHAT if chat else "2 + 2 =")
        assert read.responses == (row["chosen"], row["rejected"])
        assert read.ranks == (0, 1)
        assert read.margin == pytest.approx(row["score_chosen"] - row["score_rejected"])
        assert (read.id, read.subset) == ("x", "s")


@pytest.mark.parametrize("chat", [False, True])
def test_rankings_are_read_back_as_ranked_preferences(chat: bool) -> None:
    texts = said("a", "b", "c") if chat else ["a", "b", "c"]
    group = ranked([0.5, 2.0, 0.5], texts, prompt=CHAT if chat else "Q:")
    (row,) = select(group, Selection()).rows
    verdict = choose_format("auto", list(row), [row], "ranked.jsonl", "subset")
    assert verdict.name == "ranked"
    read = RowReader("ranked").read(row, 0)
    assert list(read.responses) == [texts[1], texts[0], texts[2]]
    assert read.ranks == (0, 1, 1)


@pytest.mark.parametrize("chat", [False, True])
def test_trl_takes_the_pairs_and_the_best(chat: bool, tiny_model: Path) -> None:
    """The steps by which TRL's DPO and SFT trainers read their rows: kind, prompt, template."""
    from trl.data_utils import apply_chat_template, is_conversational, maybe_extract_prompt

    texts = said("4", "5") if chat else [" 4", " 5"]
    group = ranked([2.0, -1.0], texts, prompt=CHAT if chat else "2 + 2 =")
    (pair,) = select(group, Selection("pairs")).rows
    (best,) = select(group, Selection("best")).rows
    assert is_conversational(pair) == is_conversational(best) == chat
    assert maybe_extract_prompt(pair) == pair, "the prompt is there already"
    if chat:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        rendered = apply_chat_template({name: pair[name] for name in ("prompt", "chosen", "rejected")}, tokenizer)
        whole = tokenizer.apply_chat_template([*CHAT, *texts[0]], tokenize=False)
        assert rendered["prompt"] + rendered["chosen"] == whole
        again = apply_chat_template({name: best[name] for name in ("prompt", "completion")}, tokenizer)
        assert again["prompt"] + again["completion"] == whole


def test_report_accounts_for_every_prompt_and_completion() -> None:
    source = random.Random(1)
    report = RankReport()
    written = 0
    for _ in range(300):
        scores = [source.choice([None, 0.0, 1.0, 2.0]) for _ in range(source.randrange(1, 5))]
        texts = [source.choice(["a", "b", "c", " "]) for _ in scores]
        known = {text: score for text, score in zip(texts, scores, strict=True) if score is not None}
        group = ranked(
            [None if score is None else known[text] for score, text in zip(scores, texts, strict=True)], texts
        )
        selected = select(group, Selection("pairs", pairs="all", ties="skip", min_margin=1.5))
        written += len(selected.rows)
        report.add(group, selected)
    assert report.num_prompts == 300 == report.num_prompts_written + report.left_out.total()
    assert report.num_completions == report.num_scored + report.unscored.total()
    assert report.num_rows_written == written > 0
    assert set(report.left_out) <= set(LEFT_OUT_REASONS)
    assert set(report.unscored) <= set(UNSCORED_REASONS)
    assert set(report.no_pairs) == set(NO_PAIR_REASONS) - {"nul_character"}
    text = report.text("pairs")
    assert f"300: {report.num_prompts_written} written" in text
    assert "left out: equal_scores" in text
    assert "(rows 3, ...)" in text


def test_report_counts_ties_between_texts_not_repeats() -> None:
    report = RankReport()
    for group in (ranked([1.0, 1.0, 0.0], ["a", "b", "c"]), ranked([1.0, 1.0, 0.0], ["a", "a", "c"]), ranked([1.0])):
        report.add(group, select(group, Selection()))
    assert (report.num_tied, report.num_prompts_tied_best, report.num_repeated) == (2, 1, 1)
    assert report.noted == {"one_completion": 1}
    assert report.to_json()["noted"] == {"one_completion": 1}
