"""What the documents say exists: settings with their defaults, links, and the README's commands."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from rm_scale.config import RunConfig, parse_config
from rm_scale.data.groups import REJECTION_REASONS

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "CONTRIBUTING.md"]


def test_settings_table_is_the_configuration() -> None:
    """Regenerate the table in docs/settings.md when this fails: name and meaning must match field by field."""
    text = (REPOSITORY / "docs" / "settings.md").read_text()
    table = text[text.index("<!-- settings:begin -->") : text.index("<!-- settings:end -->")]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    documented = {row[0].strip("| `"): row[-1].removesuffix(" |") for row in rows}
    assert documented == {name: info.description for name, info in RunConfig.model_fields.items()}


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
def test_training_commands_use_real_settings(document: Path) -> None:
    text = document.read_text().replace("\\\n", " ")
    commands = re.findall(r"rm_scale/train\.py (--[^\n`|]*)", text)
    for command in commands:
        flags = [word for word in shlex.split(command) if word not in {"...", "--help"}]
        unknown = [problem for problem in parse_config(flags).problems if "no such setting" in problem]
        assert unknown == [], command


def test_the_table_of_needs_is_the_planners() -> None:
    """Run tools/plan_table.py when this fails."""
    spec = importlib.util.spec_from_file_location("plan_table", REPOSITORY / "tools" / "plan_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (REPOSITORY / "docs" / "planning.md").read_text()
    assert text.partition(module.BEGIN)[2].partition(module.END)[0].strip() == module.table()
