"""Lists of sources are read strictly: every mistake is told, with the value, the rule and the fix, and all at once."""

# ruff: noqa: E501  one line per mistake: a table

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rm_scale.config_parsing import config_from_dict, parse_config
from rm_scale.config_sources import ColumnFilter, SourceSettings, named_paths, source_problems, sources_in


def parsed(*entries: Any, setting: str = "datasets", **more: Any) -> Any:
    named = {"dataset_path": ["d.jsonl"]} if setting == "eval_datasets" else {}
    return config_from_dict({"model_name_or_path": "m", **named, setting: list(entries), **more})


def only_problem(*entries: Any, setting: str = "datasets") -> str:
    (problem,) = parsed(*entries, setting=setting).problems
    return str(problem)


def test_all_that_a_source_can_say() -> None:
    entry = {
        "name": "hs2",
        "hub": "nvidia/HelpSteer2",
        "config": "default",
        "split": "train",
        "revision": "abc",
        "data_dir": "preference",
        "preset": "helpsteer3",
        "subset_column": "kind",
        "ignore_columns": ["x"],
        "epochs": 2,
        "max_samples": 100,
        "filters": {"lang": "en", "score": {"min": "3", "max": 4.5}, "kind": ["a", "b"], "meta.n": {"equal": 1}},
    }
    result = parsed(entry)
    assert result.problems == ()
    assert sources_in(result.config, "datasets") == (
        SourceSettings(
            name="hs2",
            hub="nvidia/HelpSteer2",
            config="default",
            split="train",
            revision="abc",
            data_dir="preference",
            preset="helpsteer3",
            subset_column="kind",
            ignore_columns=("x",),
            epochs=2.0,
            max_samples=100,
            filters=(
                ColumnFilter("lang", ("en",)),
                ColumnFilter("score", None, 3, 4.5),
                ColumnFilter("kind", ("a", "b")),
                ColumnFilter("meta.n", (1,)),
            ),
        ),
    )


def test_lists_come_from_yaml_and_as_json_from_a_flag(tmp_path: Path) -> None:
    entries = [{"path": ["a,b.jsonl", "c.jsonl"], "weight": 0.5}, {"path": "d/*.jsonl", "name": "d", "weight": 1e-3}]
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: m\ndatasets:\n- {path: ['a,b.jsonl', c.jsonl], weight: 0.5}\n"
        "- {path: 'd/*.jsonl', name: d, weight: 1e-3}\n"
    )
    from_file = parse_config(["--config", str(file)])
    from_flag = parse_config(["--model_name_or_path", "m", "--datasets", json.dumps(entries)])
    assert from_file.problems == from_flag.problems == ()
    assert sources_in(from_file.config, "datasets") == sources_in(from_flag.config, "datasets")
    assert [source.weight for source in sources_in(from_flag.config, "datasets")] == [0.5, 0.001]
    assert [path for _, path in named_paths(from_flag.config)] == ["a,b.jsonl", "c.jsonl", "d/*.jsonl"]
    written = yaml.safe_load(yaml.safe_dump(from_file.config.model_dump()))
    assert sources_in(config_from_dict(written).config, "datasets") == sources_in(from_file.config, "datasets")


