"""Column maps and presets are checked when the settings are read: each fault has a text with the value and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rm_scale.config_columns import map_problems, reading_problems
from rm_scale.config_parsing import parse_config

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
TWO = {"prompt": "q", "responses": ["a", "b"]}
BETTER = {"path": "l", "first": [1], "second": [2]}


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (["prompt"], "dataset_columns=['prompt']: is no map. Fix: {prompt: PATH"),
        ({**PAIR, "promt": "q"}, "dataset_columns.promt: did you mean prompt? Fix: one of prompt, system"),
        ({"prompt": "q", "chosen": "a"}, "dataset_columns: has only chosen. Fix: chosen: PATH and rejected: PATH"),
        ({"prompt": "q"}, "has neither chosen and rejected nor responses."),
        ({**PAIR, "responses": ["a", "b"], "ranks": "r"}, ".chosen: stands beside responses"),
        (TWO, "dataset_columns.responses: nothing says which of them is better."),
        ({**TWO, "ranks": "r", "better": BETTER}, ".responses: ranks and better both say which"),
        ({**PAIR, "better": BETTER}, "dataset_columns.better: needs responses"),
        ({"responses": "r", "ranks": "s"}, "dataset_columns: has no prompt for its responses."),
        ({"prompt": "q", "responses": ["a", "b", "c"], "better": BETTER}, ".responses: has 3 places, and better"),
        ({**TWO, "scores": "s", "margin": "m"}, "dataset_columns.margin: belongs to pairs"),
        ({**PAIR, "equal": "tie"}, "dataset_columns.equal: says what two responses"),
        ({**PAIR, "group_by": ["a"], "tree": {"root": "p", "replies": "r"}}, ".group_by: stands beside tree"),
        ({**PAIR, "prompt": 1}, "dataset_columns.prompt=1: is no place in a row. Fix: a path in quotes"),
        ({**PAIR, "prompt": "a..b"}, "dataset_columns.prompt='a..b': is no path."),
        ({**PAIR, "prompt": "a[x]"}, "dataset_columns.prompt='a[x]': is no path."),
        ({**PAIR, "prompt": {"pth": "a"}}, "dataset_columns.prompt: says none of path, constant"),
        ({**PAIR, "prompt": {"path": "a", "constant": 1}}, "dataset_columns.prompt: says path and constant of"),
        ({**PAIR, "prompt": {"join": ["a"], "by": ","}}, "dataset_columns.prompt.by: is unknown beside join."),
        ({**PAIR, "prompt": {"join": "a"}}, "dataset_columns.prompt.join='a': is no list of places."),
        ({**PAIR, "prompt": {"join": ["a"], "with": 1}}, "dataset_columns.prompt.with=1: is no text."),
        ({**PAIR, "prompt": {"first_of": ["a", 3]}}, "dataset_columns.prompt.first_of[1]=3: is no place"),
        ({**PAIR, "prompt": {"template": "no column"}}, ".prompt.template='no column': names no column."),
        ({**PAIR, "prompt": {"template": "{a} }"}}, "has a single brace"),
        ({**PAIR, "prompt": {"template": "{a b..c}"}}, "{a b..c} is no path"),
        ({**PAIR, "prompt": {"dialogue": "a"}}, ".prompt.marks=None: is no map from texts to roles."),
        ({**PAIR, "prompt": {"dialogue": "a", "marks": {"U:": "human"}}}, ".prompt: 'human' is no role."),
        ({**PAIR, "margin": {"difference": ["a"]}}, ".margin.difference=['a']: has not two places."),
        ({**TWO, "better": "l"}, "dataset_columns.better='l': does not say which value means which."),
        ({**TWO, "better": {"path": "l", "first": [1]}}, "dataset_columns.better.second: is missing."),
        ({**TWO, "better": {**BETTER, "tie": ["1"]}}, "dataset_columns.better.tie='1': already means first."),
        ({**TWO, "better": {**BETTER, "tie": [{}]}}, ".better.tie={}: is neither text, number nor true/false."),
        ({**TWO, "better": {"signed": "s"}}, "dataset_columns.better.negative=None: Fix: first or second."),
        ({**TWO, "better": {"higher": ["x", "y"], "equal": "no"}}, ".better.equal='no': Fix: tie or drop."),
        ({**TWO, "better": {"higher": ["x", "y"], "margin": 1}}, ".better.margin=1: is neither true nor false."),
        ({**TWO, "soft_label": {"votes": "v", "first": [1]}}, ".soft_label.second: is missing."),
        ({**TWO, "soft_label": {"counts": ["v"]}}, ".soft_label.counts: needs 2 or 3 places."),
        ({**PAIR, "as_messages": "yes"}, "dataset_columns.as_messages='yes': is neither true nor false."),
        ({**PAIR, "not_meant": "system"}, "dataset_columns.not_meant='system': is no list of columns."),
        ({**PAIR, "messages": {"name": "x"}}, "dataset_columns.messages={'name': 'x'}: Fix: {role: KEY"),
        ({**PAIR, "messages": {"role": 1}}, "dataset_columns.messages.role=1: is no key."),
        ({**PAIR, "messages": {"roles": {"a": "b"}}}, ".messages.roles={'a': 'b'}: Fix: a map"),
        ({**PAIR, "messages": {"blocks": "x"}}, ".messages.blocks='x': Fix: anthropic."),
        ({**PAIR, "tree": {"id": "i"}}, "dataset_columns.tree: needs root and replies"),
        ({**PAIR, "tree": {"kind": "i"}}, "dataset_columns.tree={'kind': 'i'}: Fix: a map of id, parent"),
        ({**PAIR, "tree": {"id": "i", "parent": 1}}, "dataset_columns.tree.parent=1: is no name of a column."),
        ({**PAIR, "tree": {"id": "i", "parent": "p", "where": []}}, "dataset_columns.tree.where=[]: is no map"),
        ({**PAIR, "messages": {"roles": {1: "user", "human": "user"}}},
         "dataset_columns.messages.roles: the key 1 is no text. Fix: in quotes, '1'."),
        ({**PAIR, "prompt": {"dialogue": "a", "marks": {2: "user", "B": "assistant"}}},
         "dataset_columns.prompt.marks: the key 2 is no text. Fix: in quotes, '2'."),
        ({**PAIR, "tree": {"id": "i", "parent": "p", "where": {True: 1, "a": 2}}},
         "dataset_columns.tree.where: the key True is no text."),
        ({**PAIR, "tools": {"constant": [{"a": 1, "b": {3: 2}}]}},
         "dataset_columns.tools.constant: the key 3 is no text."),
    ],
)  # fmt: skip
def test_each_fault_of_a_map_has_its_text(columns: Any, problem: str) -> None:
    problems = map_problems(columns)
    assert any(problem in text for text in problems), problems


def test_all_faults_are_said_at_once() -> None:
    assert len(map_problems({**PAIR, "prompt": 1, "chosen": "a..b", "as_messages": 3})) == 3


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"preset": "lmbar"}, "dataset_preset=lmbar: did you mean llmbar? Fix: one of anthropic_messages, "),
        ({"preset": "xyzzy"}, "dataset_preset=xyzzy: there is no such preset. Fix: one of "),
        ({"preset": "llmbar", "columns": PAIR}, "dataset_preset=llmbar with dataset_columns: both say"),
        ({"preset": "llmbar", "format": "ranked"}, "dataset_preset=llmbar with dataset_format=ranked: the map makes"),
        ({"columns": PAIR, "format": "soft_label"}, "dataset_columns with dataset_format=soft_label"),
        ({"columns": PAIR, "ignored": ["q"]}, "dataset_columns with ignore_columns=q: the map reads that column."),
        (
            {"preset": "topical_chat", "ignored": ["context"]},
            "dataset_preset=topical_chat with ignore_columns=context: the map reads",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], problem: str) -> None:
    (found,) = reading_problems(**{"preset": None, "columns": None, "format": "auto", "ignored": (), **settings})
    assert problem in found


def test_the_settings_of_a_run_are_checked_when_they_are_read(tmp_path: Path) -> None:
    settings = {"model_name_or_path": "m", "dataset_path": ["x.jsonl"], "output_dir": "out"}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**settings, "dataset_columns": {"prompt": "q", "chosen": "a", "rejectd": "b"}}))
    assert "dataset_columns.rejectd: did you mean rejected?" in "\n".join(
        parse_config(["--config", str(file)]).problems
    )
    file.write_text(yaml.safe_dump({**settings, "dataset_preset": "helpster3"}))
    assert "dataset_preset=helpster3: did you mean helpsteer3?" in "\n".join(
        parse_config(["--config", str(file)]).problems
    )
    # A column whose name looks like a number stays a name.
    columns = {"prompt": "1", "chosen": "1e3", "rejected": "b"}
    file.write_text(yaml.safe_dump({**settings, "dataset_columns": columns}))
    assert parse_config(["--config", str(file)]).config.dataset_columns == columns
    flags = [f"--{name}={value}" for name, value in {**settings, "dataset_path": "x.jsonl"}.items()]
    parsed = parse_config([*flags, "--dataset_columns", json.dumps(columns)])
    assert (parsed.problems, parsed.config.dataset_columns) == ((), columns)
    sources = [{"path": "x.jsonl", "columns": {"prompt": "q", "chosen": "a"}}, {"path": "y.jsonl", "preset": "lmbar"}]
    file.write_text(yaml.safe_dump({"model_name_or_path": "m", "output_dir": "out", "datasets": sources}))
    problems = "\n".join(parse_config(["--config", str(file)]).problems)
    assert "datasets: source 1 (x.jsonl): columns: has only chosen." in problems
    assert "datasets: source 2 (y.jsonl): preset=lmbar: did you mean llmbar?" in problems
