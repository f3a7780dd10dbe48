"""`rm-scale rank` as a user runs it, on a tiny trained reward model."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rm_scale.cli import main
from rm_scale.data.format_detection import choose_format
from rm_scale.data.formats import RowReader
from rm_scale.inference.scoring.row_files import open_rows
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.launching import REPOSITORY, TRAIN, read_json, read_lines, run

Rank = Callable[..., int]
PROMPTS = ["Human: 9 + 3 =\nAssistant:", "Human: 2 + 5 =\nAssistant:", "Human: Which is larger, 3 or 8?\nAssistant:"]
ANSWERS = [[" 12", " It is 5.", " 12", " It is 12.", ""], [" 7", " seven", " 9 or 8", " 3"], [" 8", " 3"]]


@pytest.fixture(scope="module")
def model(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run through the real entry."""
    output = tmp_path_factory.mktemp("rank") / "run"
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--output_dir", str(output)]
    words += ["--use_peft", "--bf16", "false", "--eval_split_size", "12", "--max_steps", "4", "--learning_rate", "5e-3"]
    done = run([sys.executable, str(TRAIN), *words, "--max_length", "64", "--sample_scores", "0", "--disable_tqdm"])
    assert done.code == 0, done.output[-3000:]
    return output


@pytest.fixture(scope="module")
def scorer(model: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(model, device="cpu")


@pytest.fixture
def rank(model: Path, tmp_path: Path) -> Rank:
    """Runs the command on rows; further words as given."""

    def call(rows: list[Any], *words: str, name: str = "in.jsonl") -> int:
        source = tmp_path / name
        if rows:
            source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        scores = () if "--score_column" in words else ("--model", str(model))
        return main(["rank", *scores, "--input", str(source), "--output", str(tmp_path / "out.jsonl"), *words])

    return call


def listed() -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "completions": answers, "id": number, "gold": [float(len(text)) for text in answers]}
        for number, (prompt, answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
    ]


def single() -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": text, "id": row["id"], "gold": gold}
        for row in listed()
        for text, gold in zip(row["completions"], row["gold"], strict=True)
    ]


