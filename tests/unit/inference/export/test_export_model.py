"""Exports: plain folders that transformers alone scores the same, or none at all."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rm_scale.batching.padding import pad_right
from rm_scale.errors import CheckpointError, DiskError, ModelError
from rm_scale.inference.export import export_model, onnx_export
from rm_scale.inference.export.export_model import cause_of_drift, export
from rm_scale.inference.export.onnx_export import write_onnx
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.modeling.scoring_contract import ScoringContract
from rm_scale.output_paths import list_files
from tests.support.launching import read_json, scores
from tests.support.tiny_runs import evaluated_texts


@pytest.fixture(scope="module")
def exported(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LoRA run, merged."""
    return export(lora_run, tmp_path_factory.mktemp("export") / "model", max_shard_size="100KB").folder


def test_an_adapter_becomes_a_plain_model(exported: Path, lora_run: Path, pairs_file: Path) -> None:
    assert not (exported / "adapter_config.json").exists() and (exported / "model.safetensors.index.json").exists()
    config = read_json(exported / "config.json")
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["problem_type"] == "regression"
    assert list(config["id2label"]) == ["0"] and config["pad_token_id"] != config["eos_token_id"]
    # What CrossEncoder and vLLM, and what transformers 4 read: raw scores, in the type of the file.
    raw = "torch.nn.modules.linear.Identity"
    assert config["sentence_transformers"] == {"activation_fn": raw}
    assert config["sbert_ce_default_activation_function"] == raw
    assert config["dtype"] == config["torch_dtype"] == ScoringContract.load(exported).dtype
    scorer = RewardScorer.from_pretrained(exported, device="cpu")
    assert scorer.score(*evaluated_texts(lora_run, pairs_file)) == pytest.approx(scores(lora_run), abs=1e-4)
    contract, trained = ScoringContract.load(exported), ScoringContract.load(lora_run)
    assert contract.score_mean == trained.score_mean and contract.encoding == trained.encoding
    assert len(contract.golden_scores) == len(trained.golden_scores) > 0
    assert "library_name: transformers" in (exported / "README.md").read_text()
    assert [path.name for path in exported.parent.iterdir()] == ["model"], "nothing is left beside it"


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_type(full_run: Path, tmp_path: Path, dtype: str) -> None:
    report = export(full_run, tmp_path / "model", dtype=dtype)
    assert report.largest_difference <= report.tolerance and report.num_probes >= 5
    tensors = load_file(report.folder / "model.safetensors")
    head = tensors.pop("score.weight")
    assert head.dtype == torch.float32 and {str(t.dtype) for t in tensors.values()} == {f"torch.{dtype}"}
    assert ScoringContract.load(report.folder).dtype == dtype
    assert report.num_bytes == sum(file.stat().st_size for file in report.folder.iterdir())


