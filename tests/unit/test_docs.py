"""What the documents say exists: settings, links, commands, Python examples; and the site that is made of them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from rm_scale import cli
from rm_scale.config import RunConfig, setting_groups
from rm_scale.config_parsing import config_from_dict, parse_config
from rm_scale.data.rejected_rows import REJECTION_REASONS

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "CONTRIBUTING.md"]


def tool(name: str) -> ModuleType:
    """A script of tools/, as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_tables() -> str:
    text = (REPOSITORY / "docs" / "settings.md").read_text()
    return text[text.index("<!-- settings:begin -->") : text.index("<!-- settings:end -->")]


def test_settings_page_names_every_setting_under_its_group() -> None:
    documented: dict[str, list[str]] = {}
    for line in settings_tables().splitlines():
        if line.startswith("### "):
            names = documented.setdefault(line.removeprefix("### "), [])
        elif line.startswith("| `"):
            names.append(line.split("`")[1])
    assert list(documented.items()) == [(str(group), names) for group, names in setting_groups().items()]
    assert sorted(name for names in documented.values() for name in names) == sorted(RunConfig.model_fields)


def test_settings_tables_are_those_of_the_fields() -> None:
    """Run tools/settings_tables.py when this fails."""
    module = tool("settings_tables")
    assert settings_tables().removeprefix(module.BEGIN).strip() == module.tables().strip()


def test_every_rejection_reason_is_documented() -> None:
    text = (REPOSITORY / "docs" / "data_formats.md").read_text()
    assert [reason for reason in REJECTION_REASONS if f"`{reason}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text())
    missing = [t for t in targets if "://" not in t and not (document.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_tests_and_sources_exist(document: Path) -> None:
    names = re.findall(r"`((?:tests|rm_scale|ds_configs|configs)/[\w./-]+?)`", document.read_text())
    assert [name for name in names if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_command_of_a_block_writes_over_what_an_earlier_one_wrote(document: Path) -> None:
    """Pasted one after the other they must all run: a second `--output best.jsonl` is refused."""
    text = document.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```(?:bash|sh|shell)\n(.*?)```", text, re.DOTALL) + re.findall(
        r"(?:^ {4}.*\n)+", text, re.MULTILINE
    )
    for block in blocks:
        written: list[str] = []
        for command in re.findall(r"(?:rm-scale (?!doctor)|train\.py|benchmarks/\w+\.py) .*", block):
            replaces = "--overwrite" in command or "--dry_run" in command or "--resume" in command
            names = [] if replaces else re.findall(r"--(?:output|output_dir|curves|summary)[ =](\S+)", command)
            assert not {name for name in names if name != "..."} & set(written), command
            written += names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_training_commands_use_real_settings(document: Path) -> None:
    text = document.read_text().replace("\\\n", " ")
    commands = re.findall(r"rm_scale/train\.py (--[^\n`|]*)", text)
    for command in commands:
        flags = [word for word in shlex.split(command) if word not in {"...", "--help"}]
        unknown = [problem for problem in parse_config(flags).problems if "no such setting" in problem]
        assert unknown == [], command


@pytest.mark.long
def test_the_table_of_needs_is_the_planners() -> None:
    """Run tools/plan_table.py when this fails."""
    module = tool("plan_table")
    text = (REPOSITORY / "docs" / "planning.md").read_text()
    assert text.partition(module.BEGIN)[2].partition(module.END)[0].strip() == module.table()


def test_the_list_of_modules_is_that_of_the_tree() -> None:
    """Run tools/module_map.py when this fails."""
    module = tool("module_map")
    text = module.PAGE.read_text(encoding="utf-8")
    assert text.partition(module.BEGIN)[2].partition(module.END)[0].strip() == module.module_list()


def test_readme_is_one_screen_with_every_promise() -> None:
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    promises = text.partition("| promise | held by |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
    assert len(promises) >= 20
    assert [line for line in promises if not re.search(r"`tests/[\w./]+`", line)] == []


def test_every_promise_has_its_bound_and_tests_that_exist() -> None:
    held = re.compile(r"`(tests/[\w./]+)`")
    rows = [line for line in (REPOSITORY / "docs" / "promises.md").read_text().splitlines() if line.startswith("| ")]
    named = {path for row in rows for path in held.findall(row)}
    in_readme = held.findall((REPOSITORY / "README.md").read_text())
    assert set(in_readme) <= named, "a promise of the README has no row there"
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []
    assert all(row.count("|") == 5 for row in rows), "promise, bound, where it holds, test"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_use_names_and_settings_that_exist(document: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", document.read_text(), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rm_scale"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "train_reward_model":
                assert (
                    config_from_dict({word.arg: ast.literal_eval(word.value) for word in node.keywords}).problems == ()
                )


def test_commands_in_the_readme_parse() -> None:
    found = re.findall(r"`rm-scale ([a-z]+ [^`]*)`", (REPOSITORY / "README.md").read_text())
    assert len(found) >= 8
    for command in found:
        options, rest = cli.build_parser().parse_known_args(shlex.split(command))
        assert cli.takes_settings(options) or rest == [], command


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("index.md", "[a](docs/slurm.md#x)", "[a](slurm.md#x)"),
        ("index.md", "![a](docs/pictures/network.svg)", "![a](pictures/network.svg)"),
        ("slurm.md", "[a](../README.md) [b](using.md)", "[a](index.md) [b](using.md)"),
        ("slurm.md", "[a](../slurm/site.env)", "[a](repository/slurm/site.env)"),
        ("slurm.md", "[a](../configs)", "[a](repository/configs/README.md)"),
        ("repository/benchmarks/README.md", "[a](../docs/gpu.md)", "[a](../../gpu.md)"),
        ("repository/CONTRIBUTING.md", "[a](LICENSE)", "[a](LICENSE)"),
        ("slurm.md", "[a](#x) [b](https://example.org/x.md)", "[a](#x) [b](https://example.org/x.md)"),
        (
            "slurm.md",
            "`[a](../README.md)`\n```\n[a](../README.md)\n```",
            "`[a](../README.md)`\n```\n[a](../README.md)\n```",
        ),
    ],
)
def test_links_lead_to_their_place_in_the_site(page: str, text: str, expected: str) -> None:
    assert tool("docs_site").rewrite_links(text, page) == expected


def test_the_site_lists_every_command_with_its_options() -> None:
    text = tool("docs_site").command_help()
    for name in (name for group in cli.COMMANDS.values() for name in group):
        assert f"## rm-scale {name}\n" in text
    assert "--output_format" in text
    assert tool("docs_site").COMMANDS_MARK in (REPOSITORY / "docs" / "commands.md").read_text()
