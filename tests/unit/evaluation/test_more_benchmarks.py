"""JudgeBench, LLMBar and PPE, and benchmarks whose files hold scores: true shapes, numbers worked out by hand."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_scale.cli import main
from rm_scale.errors import DataError
from rm_scale.evaluation.benchmarks import read_benchmark, read_scored_benchmark
from rm_scale.evaluation.benchmarks.rewardbench import PRIOR_SETS, SUBSET_WEIGHTS, SUBSETS_2, ties_score
from rm_scale.evaluation.judge_columns import judge_scored_benchmarks
from tests.support.launching import read_json

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- JudgeBench ------------------------------------------------------------------------------------------------------

SOURCES = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench", "mmlu-pro-computer science")


def judgebench_rows(scores: list[list[float]] | None = None) -> Rows:
    """As the repository has them; with scores as in its outputs, where each pair is judged in both orders."""
    rows: Rows = [
        {
            "pair_id": f"81ec57f2-{number}",
            "original_id": str(number),
            "source": source,
            "question": f"What is {number}?",
            "response_model": "gpt-4o-2024-05-13",
            "response_A": "one",
            "response_B": "two",
            "label": "B>A" if number % 2 else "A>B",
        }
        for number, source in enumerate(SOURCES)
    ]
    for row, values in zip(rows, scores or [], strict=False):
        decision = "A>B" if values[0] > values[1] else "B>A"
        judgment = {"judge_model": "m", "prompt": "", "response": "", "scores": values}
        row["judge_name"] = "reward_model"
        row["judgments"] = [{"judgment": judgment, "decision": decision}, {"judgment": judgment, "decision": decision}]
    return rows


def test_judgebench(tmp_path: Path) -> None:
    benchmark = read_benchmark(write(tmp_path / "dataset=judgebench.jsonl", judgebench_rows()))
    assert benchmark.items[1].prompt == [{"role": "user", "content": "What is 1?"}]
    assert [item.completions[0] for item in benchmark.items] == ["one", "two", "one", "two", "one"]
    result = benchmark.score([[1, 0], [1, 0], [0, 0], [0, 1], [0, 1]])
    assert result["parts"] == {"Knowledge": 0.5, "Reasoning": 1.0, "Math": 0.0, "Coding": 0.0}, "a tie is wrong"
    assert (result["score"], result["missing"]) == (0.4, []), "over all pairs, not over parts"
    part = read_benchmark(write(tmp_path / "part.jsonl", judgebench_rows()[:3])).score([[1, 0]] * 3)
    assert part["score"] is None and part["missing"] == ["Coding"]


def test_judgebench_outputs_with_scores(tmp_path: Path) -> None:
    scores = [[2.0, 1.0], [3.0, 1.0], [0.5, 0.5], [0.0, 4.0], [1.5, 1.0]]
    (found,) = read_scored_benchmark(str(write(tmp_path / "o.jsonl", judgebench_rows(scores))), "auto", [])
    assert found.name == "judgments.0.judgment.scores"
    assert found.scores == [[2.0, 1.0], [1.0, 3.0], [0.5, 0.5], [4.0, 0.0], [1.5, 1.0]], "the right answer first"
    assert found.benchmark.score([list(one) for one in found.scores])["score"] == 3 / 5  # type: ignore[arg-type]


# --- LLMBar ----------------------------------------------------------------------------------------------------------

LLMBAR_FILES = {
    "Natural": "Natural.json",
    "Neighbor": "Adversarial_Neighbor.json",
    "GPTInst": "Adversarial/GPTInst/dataset.json",
    "GPTOut": "Adversarial_GPTOut.json",
    "Manual": "Adversarial_Manual.json",
}


def test_llmbar_files_as_published(tmp_path: Path) -> None:
    row = {"input": "Say hi.", "output_1": "no", "output_2": "hi", "label": 2}
    for number, (name, file) in enumerate(LLMBAR_FILES.items()):
        benchmark = read_benchmark(write(tmp_path / file, [row] * (number + 1)))
        assert [item.subset for item in benchmark.items] == [name] * (number + 1)
        assert benchmark.items[0].completions == ("hi", "no")
    together = read_benchmark(tmp_path / "*.json", "llmbar")
    assert together.score([[1, 0]] * len(together.items))["missing"] == ["GPTInst"]
    rows = [{**row, "subset": name, "label": 1 + number % 2} for number, name in enumerate(LLMBAR_FILES)]
    benchmark = read_benchmark(write(tmp_path / "all.jsonl", rows))
    result = benchmark.score([[1, 0], [1, 0], [1, 0], [0, 0], [0, 1]])
    assert result["score"] == 3 / 5 and result["parts"]["Adversarial"] == 2 / 4 and result["parts"]["Natural"] == 1.0
    nameless = write(tmp_path / "mine.jsonl", [row])
    with pytest.raises(DataError, match=r"no subset\. Fix: add a column subset \(Natural, .*Adversarial_GPTInst\.json"):
        read_benchmark(nameless)


@pytest.mark.skipif("RM_SCALE_HH_DATA" not in os.environ, reason="RM_SCALE_HH_DATA names no file beside LLMBar's")
def test_llmbars_own_files() -> None:
    folder = Path(os.environ["RM_SCALE_HH_DATA"]).parent.parent / "llmbar"
    benchmark = read_benchmark(folder / "*.json", "llmbar")
    assert len(benchmark.items) == 419
    # What a rule by length alone reaches: the natural set has little to do with it, the adversarial ones go against it.
    rewards = [[float(len(text)) for text in item.completions] for item in benchmark.items]
    result = benchmark.score(rewards)
    sizes = {name: part["num_items"] for name, part in result["subsets"].items()}
    assert sizes == {"GPTInst": 92, "GPTOut": 47, "Manual": 46, "Natural": 100, "Neighbor": 134}
    rows = json.loads((folder / "Natural.json").read_text())
    longer = [(len(row["output_1"]) > len(row["output_2"])) == (row["label"] == 1) for row in rows]
    equal = [len(row["output_1"]) == len(row["output_2"]) for row in rows]
    right = sum(one and not other for one, other in zip(longer, equal, strict=True))
    assert result["parts"]["Natural"] == right / 100 and result["parts"]["Adversarial"] < 0.5


# --- PPE -------------------------------------------------------------------------------------------------------------


def ppe_row(correct: list[bool], pairs: list[list[int]], **columns: Any) -> dict[str, Any]:
    return {
        "question_id": "q1",
        "model_name": "m",
        "prompt": "2 + 2 =",
        "scores": correct,
        "mean_score": sum(correct) / len(correct),
        "sampled_conflict_pairs": pairs,
        **{f"response_{number + 1}": f"text {number}" for number in range(len(correct))},
        **columns,
    }


def test_ppe_best_of_k(tmp_path: Path) -> None:
    rows = [ppe_row([False, True, True, False], [[0, 1], [2, 3], [0, 2]]), ppe_row([True] * 4, [])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "PPE-MMLU-Pro-Best-of-K.parquet")
    benchmark = read_benchmark(tmp_path / "PPE-MMLU-Pro-Best-of-K.parquet")
    item = benchmark.items[0]
    assert (item.completions, item.num_correct) == (("text 1", "text 2", "text 0", "text 3"), 2)
    assert item.pairs == ((0, 2), (1, 3), (1, 2))
    # In the file's order the rewards are 3, 4, 1, 1: the first pair is right, the second a tie, the third wrong.
    result = benchmark.score([[4.0, 1.0, 3.0, 1.0], [1, 2, 3, 4]])
    entry = result["subsets"]["mmlu_pro"]
    assert (entry["score"], entry["num_pairs"]) == (1 / 3, 3)
    assert entry["auc"] == pytest.approx((1 + 1 + 0 + 0.5) / 4), "4 > 3, 4 > 1, 1 < 3, 1 = 1"
    # One at random is right in 1/2 of the first question; the best of four is right: it has the reward 4.
    assert (entry["one_at_random"], entry["best_of_all"]) == pytest.approx((0.75, 1.0))
    assert (entry["largest"], entry["largest_at"]) == (1.0, 4), "of three, 3 may be the best, which is wrong"
    assert result["score"] is None and result["missing"] == ["math", "gpqa", "ifeval", "mbpp_plus"]
    with pytest.raises(DataError, match=r"sampled_conflict_pairs holds \[1, 2\], which are no right and wrong"):
        read_benchmark(write(tmp_path / "gpqa.jsonl", [ppe_row([False, True, True, False], [[1, 2]])]))


def test_ppe_results_with_numbered_scores(tmp_path: Path) -> None:
    scores = {f"score_{number + 1}": [value] for number, value in enumerate((3.0, 4.0, 1.0, 1.0))}
    row = ppe_row([False, True, True, False], [[0, 1], [2, 3], [0, 2]], **scores)
    bare = {key: value for key, value in row.items() if not key.startswith("response_")}
    (found,) = read_scored_benchmark(str(write(tmp_path / "mbpp_plus_best_of_k" / "RM.json", [bare])), "auto", [])
    assert found.scores == [[4.0, 1.0, 3.0, 1.0]] and found.benchmark.items[0].subset == "mbpp_plus"


# --- RewardBench -----------------------------------------------------------------------------------------------------


def results_table(columns: dict[str, list[Any]], subsets: list[str]) -> dict[str, Any]:
    return {"model": "m", "chat_template": "t", "id": list(range(len(subsets))), "subset": subsets, **columns}


def test_rewardbench_results(tmp_path: Path) -> None:
    """A table of columns with numbers in lists of one, as allenai/reward-bench-results has it."""
    subsets = list(SUBSET_WEIGHTS)
    columns = {"scores_chosen": [[1.0] for _ in subsets], "scores_rejected": [[0.0] for _ in subsets]}
    columns["scores_rejected"][subsets.index("alpacaeval-easy")] = [1.0]
    path = tmp_path / "rm.json"
    path.write_text(json.dumps(results_table(columns, subsets)))
    found = judge_scored_benchmarks([str(path)], "auto", [], 0.05)["scores_chosen,scores_rejected"]["rm.json"]
    assert found["parts"]["Chat"] == pytest.approx(258 / 358) and found["parts"]["Safety"] == 1.0
    assert (found["num_items"], found["num_unscored"], found["unscored"]) == (23, 0, {})


def test_unusable_scores_are_lost_and_named(tmp_path: Path) -> None:
    subsets = list(SUBSET_WEIGHTS)
    columns = {"scores_chosen": [1.0 for _ in subsets], "scores_rejected": [0.0 for _ in subsets]}
    columns["scores_chosen"][0] = math.nan
    path = tmp_path / "rm.json"
    path.write_text(json.dumps(results_table(columns, subsets)))
    found = judge_scored_benchmarks([str(path)], "auto", ["scores_chosen"], 0.05)["scores_chosen,scores_rejected"]
    assert found["rm.json"]["unscored"] == {"nan_score": {"count": 1, "first_rows": [0]}}
    assert found["rm.json"]["subsets"][subsets[0]]["score"] == 0.0
    with pytest.raises(DataError, match=r"rm\.json: 1 of 23 items have no usable scores .* item 0: nan_score: .*Fix:"):
        judge_scored_benchmarks([str(path)], "auto", [], 0.01)


def test_prior_sets_have_half_a_sections_weight(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "subset": name} for name in (*SUBSET_WEIGHTS, *PRIOR_SETS)]
    benchmark = read_benchmark(write(tmp_path / "rb.jsonl", rows))
    rewards = [[1.0, 0.0]] * len(SUBSET_WEIGHTS) + [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]] + [[0.0, 1.0]] * 3
    result = benchmark.score(rewards)
    assert result["score"] == 1.0 and result["parts"]["Prior Sets"] == 0.25
    assert result["parts"]["with Prior Sets"] == pytest.approx((4 + 0.5 * 0.25) / 4.5)


def test_ties_without_spread_as_the_released_package_counts(tmp_path: Path) -> None:
    items: list[Any] = [("ref:0", [1, 0], 1), ("tied:0", [1, 1, 0], 2), ("ref:1", [2, 0], 1), ("tied:1", [3, 2, 0], 2)]
    assert ties_score(items)["margin"] == pytest.approx((1 + math.tanh(1)) / 2)
    assert ties_score(items, counts_zero_spread=False)["margin"] == pytest.approx(math.tanh(1))
    rows = [
        {"id": name, "subset": "Ties", "num_correct": good, "scores": [[float(value)] for value in values]}
        for name, values, good in items
    ]
    rows += [
        {"id": n, "subset": name, "num_correct": 1, "scores": [1, 0, 0, 0]} for n, name in enumerate(SUBSETS_2[:5])
    ]
    path = str(write(tmp_path / "rb2.jsonl", rows))
    now, released = (
        judge_scored_benchmarks([path], format, [], 0.0)["scores"]["rb2.jsonl"]
        for format in ("auto", "rewardbench2-0.1.4")
    )
    assert now["score"] - released["score"] == pytest.approx(0.01 * (1 - math.tanh(1)) / 2 / 6)


# --- RM-Bench --------------------------------------------------------------------------------------------------------


def test_rm_bench_results(tmp_path: Path) -> None:
    """As `run_rm.py` writes them: the data with score_chosen and score_rejected beside it."""
    row = {"id": "0", "prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "chat"}
    row |= {"score_chosen": [0.1, 1.1, 2.1], "score_rejected": [[0.0], [1.0], [2.0]]}
    path = write(tmp_path / "total_dataset_Some-RM_REWORD_MODEL_20250318_172310.json", [row])
    (found,) = read_scored_benchmark(str(path), "auto", [])
    result = found.benchmark.score([list(one) for one in found.scores])  # type: ignore[arg-type]
    assert result["subsets"]["chat"]["matrix"] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    short = write(tmp_path / "short.json", [{**row, "score_chosen": [1, 2]}])
    with pytest.raises(DataError, match="ragged_scores: the row has 5 scores, not 6"):
        judge_scored_benchmarks([str(short)], "auto", [], 0.0)


# --- The command -----------------------------------------------------------------------------------------------------


def test_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pairs, benchmark, gate and page from one file of results."""
    scores = [[2.0, 1.0], [3.0, 1.0], [0.5, 0.5], [0.0, 4.0], [1.5, 1.0]]
    file = write(tmp_path / "o.jsonl", judgebench_rows(scores))
    words = [
        "eval",
        "--input",
        str(file),
        "--benchmark",
        str(file),
        "--score_column",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--require", "benchmarks.o.jsonl.score>=0.6,accuracy==0.6"]) == 0
    document = read_json(tmp_path / "out" / "evaluation.json")
    assert document["benchmarks"]["judgments.0.judgment.scores"]["o.jsonl"]["score"] == document["accuracy"] == 0.6
    assert "JudgeBench 0.6000; Knowledge 1.0000" in capsys.readouterr().out
    assert "JudgeBench" in (tmp_path / "out" / "evaluation.html").read_text()
    assert main(["eval", "--benchmark", str(file), "--score_column", "--require", "benchmarks.o.jsonl.score>0.9"]) == 1


def test_ppe_page(tmp_path: Path) -> None:
    row = ppe_row([True, True], [], score_1=1.0, score_2=2.0, domain="gpqa")
    file = write(tmp_path / "p.jsonl", [row])
    assert main(["eval", "--benchmark", str(file), "--score_column", "--output", str(tmp_path / "out")]) == 0
    entry = read_json(tmp_path / "out" / "evaluation.json")["benchmarks"]["score_1,score_2"]["p.jsonl"]
    assert entry["subsets"]["gpqa"]["score"] is None and entry["parts"] == {}
