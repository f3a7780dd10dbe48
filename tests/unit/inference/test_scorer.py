"""A saved model scores texts by its contract: the same as in training, whatever the batch."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from rm_scale.errors import DataError, ModelError
from rm_scale.inference.merging import merge_adapter
from rm_scale.inference.scorer import RewardScorer
from rm_scale.modeling.contract import ScoringContract
from tests.support.launching import TRAIN, read_json, read_lines, run, scores


@pytest.fixture(scope="module")
def lora_run(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run through the real entry, one process, fp32."""
    output = tmp_path_factory.mktemp("lora") / "run"
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--output_dir", str(output)]
    words += ["--use_peft", "--bf16", "false", "--eval_split_size", "12", "--max_steps", "6", "--learning_rate", "5e-3"]
    done = run([sys.executable, str(TRAIN), *words, "--sample_scores", "0", "--disable_tqdm"])
    assert done.code == 0, done.output[-3000:]
    return output


def texts(run_folder: Path, pairs_file: Path) -> tuple[list[str], list[str]]:
    rows = {row["id"]: row for row in read_lines(pairs_file)}
    order = [rows[line["id"]] for line in read_lines(run_folder / "run" / "evaluation_scores.jsonl")]
    prompts = [row["prompt"] for row in order for _ in range(2)]
    return prompts, [row[side] for row in order for side in ("chosen", "rejected")]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_scores_are_the_trainers(lora_run: Path, pairs_file: Path, batch_size: int, packed: bool) -> None:
    scorer = RewardScorer.from_pretrained(lora_run, device="cpu", packed=packed)
    given = scorer.score(*texts(lora_run, pairs_file), batch_size=batch_size)
    assert given == pytest.approx(scores(lora_run), abs=1e-5)


def test_score_spread_is_in_the_contract(lora_run: Path) -> None:
    contract = ScoringContract.load(lora_run)
    expected = scores(lora_run)
    assert contract.num_scored == len(expected) == 24
    assert contract.score_mean == pytest.approx(sum(expected) / 24, abs=1e-6)
    assert contract.score_std == pytest.approx(float(torch.tensor(expected).std(correction=0)), abs=1e-5)


def test_merged_model_is_plain_and_scores_the_same(lora_run: Path, pairs_file: Path, tmp_path: Path) -> None:
    merged = merge_adapter(lora_run, tmp_path / "merged")
    assert not (merged / "adapter_config.json").exists()
    assert read_json(merged / "config.json")["problem_type"] == "regression"
    scorer = RewardScorer.from_pretrained(merged, device="cpu")
    assert scorer.score(*texts(lora_run, pairs_file)) == pytest.approx(scores(lora_run), abs=1e-4)


def test_wrong_requests_are_explained(lora_run: Path, tiny_model: Path, tmp_path: Path) -> None:
    scorer = RewardScorer.from_pretrained(lora_run, device="cpu")
    with pytest.raises(DataError, match="2 prompts and 1 completions"):
        scorer.score(["a", "b"], ["c"])
    with pytest.raises(DataError, match=r"too long to be scored: .* max_length is 1024"):
        scorer.score(["a" * 4], [" 7" * 1100])
    with pytest.raises(ModelError, match="the scoring contract can't be read"):
        RewardScorer.from_pretrained(tiny_model)
    untrusted = tmp_path / "untrusted"
    shutil.copytree(lora_run, untrusted)
    contract = read_json(untrusted / "scoring_contract.json")
    contract["base_model"]["trust_remote_code"] = True
    (untrusted / "scoring_contract.json").write_text(json.dumps(contract))
    with pytest.raises(ModelError, match="needs Python code of its own, which is not run unasked"):
        RewardScorer.from_pretrained(untrusted)
    with pytest.raises(ModelError, match="holds no adapter to merge"):
        merge_adapter(tiny_model, tmp_path / "x")


def test_a_prompt_is_computed_once_for_all_its_completions(lora_run: Path) -> None:
    scorer = RewardScorer.from_pretrained(lora_run, device="cpu")
    assert scorer.packed
    prompts = ["What is two and two?"] * 5 + ["Say no."]
    completions = [" 4", " 5", " four", " It is 4.", " 22", " no"]
    seen: list[int] = []
    hook = scorer.model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: seen.append(ids[0].numel()))
    together = scorer.score(prompts, completions, batch_size=8)
    hook.remove()
    alone = [scorer.score([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    tokens = sum(len(scorer.encoder.encode_one(p, c)) for p, c in zip(prompts, completions, strict=True))
    assert sum(seen) == 64 < tokens  # one row, rounded up
    assert scorer.score([], []) == []


def test_impossible_requests_are_refused(lora_run: Path) -> None:
    scorer = RewardScorer.from_pretrained(lora_run, device="cpu")
    with pytest.raises(DataError, match="batch_size=0: must be at least 1"):
        scorer.score(["a"], ["b"], batch_size=0)
    with pytest.raises(DataError, match="sequence 1 has no tokens"):
        scorer.score_tokens([[1, 2, 3], []])
