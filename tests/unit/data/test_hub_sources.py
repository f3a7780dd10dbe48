"""Hub data sets are read at a known commit; every refusal says what to do. Read with the real library, offline."""

# ruff: noqa: E501  one line per refusal: a table

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

from rm_scale.data import hub_sources
from rm_scale.data.hub_sources import HubSplit, hub_error_text, hub_record, hub_source
from rm_scale.data.sources import Source
from rm_scale.errors import DataError

Jsonl = Callable[[Path, Iterable[Any]], str]
ROWS = [{"prompt": f"Question {n}? ", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(5)]
COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def read(source: Source, work: Path) -> list[Any]:
    raw = source.load(work)
    return [row for _, row in raw.decode(raw.dataset[:], range(len(raw.dataset)))]


def repository(folder: Path, jsonl: Jsonl) -> str:
    """A folder in the form of a hub data set, with two folders of data."""
    for name, rows in (("first", ROWS), ("second", ROWS[:2])):
        (folder / name).mkdir(parents=True)
        jsonl(folder / name / "train.jsonl", rows)
        jsonl(folder / name / "test.jsonl", rows[:1])
    return str(folder)


@pytest.fixture
def cached(tmp_path: Path, jsonl: Jsonl, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set that the library finds in its cache at `COMMIT`, as an online run has left it there; then offline."""
    folder = tmp_path / "made"
    folder.mkdir()
    jsonl(folder / "train.jsonl", ROWS)
    builder = datasets.load_dataset_builder(str(folder))
    builder.download_and_prepare()
    kept = tmp_path / "hf" / "owner___prefs" / "default" / "0.0.0" / COMMIT
    shutil.copytree(builder.cache_dir, kept)
    for file in kept.glob("made-*"):
        file.rename(kept / file.name.replace("made-", "prefs-"))
    info = json.loads((kept / "dataset_info.json").read_text())
    info["dataset_name"] = "prefs"
    (kept / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "owner/prefs"


def test_a_folder_in_the_form_of_a_hub_data_set(tmp_path: Path, jsonl: Jsonl) -> None:
    folder = repository(tmp_path / "repo", jsonl)
    source = hub_source(HubSplit(folder, data_dir="second"))
    assert read(source, tmp_path) == ROWS[:2]
    assert source.commit is None and hub_record([source]) == [{"name": f"{folder}[train]", "commit": None}]
    json.dumps(source.identity)
    assert read(hub_source(HubSplit(folder, data_dir="first", split="test")), tmp_path) == ROWS[:1]
    with pytest.raises(DataError, match=r'Unknown split "nope".*Fix: --dataset_train_split or --dataset_test_split'):
        hub_source(HubSplit(folder, data_dir="first", split="nope"))
    with pytest.raises(DataError, match=r"^datasets: x: hub=.*Unknown split.*Fix: split: with one of the splits above"):
        hub_source(HubSplit(folder, data_dir="first", split="nope", where="datasets: x: hub"))


def test_a_cached_data_set_is_read_offline_and_its_commit_is_recorded(tmp_path: Path, cached: str) -> None:
    source = hub_source(HubSplit(cached))
    assert source.commit == COMMIT and source.identity["commit"] == COMMIT
    assert read(source, tmp_path) == ROWS
    assert hub_record([source]) == [{"name": "owner/prefs[train]", "commit": COMMIT}]
    assert read(hub_source(HubSplit(cached, revision=COMMIT)), tmp_path) == ROWS


def test_another_commit_than_the_one_asked_for_is_refused(tmp_path: Path, cached: str) -> None:
    with pytest.raises(
        DataError,
        match=f"^dataset_name=owner/prefs .*is at commit {OTHER}, but the cache holds {COMMIT}.*Fix: fetch it where",
    ):
        hub_source(HubSplit(cached, revision=OTHER))
    with pytest.raises(
        DataError, match=f"which commit this is can't be told .* holds {COMMIT}. Fix: revision: {COMMIT}"
    ):
        hub_source(HubSplit(cached, revision="v1"))
    refs = tmp_path / "hub" / "datasets--owner--prefs" / "refs"
    refs.mkdir(parents=True)
    (refs / "v1").write_text(COMMIT)
    assert hub_source(HubSplit(cached, revision="v1")).commit == COMMIT
    (refs / "v1").write_text(OTHER)
    with pytest.raises(DataError, match=f"is at commit {OTHER}"):
        hub_source(HubSplit(cached, revision="v1"))


@pytest.mark.usefixtures("cached")
def test_what_is_not_cached_is_said_offline() -> None:
    with pytest.raises(
        DataError, match=r"dataset_name=owner/missing .*Fix: HF_HUB_OFFLINE is set, so only what is cached"
    ):
        hub_source(HubSplit("owner/missing"))


def gated() -> Exception:
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    error = datasets.exceptions.DatasetNotFoundError(
        "Dataset 'o/n' is a gated dataset on the Hub. Visit the dataset page at https://huggingface.co/datasets/o/n to "
        "ask for access."
    )
    error.__cause__ = GatedRepoError("403 Client Error. Cannot access gated repo", response=response)
    return error


def unreachable(cause: Exception) -> Exception:
    error = ConnectionError("Couldn't reach 'o/n' on the Hub (ConnectError)")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (gated(), "accept its terms on https://huggingface.co/datasets/o/n with your account, then log in here: set HF_"),
        (unreachable(httpx.ConnectError("no route")), "there is no connection to the hub. Try again with a network;"),
        (unreachable(httpx.ReadTimeout("timed out")), "there is no connection to the hub."),
        (OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled."), "there is no connection"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub"), "check the name (OWNER/NAME)"),
        (
            datasets.exceptions.DatasetNotFoundError("Revision 'x' doesn't exist for dataset 'o/n' on the Hub."),
            "a branch, tag or commit that https://huggingface.co/datasets/o/n/tree/main lists.",
        ),
        (ValueError("Config name is missing.\nPlease pick one among ['a', 'b']"), "--dataset_config with one of the conf"),
    ],
)  # fmt: skip
def test_each_refusal_of_the_hub_says_what_to_do(error: Exception, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_sources, "is_offline", lambda: False)
    text = hub_error_text(HubSplit("o/n", "small", revision="x"), error)
    assert text.startswith(
        "dataset_name=o/n (config=small, split=train, revision=x): can't be loaded from the hub or its"
    )
    assert f"Fix: {fix}" in text and "\n" not in text
