"""Write the tables of docs/settings.md from the fields of RunConfig: python tools/settings_tables.py"""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from rm_scale.config import RunConfig, setting_groups  # noqa: E402
from rm_scale.config_help import default_text, value_choices, value_type  # noqa: E402

PAGE = REPOSITORY / "docs" / "settings.md"
BEGIN, END = "<!-- settings:begin -->", "<!-- settings:end -->"


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


def main() -> None:
    """Replace the tables in the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
