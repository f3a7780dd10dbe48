"""The rows of each benchmark: which columns they have, their texts, and which of the answers are the good ones.

A row is read for a model, which scores its texts, or together with scores that were made elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rm_scale.data.conversations import as_text, check_answered
from rm_scale.data.preference_group import Message
from rm_scale.evaluation.benchmarks.benchmark import Benchmark, BenchmarkItem
from rm_scale.evaluation.benchmarks.best_of_k import PPE_DOMAINS, PPECorrectness
from rm_scale.evaluation.benchmarks.pair_benchmarks import JUDGE_SOURCES, LLMBAR_SETS, JudgeBench, LLMBar
from rm_scale.evaluation.benchmarks.rewardbench import (
    PRIOR_SETS,
    SUBSET_WEIGHTS,
    SUBSETS_2,
    RewardBench,
    RewardBench2,
    RewardBench2Released,
)
from rm_scale.evaluation.benchmarks.rm_bench import DOMAIN_NAMES, STYLES, RMBench
from rm_scale.evaluation.score_columns.score_values import ScoreColumns, UnusableScores, first_problem

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Answers:
    """Which of a row's answers are good.

    Attributes:
        subset, id: see `BenchmarkItem`.
        good: places of the good answers among all, as the file has them.
        total: number of answers.
        pairs: places of answers that are compared, the good one first, where the benchmark says which.
    """

    subset: str
    id: str
    good: tuple[int, ...]
    total: int
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """Places of all answers, the good ones first."""
        return (*self.good, *(place for place in range(self.total) if place not in self.good))

    def item(self, prompt: str | list[Message], texts: list[str]) -> BenchmarkItem:
        """Return the item with its texts, the good ones first."""
        place_of = {place: rank for rank, place in enumerate(self.order)}
        pairs = tuple((place_of[one], place_of[other]) for one, other in self.pairs)
        completions = tuple(texts[place] for place in self.order)
        return BenchmarkItem(prompt, completions, len(self.good), self.subset, self.id, pairs)


@dataclass(frozen=True)
class BenchmarkFormat:
    """How one benchmark's rows are read.

    Attributes:
        build: the benchmark.
        columns: what a row needs, texts included; `scored_columns` where scores are given.
        texts: returns all answers of a row.
        answers: returns which are good, of a row with its number, and how many answers there are (`None`: not known).
        prompt: the column of the prompt.
    """

    build: type[Benchmark]
    columns: tuple[str, ...]
    scored_columns: tuple[str, ...]
    texts: Callable[[Row], list[str]]
    answers: Callable[[Row, int, int | None], Answers]
    prompt: str = "prompt"

    def item(self, row: Row, number: int) -> BenchmarkItem:
        """Return a row for a model to score.

        Raises:
            RejectedRow: its prompt is no conversation.
            KeyError, TypeError, ValueError: it is no row of this benchmark.
        """
        texts = self.texts(row)
        return self.answers(row, number, len(texts)).item(_conversation(row[self.prompt]), texts)

    def scored_item(
        self, row: Row, number: int, columns: ScoreColumns
    ) -> tuple[BenchmarkItem, list[float] | UnusableScores]:
        """Return a row without texts, and its scores in the item's order or why they can't be used.

        Raises:
            KeyError, TypeError, ValueError: it is no row of this benchmark.
        """
        try:
            parts = columns.parts(row)
        except UnusableScores as problem:
            return _without_texts(self.answers(row, number, None)), problem
        scores = [score for part in parts for score in part]
        try:
            answers = self.answers(row, number, len(scores))
        except UnusableScores as problem:
            return _without_texts(self.answers(row, number, None)), problem
        if columns.says_chosen:  # the file's own order does not matter then
            answers = replace(answers, good=tuple(range(len(parts[0]))))
        problem_of_one = first_problem(scores)
        found = [float(scores[place]) for place in answers.order] if problem_of_one is None else problem_of_one  # type: ignore[arg-type]
        return _without_texts(answers), found


def _without_texts(answers: Answers) -> BenchmarkItem:
    return answers.item("", [""] * answers.total)


# --- Parts of rows ---------------------------------------------------------------------------------------------------


def _conversation(prompt: Any) -> list[Message]:
    """Make messages of a prompt: a user's text, as published, or messages in any form that training reads.

    Raises:
        RejectedRow: it is neither, or no conversation to which an assistant answers.
    """
    found = as_text(prompt, "prompt")
    messages: list[Message] = [{"role": "user", "content": found}] if isinstance(found, str) else found
    check_answered([*messages, {"role": "assistant"}])
    return messages


def _texts(row: Row, column: str, count: int | None = None) -> list[str]:
    value = row[column]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{column} holds no texts")
    if count is not None and len(texts) != count:
        raise ValueError(f"{column} holds {len(texts)} texts, not {count}")
    return texts


def _known(name: Any, names: tuple[str, ...] | Mapping[str, Any], column: str) -> str:
    if name not in names:
        raise ValueError(f"{column}={name!r} is not one of {', '.join(names)}")
    return str(name)


def _fixed(total: int | None, expected: int) -> int:
    if total not in {None, expected}:
        raise UnusableScores("ragged_scores", f"the row has {total} scores, not {expected}")
    return expected


def _chosen_first(row: Row, counts: tuple[int | None, int | None] = (None, None)) -> list[str]:
    return [*_texts(row, "chosen", counts[0]), *_texts(row, "rejected", counts[1])]


# --- One benchmark each ----------------------------------------------------------------------------------------------


def _rewardbench(row: Row, number: int, total: int | None) -> Answers:
    subset = _known(row["subset"], (*SUBSET_WEIGHTS, *PRIOR_SETS), "subset")
    return Answers(subset, str(row.get("id", number)), (0,), _fixed(total, 2))


def _rewardbench2(row: Row, number: int, total: int | None) -> Answers:
    subset = _known(row["subset"], SUBSETS_2, "subset")
    good = int(row["num_correct"])
    if isinstance(row.get("chosen"), list) and good != len(row["chosen"]):
        raise ValueError(f"num_correct={row['num_correct']} with {len(row['chosen'])} chosen")
    name = str(row.get("id", number))
    if subset == "Ties":
        kind, colon, _ = name.partition(":")
        if not colon or kind not in {"ref", "tied"}:
            raise ValueError(f"id={name!r} of a Ties row is not ref:N or tied:N")
    if good < 1:
        raise ValueError(f"num_correct={good} is not at least 1")
    if total is not None and total <= good:
        raise UnusableScores("ragged_scores", f"the row has {total} scores, of which {good} are of good answers")
    return Answers(subset, name, tuple(range(good)), good + 1 if total is None else total)


def _rm_bench(row: Row, number: int, total: int | None) -> Answers:
    domain = _known(row["domain"], DOMAIN_NAMES, "domain")
    return Answers(domain, str(row.get("id", number)), tuple(range(STYLES)), _fixed(total, 2 * STYLES))


def _judgebench(row: Row, number: int, total: int | None) -> Answers:
    source = str(row["source"])
    part = next((name for name, prefix in JUDGE_SOURCES.items() if source.startswith(prefix)), None)
    if part is None:
        raise ValueError(f"source={source!r} begins with none of {', '.join(JUDGE_SOURCES.values())}")
    if row["label"] not in {"A>B", "B>A"}:
        raise ValueError(f"label={row['label']!r} is neither A>B nor B>A")
    good = 0 if row["label"] == "A>B" else 1
    return Answers(part, str(row.get("pair_id", number)), (good,), _fixed(total, 2))


def _llmbar(row: Row, number: int, total: int | None) -> Answers:
    subset = _known(row["subset"], LLMBAR_SETS, "subset")
    if row["label"] not in {1, 2}:
        raise ValueError(f"label={row['label']!r} is neither 1 nor 2")
    return Answers(subset, str(row.get("id", number)), (int(row["label"]) - 1,), _fixed(total, 2))


def _ppe(row: Row, number: int, total: int | None) -> Answers:
    correct = row["scores"]
    if not isinstance(correct, list) or not all(isinstance(value, bool | int) for value in correct):
        raise ValueError("scores must be a list of true and false, one per response")
    _fixed(total, len(correct))
    good = tuple(place for place, value in enumerate(correct) if value)
    pairs = []
    for pair in row.get("sampled_conflict_pairs") or []:
        one, other = (int(place) for place in pair)
        if not (0 <= one < len(correct) and 0 <= other < len(correct)) or bool(correct[one]) == bool(correct[other]):
            raise ValueError(f"sampled_conflict_pairs holds {pair}, which are no right and wrong response")
        pairs.append((one, other) if correct[one] else (other, one))
    name = f"{row.get('question_id', number)}:{row.get('model_name', '')}"
    domain = _known(row["domain"], PPE_DOMAINS, "domain")
    return Answers(domain, name, good, len(correct), tuple(pairs))


def _ppe_texts(row: Row) -> list[str]:
    return [text for number in range(len(row["scores"])) for text in _texts(row, f"response_{number + 1}", 1)]


def _pair(first: str, second: str) -> Callable[[Row], list[str]]:
    return lambda row: [*_texts(row, first, 1), *_texts(row, second, 1)]


_REWARDBENCH2 = BenchmarkFormat(
    RewardBench2,
    ("prompt", "chosen", "rejected", "subset", "num_correct"),
    ("subset", "num_correct", "id"),
    _chosen_first,
    _rewardbench2,
)
BENCHMARKS = {
    "rewardbench": BenchmarkFormat(
        RewardBench,
        ("prompt", "chosen", "rejected", "subset"),
        ("subset",),
        lambda row: _chosen_first(row, (1, 1)),
        _rewardbench,
    ),
    "rewardbench2": _REWARDBENCH2,
    "rewardbench2-0.1.4": replace(_REWARDBENCH2, build=RewardBench2Released),
    "rm_bench": BenchmarkFormat(
        RMBench,
        ("prompt", "chosen", "rejected", "domain"),
        ("domain",),
        lambda row: _chosen_first(row, (STYLES, STYLES)),
        _rm_bench,
    ),
    "judgebench": BenchmarkFormat(
        JudgeBench,
        ("question", "response_A", "response_B", "label", "source"),
        ("label", "source"),
        _pair("response_A", "response_B"),
        _judgebench,
        "question",
    ),
    "llmbar": BenchmarkFormat(
        LLMBar,
        ("input", "output_1", "output_2", "label", "subset"),
        ("label", "subset"),
        _pair("output_1", "output_2"),
        _llmbar,
        "input",
    ),
    "ppe": BenchmarkFormat(
        PPECorrectness,
        ("prompt", "response_1", "scores", "domain"),
        ("scores", "domain"),
        _ppe_texts,
        _ppe,
    ),
}
"""Formats by the name that `--benchmark_format` takes."""
