"""Check `chat_template_path` before a tokenizer is loaded: a Jinja file, a folder with a tokenizer, or a hub name."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rm_scale.files import read_small_text
from rm_scale.texts import nearest_file

_MAX_TEMPLATE_BYTES = 1_000_000
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TEMPLATE_ENDINGS = (".jinja", ".jinja2", ".j2", ".txt", ".json")


def template_problems(path: str | None) -> list[str]:
    """Return why no chat template can be read there; of a hub name only its form is looked at."""
    if path is None:
        return []
    setting, place = f"chat_template_path={path}", Path(path)
    if place.is_dir():
        if _has_template(place):
            return []
        return [f"{setting}: the tokenizer there has no chat template. Fix: give a Jinja file, or another tokenizer."]
    if not place.exists() and _HUB_NAME.fullmatch(path) and not path.endswith(_TEMPLATE_ENDINGS):
        return []
    try:
        read_small_text(path, _MAX_TEMPLATE_BYTES)
    except ValueError as error:
        near = "" if place.exists() else nearest_file(place)
        fix = "give a Jinja file in UTF-8, or a tokenizer by folder or hub name"
        return [f"{setting}: can't be read ({error}).{near} Fix: {fix}."]
    return []


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "additional_chat_templates").is_dir():
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))
