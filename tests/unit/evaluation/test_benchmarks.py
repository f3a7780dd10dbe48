"""Public benchmarks: files in their forms, and their rules worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_scale.data.conversations import message_text
from rm_scale.errors import DataError
from rm_scale.evaluation.benchmarks import Benchmark, BenchmarkItem, read_benchmark
from rm_scale.evaluation.benchmarks.rewardbench import SECTIONS, SUBSET_WEIGHTS, SUBSETS_2, ties_score
from rm_scale.evaluation.benchmarks.rm_bench import level_accuracies


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- RewardBench -----------------------------------------------------------------------------------------------------


def rewardbench_rows() -> list[dict[str, Any]]:
    """Two rows of every subset."""
    return [
        {"prompt": f"{subset} {n}", "chosen": "good", "rejected": "bad", "subset": subset, "id": n}
        for subset in SUBSET_WEIGHTS
        for n in range(2)
    ]


def rewards_for(benchmark: Benchmark, right: dict[str, float]) -> list[list[float]]:
    """Rewards that give each subset this accuracy; a tie is wrong."""
    seen: dict[str, int] = {}
    rewards = []
    for item in benchmark.items:
        number = seen[item.subset] = seen.get(item.subset, 0) + 1
        rewards.append([1.0, 0.0] if number <= 2 * right.get(item.subset, 0.0) else [0.5, 0.5])
    return rewards


def test_rewardbench_weighs_subsets_by_their_size(tmp_path: Path) -> None:
    benchmark = read_benchmark(write(tmp_path / "rb.jsonl", rewardbench_rows()))
    assert benchmark.items[0].prompt == [{"role": "user", "content": "alpacaeval-easy 0"}]
    right = {"alpacaeval-easy": 1.0, "mt-bench-easy": 0.5, "math-prm": 1.0, "donotanswer": 0.5}
    result = benchmark.score(rewards_for(benchmark, right))
    parts = result["parts"]
    assert parts["Chat"] == pytest.approx((100 + 14) / (100 + 95 + 95 + 28 + 40))
    assert parts["Reasoning"] == pytest.approx(984 / (984 + 6 * 164)) == 0.5
    assert parts["Safety"] == pytest.approx(68 / (100 + 100 + 154 + 250 + 136))
    assert parts["Chat Hard"] == 0.0
    assert result["score"] == pytest.approx(sum(parts.values()) / 4) and result["missing"] == []
    assert result["subsets"]["mt-bench-easy"] == {"num_items": 2, "score": 0.5}


def test_rewardbench_without_a_subset_has_no_score(tmp_path: Path) -> None:
    rows = [row for row in rewardbench_rows() if row["subset"] != "hep-go"]
    benchmark = read_benchmark(write(tmp_path / "rb.jsonl", rows))
    result = benchmark.score(rewards_for(benchmark, dict.fromkeys(SUBSET_WEIGHTS, 1.0)))
    assert result["score"] is None and result["missing"] == ["Reasoning: hep-go"]
    assert set(result["parts"]) == set(SECTIONS) - {"Reasoning"} and result["parts"]["Chat"] == 1.0


def test_rewardbench_knows_its_subsets() -> None:
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(SUBSET_WEIGHTS)
    assert len(SUBSET_WEIGHTS) == 23 and sum(SUBSET_WEIGHTS.values()) == 2985 + (984 - 447)


# --- RewardBench 2 ---------------------------------------------------------------------------------------------------


def rewardbench2_rows() -> list[dict[str, Any]]:
    rows = [
        {"prompt": "q", "chosen": ["good"], "rejected": ["b1", "b2", "b3"], "num_correct": 1, "subset": name, "id": n}
        for n, name in enumerate(SUBSETS_2[:-1])
    ]
    for number in range(2):
        common = {"prompt": "colour?", "subset": "Ties"}
        rows += [
            {**common, "chosen": ["red"], "rejected": ["dog"], "num_correct": 1, "id": f"ref:{number}"},
            {**common, "chosen": ["red", "blue"], "rejected": ["dog"], "num_correct": 2, "id": f"tied:{number}"},
        ]
    return rows


def test_rewardbench2_takes_the_best_of_four_and_splits_ties(tmp_path: Path) -> None:
    benchmark = read_benchmark(write(tmp_path / "rb2.jsonl", rewardbench2_rows()))
    rewards: list[list[float]] = [
        [2, 1, 0, 0],  # Factuality: right
        [1, 1, 0, 0],  # Precise IF: two share the top
        [0, 0, 0, 0],  # Math: all four do
        [1, 2, 0, 0],  # Safety: wrong
        [5, 1, 1, 1],  # Focus: right
    ]
    rewards += [[3, 0], [3.0, 2.5, 0.0], [0.2, 0.0], [2.0, 1.0, 1.5]]
    result = benchmark.score(rewards)
    # ref: both right. tied: the first right, the second not (1.0 < 1.5). Gaps of tied: 2.5 and -0.5, of ref 3 and 0.2;
    # spreads 0.5 and 1. Preferred and hard: the first only.
    margin = (math.tanh(2.5 / 0.5 - 1) + math.tanh(-0.5 / 1 - 1)) / 2
    ties = 0.3 * 0.5 + 0.3 * 1.0 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margin
    assert result["parts"] == pytest.approx(
        {"Factuality": 1.0, "Precise IF": 0.5, "Math": 0.25, "Safety": 0.0, "Focus": 1.0, "Ties": ties}
    )
    assert result["score"] == pytest.approx((2.75 + ties) / 6)
    assert result["subsets"]["Ties"]["num_items"] == 4


def test_ties_whose_answers_score_alike() -> None:
    perfect = ties_score([("ref:0", [1.0, 0.0], 1), ("tied:0", [1.0, 1.0, 0.0], 2)])
    assert perfect["score"] == pytest.approx(1.01) and perfect["margin"] == 1.0
    nothing = ties_score([("ref:0", [0.0, 0.0], 1), ("tied:0", [0.0, 0.0, 0.0], 2)])
    assert nothing["score"] == 0.0
    alone = ties_score([("tied:0", [1.0, 0.5, 0.0], 2)])
    assert (alone["tied"], alone["ref"], alone["preferred"]) == (1.0, 0.0, 0.0), "its reference is not there"


# --- RM-Bench --------------------------------------------------------------------------------------------------------


def test_rm_bench_compares_all_styles(tmp_path: Path) -> None:
    domains = ("chat", "math", "code", "safety-refuse", "safety-response")
    rows = [
        {"id": n, "prompt": "q", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"], "domain": domain}
        for n, domain in enumerate(domains)
    ]
    (tmp_path / "rm.json").write_text(json.dumps(rows))
    benchmark = read_benchmark(tmp_path / "rm.json")
    style_lover = [0.1, 1.1, 2.1, 0.0, 1.0, 2.0]  # right wins at equal polish, polish wins otherwise
    rewards = [style_lover] * 3 + [[3, 3, 3, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    result = benchmark.score(rewards)
    assert result["subsets"]["chat"]["matrix"] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    third = pytest.approx(2 / 3)
    assert (result["parts"]["chat"], result["parts"]["safety"]) == (third, 0.5), "a tie is wrong"
    assert result["parts"]["easy"] == pytest.approx((3 * 1 + 0.5) / 4)
    assert result["parts"]["hard"] == pytest.approx((3 * 0 + 0.5) / 4)
    assert result["score"] == pytest.approx((3 * 2 / 3 + 0.5) / 4)
    part = read_benchmark(write(tmp_path / "part.jsonl", rows[:4])).score(rewards[:4])
    assert part["score"] is None and part["missing"] == ["safety-response"]


def test_rm_bench_pools_the_items_of_safety(tmp_path: Path) -> None:
    """Three items of one part and one of the other: by items, not by parts, as the authors' `compute_accuracy` does."""
    domains = ["chat", "math", "code", *["safety-refuse"] * 3, "safety-response"]
    rows = [
        {"id": n, "prompt": "q", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"], "domain": domain}
        for n, domain in enumerate(domains)
    ]
    always, never = [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]
    polish = [0.1, 1.1, 2.1, 0.0, 1.0, 2.0]  # easy 1, normal 1, hard 0
    rewards = [always, never, polish, always, always, polish, never]
    result = read_benchmark(write(tmp_path / "total_dataset.jsonl", rows)).score(rewards)
    # Of the four items: easy and normal (1 + 1 + 1 + 0) / 4, hard (1 + 1 + 0 + 0) / 4. By parts it were 1/2 and 1/3.
    assert result["parts"]["safety"] == pytest.approx((3 / 4 + 3 / 4 + 2 / 4) / 3)
    assert result["parts"]["easy"] == pytest.approx((1 + 0 + 1 + 3 / 4) / 4) == result["parts"]["normal"]
    assert result["parts"]["hard"] == pytest.approx((1 + 0 + 0 + 2 / 4) / 4)
    assert result["score"] == pytest.approx((1 + 0 + 2 / 3 + 2 / 3) / 4)
    parts = {name: (part["num_items"], part["score"]) for name, part in result["subsets"].items()}
    assert parts["safety-refuse"] == (3, pytest.approx((1 + 1 + 2 / 3) / 3)) and parts["safety-response"] == (1, 0.0)
    whole = [{**row, "domain": str(row["domain"]).partition("-")[0]} for row in rows]
    assert read_benchmark(write(tmp_path / "x.jsonl", whole)).score(rewards)["score"] == pytest.approx(result["score"])


# The subsets as the repository's files have them: those of other benchmarks, some with one of RewardBench's names.
RM_BENCH_FILES = {
    "chat": "alpacaeval",
    "code": "bigcode/humanevalpack",
    "math": "math",
    "safety-refuse": "xstest-should-refuse",
    "safety-response": "xstest-should-respond",
}


def test_rm_bench_files_as_published(tmp_path: Path) -> None:
    for number, (domain, subset) in enumerate(RM_BENCH_FILES.items()):
        row = {"id": number, "subset": subset, "prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
        (tmp_path / f"{domain}_filtered.json").write_text(json.dumps([row]))
    for format in ("auto", "rm_bench"):
        chat = read_benchmark(tmp_path / "chat_filtered.json", format).score([[1, 1, 1, 0, 0, 0]])
        assert (chat["name"], chat["parts"]) == ("RM-Bench", {"chat": 1.0})
    together = read_benchmark(tmp_path / "*_filtered.json")
    assert [item.subset for item in together.items] == list(RM_BENCH_FILES)
    assert together.score([[1, 1, 1, 0, 0, 0]] * 5)["score"] == 1.0


def test_a_refused_file_is_not_sent_in_a_circle(tmp_path: Path) -> None:
    row = {"subset": "alpacaeval", "prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
    nameless = write(tmp_path / "mine.jsonl", [row])
    for format in ("auto", "rm_bench"):
        with pytest.raises(DataError, match=r"no domain\. Fix: add a column domain \(chat, .*chat_filtered\.json"):
            read_benchmark(nameless, format)
    with pytest.raises(DataError, match=r"have no num_correct\. Fix: --benchmark_format rm_bench"):
        read_benchmark(nameless, "rewardbench2")
    with pytest.raises(DataError, match=r"have no subset\. Fix: add the columns"):
        read_benchmark(write(tmp_path / "y.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}]), "rewardbench")


def test_levels_of_a_matrix() -> None:
    assert level_accuracies([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]]) == pytest.approx(
        {"easy": (0.4 + 0.7 + 0.8) / 3, "normal": 0.5, "hard": (0.2 + 0.3 + 0.6) / 3}
    )


# --- Files -----------------------------------------------------------------------------------------------------------


def test_parquet_is_read_as_published(tmp_path: Path) -> None:
    rows = [{**row, "id": str(row["id"])} for row in rewardbench2_rows()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rb2.parquet")
    assert read_benchmark(tmp_path / "rb2.parquet").name == "RewardBench 2"


TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def in_a_row(prompt: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": "x", "rejected": "y", "subset": "math-prm", "id": "1"}


@pytest.mark.parametrize(
    "prompt",
    [
        TURNS,
        json.dumps(TURNS),
        [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS],
        [{"from": "human" if turn["role"] == "user" else turn["role"], "value": turn["content"]} for turn in TURNS],
        [{**turn, "name": None, "tool_calls": None} for turn in TURNS],
    ],
    ids=["messages", "JSON text", "text parts", "ShareGPT", "nulls"],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_prompt_is_read_as_in_training_data(tmp_path: Path, kind: str, prompt: Any) -> None:
    path = tmp_path / f"rb.{kind}"
    if kind == "jsonl":
        write(path, [in_a_row(prompt)])
    else:
        pq.write_table(pa.Table.from_pylist([in_a_row(prompt)]), path)
    benchmark = read_benchmark(path)
    (item,) = benchmark.items
    assert isinstance(item.prompt, list)
    assert [with_text(message) for message in item.prompt] == TURNS
    assert benchmark.items_for(False)[0].prompt == "s\n\na\n\nb\n\nc\n\n"


def with_text(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": message_text(message)}


def test_a_text_prompt_is_a_users_turn_as_published(tmp_path: Path) -> None:
    texts = ["q", "", " [1, 2]", '{"a": 1}', "[INST] x [/INST]", "a\n\nHuman: b"]
    items = read_benchmark(write(tmp_path / "rb.jsonl", [in_a_row(text) for text in texts])).items
    assert [item.prompt for item in items] == [[{"role": "user", "content": text}] for text in texts]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (TURNS[1:2] * 2, r"row 0: .*bad_conversation: message 1 is user after user: .* Fix: correct its prompt"),
        (TURNS[:3], r"bad_conversation: message 3 is assistant after assistant: expected user"),
        (json.dumps(TURNS[1:2] * 2), r"bad_conversation: message 1 is user after user"),
        ([], r"empty: prompt has no messages"),
        ([{"content": "a"}], r"bad_conversation: prompt\[0\] has no role"),
        ("[{'role': 'user', 'content': 'a'}]", r"prompt begins like a list of messages, but isn't JSON"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"has a content part of type 'image'"),
    ],
)
def test_a_prompt_that_is_no_conversation_is_refused(tmp_path: Path, prompt: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_benchmark(write(tmp_path / "rb.jsonl", [in_a_row(prompt)]))


@pytest.mark.parametrize(
    ("rows", "format", "message"),
    [
        ([{"chosen": "a", "rejected": "b"}], "auto", r"is no benchmark that is known here .* Fix: --dataset_path"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], "rewardbench", "its rows have no subset"),
        (
            [{"prompt": "q", "chosen": "a", "rejected": "b", "subset": "math"}],
            "auto",
            r"row 0: is no rewardbench row \(subset='math' is not one of alpacaeval-easy",
        ),
        (
            [{"prompt": 1, "chosen": "a", "rejected": "b", "subset": "math-prm"}],
            "auto",
            "prompt is a number, neither text nor a list of messages",
        ),
        (
            [{"prompt": "q", "chosen": ["a"], "rejected": ["b"], "num_correct": 2, "subset": "Math"}],
            "auto",
            "num_correct=2 with 1 chosen",
        ),
        (
            [{"prompt": "q", "chosen": ["a"], "rejected": ["b"], "num_correct": 1, "subset": "Ties", "id": "7"}],
            "auto",
            "id='7' of a Ties row is not ref:N or tied:N",
        ),
        (
            [{"prompt": "q", "chosen": ["a"], "rejected": ["b"] * 3, "domain": "chat"}],
            "auto",
            "chosen holds 1 texts, not 3",
        ),
        ([{"prompt": "q", "chosen": ["a", 3, "b"], "rejected": ["b"] * 3, "domain": "chat"}], "auto", "holds no texts"),
        ([], "auto", "rows|readable|empty"),
    ],
)
def test_files_that_are_none(tmp_path: Path, rows: list[dict[str, Any]], format: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_benchmark(write(tmp_path / "x.jsonl", rows), format)


def test_rewards_must_fit(tmp_path: Path) -> None:
    benchmark = read_benchmark(write(tmp_path / "rb.jsonl", rewardbench_rows()))
    with pytest.raises(DataError, match="1 rewards for 46 items"):
        benchmark.score([[1.0, 0.0]])


def test_models_without_a_template_read_text() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    item = BenchmarkItem(messages, ("x", "y"), 1, "s", "1")
    assert item.as_text().prompt == "a\n\nb\n\nc\n\n"
    assert item.as_text().as_text() == item.as_text()