def test_a_text_is_a_path_and_names_come_from_files() -> None:
    config = parsed(
        "data/hh.jsonl.gz", "~/x y.json", {"path": "data/llmbar/*.json"}, {"hub": "owner/some.name-1"}
    ).config
    sources = sources_in(config, "datasets")
    assert [source.name for source in sources] == ["hh", "x_y", "llmbar", "some"]
    assert sources[1].paths == (str(Path.home() / "x y.json"),)
    assert parse_config(["--model_name_or_path", "m", "--datasets", "hh.jsonl"]).problems == ()


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"path": "a", "wieght": 1}, "source 1 (a): wieght: no such key of a source. Fix: did you mean weight?"),
        ({"path": "a", "fraction": 1}, "fraction: no such key of a source. Fix: weight: a number; smaller sources"),
        ({"path": "json", "data_files": "a"}, "data_files: no such key of a source. Fix: path: FILES."),
        ({"path": "a", "columns": ["chosen"]}, "columns=['chosen']: must map our columns to the source's. Fix: "),
        ({"path": "a", "hub": "b"}, "path and hub: a source is one or the other. Fix: keep one of them."),
        ({"weight": 1}, "source 1: path or hub: neither is given. Fix: path: FILE, or hub: OWNER/NAME."),
        ({"path": []}, "path=[]: names no file. Fix: path: FILE."),
        ({"path": "a", "revision": "x"}, "revision='x': is for hub data sets. Fix: leave it out, or hub: instead of path:."),
        ({"path": "a", "weight": -1}, "weight=-1: must be a number from 0 to 1,000,000,000. Fix: e.g. weight: 1"),
        ({"path": "a", "weight": ".inf"}, "weight='.inf': must be a number from 0"),
        ({"path": "a", "weight": float("nan")}, "weight=nan: must be a number from 0"),
        ({"path": "a", "weight": True}, "weight=True: must be a number from 0"),
        ({"path": "a", "epochs": 0}, "epochs=0: must be above 0 and at most 1,000,000. Fix: e.g. epochs: 1"),
        ({"path": "a", "max_samples": 0}, "max_samples=0: must be a whole number of at least 1. Fix: e.g. max_samples"),
        ({"path": "a", "preset": "x", "format": "auto"}, "preset and format: only one can say how rows are read. Fix: "),
        ({"path": "a", "format": "x"}, "format='x': no such format. Fix: one of auto, explicit_prompt"),
        ({"path": "a", "name": "a b/c"}, "name='a b/c': a source's name is part of metrics' names: letters, digits, _ and"),
        ({"path": 3}, "path=3: must be a text, or a list of texts. Fix: "),
        ({"path": "a", "preset": ""}, "preset='': must be a text. Fix: write a name, or leave it out."),
        ({"path": "a", "columns": "x"}, "columns='x': must be a mapping. Fix: {prompt: ..., chosen: ..., rejected: ...}."),
        ({"path": "~nobody-here/a"}, "source 1 (~nobody-here/a): ~nobody-here/a: "),
        ({"path": "a", "filters": ["x"]}, "filters=['x']: must map columns to what they must be. Fix: e.g. {score"),
        ({"path": "a", "filters": {"n": {"mim": 3, "max": 4}}}, "filters: n: mim: no such rule. Fix: did you mean min?"),
        ({"path": "a", "filters": {"n": {"min": 3, "max": 2}}}, "filters: n: min=3 is above max=2: no row passes. Fix: "),
        ({"path": "a", "filters": {"n": {"min": "x"}}}, "filters: n: min='x': must be a number. Fix: e.g. min: 3."),
        ({"path": "a", "filters": {"n": {}}}, "filters: n: says no value to keep, or says it twice. Fix: equal: X"),
        ({"path": "a", "filters": {"n": []}}, "filters: n: says no value to keep"),
    ],
)  # fmt: skip
def test_each_mistake_of_a_source_is_told_with_its_fix(entry: dict[str, Any], text: str) -> None:
    problem = only_problem(entry)
    assert problem.startswith("datasets: source 1")
    assert text in problem and "Fix: " in problem


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        (["a/x.json", "b/x.json"], "datasets: 2 sources are called x: metrics and reports tell sources by name. Fix: "),
        (
            [{"path": "a", "weight": 0}, {"path": "b", "weight": 0}],
            "datasets: the weights of a, b add up to 0: nothing would be trained on. Fix: a weight above 0",
        ),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "datasets: b: weight is missing, while a have one. Fix: weight for"),
        (
            [{"path": "a", "weight": 1}, {"path": "b", "epochs": 2}],
            "datasets: a with weight and b with epochs: shares follow from one or the other. Fix: ",
        ),
        ([{"path": "a", "weight": 1, "epochs": 1}], "weight and epochs: only one can say how often the source is used."),
        ([{"path": "a"}] * 1001, "datasets: 1,001 sources, more than 1,000. Fix: name a folder or a pattern."),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_list_is_told_once(entries: list[Any], text: str) -> None:
    assert text in only_problem(*entries)


def test_all_mistakes_are_told_at_once() -> None:
    problems = parsed({"path": "a", "weight": -1, "nam": "x"}, {"hub": "b", "epochs": "x"}, {}).problems
    assert len(problems) == 4


def test_files_are_known_of_sources_with_mistakes_too() -> None:
    config = parsed({"path": ["a.jsonl", "b.jsonl"], "weight": -1}, {"path": 3}, setting="datasets").config
    assert list(named_paths(config)) == [("datasets: a: path", "a.jsonl"), ("datasets: a: path", "b.jsonl")]


def test_an_evaluation_has_no_weights_and_a_run_one_list_of_sources() -> None:
    problem = only_problem({"path": "a", "weight": 1}, setting="eval_datasets")
    assert "eval_datasets: a: weight and epochs are for training; each group is evaluated once. Fix: " in problem
    (both,) = parsed("a", dataset_path=["b"]).problems
    assert both.startswith("dataset_path, dataset_name and datasets: exactly one must be given, got 2.")
    (two,) = parsed("a", setting="eval_datasets", eval_split_size=0.1).problems
    assert two.startswith("eval_datasets and eval_split_size: only one can say what to evaluate on.")
    assert parsed("a", eval_datasets=["b"], eval_strategy="epoch").problems == ()


def test_what_is_no_list_of_mappings_is_refused() -> None:
    (problem,) = config_from_dict({"model_name_or_path": "m", "datasets": [3]}).problems
    assert problem.startswith("datasets=[3]: must be a valid dictionary. Fix: Several sources")
    assert source_problems("datasets", [{"path": "a"}]) == []


@pytest.mark.parametrize(
    ("rule", "passing", "refused"),
    [
        (ColumnFilter("x", ("en",)), ["en"], ["de", None, 3, ["en"]]),
        (ColumnFilter("x", (1,)), [1, 1.0, "1"], [True, 2, "x"]),
        (ColumnFilter("x", (True,)), [True, "true", "True"], [1, "1", False, None]),
        (ColumnFilter("x", ("a", None)), ["a", None], ["b"]),
        (ColumnFilter("x", None, 3, None), [3, 4.5, "3", "1e9"], [2, "2", None, "x", True, [3]]),
        (ColumnFilter("x", None, None, 3), [3, -1, "2.5"], [4, "nan"]),
        (ColumnFilter("x", (2, 3), 3), [3], [2, 4]),
    ],
)  # fmt: skip
def test_filters_keep_what_their_values_say(rule: ColumnFilter, passing: list[Any], refused: list[Any]) -> None:
    assert [value for value in passing if not rule.passes(value)] == []
    assert [value for value in refused if rule.passes(value)] == []
