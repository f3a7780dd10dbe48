"""The data of a model's own run is found from any folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from rm_scale.errors import DataError
from rm_scale.evaluation.evaluation_groups import EvaluationGroups


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder in which a run was started with relative names."""
    folder = tmp_path / "project"
    (folder / "outputs" / "mine" / "run").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("{}\n")
    config = {"model_name_or_path": "m", "dataset_path": ["data/*.jsonl"], "output_dir": "outputs/mine"}
    write(folder, {**config, "eval_split_size": 0.5})
    return folder


def write(folder: Path, config: dict[str, object]) -> None:
    (folder / "outputs" / "mine" / "run" / "run_config.yaml").write_text(yaml.safe_dump(config))


def own_files(folder: Path) -> list[str] | None:
    return EvaluationGroups([], folder / "outputs" / "mine" / "run" / "run_config.yaml", {}).config.dataset_path


def test_here_the_names_stay_as_they_are(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    assert own_files(project) == ["data/*.jsonl"]


def test_from_another_folder_and_after_a_move(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert own_files(project) == [str(project / "data" / "*.jsonl")]
    moved = tmp_path / "moved"
    shutil.move(project, moved)
    assert own_files(moved) == [str(moved / "data" / "*.jsonl")]


def test_a_run_whose_output_lies_elsewhere(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_name_or_path": "m", "dataset_path": ["data/train.jsonl"], "eval_split_size": 0.5}
    write(project, {**config, "output_dir": "/elsewhere/mine"})
    environment = project / "outputs" / "mine" / "run" / "environment.json"
    environment.write_text(json.dumps({"working_directory": str(project)}))
    monkeypatch.chdir(tmp_path)
    assert own_files(project) == [str(project / "data" / "train.jsonl")]


def test_sources_of_a_list_are_found_under_the_names_they_had(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [{"path": "data/*.jsonl", "weight": 2}, {"hub": "owner/name", "weight": 1}]
    config = {"model_name_or_path": "m", "datasets": sources, "output_dir": "outputs/mine"}
    write(project, {**config, "eval_datasets": ["data/train.jsonl"]})
    monkeypatch.chdir(tmp_path)
    found = EvaluationGroups([], project / "outputs" / "mine" / "run" / "run_config.yaml", {}).config
    assert found.datasets == [
        {"name": "data", "path": [str(project / "data" / "*.jsonl")], "weight": 2},
        {"hub": "owner/name", "weight": 1},
    ]
    assert found.eval_datasets == [{"name": "train", "path": [str(project / "data" / "train.jsonl")]}]


def test_what_is_nowhere_names_all_places(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "data" / "train.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"is not in .* nor in .*project\. Fix: --dataset_path FILE"):
        own_files(project)
