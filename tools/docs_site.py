"""A MkDocs hook that makes the site of the repository: links out of docs/ lead somewhere there too.

In the repository pages link to each other and to files by relative paths, as GitHub shows them. The site holds the
pages of docs/, README.md as its first page, other Markdown files that pages link to under repository/, and any other
file that is linked as a copy there. A link to a file that does not exist is left as it is, and the strict build fails.
"""

from __future__ import annotations

import argparse
import importlib
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[1]
FIRST_PAGE = "README.md"
COMMANDS_PAGE = "commands.md"
COMMANDS_MARK = "<!-- commands -->"

_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def place_in_site(path: str) -> str:
    """Return where a file of the repository lies in the site, from the top of either."""
    if path == FIRST_PAGE:
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def place_in_repository(page: str) -> str:
    """Return the file of the repository that a page of the site is made from."""
    if page == "index.md":
        return FIRST_PAGE
    return page.removeprefix("repository/") if page.startswith("repository/") else f"docs/{page}"


def linked(text: str, path: str) -> Iterator[str]:
    """Yield what the Markdown file at `path` links to, by path in the repository."""
    for target in _LINK.findall(_CODE.sub("", text)):
        found = _resolve(target, path)
        if found is not None:
            yield found


def rewrite_links(text: str, page: str) -> str:
    """Return a page's text with its links as they must be in the site; code is left alone."""
    path = place_in_repository(page)

    def replaced(match: re.Match[str]) -> str:
        found = _resolve(match.group(1), path)
        if found is None:
            return match.group(1)
        anchor = match.group(1).partition("#")[2]
        site = posixpath.relpath(place_in_site(found), posixpath.dirname(page) or ".")
        return f"{site}#{anchor}" if anchor else site

    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [_LINK.sub(replaced, text[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, _LINK.sub(replaced, text[end:])])


def _resolve(target: str, path: str) -> str | None:
    """Return the path in the repository that a link means; `None` for addresses and places on the page itself."""
    name = target.partition("#")[0]
    if not name or ":" in name or name.startswith("/"):
        return None
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
    return f"{found}/README.md" if (REPOSITORY / found).is_dir() else found  # as GitHub shows a folder


def on_files(files: Files, config: Any) -> Files:
    """Add the first page and everything outside docs/ that pages link to, with what those link to in turn."""
    files.append(_file(FIRST_PAGE, config))
    waiting = [FIRST_PAGE, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    waiting += [place_in_repository(page) for page in _pages_of_nav(config.nav) if page.startswith("repository/")]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (REPOSITORY / path).parent.is_dir():
            continue
        seen.add(path)
        is_folder = path.endswith("/README.md") and not (REPOSITORY / path).exists()
        text = list_of_files(path) if is_folder else ""
        if files.get_file_from_path(place_in_site(path)) is None and (is_folder or (REPOSITORY / path).is_file()):
            files.append(_file(path, config, text))
        if path.endswith(".md") and (text or (REPOSITORY / path).is_file()):
            waiting += linked(text or (REPOSITORY / path).read_text(encoding="utf-8"), path)
    return files


def list_of_files(path: str) -> str:
    """Return a page for a folder that has no README.md of its own: its files, each as a link."""
    folder = (REPOSITORY / path).parent
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    return "\n".join([f"# {folder.relative_to(REPOSITORY)}", "", *(f"- [{name}]({name})" for name in names), ""])


def _file(path: str, config: Any, text: str = "") -> File:
    if text:
        return File.generated(config, place_in_site(path), content=text)
    return File.generated(config, place_in_site(path), abs_src_path=str(REPOSITORY / path))


def _pages_of_nav(nav: Any) -> Iterator[str]:
    for entry in nav if isinstance(nav, list) else nav.values():
        if isinstance(entry, str):
            yield entry
        else:
            yield from _pages_of_nav(entry)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the options of each command where the page of commands wants them, and lead links to their place."""
    if page.file.src_uri == COMMANDS_PAGE:
        markdown = markdown.replace(COMMANDS_MARK, command_help())
    return rewrite_links(markdown, page.file.src_uri)


def command_help() -> str:
    """Return what `rm-scale COMMAND --help` prints, a section for each command."""
    cli = importlib.import_module("rm_scale.cli")
    return "\n".join(
        f"## {name}\n\n```text\n{parser.format_help()}```\n"
        for name, parser in _commands(cli.build_parser(), "rm-scale")
    )


def _commands(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Return the parsers below one, those of `rm-scale slurm submit` and its like too, by what is typed."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                below.prog = f"{name} {word}"
                yield below.prog, below
                yield from _commands(below, below.prog)
