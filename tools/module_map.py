"""Write the list of all modules in docs/architecture.md, each with the first sentence of its docstring.

    python tools/module_map.py

`make format` runs it; tests/unit/test_docs.py fails when the list is not that of the tree.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "rm_scale"
PAGE = REPOSITORY / "docs" / "architecture.md"
BEGIN, END = "<!-- modules:begin -->", "<!-- modules:end -->"


def first_sentence(path: Path) -> str:
    """Return the first paragraph of a module's docstring up to the end of its first sentence, in one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    found = re.match(r".*?\.(?= [A-Z`])", paragraph)
    return (found.group() if found else paragraph).replace("|", "\\|")


def module_list() -> str:
    """Return the list as Markdown: a heading and a table for each package, the top level first."""
    packages: dict[str, list[Path]] = {"": []}
    for path in sorted(PACKAGE.rglob("*.py")):
        folder = path.parent.relative_to(PACKAGE).as_posix().removeprefix(".")
        packages.setdefault(folder, []).append(path)
    sections = []
    for folder, paths in sorted(packages.items()):
        about = first_sentence(PACKAGE / folder / "__init__.py")
        rows = [f"| `{path.name}` | {first_sentence(path)} |" for path in paths if path.name != "__init__.py"]
        if rows:
            sections.append("\n".join([f"### `{folder or 'rm_scale'}/`", "", about, "", "| | |", "|---|---|", *rows]))
    return "\n\n".join(sections)


def main() -> None:
    """Put the list between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{module_list()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
