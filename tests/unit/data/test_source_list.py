"""A list of sources becomes groups that know their source: read, filtered, limited, held out and mixed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rm_scale.batching.mixture_sampler import MixtureSampler
from rm_scale.config import RunConfig
from rm_scale.data.data_report import raise_if_too_many, too_many_text, write_data_report
from rm_scale.data.encoding import TextEncoder
from rm_scale.data.mixture import Mixture
from rm_scale.data.preparation import PreparedData, find_sources, prepare_data, prepare_evaluation, prepare_held_out
from rm_scale.errors import DataError
from rm_scale.training.checkpoint.manifest import differences
from rm_scale.training.checkpoint.run_facts import data_fingerprint

Jsonl = Callable[[Path, Iterable[Any]], str]
MakeConfig = Callable[..., RunConfig]


def pair(number: int, about: str = "", **more: Any) -> dict[str, Any]:
    asked = f"Question {about}{number}? "
    return {"prompt": asked, "chosen": f"good {number}", "rejected": f"bad {number}", "id": f"{about}{number}", **more}


def pairs(count: int, about: str, **more: Any) -> list[dict[str, Any]]:
    return [pair(number, about, **more) for number in range(count)]


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
    return TextEncoder(tokenizer)


@pytest.fixture
def prepare(make_config: MakeConfig, encoder: TextEncoder) -> Callable[..., PreparedData]:
    """Prepare the data of a list of sources."""
    return lambda *entries, **settings: prepare_data(make_config(datasets=list(entries), **settings), encoder)


def sources_of(data: PreparedData) -> list[str]:
    """The source of each training group by its id, which begins with it."""
    return [name.rstrip("0123456789") for name in data.train["id"]]


def test_files_globs_folders_and_hub_data_become_named_sources(
    tmp_path: Path, jsonl: Jsonl, prepare: Callable[..., PreparedData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    for folder in ("many", "repo/part", "saved"):
        (tmp_path / folder).mkdir(parents=True)
    one = jsonl(tmp_path / "one.jsonl", pairs(3, "one"))
    jsonl(tmp_path / "many" / "x.jsonl", pairs(2, "many"))
    jsonl(tmp_path / "many" / "y.jsonl", pairs(1, "many", x="not the same"))
    jsonl(tmp_path / "repo" / "part" / "train.jsonl", pairs(4, "hub"))
    datasets.Dataset.from_list(pairs(2, "saved")).save_to_disk(str(tmp_path / "saved"))
    data = prepare(
        {"path": one},
        {"path": str(tmp_path / "many")},
        {"path": [str(tmp_path / "saved")], "name": "disk"},
        {"hub": str(tmp_path / "repo"), "data_dir": "part", "name": "hub"},
    )
    assert data.mixture is not None and data.mixture.names == ("one", "many", "disk", "hub")
    assert Counter(sources_of(data)) == {"one": 3, "many": 3, "saved": 2, "hub": 4}
    assert data.mixture.sizes().tolist() == [3, 3, 2, 4]
    shares = data.report.to_dict()["mixture"]
    assert [(share["name"], share["rows_read"], share["groups"]) for share in shares] == [
        ("one", 3, 3),
        ("many", 3, 3),
        ("disk", 2, 2),
        ("hub", 4, 4),
    ]


def test_each_source_is_read_in_its_own_way(tmp_path: Path, jsonl: Jsonl, prepare: Callable[..., PreparedData]) -> None:
    mapped = jsonl(tmp_path / "mapped.jsonl", [{"q": "Mapped? ", "yes": "good", "no": "bad", "kind": "a"}])
    plain = jsonl(tmp_path / "plain.jsonl", pairs(2, "plain", subset="b"))
    data = prepare(
        {"path": mapped, "columns": {"prompt": "q", "chosen": "yes", "rejected": "no"}, "subset_column": "kind"},
        {"path": plain},
    )
    assert [report.rows_used for report in data.report.sources] == [1, 2]
    assert list(data.train["subset"]) == ["a", "b", "b"]


def test_filtered_rows_are_counted_apart_from_rejected_ones(
    tmp_path: Path, jsonl: Jsonl, prepare: Callable[..., PreparedData]
) -> None:
    rows = [pair(number, "a", score=number, lang="en" if number % 2 else "de") for number in range(10)]
    rows[9]["chosen"] = ""
    path = jsonl(tmp_path / "a.jsonl", [*rows, {"prompt": "no score"}, b"{broken"])
    data = prepare({"path": path, "filters": {"lang": "en", "score": {"min": 3}}})
    (report,) = data.report.sources
    assert list(data.train["id"]) == ["a3", "a5", "a7"]
    assert (report.rows_read, report.rows_used, report.rows_filtered, report.rows_rejected) == (12, 3, 7, 2)
    assert sorted(report.rejected) == ["bad_json", "empty"]
    written = data.report.to_dict()
    assert (written["rows_filtered"], written["rows_used"], written["rows_rejected"]) == (7, 3, 2)
    assert [row["row"] for row in data.rejected] == [9, 11], "the file of rejected rows has no filtered ones"
    again = prepare({"path": path, "filters": {"lang": "en", "score": {"min": 3}}})
    assert again.report == data.report
    assert len(prepare({"path": path, "filters": {"lang": "de"}}).train) == 5, (
        "other filters, another entry of the cache"
    )
    raise_if_too_many(data.report, 0.2)
    with pytest.raises(DataError, match="2 of 12 rows can't be used"):
        raise_if_too_many(data.report, 0.1)
    write_data_report(data.report, data.rejected, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "data_report.json").read_text())["mixture"][0]["rows_filtered"] == 7


def test_a_filter_that_fits_nothing_is_told(tmp_path: Path, jsonl: Jsonl, prepare: Callable[..., PreparedData]) -> None:
    path = jsonl(tmp_path / "a.jsonl", pairs(3, "a", score=1))
    with pytest.raises(
        DataError, match=r"filters: scor: none of the first 3 rows has such a column. Fix: did you mean sco"
    ):
        prepare({"path": path, "filters": {"scor": {"min": 1}}})
    other = jsonl(tmp_path / "b.jsonl", pairs(3, "b"))
    with pytest.raises(DataError, match=r"datasets: a: no group of it is left to train on, after its filters"):
        prepare({"path": path, "filters": {"score": {"min": 2}}}, {"path": other})
    with pytest.raises(DataError, match=r"no usable row is left"):
        prepare({"path": path, "filters": {"score": {"min": 2}}})


def test_limits_are_by_source_and_in_proportion(
    tmp_path: Path, jsonl: Jsonl, prepare: Callable[..., PreparedData]
) -> None:
    first, second = jsonl(tmp_path / "a.jsonl", pairs(30, "a")), jsonl(tmp_path / "b.jsonl", pairs(10, "b"))
    data = prepare({"path": first, "max_samples": 20}, {"path": second})
    assert Counter(sources_of(data)) == {"a": 20, "b": 10} and data.report.left_out_by_limit == 10
    assert list(data.train["id"])[:20] == [f"a{number}" for number in range(20)]
    data = prepare({"path": first}, {"path": second}, max_train_samples=8)
    assert Counter(sources_of(data)) == {"a": 6, "b": 2} and data.report.left_out_by_limit == 32


def test_each_source_gives_its_part_to_what_is_held_out_and_prompts_stay_together(
    tmp_path: Path, jsonl: Jsonl, prepare: Callable[..., PreparedData], make_config: MakeConfig, encoder: TextEncoder
) -> None:
    first = [pair(number // 2, "a", chosen=f"good {number}") for number in range(60)]
    paths = [jsonl(tmp_path / "a.jsonl", first), jsonl(tmp_path / "b.jsonl", pairs(40, "b"))]
    entries = [{"path": path} for path in paths]
    data = prepare(*entries, eval_split_size=0.2)
    assert data.eval is not None and data.eval_origins is not None
    assert Counter(name.rstrip("0123456789") for name in data.eval["id"]) == {"a": 12, "b": 8}
    assert data.eval_origins.names == ("a", "b") and data.report.shared_prompts == 0
    assert [(share.held_out, share.groups) for share in data.report.mixture] == [(12, 48), (8, 32)]
    alone = prepare(entries[1], eval_split_size=0.2)
    assert alone.eval is not None
    assert sorted(alone.eval["id"]) == sorted(name for name in data.eval["id"] if name.startswith("b")), "of b alone"
    held = prepare_held_out(make_config(datasets=entries, eval_split_size=0.2), encoder)
    assert list(held.groups["id"]) == list(data.eval["id"])
    with pytest.raises(DataError, match=r"eval_split_size=100: holds out 100 of 100 usable groups.*Fix: "):
        prepare(*entries, eval_split_size=100)


def test_sources_to_evaluate_on(
    tmp_path: Path, jsonl: Jsonl, prepare: Callable[..., PreparedData], make_config: MakeConfig, encoder: TextEncoder
) -> None:
    train = jsonl(tmp_path / "a.jsonl", pairs(3, "a"))
    others = [{"path": jsonl(tmp_path / f"{name}.jsonl", pairs(4, name)), "max_samples": 3} for name in ("x", "y")]
    data = prepare({"path": train}, eval_datasets=others)
    assert data.eval_origins is not None and data.eval_origins.names == ("x", "y")
    assert data.eval_origins.source.tolist() == [0, 0, 0, 1, 1, 1]
    assert [(share.name, share.split, share.groups, share.share) for share in data.report.mixture] == [
        ("a", "train", 3, 1.0),
        ("x", "eval", 3, 0.5),
        ("y", "eval", 3, 0.5),
    ]
    config = make_config(datasets=[{"path": train}], eval_datasets=others, max_eval_samples=2)
    for found in (prepare_evaluation(config, encoder), prepare_held_out(config, encoder)):
        assert found.origins.names == ("x", "y") and len(found.groups) == 2
    assert [source.member for source in find_sources(config)[1]] == ["x", "y"]


def test_weights_and_epochs_decide_what_an_epoch_holds(
    tmp_path: Path, jsonl: Jsonl, prepare: Callable[..., PreparedData]
) -> None:
    first, second = jsonl(tmp_path / "a.jsonl", pairs(30, "a")), jsonl(tmp_path / "b.jsonl", pairs(10, "b"))
    data = prepare({"path": first, "weight": 1}, {"path": second, "weight": 3}, mixture_shares="per_epoch")
    assert data.mixture is not None and data.mixture.counts == (30, 90)
    assert [(share.weight, share.share, share.groups_per_epoch) for share in data.report.mixture] == [
        (1.0, 0.25, 30),
        (3.0, 0.75, 90),
    ]
    data = prepare({"path": first, "weight": 1}, {"path": second, "weight": 3})
    assert data.mixture is not None and data.mixture.counts is None and data.mixture.epoch_size(16) == 128
    sampler = MixtureSampler(data.mixture, 16, shuffle=True, seed=0)
    names = np.array(sources_of(data))
    assert all(Counter(names[rows].tolist()) == {"a": 4, "b": 12} for (rows,) in sampler)
    data = prepare({"path": first}, {"path": second, "epochs": 2.5})
    assert data.mixture is not None and data.mixture.counts == (30, 25)


def test_mistakes_that_only_the_files_show(tmp_path: Path, jsonl: Jsonl, prepare: Callable[..., PreparedData]) -> None:
    path = jsonl(tmp_path / "a.jsonl", pairs(3, "a"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"^datasets: missing: path=.*missing.jsonl: there is no such file"):
        prepare({"path": str(tmp_path / "missing.jsonl")})
    with pytest.raises(DataError, match=r"^datasets: empty: path=.*: the folder holds no file that can be read"):
        prepare({"path": str(tmp_path / "empty")})
    with pytest.raises(DataError, match=r"^datasets: x: path=.*x\*: the pattern matches no file"):
        prepare({"path": str(tmp_path / "x*"), "name": "x"})
    with pytest.raises(DataError, match=r"a.jsonl: is read by a and by b, with the same filters. Fix: name it once"):
        prepare({"path": path}, {"path": path, "name": "b"})
    assert len(prepare({"path": path, "filters": {"id": "a0"}}, {"path": path, "name": "b"}).train) == 4
    assert "can't be used" in too_many_text([], 1, 1, 0.0)


def test_a_single_path_is_read_as_before(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    path = jsonl(tmp_path / "a.jsonl", pairs(3, "a"))
    data = prepare_data(make_config(path), encoder)
    assert data.mixture is None and data.report.mixture == () and data.report.hub == ()
    one = prepare_data(make_config(datasets=[{"path": path}]), encoder)
    assert list(one.train) == list(data.train), "the same entry of the cache"


def test_changed_sources_weights_or_files_are_told_apart_in_a_resumed_run(
    tmp_path: Path, jsonl: Jsonl, prepare: Callable[..., PreparedData]
) -> None:
    paths = [jsonl(tmp_path / f"{name}.jsonl", pairs(6, name)) for name in ("a", "b", "c")]

    def facts(*weights: float, **settings: Any) -> dict[str, Any]:
        entries = [{"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=False)]
        data = prepare(*entries, **settings)
        assert data.mixture is not None
        return {"data": data_fingerprint(data), "mixture": data.mixture.describe()}

    before = facts(1, 3)
    assert differences(before, facts(1, 3)) == differences(before, facts(0.5, 1.5)) == []
    (changed,) = differences(before, facts(1, 3.5))
    assert changed.startswith("mixture: 'a 0.25 of 6 groups, b 0.75 of 6 groups, in each step, groups by source ")
    assert " then, 'a 0.222" in changed
    assert [line.split(":")[0] for line in differences(before, facts(1, 3, mixture_shares="per_epoch"))] == ["mixture"]
    assert [line.split(":")[0] for line in differences(before, facts(1, 3, 1))] == ["data", "mixture"]
    jsonl(tmp_path / "b.jsonl", [*pairs(5, "b"), pair(5, "b", rejected="something else")])
    assert [line.split(":")[0] for line in differences(before, facts(1, 3))] == ["data"]
    assert differences(before, facts(1, 3), ["data"]) == []


def test_files_that_moved_between_sources_are_told_in_a_resumed_run(
    tmp_path: Path, jsonl: Jsonl, prepare: Callable[..., PreparedData]
) -> None:
    """All groups, their order and the weights are the same; only which source the middle file counts for is not."""
    for folder, middle in (("one", "b"), ("two", "a")):
        for source, name in (("a", "1"), (middle, "2"), ("b", "3")):
            (tmp_path / folder / source).mkdir(parents=True, exist_ok=True)
            jsonl(tmp_path / folder / source / f"{name}.jsonl", pairs(4, name))

    def facts(folder: str) -> dict[str, Any]:
        data = prepare(*({"path": str(tmp_path / folder / name), "weight": 1} for name in ("a", "b")))
        assert data.mixture is not None
        return {"data": data_fingerprint(data), "mixture": data.mixture.describe()}

    (changed,) = differences(facts("one"), facts("two"))
    assert changed.startswith("mixture: 'a 0.5 of 4 groups, b 0.5 of 8 groups, in each step, groups by source ")
    assert " then, 'a 0.5 of 8 groups, b 0.5 of 4 groups, in each step, groups by source " in changed
    same = [Mixture(("a", "b"), np.array(source), (1, 1), None, True) for source in ([0, 1, 1, 0], [0, 1, 0, 1])]
    assert same[0].describe() != same[1].describe() and same[0].describe()[:40] == same[1].describe()[:40]
