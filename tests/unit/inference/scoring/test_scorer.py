"""A saved model scores texts by its contract: the same as in training, whatever the batch."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import pipeline

from rm_scale.errors import DataError, ModelError, UserError
from rm_scale.inference.export.merge_adapter import merge_adapter
from rm_scale.inference.scoring.scorer import RewardScorer, padded_batches
from rm_scale.modeling.scoring_contract import ScoringContract
from tests.support.launching import read_json, scores
from tests.support.tiny_runs import evaluated_texts

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def lora_scorer(lora_run: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(lora_run, device="cpu")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_scores_are_the_trainers(lora_run: Path, pairs_file: Path, batch_size: int, packed: bool) -> None:
    scorer = RewardScorer.from_pretrained(lora_run, device="cpu", packed=packed)
    given = scorer.score(*evaluated_texts(lora_run, pairs_file), batch_size=batch_size)
    assert given == pytest.approx(scores(lora_run), abs=1e-5)


def test_single_texts_and_lists(lora_scorer: RewardScorer) -> None:
    both = lora_scorer.score(["2 + 2 =", "2 + 2 ="], [" 4", " 5"])
    assert lora_scorer.score("2 + 2 =", [" 4", " 5"]) == pytest.approx(both, abs=1e-5)
    one = lora_scorer.score("2 + 2 =", " 5")
    assert isinstance(one, float) and one == pytest.approx(both[1], abs=1e-5)
    assert one == pytest.approx(lora_scorer.score_one("2 + 2 =", " 5"), abs=1e-6)
    user, answer = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    other = {"role": "assistant", "content": "5"}
    talk = lora_scorer.score([[user], [user]], [[answer], [other]])
    assert lora_scorer.score([user], [[answer], [other]]) == pytest.approx(talk, abs=1e-5)
    assert lora_scorer.score([user], [answer]) == pytest.approx(talk[0], abs=1e-5)
    assert lora_scorer.score([user], [answer], normalized=True) == pytest.approx(
        lora_scorer.normalize(talk)[0], abs=1e-4
    )
    assert isinstance(lora_scorer.score("", "alone"), float) and isinstance(lora_scorer.score([], [answer]), float)


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
    assert scorer.score(*evaluated_texts(lora_run, pairs_file)) == pytest.approx(scores(lora_run), abs=1e-4)


def test_wrong_requests_are_explained(lora_run: Path, tiny_model: Path, tmp_path: Path) -> None:
    scorer = RewardScorer.from_pretrained(lora_run, device="cpu")
    with pytest.raises(DataError, match="2 prompts and 1 completions"):
        scorer.score(["a", "b"], ["c"])
    with pytest.raises(DataError, match=r"too long to be scored: .* max_length is 1024"):
        scorer.score(["a" * 4], [" 7" * 1100])
    with pytest.raises(DataError, match=r"2 prompts and a single completion\. Fix: a completion per prompt"):
        scorer.score(["a", "b"], "c")
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
    assert sum(seen) < tokens
    assert scorer.score([], []) == []


def test_impossible_requests_are_refused(lora_run: Path) -> None:
    scorer = RewardScorer.from_pretrained(lora_run, device="cpu")
    with pytest.raises(DataError, match="batch_size=0: must be at least 1"):
        scorer.score(["a"], ["b"], batch_size=0)
    with pytest.raises(DataError, match=r"max_tokens=0: must be at least 1\. Fix: tokens per forward pass"):
        scorer.score(["a"], ["b"], max_tokens=0)
    with pytest.raises(DataError, match="sequence 1 has no tokens"):
        scorer.score_tokens([[1, 2, 3], []])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_a_budget_of_tokens_changes_nothing(lora_run: Path, pairs_file: Path, packed: bool, max_tokens: int) -> None:
    scorer = RewardScorer.from_pretrained(lora_run, device="cpu", packed=packed)
    given = scorer.score(*evaluated_texts(lora_run, pairs_file), max_tokens=max_tokens)
    assert given == pytest.approx(scores(lora_run), abs=1e-5)


def test_order_and_neighbours_change_nothing(full_run: Path, pairs_file: Path) -> None:
    scorer = RewardScorer.from_pretrained(full_run, device="cpu")
    prompts, completions = evaluated_texts(full_run, pairs_file)
    given = scorer.score(prompts, completions)
    backwards = scorer.score([*prompts[::-1], "x"], [*completions[::-1], " y" * 300], batch_size=3)
    assert backwards[:-1][::-1] == pytest.approx(given, abs=1e-5)
    assert scorer.score_one(prompts[5], completions[5]) == pytest.approx(given[5], abs=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_identical_texts_are_computed_once_and_tie(full_run: Path, pairs_file: Path, packed: bool) -> None:
    scorer = RewardScorer.from_pretrained(full_run, device="cpu", dtype="bfloat16", packed=packed)
    prompts, completions = evaluated_texts(full_run, pairs_file)
    seen: list[int] = []
    hook = scorer.model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: seen.append(ids[0].numel()))
    once = scorer.score(prompts, completions, batch_size=3)
    tokens = sum(seen)
    twice = scorer.score([*prompts, *prompts[::-1]], [*completions, *completions[::-1]], batch_size=3)
    hook.remove()
    assert twice[:24] == twice[:23:-1] == once
    assert sum(seen) == 2 * tokens


@pytest.mark.parametrize(("batch_size", "max_tokens"), [(3, None), (1, None), (8, 20), (8, 1)])
def test_padded_batches_hold_each_sequence_once(batch_size: int, max_tokens: int | None) -> None:
    lengths = [5, 9, 1, 9, 2, 7, 3]
    batches = list(padded_batches(lengths, batch_size, max_tokens))
    assert sorted(place for batch in batches for place in batch) == list(range(7))
    for batch in batches:
        longest = max(lengths[place] for place in batch)
        assert len(batch) == 1 or (longest * len(batch) <= max_tokens if max_tokens else len(batch) <= batch_size)


def test_normalized_scores_have_mean_0_and_deviation_1(lora_run: Path, pairs_file: Path) -> None:
    scorer = RewardScorer.from_pretrained(lora_run, device="cpu")
    given = torch.tensor(scorer.score(*evaluated_texts(lora_run, pairs_file), normalized=True))
    assert abs(float(given.mean())) < 1e-4 and float(given.std(correction=0)) == pytest.approx(1, abs=1e-4)
    scorer.contract = replace(scorer.contract, score_mean=None, score_std=None)
    with pytest.raises(ModelError, match=r"no score_mean and score_std .* Fix: raw scores, or train with eval_split"):
        scorer.score(["a"], ["b"], normalized=True)


def test_a_text_that_can_not_be_scored_is_named(lora_run: Path) -> None:
    scorer = RewardScorer.from_pretrained(lora_run, device="cpu")
    with pytest.raises(
        DataError, match=r"completion 1: a text is too long to be scored: \d+ tokens, max_length is 1024"
    ):
        scorer.score(["a", "b"], ["c", " 7" * 1100])


@given(prompt=st.text(max_size=60), completion=st.text(max_size=60))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_has_a_finite_score_or_a_reason(lora_scorer: RewardScorer, prompt: str, completion: str) -> None:
    try:
        score = lora_scorer.score_one(prompt, completion)
    except UserError as error:
        assert "Fix:" in str(error)
    else:
        assert math.isfinite(score)


# --- What is no reward model -----------------------------------------------------------------------------------------


def test_folders_that_are_no_reward_model_are_named(
    tiny_model: Path, lora_run: Path, full_run: Path, tmp_path: Path
) -> None:
    cases = {
        "nowhere": r"there is no such folder\. Fix: give a run's output directory",
        "empty": r"is empty\. Fix: give a run's output directory",
        "stray": r"holds no config\.json or adapter_config\.json",
        "classifier": r"is a classifier with 2 outputs, a reward model has 1",
        "headless": r"the adapter \(task_type CAUSAL_LM\) holds no reward head, .* task_type SEQ_CLS",
        "half": r"holds adapter_config\.json but no adapter_model\.safetensors",
        "broken": r"config\.json: can't be read",
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "notes.txt").write_text("x")
    shutil.copytree(full_run, tmp_path / "classifier", ignore=shutil.ignore_patterns("run", "*.safetensors"))
    config = read_json(full_run / "config.json")
    config["id2label"], config["label2id"] = {"0": "bad", "1": "good"}, {"bad": 0, "good": 1}
    config.pop("num_labels", None)
    (tmp_path / "classifier" / "config.json").write_text(json.dumps(config))
    for name in ("headless", "half"):
        shutil.copytree(lora_run, tmp_path / name, ignore=shutil.ignore_patterns("run"))
    tensors = load_file(lora_run / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if ".score" not in name}, tmp_path / "headless" / ADAPTER)
    adapter = {**read_json(lora_run / "adapter_config.json"), "task_type": "CAUSAL_LM"}
    (tmp_path / "headless" / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "half" / ADAPTER).unlink()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for name, message in cases.items():
        with pytest.raises(ModelError, match=message):
            RewardScorer.from_pretrained(tmp_path / name)
    with pytest.raises(ModelError, match=r"is a LlamaForCausalLM, which has no scalar head: not a reward model\. Fix:"):
        RewardScorer.from_pretrained(tiny_model)


def test_a_plain_reward_model_is_scored_when_asked(
    full_run: Path, lora_run: Path, pairs_file: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(full_run, plain, ignore=shutil.ignore_patterns("run", "scoring_contract.json"))
    with pytest.raises(
        ModelError, match=r"a reward model without scoring_contract\.json, .* Fix: copy .*--no_contract"
    ):
        RewardScorer.from_pretrained(plain)
    scorer = RewardScorer.from_pretrained(plain, device="cpu", allow_missing_contract=True)
    assert scorer.score(*evaluated_texts(full_run, pairs_file)) == pytest.approx(scores(full_run), abs=1e-5)
    adapter = tmp_path / "adapter"
    shutil.copytree(lora_run, adapter, ignore=shutil.ignore_patterns("run", "scoring_contract.json"))
    with pytest.raises(ModelError, match=r"a reward model without scoring_contract\.json"):
        RewardScorer.from_pretrained(adapter)
    scorer = RewardScorer.from_pretrained(adapter, device="cpu", allow_missing_contract=True)
    assert scorer.score(*evaluated_texts(lora_run, pairs_file)) == pytest.approx(scores(lora_run), abs=1e-5)


def test_a_plain_model_without_padding_gets_one(full_run: Path, tmp_path: Path) -> None:
    """As many are published: pad is EOS, nothing in the config; the token that is added is new to the embedding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    plain = tmp_path / "plain"
    model = AutoModelForSequenceClassification.from_pretrained(full_run)
    model.config.pad_token_id = None
    model.save_pretrained(plain)
    AutoTokenizer.from_pretrained(full_run).save_pretrained(plain)
    for file in ("tokenizer.json", "tokenizer_config.json"):  # no unused token is left under a known name
        text = (plain / file).read_text(encoding="utf-8")
        (plain / file).write_text(text.replace("<pad>", "<gap>").replace("<|endoftext|>", "<odd>"), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.pad_token, tokenizer.bos_token = tokenizer.eos_token, None
    tokenizer.save_pretrained(plain)
    texts = (["a", "a", "b c"], [" b", " c and more of it", " d"])
    known = RewardScorer.from_pretrained(full_run, device="cpu").score(*texts)
    for packed in (True, False):
        scorer = RewardScorer.from_pretrained(plain, device="cpu", allow_missing_contract=True, packed=packed)
        assert scorer.tokenizer.pad_token == "<|rm_scale_pad|>"
        assert scorer.contract.pad_token_id >= read_json(plain / "config.json")["vocab_size"]
        assert scorer.score(*texts) == pytest.approx(known, abs=1e-5)


def test_a_model_trained_in_another_type_than_saved_says_so(
    full_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(full_run, copy, ignore=shutil.ignore_patterns("run", "checkpoint-*"))
    replace(ScoringContract.load(copy), compute_dtype="bfloat16").save(copy)
    logging.getLogger("rm_scale").propagate = True  # a command run earlier in this process may have taken it over
    RewardScorer.from_pretrained(full_run, device="cpu")
    RewardScorer.from_pretrained(copy, device="cpu", dtype="bfloat16")
    assert "was trained in" not in caplog.text
    with caplog.at_level(logging.INFO, "rm_scale"):
        RewardScorer.from_pretrained(copy, device="cpu")
    assert "was trained in bfloat16 and is scored in float32: no score depends on its" in caplog.text
    assert "--dtype bfloat16" in caplog.text and "WARNING" not in caplog.text


def test_bf16_weights_are_scored_in_fp32_on_a_processor(full_run: Path, pairs_file: Path, tmp_path: Path) -> None:
    """As ZeRO saves: the backbone in bfloat16, the head in fp32, and a config that names float32."""
    copy = tmp_path / "copy"
    shutil.copytree(full_run, copy, ignore=shutil.ignore_patterns("run", "checkpoint-*"))
    tensors = load_file(copy / "model.safetensors")
    rounded = {name: value if name == "score.weight" else value.bfloat16() for name, value in tensors.items()}
    save_file(rounded, copy / "model.safetensors", {"format": "pt"})
    replace(ScoringContract.load(copy), dtype="bfloat16", compute_dtype="bfloat16").save(copy)
    exact = RewardScorer.from_pretrained(copy, device="cpu")
    assert next(exact.model.parameters()).dtype == torch.float32
    saved = RewardScorer.from_pretrained(copy, device="cpu", dtype="saved")
    assert next(saved.model.parameters()).dtype == torch.bfloat16
    prompts, completions = evaluated_texts(full_run, pairs_file)
    alone = [exact.score_one(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
    assert exact.score(prompts, completions) == pytest.approx(alone, abs=1e-5)
    in_bf16 = saved.score(prompts, completions)
    assert in_bf16 == pytest.approx(alone, abs=5e-2) and in_bf16 != pytest.approx(alone, abs=1e-5)
    rewarder = pipeline("text-classification", model=str(copy), function_to_apply="none")
    texts = [exact.encoder.render(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
    assert [rewarder(text)[0]["score"] for text in texts] == pytest.approx(alone, abs=1e-5), "the shortest snippet"


def test_another_template_is_refused_unless_forced(full_run: Path) -> None:
    own = ScoringContract.load(full_run).encoding["chat_template"]
    if own is not None:
        RewardScorer.from_pretrained(full_run, device="cpu", chat_template=own)
    other = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ModelError, match=r"is not the one of training .* Fix: leave it out, or --force template"):
        RewardScorer.from_pretrained(full_run, device="cpu", chat_template=other)
    forced = RewardScorer.from_pretrained(full_run, device="cpu", chat_template=other, force_template=True)
    rendered = forced.encoder.render([{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}])
    assert rendered == "ab"


def test_the_front_door() -> None:
    import rm_scale

    assert rm_scale.RewardScorer is RewardScorer
    with pytest.raises(AttributeError, match="no attribute 'Scorer'"):
        _ = rm_scale.Scorer
