"""The parts of a save and of a resume: space, rotation, leftovers, stored slices, fingerprints; and what errors say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rm_scale.config import RunConfig
from rm_scale.config_parsing import config_from_dict
from rm_scale.errors import CheckpointError, DiskError, TrainingError
from rm_scale.training.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    check_files,
    differences,
    files_in,
    hash_files,
    newest_valid,
    read_manifest,
    require_same_run,
    write_manifest,
)
from rm_scale.training.checkpoint.optimizer_state import FOLDER, StoredState
from rm_scale.training.checkpoint.publish import (
    ASIDE,
    _require_shared,
    aside_name,
    keep_one_unverified,
    publish,
    remove_leftovers,
    require_space,
    rotate,
    seal,
    set_aside_later,
    writing,
)
from rm_scale.training.checkpoint.run_facts import model_fingerprint
from rm_scale.training.plan_check import out_of_memory_explained
from rm_scale.training.watchdog import collective_failure

EMPTY = Manifest(1, 1, 0, True, True, 1, {"seed": 1, "learning_rate": 0.1}, {})


def checkpoint(output_dir: Path, step: int, manifest: Manifest = EMPTY) -> Path:
    """A small sealed checkpoint."""
    aside = output_dir / aside_name(step, 1)
    aside.mkdir(parents=True)
    (aside / "model.safetensors").write_text(f"step {step}")
    seal(aside, replace(manifest, step=step), [], 0)
    publish(aside, output_dir / f"checkpoint-{step}")
    return output_dir / f"checkpoint-{step}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    require_space(tmp_path, 1000)
    with pytest.raises(DiskError, match=r"a checkpoint takes about 1e\+06 GB and .* GB are free\. Fix: free disk"):
        require_space(tmp_path, 10**15)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 10):
        checkpoint(tmp_path, step)
    rotate(tmp_path, None, None)
    assert len(names(tmp_path)) == 5
    rotate(tmp_path, 2, best_step=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2", "checkpoint-4"]


def test_a_name_is_taken_over_from_an_abandoned_try(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5, replace(EMPTY, attempt=1))
    checkpoint(tmp_path, 5, replace(EMPTY, attempt=2))
    assert names(tmp_path) == ["checkpoint-5"] and read_manifest(tmp_path / "checkpoint-5").attempt == 2


def test_what_no_run_has_written_is_never_removed(tmp_path: Path) -> None:
    for step in (4, 500):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "notes.txt").write_text("mine")
    noted = checkpoint(tmp_path, 3)
    (noted / "thesis.txt").write_text("mine")
    (tmp_path / f"{ASIDE}mine").mkdir()
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
        rotate(tmp_path, 1, None)
    remove_leftovers(tmp_path)
    aside = next(tmp_path.glob("foreign-checkpoint-4-*"))
    kept = [f"{ASIDE}mine", "checkpoint-3", "checkpoint-500", "checkpoint-6", aside.name]
    assert names(tmp_path) == kept, "the foreign ones don't count among those that are kept"
    assert names(aside) == names(tmp_path / "checkpoint-500") == ["notes.txt"]
    checkpoint(tmp_path, 3)
    assert (next(tmp_path.glob("foreign-checkpoint-3-*")) / "thesis.txt").read_text() == "mine"
    assert names(tmp_path / "checkpoint-3") == ["manifest.json", "model.safetensors"]


def test_of_unverified_checkpoints_ours_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step).rename(tmp_path / f"unverified-checkpoint-{step}")
    (tmp_path / "unverified-checkpoint-1" / "notes.txt").write_text("mine")
    keep_one_unverified(tmp_path / "unverified-checkpoint-3")
    assert names(tmp_path) == ["unverified-checkpoint-1", "unverified-checkpoint-3"]


def test_a_manifest_that_counts_lives_is_read(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5, replace(EMPTY, attempt=3))
    path = tmp_path / "checkpoint-5" / MANIFEST
    values = json.loads(path.read_text())
    values["life"] = values.pop("attempt")
    path.write_text(json.dumps(values))
    assert read_manifest(path.parent).attempt == 3


def test_leftovers_go_and_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (2, 4):
        checkpoint(tmp_path, step)
    (tmp_path / aside_name(6, 1)).mkdir()
    assert newest_valid(tmp_path, 0, 1) == tmp_path / "checkpoint-4"
    remove_leftovers(tmp_path)
    set_aside_later(tmp_path, 2)
    assert [name.split("-")[0] for name in names(tmp_path)] == ["checkpoint", "later"]
    assert newest_valid(tmp_path, 0, 1) == tmp_path / "checkpoint-2"


def test_no_two_attempts_share_a_name_aside() -> None:
    assert aside_name(3, 1) != aside_name(3, 1)


def test_an_output_dir_that_nodes_do_not_share_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="output_dir is not on a file system that all nodes share"):
        _require_shared(tmp_path, {"optimizer_state/rank-00001.safetensors": FileRecord(5, "0")})


def test_a_model_alone_is_not_resumed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3, replace(EMPTY, resumable=False))
    with pytest.raises(CheckpointError, match=r"holds the model only \(save_only_model\)"):
        check_files(folder, 0, 1)


def test_manifests_that_are_not_there_or_not_readable(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(CheckpointError, match=r"has no manifest\.json\. It was never finished"):
        read_manifest(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "manifest.json").write_text('{"step": 1}')
    with pytest.raises(CheckpointError, match="The checkpoint is damaged"):
        read_manifest(tmp_path / "checkpoint-1")
    folder = checkpoint(tmp_path, 7)
    assert hash_files(folder, files_in(folder)) == read_manifest(folder).files
    folder.rename(tmp_path / "checkpoint-8")
    with pytest.raises(CheckpointError, match=r"is of step 7, but the folder is called checkpoint-8"):
        read_manifest(tmp_path / "checkpoint-8")


def test_another_run_is_refused_with_all_differences(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    require_same_run(folder, EMPTY.facts, [])
    changed = {"seed": 2, "learning_rate": 0.1, "optim": "adamw_torch"}
    with pytest.raises(CheckpointError, match=r"(?s)optim: None then, 'adamw_torch' now.*seed: 1 then, 2 now"):
        require_same_run(folder, changed, [])
    require_same_run(folder, changed, ["seed", "optim"])
    assert differences({"a": 1}, {"a": 1}) == []


def test_a_failed_write_is_a_matter_of_the_disk_and_others_are_not() -> None:
    with pytest.raises(DiskError, match=r"could not be written .*Fix: free disk space"), writing(Path("out")):
        torch.save(torch.ones(100_000), "/dev/full")
    with pytest.raises(RuntimeError, match="CUDA out of memory"), writing(Path("out")):
        raise RuntimeError("CUDA out of memory")


def store(folder: Path, **tensors: torch.Tensor) -> Path:
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    save_file({key.replace("__", "|"): value for key, value in tensors.items()}, folder / FOLDER / "rank.safetensors")
    return folder


def test_slices_are_read_across_the_borders_of_those_who_wrote_them(tmp_path: Path) -> None:
    values = torch.arange(10.0)
    folder = store(tmp_path, w__weight__0=values[:4], w__weight__4=values[4:7], w__weight__7=values[7:])
    stored = StoredState(folder)
    stored.require("w", "weight", 10)
    assert torch.equal(stored.read("w", "weight", 2, 7), values[2:9])
    assert torch.equal(stored.read("w", "weight", 4, 3), values[4:7])
    assert stored.read("w", "weight", 10, 0).numel() == 0


def test_slices_of_another_model_or_with_a_hole_are_refused(tmp_path: Path) -> None:
    stored = StoredState(store(tmp_path, w__weight__0=torch.ones(4), w__weight__6=torch.ones(4)))
    with pytest.raises(CheckpointError, match=r"weight of w has 10 stored elements, the model's has 12"):
        stored.require("w", "weight", 12)
    with pytest.raises(CheckpointError, match=r"weight of v has 0 stored elements"):
        stored.require("v", "weight", 12)
    with pytest.raises(CheckpointError, match=r"elements from 4 on of weight of w are missing"):
        stored.require("w", "weight", 10)
    (tmp_path / FOLDER / "rank.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"rank\.safetensors: can't be read"):
        StoredState(tmp_path)


def test_models_of_one_shape_are_told_apart(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    first = RunConfig(model_name_or_path=str(tiny_model))
    moved = RunConfig(model_name_or_path=str(shutil.copytree(tiny_model, tmp_path / "moved")))
    assert model_fingerprint(first) == model_fingerprint(moved)
    weights = tmp_path / "moved" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert model_fingerprint(first) != model_fingerprint(moved)
    hub = RunConfig(model_name_or_path="someone/model", model_revision="abc")
    assert model_fingerprint(hub) == "someone/model at abc"


def test_out_of_memory_is_told_from_other_errors() -> None:
    said = r"out of memory: .*Fix: a smaller max_tokens_per_device"
    with pytest.raises(TrainingError, match=said), out_of_memory_explained(None):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_explained(None):
        raise RuntimeError("shapes differ")


def test_a_broken_connection_is_known() -> None:
    assert collective_failure(RuntimeError("gloo: Connection closed by peer [127.0.0.1]:1"))
    assert collective_failure(RuntimeError("shapes differ")) is None


def test_settings_about_checkpoints_are_checked() -> None:
    values = {"model_name_or_path": "m", "dataset_path": "d", "allow_changed": ["learning_rat"]}
    problems = config_from_dict({**values, "metric_for_best_model": "accuracy"}).problems
    assert any(
        "learning_rat (in allow_changed): no such setting. Fix: did you mean learning_rate?" in p for p in problems
    )
    assert any("metric_for_best_model=accuracy with eval_strategy=no" in problem for problem in problems)


def test_the_manifest_is_whole_or_not_there(tmp_path: Path) -> None:
    write_manifest(tmp_path, EMPTY)
    assert json.loads((tmp_path / "manifest.json").read_text())["step"] == 1
    assert names(tmp_path) == ["manifest.json"]
