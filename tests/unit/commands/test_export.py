"""`rm-scale export` as it is typed: a checkpoint, a dry run, an export that exists, and options that make no sense."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rm_scale.cli import main
from rm_scale.errors import ModelError
from rm_scale.inference.export.earlier_export import take_place
from rm_scale.inference.export.hub_upload import plan_upload
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.modeling.scoring_contract import ScoringContract
from rm_scale.output_paths import foreign_files, list_files
from tests.support.launching import read_json, run
from tests.support.tiny_runs import train_tiny

PROMPTS, COMPLETIONS = ["What is 2 + 2?", "Say it."], [" 4", " Grüße 🦀"]


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half-way through a LoRA run."""
    folder = tmp_path_factory.mktemp("run") / "run"
    words = ["--use_peft", "--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "2"]
    return train_tiny(tiny_model, pairs_file, folder, *words) / "checkpoint-3"


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "model"
    assert main(["export", "--model", str(checkpoint), "--output", str(output)]) == 0
    return output


def test_a_checkpoint_becomes_a_plain_model(exported: Path, checkpoint: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "scoring_contract.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin")) or name.startswith(("adapter", "run"))]
    config = read_json(exported / "config.json")
    assert config["problem_type"] == "regression" and list(config["id2label"]) == ["0"]
    before = RewardScorer.from_pretrained(checkpoint, device="cpu").score(PROMPTS, COMPLETIONS)
    last = RewardScorer.from_pretrained(checkpoint.parent, device="cpu").score(PROMPTS, COMPLETIONS)
    found = RewardScorer.from_pretrained(exported, device="cpu").score(PROMPTS, COMPLETIONS)
    assert found == pytest.approx(before, abs=1e-4)
    assert found != pytest.approx(last, abs=1e-3), "the checkpoint's scores, not the run's"


def test_its_card_tells_what_it_is(exported: Path, checkpoint: Path, tiny_model: Path) -> None:
    card = (exported / "README.md").read_text()
    runs = (checkpoint.parent / "README.md").read_text()
    assert "library_name: peft" in runs and f"base_model: {tiny_model}" in runs and "| all | 12 |" in runs
    assert "library_name: transformers" in card and "base_model:" not in card and "| base model | llama |" in card
    assert "Not evaluated: this is checkpoint-3 of the run." in card and "| all | 12 |" not in card
    assert "| made of | an adapter, merged into its unquantised base |" in card
    assert card.count("## Export") == 1 and "| weights | float32, head float32 |" in card
    assert not [file.name for file in exported.glob("*.json") if str(tiny_model) in file.read_text()]
    assert plan_upload(exported, "me/model").warnings == ()


def test_what_exists_is_replaced_only_when_asked(
    exported: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "old.txt").write_text("old")
    list_files(output)
    words = ["export", "--model", str(checkpoint), "--output", str(output), "--max_shard_size", "1MB"]
    assert main(words) == 2
    assert "exists. Fix: --overwrite, or another --output" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    said = capsys.readouterr().out
    assert f"{output}: " in said and "texts score the same in plain transformers (largest difference" in said
    assert {path.name for path in output.iterdir()} == {path.name for path in exported.iterdir()}
    assert list(tmp_path.iterdir()) == [output]


def test_what_is_put_there_while_it_runs_stays(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model"

    def put() -> None:
        while not any(path.name.startswith(".model.exporting-") for path in tmp_path.iterdir()):
            time.sleep(0.01)
        target.mkdir()
        (target / "thesis.txt").write_text("mine")

    thread = threading.Thread(target=put)
    thread.start()
    assert main(["export", "--model", str(checkpoint), "--output", str(target)]) == 2
    thread.join()
    assert "model: exists. Fix: --overwrite, or another --output. It was put there while the export ran" in (
        capsys.readouterr().err
    )
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "model",
        "model/thesis.txt",
    ]