def test_ranking_is_by_the_scorers_scores(rank: Rank, scorer: RewardScorer, tmp_path: Path) -> None:
    assert rank(listed(), "--per_completion", "gold", "--summary", str(tmp_path / "s.json")) == 0
    rows = read_lines(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    for row, answers in zip(rows, ANSWERS, strict=True):
        alone = [scorer.score([row["prompt"]], [text])[0] for text in answers]
        assert row["scores"] == pytest.approx([alone[place] for place in row["order"]], abs=1e-5)
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert row["completions"] == [answers[place] for place in row["order"]]
        assert row["gold"] == [float(len(text)) for text in row["completions"]]
    first = rows[0]
    twice = [first["ranks"][place] for place, text in enumerate(first["completions"]) if text == " 12"]
    assert len(twice) == 2 and twice[0] == twice[1], "the same text ties exactly"
    summary = read_json(tmp_path / "s.json")
    assert (summary["num_rows"], summary["num_prompts"], summary["num_completions"]) == (3, 3, 11)
    assert summary["num_repeated"] == 1
    assert read_lines(tmp_path / "out.jsonl.left_out.jsonl") == []
    verdict = choose_format("auto", list(first), rows, "out", "subset")
    assert verdict.name == "ranked"
    assert RowReader("ranked").read(rows[1], 0).ranks == tuple(rows[1]["ranks"])


def test_layout_order_and_batch_size_change_nothing(rank: Rank, tmp_path: Path) -> None:
    """Listed or one per row, collected by a column, rows backwards, other batches: the same scores to 1e-5."""

    def scores() -> dict[tuple[str, str], float]:
        rows = read_lines(tmp_path / "out.jsonl")
        return {(r["prompt"], c): s for r in rows for c, s in zip(r["completions"], r["scores"], strict=True)}

    assert rank(listed()) == 0
    expected = scores()
    backwards = [{**row, "completions": row["completions"][::-1]} for row in reversed(listed())]
    shuffled = sorted(single(), key=lambda row: row["completion"])
    for rows, words in (
        (single(), ()),
        (shuffled, ("--group_by", "id")),
        (backwards, ()),
        (listed(), ("--max_tokens_per_batch", "1")),
        (listed(), ("--max_tokens_per_batch", "100")),
    ):
        assert rank(rows, *words, "--overwrite") == 0
        assert scores() == pytest.approx(expected, abs=1e-5)


def test_conversations(rank: Rank, scorer: RewardScorer, tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße? 你好"}]
    said = [[{"role": "assistant", "content": text}] for text in ("Hallo", "Nein, danke.", "🙂")]
    rows = [{"prompt": prompt, "completions": [*said, "Hallo"]}]
    assert rank(rows, "--output_format", "best") == 0
    (row,) = read_lines(tmp_path / "out.jsonl")
    scores = scorer.score([prompt] * 3, said)
    assert row["score"] == pytest.approx(max(scores), abs=1e-5)
    assert row["completion"] == said[scores.index(max(scores))]
    assert row["prompt"] == prompt


def test_best_and_top(rank: Rank, tmp_path: Path) -> None:
    assert rank(listed(), "--output_format", "top", "--top_k", "2") == 0
    top = read_lines(tmp_path / "out.jsonl")
    assert [len(row["completions"]) for row in top] == [2, 2, 2]
    threshold = sorted(row["scores"][0] for row in top)[1]
    assert rank(single(), "--output_format", "best", "--min_score", str(threshold), "--overwrite") == 0
    best = read_lines(tmp_path / "out.jsonl")
    assert [(r["prompt"], r["completion"], r["score"]) for r in best] == [
        (r["prompt"], r["completions"][0], pytest.approx(r["scores"][0], abs=1e-5))
        for r in top
        if r["scores"][0] >= threshold
    ]
    (lost,) = read_lines(tmp_path / "out.jsonl.left_out.jsonl")
    assert lost["reason"] == "below_min_score" and lost["place"] is None


def test_pairs_train_a_model(rank: Rank, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rank(listed(), "--output_format", "pairs", "--pairs", "all", "--min_margin", "1e-6") == 0
    told = capsys.readouterr().out
    assert "comparisons without a pair: empty_completion 1" in told
    rows = read_lines(tmp_path / "out.jsonl")
    assert f"pairs        {len(rows)} written" in told
    assert 7 <= len(rows) <= 3 + 6 + 1
    words = ["data", "--model_name_or_path", str(tiny_model), "--dataset_path", str(tmp_path / "out.jsonl")]
    assert main([*words, "--dataset_cache_dir", str(tmp_path / "cache")]) == 0
    assert f"{len(rows)} rows read as explicit_prompt, {len(rows)} used" in capsys.readouterr().err


def test_curves_and_gold(rank: Rank, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = tmp_path / "c.json"
    assert rank(listed(), "--curves", str(curves), "--gold_column", "gold", "--max_n", "4") == 0
    found = read_json(curves)
    assert (found["num_prompts"], found["max_n"], found["left_out"]) == (2, 4, {"fewer_than_max_n": 1})
    rows = read_lines(tmp_path / "out.jsonl")[:2]
    assert found["points"][0]["reward"] == pytest.approx(sum(sum(r["scores"]) / len(r["scores"]) for r in rows) / 2)
    assert found["points"][3]["reward"] >= found["points"][0]["reward"]
    assert found["points"][1]["kl_bound_nats"] == pytest.approx(0.19315, abs=1e-5)
    means = [sum(row["gold"]) / len(row["gold"]) for row in listed()[:2]]
    assert found["points"][0]["gold"] == pytest.approx(sum(means) / 2)
    assert "gold oracle" in capsys.readouterr().out


@pytest.mark.parametrize("gold", [True, False])
def test_curves_are_drawn(rank: Rank, tmp_path: Path, gold: bool) -> None:
    page = tmp_path / "curves.html"
    rows = [{**row, "scores": row["gold"]} for row in listed()]
    words = ["--gold_column", "gold"] if gold else []
    assert rank(rows, "--score_column", "scores", "--curves_page", str(page), "--max_n", "2", *words) == 0
    text = page.read_text(encoding="utf-8")
    charts = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(charts) == 2
    titles = [ElementTree.fromstring(chart).findtext("{http://www.w3.org/2000/svg}title") for chart in charts]
    assert titles == ["Expected reward over n", f"Expected {'gold score' if gold else 'reward'} over KL"]
    assert ("gold oracle" in text) == gold
    assert "3 prompts, 11 completions" in text and "<td>0.1931</td>" in text.replace(' class="number"', "")


def test_scores_of_the_input_need_no_model(rank: Rank, tmp_path: Path) -> None:
    with (tmp_path / "in.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["prompt", "completion", "s"], ["a", "x", "0.5"], ["a", "y", "1.5"], ["b", "z", "2"]])
    words = ("--score_column", "s", "--output_format", "best")
    assert rank([], *words, name="in.csv") == 0
    assert [(r["completion"], r["score"]) for r in read_lines(tmp_path / "out.jsonl")] == [("y", 1.5), ("z", 2.0)]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl.gz"])
def test_other_files_hold_the_same_pairs(rank: Rank, tmp_path: Path, suffix: str) -> None:
    """Rows of different prompts may have different columns; all are there, and are read back."""
    rows = [{**row, "scores": row["gold"]} for row in listed()]
    rows[1]["note"] = "only here"
    words = ("--score_column", "scores", "--output_format", "pairs", "--pairs", "all")
    assert rank(rows, *words) == 0
    expected = read_lines(tmp_path / "out.jsonl")
    assert rank(rows, *words, "--output", str(tmp_path / f"out{suffix}")) == 0
    with open_rows(str(tmp_path / f"out{suffix}")) as file:
        found = [row for _, row in file.read(0, 100)]
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in found] == [
        (r["prompt"], r["chosen"], r["rejected"]) for r in expected
    ]
    assert [float(r["margin"]) for r in found] == [r["margin"] for r in expected]
    assert {r["note"] for r in found if r.get("note")} == {"only here"}


def test_many_rows_go_through_in_order(rank: Rank, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "completion": c, "s": s} for n in range(1500) for c, s in (("a", n), ("b", n + 0.5))]
    assert rank(rows, "--score_column", "s", "--output_format", "best") == 0
    assert [(r["prompt"], r["completion"]) for r in read_lines(tmp_path / "out.jsonl")] == [
        (f"p{n}", "b") for n in range(1500)
    ]


def test_an_empty_file_is_named(rank: Rank, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    assert rank([], "--score_column", "s") == 2
    assert "in.jsonl: has no rows" in capsys.readouterr().err


@pytest.mark.long
def test_the_document_s_python_runs(model: Path) -> None:
    text = (REPOSITORY / "docs" / "best_of_n.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    done = run([sys.executable, "-c", block.replace("outputs/mine", str(model)) + "\nprint(ranked.order)"])
    assert done.code == 0, done.output
    assert sorted(json.loads(done.output.splitlines()[-1].replace("(", "[").replace(")", "]"))) == [0, 1, 2]


def test_over_long_completions_are_left_out_by_name(
    rank: Rank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "Human: 1 + 1 =\nAssistant:", "completions": [" 2", " 7" * 90, None]}]
    assert rank(rows) == 2
    told = capsys.readouterr().err
    assert "2 of 3 completions can't be used, and --max_rejected_share is 0.05; nothing was written" in told
    assert "--max_rejected_share 0.67" in told
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))
    assert rank(rows, "--max_rejected_share", "0.67", "--output_format", "pairs") == 0
    assert read_lines(tmp_path / "out.jsonl") == []
    assert read_lines(tmp_path / "out.jsonl.left_out.jsonl") == [
        {"row": 0, "place": 1, "reason": "over_long"},
        {"row": 0, "place": 2, "reason": "missing_key"},
        {"row": 0, "place": None, "reason": "one_completion"},
    ]
    assert "left out: one_completion 1" in capsys.readouterr().out


def test_rows_that_cannot_be_read_stop_the_command(rank: Rank, capsys: pytest.CaptureFixture[str]) -> None:
    assert rank([{"prompt": "a", "completions": ["x"]}, {"prompt": 3, "completions": ["x"]}]) == 2
    assert "1 of 2 rows can't be used" in capsys.readouterr().err


def test_a_prompt_that_comes_again_leaves_nothing_behind(
    rank: Rank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = single()
    assert rank([*rows, rows[0]]) == 2
    assert "row 11: its prompt was in row 4 already" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--score_column", "s", "--model", "m"], "--model and --score_column: both given, one is needed"),
        (["--top_k", "3"], "--top_k 3: only --output_format top reads it, and this one is ranked"),
        (["--output_format", "best", "--min_margin", "1"], "--min_margin 1.0: only --output_format pairs reads it"),
        (["--output_format", "top", "--top_k", "0"], "--top_k 0: must be at least 1"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--seed", "9" * 30], "must be at most 4294967295. Fix: --seed 4294967295 or less"),
        (["--num_resamples", "999999999"], "--num_resamples 999999999: must be at most 100000"),
        (["--max_rejected_share", "nan"], "--max_rejected_share nan: must be at least 0"),
        (["--max_tokens_per_batch", "0"], "--max_tokens_per_batch 0: must be at least 1"),
        (["--output", "x.txt"], "--output x.txt: can't be written in this form. Fix: a name ending in .jsonl"),
        (["--max_n", "4"], "--max_n 4: only --curves reads it"),
        (["--gold_column", "g"], "--gold_column g: only --curves reads it"),
        (["--output_format", "best", "--min_score", "nan"], "--min_score nan: every comparison with it fails"),
        (["--summary", "/nowhere/s.json"], "/nowhere/s.json: its folder does not exist"),
    ],
)
def test_impossible_options_are_refused(
    rank: Rank, words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rank([], *words) == 2
    assert text in capsys.readouterr().err


def test_an_output_that_exists_is_kept(rank: Rank, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    assert rank(listed()) == 2
    assert "out.jsonl: exists. Fix: another name, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_missing_model_and_neither(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(listed()[0]))
    words = ["rank", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "o.jsonl")]
    assert main(words) == 2
    assert "--model and --score_column: neither given" in capsys.readouterr().err
    assert main([*words, "--model", str(tiny_model)]) == 2
    assert "has no scalar head: not a reward model" in capsys.readouterr().err


def test_a_model_that_scores_nan_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "nan"
    shutil.copytree(model, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    head = next(name for name in tensors if "score" in name)
    save_file({**tensors, head: tensors[head] * float("nan")}, broken / "adapter_model.safetensors")
    (tmp_path / "in.jsonl").write_text(json.dumps(listed()[0]))
    words = ["rank", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "o.jsonl")]
    assert main([*words, "--model", str(broken)]) == 2
    assert "not finite" in capsys.readouterr().err