def test_an_export_that_scores_differently_is_not_left_behind(
    full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_model.scores_of_plain_transformers

    def damaged(folder: Path, *args: object) -> dict[str, list[float]]:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["score.weight"] = tensors["score.weight"] * 1.5
        save_file(tensors, file, metadata={"format": "pt"})
        return real(folder, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(export_model, "scores_of_plain_transformers", damaged)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("kept")
    kept = list_files(tmp_path / "model").name
    with pytest.raises(CheckpointError, match=r"the export scores .* where its source scores .*report this"):
        export(full_run, tmp_path / "model", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine.txt", kept]


def test_a_merge_that_moves_scores_a_little_is_refused_in_any_type(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding to bfloat16 would hide it."""
    real = export_model.plain_model

    def careless(*args: object) -> object:
        plain = real(*args)  # type: ignore[arg-type]
        plain.model.layers[0].self_attn.q_proj.weight.data += 0.01
        return plain

    monkeypatch.setattr(export_model, "plain_model", careless)
    with pytest.raises(
        CheckpointError, match=r"the export scores .* where its source scores .* \(allowed difference 0\.0001"
    ):
        export(lora_run, tmp_path / "model", dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_an_export_that_can_not_be_loaded(full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = export_model.scores_of_plain_transformers

    def broken(folder: Path, *args: object) -> dict[str, list[float]]:
        (folder / "config.json").write_text("{}")
        return real(folder, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(export_model, "scores_of_plain_transformers", broken)
    with pytest.raises(CheckpointError, match=r"transformers can't load or score the export .*has been removed"):
        export(full_run, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_targets_that_can_not_be(full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"is the model itself .* Fix: another folder"):
        export(full_run, full_run)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match=r"exists\. Fix: --overwrite, or another --output"):
        export(full_run, tmp_path / "file")
    with pytest.raises(ModelError, match=r"there is no folder .*gone\. Fix: make it first"):
        export(full_run, tmp_path / "gone" / "model")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(export_model.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(DiskError, match=r"needs about .* GB, 0\.0 GB are free\. Fix: free disk space"):
        export(full_run, tmp_path / "model")


@pytest.mark.long
def test_a_text_that_the_export_would_read_differently(full_run: Path, tmp_path: Path) -> None:
    """Tokenizer files that turn the probes' texts into other ids than the contract's."""
    probes = export_model.make_probes(
        (scorer := RewardScorer.from_pretrained(full_run, device="cpu", packed=False)).model,
        scorer.tokenizer,
        scorer.contract,
    )
    texts = [probe for probe in probes if probe.text is not None]
    wrong = [replace(texts[0], text=str(texts[1].text))]
    with pytest.raises(CheckpointError, match=r"pipeline gives .* for the text of probe 0, its token ids"):
        export_model.scores_of_plain_transformers(full_run, wrong, ["float32"])


@pytest.mark.long
def test_a_type_that_moves_scores_too_far(full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_model, "allowed_drift", lambda *_: 1e-9)
    with pytest.raises(CheckpointError, match=r"in bfloat16 scores move by up to .* Fix: --dtype float32"):
        export(full_run, tmp_path / "model", dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []


# --- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_onnx(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "model"
    shutil.copytree(exported, folder)
    # Without golden scores, as a model of another library has none: texts are enough.
    replace(ScoringContract.load(folder), golden_scores=[]).save(folder)
    assert write_onnx(folder) < 1e-4
    assert not list(folder.glob(".onnx*"))
    return folder


def test_onnx_runtime_scores_batches_of_any_shape(with_onnx: Path) -> None:
    import onnxruntime

    scorer = RewardScorer.from_pretrained(with_onnx, device="cpu")
    session = onnxruntime.InferenceSession(str(with_onnx / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["input_ids", "attention_mask"]
    prompts = ["What is 2 + 2?", "", "Name a colour.", "x" * 200]
    completions = [" 4", "Just a text, of many more words than the others have.", " 🟥 rouge", ""]
    ids = [scorer.encoder.encode_one(p, c) for p, c in zip(prompts, completions, strict=True)]
    assert [(output.name, output.shape[1:]) for output in session.get_outputs()] == [("logits", [1])]
    for size in (1, 2, 4):
        padded = pad_right(ids[-size:], scorer.contract.pad_token_id)
        (found,) = session.run(["logits"], {name: padded[name].numpy() for name in ("input_ids", "attention_mask")})
        assert found.shape == (size, 1)
        assert found[:, 0].tolist() == pytest.approx(scorer.score(prompts[-size:], completions[-size:]), abs=1e-4)


@pytest.mark.long
def test_onnx_that_scores_differently_is_not_kept(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    before = sorted(path.name for path in folder.iterdir())
    real = onnx_export._trace

    def damaged(scores: torch.nn.Module, *args: object) -> None:
        weight = scores.head.weight.data
        weight *= 1.5
        real(scores, *args)  # type: ignore[arg-type]
        weight /= 1.5

    monkeypatch.setattr(onnx_export, "_trace", damaged)
    with pytest.raises(CheckpointError, match=r"ONNX Runtime's scores are off by .*It was not kept\. Fix: leave out"):
        write_onnx(folder)

    def endless(self: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return input_ids.float().mean() if int(input_ids.sum()) > 3 else attention_mask

    monkeypatch.setattr(onnx_export, "_trace", real)
    monkeypatch.setattr(onnx_export._Scores, "forward", endless)
    with pytest.raises(ModelError, match=r"LlamaModel can't be written as ONNX \(.*Fix: leave out --onnx"):
        write_onnx(folder)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"--onnx needs onnxruntime\. Fix: pip install 'rm-scale\[onnx\]'"):
        write_onnx(folder)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("quantization", "compute", "is_merged", "told"),
    [
        ({"quant_type": "nf4"}, "bfloat16", True, "beside 4-bit weights"),
        (None, "bfloat16", True, "the adapter is added to weights of bfloat16"),
        (None, "float32", True, "training computed in float32, the export's weights are bfloat16"),
        (None, "bfloat16", False, "in other kernels"),
    ],
)
def test_why_scores_move_is_told(
    quantization: dict[str, str] | None, compute: str, is_merged: bool, told: str, full_run: Path
) -> None:
    contract = ScoringContract.load(full_run)
    base = replace(contract.base_model, quantization=quantization)
    moved = replace(contract, base_model=base, compute_dtype=compute)
    assert told in cause_of_drift(moved, "bfloat16", is_merged)
