"""Reward models of other projects score as their own code does, and so do their exports in plain transformers."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rm_scale.cli import main
from rm_scale.config_parsing import config_from_dict
from rm_scale.errors import ModelError
from rm_scale.inference.export.export_model import export, plain_model
from rm_scale.inference.export.foreign_source import fit_to_plain_classifier
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.modeling.adapter_base import head_among_tensors
from rm_scale.modeling.head_layouts import READ, UNREADABLE
from rm_scale.modeling.loading import load_for_training
from rm_scale.modeling.scoring_contract import ScoringContract
from rm_scale.modeling.stored_head import head_to_start_from
from rm_scale.modeling.token_scores import score_sequences
from rm_scale.modeling.tokenizers import load_tokenizer
from rm_scale.planning.plan import make_plan
from tests.support.foreign_models import (
    SEQUENCES,
    WRITERS,
    ForeignModel,
    add_tensors,
    beaver,
    edit_config,
    llama_factory,
    llama_factory_adapter,
    nemotron,
    one_of_two_labels,
    openrlhf,
    random_head,
    sequence_classifier,
    token_logit,
    trl_adapter,
    width_of,
    written,
)
from tests.support.launching import TRAIN, run

PAGE = Path(__file__).resolve().parents[3] / "docs" / "foreign_models.md"


def scorer_of(folder: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(folder, device="cpu", allow_missing_contract=True)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="rm_scale")
    return caplog


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_scores_are_those_of_its_own_code(
    write: Callable[[Path], ForeignModel], tiny_model: Path, tmp_path: Path
) -> None:
    foreign = written(write, tiny_model, tmp_path / "model")
    expected = [foreign.home(ids) for ids in SEQUENCES]
    scorer = scorer_of(foreign.folder)
    assert scorer.score_tokens(SEQUENCES) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1, "scores that are all alike would prove nothing"
    # As an export writes it, and transformers alone loads it.
    constant = fit_to_plain_classifier(scorer.model, scorer.contract, foreign.folder)
    plain_model(scorer.model, scorer.tokenizer).save_pretrained(tmp_path / "plain")
    expected = [score - foreign.constant for score in expected]
    assert constant == foreign.constant
    assert scores_of_transformers(tmp_path / "plain") == pytest.approx(expected, abs=1e-5)


def scores_of_transformers(folder: Path) -> list[float]:
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [float(plain(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in SEQUENCES]


@pytest.mark.long
@pytest.mark.parametrize(
    "write", [openrlhf, llama_factory, llama_factory_adapter, nemotron], ids=lambda write: write.__name__
)
def test_its_export_scores_the_same_in_plain_transformers(
    write: Callable[[Path], ForeignModel], tiny_model: Path, tmp_path: Path
) -> None:
    foreign = written(write, tiny_model, tmp_path / "model")
    report = export(foreign.folder, tmp_path / "plain", dtype="float32", allow_missing_contract=True)
    assert report.constant == foreign.constant
    home = [foreign.home(ids) - foreign.constant for ids in SEQUENCES]
    assert scores_of_transformers(report.folder) == pytest.approx(home, abs=1e-5)
    contract = ScoringContract.load(report.folder)
    golden = [foreign.home(one.input_ids) - foreign.constant for one in contract.golden_scores]
    assert len(golden) >= 3 and [one.score for one in contract.golden_scores] == pytest.approx(golden, abs=1e-5)
    card = (report.folder / "README.md").read_text()
    assert ("| lower than before, all alike, by | 0.75" in card) == bool(foreign.constant)


def test_an_export_needs_to_be_told_that_there_is_no_contract(tiny_model: Path, tmp_path: Path) -> None:
    foreign = written(openrlhf, tiny_model, tmp_path / "model")
    with pytest.raises(ModelError, match=r"a reward model without scoring_contract\.json.* --no_contract"):
        export(foreign.folder, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_classifier_that_pads_with_eos_scores_as_transformers_and_is_not_exported(
    tiny_model: Path, tmp_path: Path
) -> None:
    foreign = written(sequence_classifier, tiny_model, tmp_path / "model")
    eos = json.loads((foreign.folder / "config.json").read_text())["eos_token_id"]
    edit_config(foreign.folder, pad_token_id=eos)
    assert scorer_of(foreign.folder).score_tokens([[*ids, eos] for ids in SEQUENCES]) == pytest.approx(
        [foreign.home(ids) for ids in SEQUENCES], abs=1e-5
    )
    with pytest.raises(ModelError, match=r"its padding token is EOS.*Fix: score it as it is, with --no_contract"):
        export(foreign.folder, tmp_path / "plain", allow_missing_contract=True)


def test_mean_and_deviation_are_those_of_its_own_code(
    tiny_model: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    safe_rlhf = scorer_of(written(beaver, tiny_model, tmp_path / "beaver").folder)
    assert (safe_rlhf.contract.score_mean, safe_rlhf.contract.score_std) == (1.5, 2.0)
    foreign = written(openrlhf, tiny_model, tmp_path / "openrlhf")
    edit_config(foreign.folder, normalize_reward=True)
    scorer = scorer_of(foreign.folder)
    raw = scorer.score_tokens(SEQUENCES)
    assert scorer.normalize(raw) == pytest.approx([(foreign.home(ids) - 0.5) / 2.0 for ids in SEQUENCES], abs=1e-5)
    assert "config.json asks for normalised rewards" in messages.text


def test_an_adapter_whose_base_has_moved_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    foreign = written(llama_factory_adapter, tiny_model, tmp_path / "model")
    config = foreign.folder / "adapter_config.json"
    for name, message in (
        ("/gone/model", r"its base model '/gone/model' is not there"),
        (None, r"names no base model"),
    ):
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": name}))
        with pytest.raises(ModelError, match=message):
            scorer_of(foreign.folder)
    (foreign.folder / "value_head.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no reward head.*copy it beside the adapter"):
        scorer_of(foreign.folder)


def _adapter_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the head of an adapter."""
    file = folder / "adapter_model.safetensors"
    kept = {key: one for key, one in load_file(file).items() if ".lora_" in key}
    save_file({**kept, **tensors}, file, {"format": "pt"})


