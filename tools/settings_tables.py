"""Write the tables of docs/settings.md from the settings and the installed TRL: python tools/settings_tables.py"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from rm_scale.config import RunConfig, setting_groups  # noqa: E402
from rm_scale.config_help import default_text, value_choices, value_type  # noqa: E402
from rm_scale.config_trl import DIFFERENT_DEFAULTS, FIXED, RENAMED  # noqa: E402

PAGE = REPOSITORY / "docs" / "settings.md"
BEGIN, END = "<!-- settings:begin -->", "<!-- settings:end -->"
TRL_BEGIN, TRL_END = "<!-- trl:begin -->", "<!-- trl:end -->"


def tables() -> str:
    """Return one heading and table per group, in Markdown."""
    lines = []
    for group, names in setting_groups().items():
        lines += [f"### {group}", "", "| setting | values | default | meaning |", "|---|---|---|---|"]
        lines += [row(name) for name in names]
        lines.append("")
    return "\n".join(lines)


def row(name: str) -> str:
    """Return the row of one setting."""
    choices = value_choices(name)
    values = " \\| ".join(choices if "true" in choices else [f"`{choice}`" for choice in choices]) or value_type(name)
    default = default_text(name)
    shown = default if default in {"required", "none", "empty", "true", "false"} else f"`{default}`"
    return f"| `{name}` | {values} | {shown} | {RunConfig.model_fields[name].description} |"


def trl_defaults() -> dict[str, Any]:
    """Return every setting of the installed TRL by name, with its default."""
    from trl import ModelConfig, RewardConfig, ScriptArguments
    from trl.scripts.utils import DatasetMixtureConfig

    found: dict[str, Any] = {}
    for kind in (RewardConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig):
        for field in dataclasses.fields(kind):
            made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            found.setdefault(field.name, made)
    return found


def trl_tables() -> str:
    """Return what becomes of TRL's settings, and where defaults differ, in Markdown."""
    defaults = trl_defaults()
    same = [f"`{name}`" for name in defaults if name in RunConfig.model_fields]
    lines = [f"Of the same name and meaning here ({len(same)} of {len(defaults)}): {', '.join(same)}.", ""]
    lines += ["| another name | here |", "|---|---|"]
    lines += [f"| `{name}` | `{ours}` |" for name, ours in RENAMED.items()]
    lines += ["", "| refused | accepted with the value | why no other | instead |", "|---|---|---|---|"]
    for name, fixed in FIXED.items():
        accepted = ", ".join(f"`{value}`" for value in fixed.accepted)
        lines.append(f"| `{name}` | {accepted} | {fixed.reason} | {fixed.instead} |")
    lines += ["", "| default of | in TRL | here | why |", "|---|---|---|---|"]
    for name, (ours, why) in DIFFERENT_DEFAULTS.items():
        lines.append(f"| `{name}` | {_default(defaults[name])} | {ours} | {why} |")
    return "\n".join(lines)


def _default(value: Any) -> str:
    shown = {True: "true", False: "false", None: "none"}.get(value) if isinstance(value, bool | None) else None
    return shown or f"`{getattr(value, 'value', value)}`"


def main() -> None:
    """Replace the tables in the page."""
    text = PAGE.read_text(encoding="utf-8")
    for begin, end, table in ((BEGIN, END, tables()), (TRL_BEGIN, TRL_END, trl_tables())):
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{table}\n{end}{after}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
