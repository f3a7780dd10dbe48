"""`rm-scale eval` as a user runs it, on tiny trained reward models."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rm_scale.cli import main
from rm_scale.evaluation.benchmarks.rewardbench import SECTIONS, SUBSET_WEIGHTS
from rm_scale.evaluation.evaluated_models import short_names
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.reporting.run.model_card import BEGIN, END
from tests.support.launching import REPOSITORY, TRAIN, read_json, read_lines, run

Eval = Callable[..., int]


def train(model: Path, data: Path, output: Path, *words: str) -> Path:
    command = ["--model_name_or_path", str(model), "--dataset_path", str(data), "--output_dir", str(output)]
    command += ["--bf16", "false", "--eval_split_size", "30", "--learning_rate", "5e-3", "--max_length", "64"]
    command += ["--dataset_cache_dir", str(output.parent / "cache"), "--sample_scores", "0", "--disable_tqdm"]
    done = run([sys.executable, str(TRAIN), *command, *words])
    assert done.code == 0, done.output[-3000:]
    return output


@pytest.fixture(scope="module")
def models(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs through the real entry, a LoRA and a full one, in fp32."""
    folder = tmp_path_factory.mktemp("eval")
    return {
        "lora": train(tiny_model, pairs_file, folder / "lora", "--use_peft", "--max_steps", "8"),
        "full": train(tiny_model, pairs_file, folder / "full", "--max_steps", "2"),
    }


@pytest.fixture
def evaluate(models: dict[str, Path], tmp_path: Path) -> Eval:
    """Runs the command on the LoRA run, or on what `--model` or `--scores` says."""

    def call(*words: str, name: str = "out") -> int:
        asked = () if "--model" in words or "--scores" in words else ("--model", str(models["lora"]))
        cache = () if "--scores" in words else ("--dataset_cache_dir", str(tmp_path / "cache"))
        return main(["eval", *asked, *cache, "--output", str(tmp_path / name), "--num_resamples", "200", *words])

    return call


def result(tmp_path: Path, name: str = "out") -> Any:
    return read_json(tmp_path / name / "evaluation.json")


def rewards(path: Path) -> list[float]:
    return [reward for row in read_lines(path) for reward in row["rewards"]]


def test_the_runs_own_evaluation_is_reproduced(evaluate: Eval, models: dict[str, Path], tmp_path: Path) -> None:
    """Without data: the run's own split, and all numbers of its own record."""
    assert evaluate() == 0
    record, document = read_json(models["lora"] / "run" / "evaluation.json"), result(tmp_path)
    for key, value in record.items():
        if key != "subsets":
            assert document[key] == pytest.approx(value, abs=1e-5), key
    assert list(document["subsets"]) == list(record["subsets"]) != []
    for name, part in record["subsets"].items():
        assert document["subsets"][name] == pytest.approx(
            {**part, "accuracy_ci95": pytest.approx(part["accuracy_ci95"])}, abs=1e-5
        )
    ours, theirs = (read_lines(p / "evaluation_scores.jsonl") for p in (tmp_path / "out", models["lora"] / "run"))
    assert [row["id"] for row in ours] == [row["id"] for row in theirs]
    assert rewards(tmp_path / "out" / "evaluation_scores.jsonl") == pytest.approx(
        rewards(models["lora"] / "run" / "evaluation_scores.jsonl"), abs=1e-5
    )
    model = document["models"][0]
    assert (model["name"], model["dtype"], model["device"], model["max_length"]) == ("lora", "float32", "cpu", 64)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.html",
        "evaluation.json",
        "evaluation.md",
        "evaluation_scores.jsonl",
    ]


@pytest.mark.long
def test_the_guides_snippet_gives_the_same(
    evaluate: Eval, models: dict[str, Path], pairs_file: Path, tmp_path: Path
) -> None:
    """The Python of docs/evaluation.md, on this model and these pairs."""
    code = (REPOSITORY / "docs" / "evaluation.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("outputs/demo/assets/heldout.jsonl", str(pairs_file)).replace(
        "outputs/demo", str(models["lora"])
    )
    done = run([sys.executable, "-c", code])
    assert evaluate("--input", str(pairs_file)) == 0
    assert f"accuracy {result(tmp_path)['accuracy']:.1%}, target > 80 %" in done.output