def _adapter_config(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("v_head.summary", "CAUSAL_LM"),
        ("v_head", "SEQ_CLS"),
        ("value_head", None),
        ("reward_head", "SEQ_CLS"),
        ("score", "CAUSAL_LM"),
    ],
)
def test_another_projects_head_among_an_adapters_tensors_is_read(
    name: str, task: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    """Under any of the names that projects give it, whatever task the adapter says it is for."""
    foreign = written(llama_factory_adapter, tiny_model, tmp_path / "model")
    beside = foreign.folder / "value_head.safetensors"
    head = load_file(beside)
    beside.unlink()
    own = {f"base_model.model.{name}.{part}": head[f"v_head.summary.{part}"] for part in ("weight", "bias")}
    _adapter_tensors(foreign.folder, own)
    _adapter_config(foreign.folder, task_type=task, modules_to_save=[name.split(".")[0]])
    home = [foreign.home(ids) for ids in SEQUENCES]
    assert scorer_of(foreign.folder).score_tokens(SEQUENCES) == pytest.approx(home, abs=1e-5)
    del own[f"base_model.model.{name}.bias"]
    _adapter_tensors(foreign.folder, own)
    without = [one - foreign.constant for one in home]
    assert scorer_of(foreign.folder).score_tokens(SEQUENCES) == pytest.approx(without, abs=1e-5)


def test_heads_in_an_adapter_that_are_not_certain_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    foreign = written(llama_factory_adapter, tiny_model, tmp_path / "model")
    head = random_head(tiny_model)
    _adapter_tensors(foreign.folder, {"base_model.model.value_head.weight": head})
    with pytest.raises(ModelError, match=r"holds a head \(.*\.value_head\.weight\), and so does value_head"):
        scorer_of(foreign.folder)
    (foreign.folder / "value_head.safetensors").unlink()
    for tensors, message in (
        ({"v_head.weight": head, "score.weight": head + 1}, r"holds 2 reward heads .*score\.weight.*v_head\.weight"),
        ({"v_head.weight": head[:, :-1].clone()}, r"sizes \(1, 31\).* hidden states of 32"),
        ({"v_head.weight": random_head(tiny_model, 2)}, r"v_head\.weight has the sizes \(2, 32\).*one output"),
        ({"v_head.weight": head, "v_head.bias": torch.zeros(2)}, r"bias .*\(2,\)"),
        ({"v_head.summary.0.weight": head, "v_head.summary.2.weight": head + 1}, r"of the kind of GRM"),
    ):
        kept = {f"base_model.model.{key}": one for key, one in tensors.items()}
        _adapter_tensors(foreign.folder, kept)
        with pytest.raises(ModelError, match=message):
            scorer_of(foreign.folder)


def test_a_runs_own_adapter_has_its_head_under_its_own_name(lora_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(lora_run, tmp_path / "run")
    file = folder / "adapter_model.safetensors"
    own = load_file(file)
    renamed = {key.replace(".score.", ".value_head."): one for key, one in own.items()}
    assert renamed.keys() != own.keys()
    save_file(renamed, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"head is among its tensors as .*value_head\.weight"):
        RewardScorer.from_pretrained(folder, device="cpu")


def test_a_bias_among_an_adapters_tensors_is_read(tiny_model: Path, tmp_path: Path) -> None:
    foreign = written(trl_adapter, tiny_model, tmp_path / "model")
    plain = scorer_of(foreign.folder).score_tokens(SEQUENCES)
    file = foreign.folder / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.score.bias": torch.tensor([0.75])}, file, {"format": "pt"})
    assert head_among_tensors(foreign.folder)[1] == 0.75
    assert scorer_of(foreign.folder).score_tokens(SEQUENCES) == pytest.approx([one + 0.75 for one in plain], abs=1e-5)


def test_lora_on_a_head_is_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    """As PEFT saves it without a task type, the way of OpenRLHF, and of TRL's own tests."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "score"])).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"score\.lora_A\.weight is LoRA on the reward head.*Fix: .*modules_to_save"):
        scorer_of(tmp_path)


def _only_pickled(folder: Path, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Leave adapter_model.bin alone, as OpenRLHF writes it."""
    safe = folder / "adapter_model.safetensors"
    tensors = {**load_file(safe), **more}
    safe.unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    return tensors


def test_an_adapter_in_a_pickle_is_to_be_converted(tiny_model: Path, tmp_path: Path) -> None:
    foreign = written(llama_factory_adapter, tiny_model, tmp_path / "model")
    tensors = _only_pickled(foreign.folder)
    message = r"adapter_model\.bin alone, .* Fix: convert it without running code .*docs/foreign_models\.md"
    with pytest.raises(ModelError, match=message):
        scorer_of(foreign.folder)
    (foreign.folder / "adapter_model.bin").unlink()
    save_file(tensors, foreign.folder / "adapter_model.safetensors", {"format": "pt"})
    home = [foreign.home(ids) for ids in SEQUENCES]
    assert scorer_of(foreign.folder).score_tokens(SEQUENCES) == pytest.approx(home, abs=1e-5)


def test_an_adapter_in_a_pickle_without_its_head_is_not_worth_converting(tiny_model: Path, tmp_path: Path) -> None:
    """OpenRLHF's: the head is new at each start, and its LoRA alone is saved."""
    foreign = written(llama_factory_adapter, tiny_model, tmp_path / "model")
    (foreign.folder / "value_head.safetensors").unlink()
    _only_pickled(foreign.folder)
    with pytest.raises(ModelError, match=r"adapter_model\.bin: the adapter .* holds no reward head.*can't be got back"):
        scorer_of(foreign.folder)
    on_head = {"base_model.model.score.lora_A.weight": random_head(tiny_model, 4)}
    torch.save(on_head, foreign.folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin: .*score\.lora_A\.weight is LoRA on the reward head"):
        scorer_of(foreign.folder)


def test_a_pickle_that_would_run_code_is_not_read(tiny_model: Path, tmp_path: Path) -> None:
    foreign = written(llama_factory_adapter, tiny_model, tmp_path / "model")
    (foreign.folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Path("x")}, foreign.folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin: can't be read as tensors"):
        scorer_of(foreign.folder)


def test_score_rank_and_eval_take_a_foreign_folder(tiny_model: Path, tmp_path: Path) -> None:
    foreign = written(llama_factory, tiny_model, tmp_path / "model")
    texts = [{"prompt": "Why?", "completion": one} for one in (" So.", " No")]
    answers = {"prompt": "Why?", "completions": [" So.", " No"]}
    for name, rows in (("texts", texts), ("answers", [answers])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--model", str(foreign.folder), "--no_contract", "--device", "cpu"]
    scores, ranked = tmp_path / "scores.jsonl", tmp_path / "ranked.jsonl"
    assert main(["score", *model, "--input", str(tmp_path / "texts.jsonl"), "--output", str(scores)]) == 0
    scorer = scorer_of(foreign.folder)
    home = [foreign.home(scorer.encoder.encode_one("Why?", one)) for one in (" So.", " No")]
    assert [json.loads(line)["score"] for line in scores.read_text().splitlines()] == pytest.approx(home, abs=1e-5)
    assert main(["rank", *model, "--input", str(tmp_path / "answers.jsonl"), "--output", str(ranked)]) == 0
    best = json.loads(ranked.read_text().splitlines()[0])
    assert best["completions"][0] == (" So." if home[0] > home[1] else " No")
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "evaluated"
    pairs.write_text(json.dumps({"prompt": "Why?", "chosen": " So.", "rejected": " No"}) + "\n")
    assert main(["eval", *model, "--input", str(pairs), "--output", str(out), "--num_resamples", "100"]) == 0
    document = json.loads((out / "evaluation.json").read_text())
    assert document["accuracy"] == float(home[0] > home[1])


def _tensors(width: int) -> dict[str, dict[str, torch.Tensor]]:
    """Names and shapes as in the published files, by the project's name in the table; widths are the tiny model's."""
    gate = {"gating.layers.0.weight": torch.ones(8, width), "gating.logit_scale": torch.ones(1)}
    matrix = {"reward_transform_matrix": torch.eye(19)}
    return {
        "ArmoRM": {**gate, **matrix, "regression_layer.weight": torch.ones(19, width)},
        "QRM": {**gate, **matrix, "regression_layer.weight": torch.ones(19 * 5, width)},
        "URM": {"score.weight": torch.ones(10, width), "weights.fc.0.weight": torch.ones(width, width)},
        "LDL-Reward-Gemma": {
            "regression_layer.network.0.weight": torch.ones(width, width),
            "gating_layer.network.0.weight": torch.ones(width, width),
        },
        "InternLM2 reward models": {
            "v_head.weight": torch.ones(1, width),
            "model.tok_embeddings.weight": torch.ones(400, width),
        },
        "GRM": {"v_head.summary.0.weight": torch.ones(16, width), "v_head.summary.2.weight": torch.ones(1, 16)},
        "INF-ORM, WorldPM, Qwen2.5-Math-RM and -PRM": {
            "score.0.weight": torch.ones(width, width),
            "score.2.weight": torch.ones(1, width),
        },
    }


@pytest.mark.parametrize("head", UNREADABLE, ids=lambda head: head.projects)
def test_heads_that_one_layer_can_not_stand_for_are_refused_by_name(
    head: object, tiny_model: Path, tmp_path: Path
) -> None:
    projects = str(head.projects)  # type: ignore[attr-defined]
    foreign = written(llama_factory, tiny_model, tmp_path / "model")
    (foreign.folder / "value_head.safetensors").unlink()
    add_tensors(foreign.folder, _tensors(width_of(tiny_model))[projects])
    with pytest.raises(
        ModelError, match=rf"a head that can't be used here \(.*, of the kind of {re.escape(projects)}:"
    ):
        scorer_of(foreign.folder)


@pytest.mark.parametrize(
    "labels", [{"0": "LABEL_0", "1": "LABEL_1"}, {"0": "reward", "1": "score"}, {"0": "other", "7": "reward"}]
)
def test_two_labels_of_which_none_is_the_reward_are_refused(
    labels: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    foreign = written(one_of_two_labels, tiny_model, tmp_path / "model")
    edit_config(foreign.folder, id2label=labels)
    with pytest.raises(ModelError, match=r'classifier with 2 outputs .*call it so in config\.json, e\.g\. "id2label"'):
        scorer_of(foreign.folder)


def test_a_token_whose_logit_can_not_be_the_reward_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    foreign = written(token_logit, tiny_model, tmp_path / "model")
    for declared in (None, 0):
        edit_config(foreign.folder, final_logit_softcapping=30.0, reward_token_id=declared)
        with pytest.raises(ModelError, match=r"config\.json scales logits \(final_logit_softcapping\)"):
            scorer_of(foreign.folder)
    for declared in (400, "0", True):
        edit_config(foreign.folder, final_logit_softcapping=None, reward_token_id=declared)
        with pytest.raises(ModelError, match=rf"reward_token_id={declared!r}, but its language head has 400 rows"):
            scorer_of(foreign.folder)
    edit_config(foreign.folder, reward_token_id=None)
    rows = torch.zeros(400, width_of(tiny_model))
    rows[[9, 10]] = 1.0
    add_tensors(foreign.folder, {"lm_head.weight": rows})
    with pytest.raises(ModelError, match=r"zero for nearly all tokens.* but 2 rows are not zero"):
        scorer_of(foreign.folder)


def test_a_nemotron_reward_model_that_does_not_say_so_is_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    foreign = written(nemotron, tiny_model, tmp_path / "Llama-3.1-Nemotron-70B-Reward-HF")
    edit_config(foreign.folder, reward_token_id=None)
    for look in (scorer_of, lambda folder: head_to_start_from(str(folder))):
        with pytest.raises(ModelError, match=r'NVIDIA.s Nemotron reward models.*Fix: write .*"reward_token_id": 0'):
            look(foreign.folder)
    edit_config(foreign.folder, reward_token_id=0)
    assert scorer_of(foreign.folder).score_tokens(SEQUENCES) == pytest.approx(
        [foreign.home(ids) for ids in SEQUENCES], abs=1e-5
    )


def test_the_page_names_every_layout() -> None:
    page = PAGE.read_text()
    assert [one.projects for one in READ if one.projects not in page] == []
    assert [one.projects for one in UNREADABLE if one.projects not in page] == []


@pytest.mark.long
def test_training_goes_on_from_its_head(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Two steps by the real entry: a new head, or another place where it is read, would show in the first score."""
    foreign = written(llama_factory, tiny_model, tmp_path / "model")
    settings = {"model_name_or_path": foreign.folder, "dataset_path": pairs_file, "output_dir": tmp_path / "run"}
    fixed = {"bf16": "false", "max_steps": "2", "learning_rate": "1e-4", "eval_split_size": "12", "sample_scores": "0"}
    words = [word for name, value in {**settings, **fixed}.items() for word in (f"--{name}", str(value))]
    done = run([sys.executable, str(TRAIN), *words, "--disable_tqdm"])
    assert done.code == 0, done.output[-3000:]
    assert "v_head.summary.weight in value_head.safetensors, as LLaMA-Factory and TRL's value-head" in done.output
    assert "its constant (v_head.summary.bias=0.75) is left out" in done.output
    golden = ScoringContract.load(tmp_path / "run").golden_scores
    home = [foreign.home(one.input_ids) - foreign.constant for one in golden]
    parsed = config_from_dict({**{name: str(value) for name, value in settings.items()}, "bf16": False})
    plan = make_plan(parsed, 1, "cpu", check_output=False)
    loaded = load_for_training(parsed.config, plan, load_tokenizer(str(foreign.folder)))
    before = score_sequences(loaded.model, [one.input_ids for one in golden], 0, 1, "cpu")
    assert before == pytest.approx(home, abs=1e-5)
    after = [one.score for one in golden]
    assert after == pytest.approx(home, abs=1.0) and after != pytest.approx(home, abs=1e-5)
    moved = load_file(tmp_path / "run" / "model.safetensors")["score.weight"] - random_head(foreign.folder)
    assert 0 < float(moved.abs().max()) < 1e-3, "two steps of 1e-4 at most"