def test_only_an_empty_folder_or_an_earlier_export_gives_way(tmp_path: Path) -> None:
    def finished() -> Path:
        partial = tmp_path / "partial"
        partial.mkdir(exist_ok=True)
        (partial / "model.safetensors").write_text("new")
        list_files(partial)
        return partial

    target = tmp_path / "model"
    take_place(finished(), target, False, [])
    shutil.rmtree(target)
    target.mkdir()
    take_place(finished(), target, False, [])
    take_place(finished(), target, True, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    (target / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, overwrite in (
        (target, True),
        (target, False),
        *((tmp_path / n, b) for n in ("file", "link") for b in (0, 1)),
    ):
        with pytest.raises(ModelError, match=r"Fix: .* It was put there while the export ran"):
            take_place(finished(), place, bool(overwrite), [])
    assert (target / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "model", "partial"]


def test_a_full_disk_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """By a limit on the size of files, which fails as a full disk does."""
    words = ["export", "--model", str(checkpoint), "--output", str(tmp_path / "model")]
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    code = f"{limited}from rm_scale.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run([sys.executable, "-c", code, *words])
    assert done.code == 2, done.output
    assert f"output={tmp_path / 'model'}: could not be written (" in done.output, done.output
    assert "Fix: free disk space, --dtype bfloat16, or another disk." in done.output
    assert list(tmp_path.iterdir()) == []


def test_onnx_and_a_dry_run_for_an_export_that_exists(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    words = ["export", "--model", str(folder), "--onnx", "--push_to_hub", "me/model"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"{folder}: 4 golden scores found again in plain transformers" in said
    assert f"{folder / 'model.onnx'}: the same scores in ONNX Runtime (largest difference" in said
    assert "would be published\nto me/model: " in said and "MB  model.onnx" in said
    assert said.rstrip().endswith(
        f"nothing was sent. To send it: rm-scale export --model {folder} --push_to_hub me/model --yes"
    )
    contract = ScoringContract.load(folder)
    wrong = [replace(golden, score=golden.score + 1) for golden in contract.golden_scores]
    replace(contract, golden_scores=wrong).save(folder)
    assert main(words) == 2
    assert "the saved model scores differently" in capsys.readouterr().err


def test_engines_for_an_export_that_exists(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    assert main(["export", "--model", str(folder), "--engine", "vllm", "--engine", "sglang"]) == 0
    said = capsys.readouterr().out
    template = folder / "vllm_chat_template.jinja"
    assert "vllm: checked by the rules of vLLM 0.32.0\n  architecture: LlamaForSequenceClassification runs as" in said
    assert f"    vllm serve {folder} --runner pooling --dtype float32 --chat-template {template} " in said
    assert "  raw score, as data[0].score:\n    curl -s http://localhost:8000/score -H 'Content-Type: " in said
    assert f"    python -m sglang.launch_server --model-path {folder} --is-embedding --dtype float32\n" in said
    assert set(read_json(folder / "rm_scale_export.json")["engines"]) == {"vllm", "sglang"}
    assert plan_upload(folder, "me/model").warnings == () and foreign_files(folder) == []


def test_an_engine_that_has_no_class_leaves_nothing(
    full_run: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "mistral"
    shutil.copytree(full_run, source, ignore=shutil.ignore_patterns("run"))
    config = read_json(source / "config.json")
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["MistralForSequenceClassification"]}))
    assert main(["export", "--model", str(source), "--output", str(tmp_path / "o"), "--engine", "sglang"]) == 2
    assert "--engine: SGLang 0.5.23 has no classifier for MistralForSequenceClassification" in capsys.readouterr().err
    # What can be told from the written export alone.
    words = ["export", "--model", str(checkpoint), "--output", str(tmp_path / "o"), "--engine", "tei"]
    tokenizer = checkpoint / "tokenizer_config.json"
    before = tokenizer.read_text()
    tokenizer.write_text(json.dumps({**json.loads(before), "padding_side": "left"}))
    try:
        assert main(words) == 2
    finally:
        tokenizer.write_text(before)
    assert "--engine tei: tokenizer_config.json: padding_side='left', on which TEI would pad" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mistral"]


def test_what_is_no_export_is_not_published(
    checkpoint: Path, tiny_model: Path, full_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, text in (
        (checkpoint, "is an adapter, not an export. Fix: --output DIR"),
        (tiny_model, "has no scalar head: not a reward model"),
        (full_run, "is not published (only weights"),
    ):
        assert main(["export", "--model", str(folder), "--push_to_hub", "me/model"]) == 2
        assert text in capsys.readouterr().err


def test_wrong_options_are_all_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model", "m", "--dtype", "float16", "--yes", "--max_shard_size", "big"]) == 2
    said = capsys.readouterr().err
    for text in (
        "--yes: there is nothing to agree to. Fix: --push_to_hub USER/NAME",
        "max_shard_size=big: is no size. Fix: 5GB, or 500MB",
        "--output is missing. Fix: --output DIR",
        "--dtype and --overwrite are about a new export. Fix: --output DIR",
    ):
        assert text in said
    assert main(["export", "--model", "m", "--output", "o", "--push_to_hub", "nobody"]) == 2
    assert "push_to_hub=nobody: is no name of a repository. Fix: USER/NAME" in capsys.readouterr().err
    assert main(["export", "--model", "/nowhere/at/all", "--output", "o"]) == 2
    assert "there is no such folder. Fix: give a run's output directory" in capsys.readouterr().err


def test_folders_without_a_contract(full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(full_run, folder, ignore=shutil.ignore_patterns("run", "scoring_contract.json"))
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "regression"
    assert main(["export", "--model", str(folder), "--output", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert "plain: a reward model without scoring_contract.json" in said and "or --no_contract" in said