def test_batch_size_changes_nothing(evaluate: Eval, tmp_path: Path) -> None:
    for name, size in (("one", "1"), ("many", "64")):
        assert evaluate("--batch_size", size, name=name) == 0
    one, many = (tmp_path / name / "evaluation_scores.jsonl" for name in ("one", "many"))
    assert rewards(one) == pytest.approx(rewards(many), abs=1e-5)
    first, second = result(tmp_path, "one"), result(tmp_path, "many")
    for key in ("accuracy", "num_ties", "num_pairs", "accuracy_ci95"):
        assert first[key] == second[key]


@pytest.fixture
def two_files(pairs_file: Path, tmp_path: Path) -> list[str]:
    """Pairs with a bad row among them, and rankings with ties of another format."""
    rows = read_lines(pairs_file)
    pairs, ranked = tmp_path / "pairs.jsonl", tmp_path / "ranked.jsonl"
    bad = {**rows[0], "rejected": rows[0]["chosen"]}
    pairs.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:39], bad]))
    rankings = [
        {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], " no"], "ranks": [0, 1, 1]}
        for row in rows[40:60]
    ]
    ranked.write_text("".join(json.dumps(row) + "\n" for row in rankings))
    return [str(pairs), str(ranked)]


def test_rows_of_other_columns(
    evaluate: Eval, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preset and the same map give the numbers of the file in our own columns."""
    pairs = read_lines(pairs_file)[:20]
    rows = [
        {"input": row["prompt"], "output_1": row["rejected"], "output_2": row["chosen"], "label": "2"} for row in pairs
    ]
    path, own = tmp_path / "llmbar.jsonl", tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    columns = {
        "prompt": "input",
        "responses": ["output_1", "output_2"],
        "better": {"path": "label", "first": [1], "second": [2]},
    }
    assert evaluate("--dataset_path", str(own), name="own") == 0
    assert evaluate("--dataset_path", str(path), "--dataset_columns", json.dumps(columns), name="map") == 0
    assert result(tmp_path, "map")["accuracy"] == result(tmp_path, "own")["accuracy"]
    assert result(tmp_path, "map")["loss"] == pytest.approx(result(tmp_path, "own")["loss"], abs=1e-6)
    capsys.readouterr()
    assert evaluate("--dataset_path", str(path), "--dataset_preset", "lmbar", name="wrong") == 2
    assert "dataset_preset=lmbar: did you mean llmbar?" in capsys.readouterr().err
    assert evaluate("--dataset_path", str(path), "--dataset_columns", "{prompt", name="wrong") == 2
    assert "dataset_columns='{prompt': is no map." in capsys.readouterr().err


def test_sources_subsets_and_what_was_not_used(
    evaluate: Eval, two_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--dataset_path", *two_files) == 0
    model = result(tmp_path)["models"][0]
    assert {name: part["num_pairs"] for name, part in model["sources"].items()} == {two_files[0]: 39, two_files[1]: 40}
    assert sum(part["num_pairs"] for part in model["subsets"].values()) == 39, "rankings name no subset"
    assert model["ties"]["num_label_ties"] == 20
    assert (model["data"]["rows_read"], model["data"]["rows_used"]) == (60, 59)
    (entry,) = model["data"]["rejected"]
    assert (entry["reason"], entry["count"], entry["first_rows"]) == ("identical_responses", 1, [39])
    printed = capsys.readouterr().out
    assert "identical_responses 1 (rows 39): all responses of the row are the same text" in printed
    summary = (tmp_path / "out" / "evaluation.md").read_text()
    assert "60 rows read" in summary and "identical\\_responses" not in summary and "identical_responses" in summary
    assert evaluate("--dataset_path", *two_files, "--max_rejected_share", "0.001", name="strict") == 2
    assert "1 of 60 rows can't be used" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists(), "nothing is written when too much is lost"
    assert evaluate("--dataset_path", *two_files, "--max_samples", "7", name="few") == 0
    assert result(tmp_path, "few")["models"][0]["num_groups"] == 7


def test_the_gate_sets_the_exit_code(evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--require", "accuracy>=0,ece<=1", "--require", "num_pairs==30") == 0
    assert "gate: passed, 3 of 3 hold" in capsys.readouterr().out
    subset = next(iter(result(tmp_path)["subsets"]))
    assert evaluate("--require", f"accuracy>=0,subsets.{subset}.accuracy>1", "--overwrite") == 1
    said = capsys.readouterr().out
    assert f"FAILED  subsets.{subset}.accuracy>1: it is " in said and "gate: FAILED, 1 of 2 requirements" in said
    gate = result(tmp_path)["gate"]
    assert gate["passed"] is False and [one["passed"] for one in gate["requirements"]] == [True, False]
    assert "**failed**" in (tmp_path / "out" / "evaluation.md").read_text()
    assert evaluate("--require", "acuracy>=0.8", name="typo") == 2
    assert "no metric 'acuracy' here. Fix: did you mean accuracy" in capsys.readouterr().err
    assert evaluate("--require", "subsets.nowhere.accuracy>=0.8", name="typo") == 2
    assert "Fix: did you mean" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.long
def test_gate_through_the_installed_command(models: dict[str, Path], tmp_path: Path) -> None:
    """The exit codes that a pipeline sees, in a process of its own."""
    command = [sys.executable, "-m", "rm_scale.cli", "eval", "--scores"]
    command += [str(models["lora"] / "run" / "evaluation_scores.jsonl"), "--require"]
    assert run([*command, "accuracy>=0"]).code == 0
    failed = run([*command, "accuracy>=1.1"])
    assert (failed.code, "gate: FAILED" in failed.output) == (1, True)
    assert run([*command, "accuracy"]).code == 2


def test_models_are_compared(evaluate: Eval, models: dict[str, Path], two_files: list[str], tmp_path: Path) -> None:
    assert evaluate("--dataset_path", *two_files, "--model", str(models["lora"]), "--compare", str(models["full"])) == 0
    document = result(tmp_path)
    assert [model["name"] for model in document["models"]] == ["lora", "full"]
    (comparison,), (agreement,) = document["comparisons"], document["agreement"]
    first, second = document["models"]
    assert comparison["accuracy_difference"] == pytest.approx(first["accuracy"] - second["accuracy"])
    assert comparison["num_pairs"] == agreement["num_pairs"] == 79
    wrong = agreement["second_only"] + agreement["neither"]
    assert (comparison["num_pairs"] - wrong) / 79 == pytest.approx(first["accuracy"])
    assert (tmp_path / "out" / second["scores_file"]).is_file()
    # The same from the scores that were written, without a model; the second one from a file beside a model, too.
    scores = [str(tmp_path / "out" / model["scores_file"]) for model in document["models"]]
    assert evaluate("--scores", *scores, "--require", "comparison.accuracy_difference<=1", name="again") == 0
    again = result(tmp_path, "again")
    for key in ("accuracy_difference", "accuracy_difference_ci95", "p_value", "mcnemar_p_value", "num_prompts"):
        assert again["comparisons"][0][key] == comparison[key], key
    for ours, theirs in zip(document["models"], again["models"], strict=True):
        for key in ("accuracy", "loss", "margins", "calibration", "length_bias", "ties", "subsets", "sources"):
            assert ours[key] == theirs[key], key
    assert evaluate("--dataset_path", *two_files, "--compare", scores[1], name="mixed") == 0
    mixed = result(tmp_path, "mixed")["comparisons"][0]
    assert mixed["accuracy_difference"] == pytest.approx(comparison["accuracy_difference"])


def test_models_that_can_score_different_groups(
    evaluate: Eval, models: dict[str, Path], pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each model is evaluated on what it can score; compared they are on what both can."""
    short = tmp_path / "short"
    shutil.copytree(models["full"], short)
    contract = read_json(short / "scoring_contract.json")
    lengths = sorted(max(row["lengths"]) for row in read_lines(models["lora"] / "run" / "evaluation_scores.jsonl"))
    contract["encoding"]["max_length"] = lengths[len(lengths) // 2]
    (short / "scoring_contract.json").write_text(json.dumps(contract))
    words = ["--input", str(pairs_file), "--compare", str(short)]
    assert evaluate(*words) == 2
    assert "over_long" in capsys.readouterr().err
    assert evaluate(*words, "--max_rejected_share", "1") == 0
    document = result(tmp_path)
    whole, part = (model["num_groups"] for model in document["models"])
    assert part < whole == 120
    assert document["models"][1]["data"]["rejected"][0]["reason"] == "over_long"
    (comparison,) = document["comparisons"]
    assert (comparison["num_pairs"], comparison["num_groups_left_out"]) == (part, whole - part)
    assert comparison["accuracy_second"] == pytest.approx(document["models"][1]["accuracy"])


def test_conversations_and_soft_labels(evaluate: Eval, models: dict[str, Path], tmp_path: Path) -> None:
    said = [[{"role": "assistant", "content": text}] for text in ("Hallo, wie geht's?", "Nein, danke. 🙂")]
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße? 你好"}]
    chat, soft = tmp_path / "chat.jsonl", tmp_path / "soft.jsonl"
    chat.write_text(json.dumps({"prompt": prompt, "chosen": said[0], "rejected": said[1], "margin": 2.0}) + "\n")
    labels = (0.8, 0.5, 0.1)
    rows = [{"prompt": f"{n} + 1 =", "response_0": " 2", "response_1": " no", "soft_label": n} for n in labels]
    soft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate("--dataset_path", str(chat), str(soft)) == 0
    scorer = RewardScorer.from_pretrained(models["lora"], device="cpu")
    lines = read_lines(tmp_path / "out" / "evaluation_scores.jsonl")
    assert lines[0]["rewards"] == pytest.approx(scorer.score([prompt] * 2, said), abs=1e-5)
    assert lines[0]["margin"] == 2.0
    model = result(tmp_path)["models"][0]
    assert (model["num_pairs"], model["ties"]["num_label_ties"]) == (3, 1)
    first, _, last = (line["rewards"][0] - line["rewards"][1] for line in lines[1:])
    right = [lines[0]["rewards"][0] > lines[0]["rewards"][1], first > 0, last < 0]
    assert model["accuracy"] == pytest.approx(sum(right) / 3)


def test_models_on_the_first_ones_own_data(evaluate: Eval, models: dict[str, Path], tmp_path: Path) -> None:
    assert evaluate("--model", str(models["lora"]), str(models["full"])) == 0
    document = result(tmp_path)
    assert [model["num_groups"] for model in document["models"]] == [30, 30]
    assert document["comparisons"][0]["num_groups_left_out"] == 0


def rewardbench(path: Path, num_each: int = 2, prompt: str = "3 + 4 =") -> Path:
    """Every subset, in the columns of the published file."""
    rows = [
        {
            "id": number,
            "prompt": f"{number} {prompt}",
            "chosen": " 7",
            "rejected": f" {number % 9} or so",
            "subset": name,
        }
        for number, name in enumerate(list(SUBSET_WEIGHTS) * num_each)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_benchmarks(
    evaluate: Eval, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = rewardbench(tmp_path / "rb.jsonl")
    words = ["--model", str(models["lora"]), "--output", str(tmp_path / "out"), "--benchmark", str(file)]
    assert main(["eval", *words, "--require", "benchmarks.rb.jsonl.score>=0,benchmarks.rb.jsonl.parts.Chat>=0"]) == 0
    document = result(tmp_path)
    assert document["models"] == [] and document["gate"]["passed"] is True
    found = document["benchmarks"]["lora"]["rb.jsonl"]
    assert (found["num_items"], found["num_unscored"], found["missing"]) == (2 * len(SUBSET_WEIGHTS), 0, [])
    # By hand: the scorer's rewards of each conversation, and the sections' weights.
    rows = read_lines(file)
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    scorer = RewardScorer.from_pretrained(models["lora"], device="cpu")
    chosen, rejected = (
        scorer.score(prompts, [[{"role": "assistant", "content": row[side]}] for row in rows])
        for side in ("chosen", "rejected")
    )
    right: dict[str, list[bool]] = {}
    for row, good, bad in zip(rows, chosen, rejected, strict=True):
        right.setdefault(row["subset"], []).append(good > bad)
    sections = [
        sum(SUBSET_WEIGHTS[name] * sum(right[name]) / 2 for name in names) / sum(SUBSET_WEIGHTS[name] for name in names)
        for names in SECTIONS.values()
    ]
    assert list(found["parts"].values()) == pytest.approx(sections)
    assert found["score"] == pytest.approx(sum(sections) / 4)
    printed = capsys.readouterr().out
    assert f"lora, rb.jsonl: RewardBench {found['score']:.4f}; Chat " in printed


def test_items_that_can_not_be_scored_are_lost(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = rewardbench(tmp_path / "long.jsonl", 1, "long " * 100)
    words = ["eval", "--model", str(models["lora"]), "--output", str(tmp_path / "out"), "--benchmark", str(file)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "23 of 23 items can't be scored by this model; the first is item 0: over_long" in error
    assert main([*words, "--max_rejected_share", "1"]) == 0
    found = result(tmp_path)["benchmarks"]["lora"]["long.jsonl"]
    assert (found["num_unscored"], found["score"]) == (23, 0.0)
    assert main(["eval", "--model", str(models["lora"]), "--benchmark", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_what_is_wrong_is_told_before_a_model_is_loaded(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder = tmp_path / "a_run"
    shutil.copytree(models["lora"], run_folder)
    settings = run_folder / "run" / "run_config.yaml"
    settings.write_text(settings.read_text() + "\nmax_length: [1, 2]\n")
    settings.write_text("\n".join(dict.fromkeys(settings.read_text().splitlines())).replace("max_length: 64\n", ""))
    monkeypatch.setattr(RewardScorer, "from_pretrained", None)  # whoever calls it fails
    assert main(["eval", "--model", str(run_folder)]) == 2
    assert "max_length=[1, 2]: must be" in capsys.readouterr().err
    assert main(["eval", "--scores", str(run_folder / "run" / "evaluation_scores.jsonl"), "--output", "/proc/h"]) == 2
    said = capsys.readouterr()
    assert "--output /proc/h: can't be written (No such file or directory). Fix:" in said.err and not said.out


def test_pairs_and_benchmarks_at_once(evaluate: Eval, pairs_file: Path, tmp_path: Path) -> None:
    file = rewardbench(tmp_path / "rb.jsonl", 1)
    requirement = "accuracy>=0,benchmarks.rb.jsonl.score>=0"
    assert evaluate("--input", str(pairs_file), "--benchmark", str(file), "--require", requirement) == 0
    document = result(tmp_path)
    assert document["models"][0]["num_groups"] == 120 and len(document["benchmarks"]["lora"]) == 1
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>") and "RewardBench" in page
    assert "http://" not in page.replace("http://www.w3.org/", "") and "<script" not in page


def test_model_card_keeps_what_is_not_ours(
    evaluate: Eval, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models["lora"], copy)
    card = copy / "README.md"
    text = card.read_text()
    assert "from rm_scale import RewardScorer" in text and text.count(BEGIN) == text.count(END) == 1
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    card.write_text(f"{text}\n## Ours\n\nby hand\n")
    for _ in range(2):
        assert evaluate("--model", str(copy), "--model_card", "--overwrite") == 0
        renewed = card.read_text()
        assert renewed.startswith(before) and renewed.endswith(f"{after}\n## Ours\n\nby hand\n")
        assert renewed.count(BEGIN) == renewed.count(END) == 1
        accuracy = result(tmp_path)["accuracy"]
        assert f"{accuracy:.4f}" in renewed.split(BEGIN)[1].split(END)[0]
    card.write_text("# A card without markers\n")
    assert evaluate("--model", str(copy), "--model_card", "--overwrite") == 0
    assert card.read_text().startswith("# A card without markers\n\n" + BEGIN)
    card.unlink()
    assert evaluate("--model", str(copy), "--model_card", "--overwrite") == 0
    assert card.read_text().startswith(BEGIN)
    card.write_text(f"{END}\ntext\n{BEGIN}\n")
    assert evaluate("--model", str(copy), "--model_card", "--overwrite") == 2
    assert "one of each is needed" in capsys.readouterr().err
    card.write_bytes(b"\xff\xfe\xff")
    assert evaluate("--model", str(copy), "--model_card", "--overwrite") == 2
    assert "can't be read" in capsys.readouterr().err


def test_results_are_not_replaced_unasked(evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.md").write_text("mine")
    assert evaluate() == 2
    assert "evaluation.md exists. Fix: another folder, or --overwrite." in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert evaluate(name="file") == 2
    assert "is a file. Fix: give a folder." in capsys.readouterr().err
    assert evaluate(name="file/below") == 2
    assert "can't be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch_size", "0", "--model", "nowhere"], "2 problems"),
        (["--model", "nowhere"], "--model nowhere: is no folder"),
        (["--scores", "nowhere"], "--scores nowhere: is no file"),
        (["--compare", "nowhere"], "--compare nowhere: does not exist"),
        (["--require", "accuracy"], "is not of the form METRIC>=NUMBER"),
        (["--scores", "SCORES", "--dataset_path", "x"], "there is no model to score it with"),
        (["--scores", "SCORES", "--benchmark", "x"], "scores files hold no model to score it with"),
        (["--scores", "SCORES", "--max_samples", "3"], "--max_samples: is for reading preference files"),
        (["--scores", "SCORES", "--model_card"], "there is no model whose card it could be"),
        (["--scores", "SCORES", "--model", "MODEL"], "on which data that is to be scored is not said"),
        (["--scores", "SCORES", "--compare", "MODEL"], "on which data that is to be scored is not said"),
        (["--benchmark", "x", "--max_samples", "3"], "--max_samples, --dataset_cache_dir: are for reading"),
        (["--model", "BARE"], "has no run/run_config.yaml that would say what its run was evaluated on"),
        (["--dataset_path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--num_resamples", "999999999"], "--num_resamples 999999999: must be at most 100000"),
        (["--batch_size", "9" * 30], "must be at most 1000000"),
        (["--num_resamples", "9"], "--num_resamples 9: must be at least 100"),
    ],
)
def test_bad_requests_are_explained(
    words: list[str], said: str, evaluate: Eval, models: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    places = {"MODEL": models["lora"], "BARE": bare, "SCORES": models["lora"] / "run" / "evaluation_scores.jsonl"}
    assert evaluate(*(str(places.get(word, word)) for word in words)) == 2
    error = capsys.readouterr().err
    assert said in error and "Fix:" in error
    assert not (tmp_path / "out").exists()


def test_no_models_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval"]) == 2
    assert "--model and --scores: neither is given. Fix: --model DIR" in capsys.readouterr().err


def test_a_run_without_evaluation_data(
    evaluate: Eval, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models["lora"], copy)
    settings = copy / "run" / "run_config.yaml"
    settings.write_text(settings.read_text().replace("eval_split_size: 30.0", "eval_split_size: null"))
    assert evaluate("--model", str(copy)) == 2
    assert "the run has no evaluation data of its own. Fix: --dataset_path FILE." in capsys.readouterr().err


def test_short_names() -> None:
    assert short_names([Path("outputs/a"), Path("outputs/b")]) == ["a", "b"]
    assert short_names([Path("x/final"), Path("y/final")]) == ["x/final", "y/final"]
    assert short_names([Path("a/run/evaluation_scores.jsonl"), Path("b/evaluation_scores.jsonl")]) == ["a", "b"]
    assert short_names([Path("a"), Path("a")])[0] != short_names([Path("a"), Path("a")])[1]
