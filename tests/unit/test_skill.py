"""The agent skill: agents can find it, its commands are those that exist, and its quick start runs as it stands."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rm_scale import cli
from rm_scale.config import RunConfig
from rm_scale.config_parsing import parse_config
from rm_scale.inference.reward_function import reward_function
from rm_scale.tiers import SIZE_TIERS
from tests.support.launching import environment, read_json, read_lines

REPOSITORY = Path(__file__).resolve().parents[2]
SKILL = REPOSITORY / "skills" / "reward-modeling" / "SKILL.md"
TEXT = SKILL.read_text(encoding="utf-8")


def front_matter() -> dict[str, Any]:
    assert TEXT.startswith("---\n")
    found = yaml.safe_load(TEXT.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def bash_blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)


def commands() -> list[list[str]]:
    """Each command of each block as words, without what a shell does before and around it."""
    found = []
    for block in bash_blocks():
        plain = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block, flags=re.S | re.M).replace("\\\n", " ")
        for line in plain.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


def test_front_matter_is_what_skill_listings_read() -> None:
    found = front_matter()
    assert found["name"] == SKILL.parent.name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", found["name"]) and len(found["name"]) <= 64
    assert 100 < len(found["description"]) <= 1024
    assert "Use when" in found["description"]
    assert len(found["compatibility"]) <= 500
    assert found["license"] == "Apache-2.0"
    assert all(isinstance(tag, str) for tag in found["tags"]) and "rlhf" in found["tags"]
    assert all(isinstance(value, str) for value in found["metadata"].values())
    assert len(TEXT.splitlines()) < 300


def test_every_command_parses() -> None:
    """By the real parsers: unknown commands, options and settings are errors."""
    seen = set()
    for words in commands():
        if words[0] == "rm-scale":
            _parse_command(words[1:])
            seen.add(words[1])
        elif "rm_scale/train.py" in words:
            _parse_settings(words[words.index("rm_scale/train.py") + 1 :])
            seen.add("train")
        elif words[0] == "sbatch":
            script = next(word for word in words[1:] if not word.startswith("-"))
            assert (REPOSITORY / script).is_file()
            _parse_settings(words[words.index(script) + 1 :], complete=False)
            seen.add("sbatch")
        else:
            assert words[0] in {"python", "&&"} or words[0].startswith("WORK"), words
    assert seen >= {"train", "sbatch", "score", "rank", "eval", "serve", "export", "plan", "data", "slurm", "doctor"}


def _parse_command(words: list[str]) -> None:
    try:
        options, rest = cli.build_parser().parse_known_args(words)
    except SystemExit as error:
        raise AssertionError(f"rm-scale {shlex.join(words)}") from error
    if rest:
        assert cli.takes_settings(options), f"rm-scale {shlex.join(words)}: unknown {rest}"
        _parse_settings(rest, complete=False)


def test_the_example_of_every_command_parses() -> None:
    for group in cli.COMMANDS.values():
        for module in group.values():
            program, *words = shlex.split(module.EXAMPLE)
            assert program == "rm-scale"
            _parse_command(words)


def _parse_settings(words: list[str], complete: bool = True) -> None:
    problems = parse_config(words).problems
    if not complete:
        problems = tuple(problem for problem in problems if "no such setting" in problem)
    assert list(problems) == [], shlex.join(words)


def test_an_invented_option_would_be_noticed() -> None:
    for words in (["rank", "--input", "a", "--output", "b", "--modle", "c"], ["plan", "--gppus", "8"]):
        with pytest.raises(AssertionError):
            _parse_command(words)
    with pytest.raises(AssertionError):
        _parse_settings(["--model_name_or_path", "m", "--dataset_path", "d", "--lora_rankk", "3"])


def test_settings_named_in_the_text_exist() -> None:
    """Options outside the blocks too."""
    known = set(RunConfig.model_fields) | _options(cli.build_parser())
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)
    named = set(re.findall(r"--(\w+)", prose))
    assert named - known == set()


def _options(parser: argparse.ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in parser._actions:
        found |= {option.lstrip("-") for option in action.option_strings}
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found |= _options(child)
    return found


def test_table_by_size_is_that_of_the_tiers() -> None:
    rows = re.findall(r"^\| (below 1B|1-7B|above 7B) \| (\S+) \| (\S+) \| (\S+) \|", TEXT, re.M)
    assert [(name, float(rate), int(pairs), float(epochs)) for name, rate, pairs, epochs in rows] == [
        (tier.name, tier.learning_rate, tier.per_device_train_batch_size, tier.num_train_epochs) for tier in SIZE_TIERS
    ]


def test_files_named_in_the_text_exist() -> None:
    names = set(re.findall(r"\b((?:configs|slurm|rm_scale|docs)/[\w./-]*\w)", TEXT))
    assert {"slurm/rm_13b.sh", "rm_scale/train.py"} <= names
    assert [name for name in sorted(names) if not (REPOSITORY / name).exists()] == []
    pages = re.findall(r"`docs/` \(([^)]*)\)", TEXT)[0].split(", ")
    assert [page for page in pages if not (REPOSITORY / "docs" / f"{page}.md").is_file()] == []


@pytest.mark.long
def test_quick_start_runs(tmp_path: Path) -> None:
    """The block as an agent would paste it, in the repository, with the environment's commands on PATH."""
    section = TEXT.partition("## Quick start")[2]
    block = re.findall(r"^```bash\n(.*?)^```", section, re.M | re.S)[0]
    work = tmp_path / "work"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", block],
        cwd=REPOSITORY,
        env=environment(WORK=str(work), PATH=path, XDG_CACHE_HOME=str(tmp_path / "cache")),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert read_json(work / "rm" / "run" / "evaluation.json")["accuracy"] >= 0.8
    assert len(read_lines(work / "scored.jsonl")) == 20
    assert [row["completion"] in {" It is.", *_chosen(work)} for row in read_lines(work / "best.jsonl")] == [True] * 20
    assert read_json(work / "curves.json")["max_n"] == 3
    pairs = read_lines(work / "dpo.jsonl")
    assert len(pairs) == 20 and all(pair["margin"] > 0 for pair in pairs)


def _chosen(work: Path) -> set[str]:
    return {row["chosen"] for row in read_lines(work / "heldout.jsonl")}


def test_python_in_the_text_compiles_and_its_names_exist() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    assert len(blocks) >= 2
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reward_function":
                signature = inspect.signature(reward_function)
                signature.bind(*["x"] * len(node.args), **{str(word.arg): None for word in node.keywords})
    named = set(re.findall(r"`(\w+)=[^`]*`", TEXT.partition("## 6. RL")[2].partition("## 7.")[0]))
    assert named <= set(inspect.signature(reward_function).parameters)
