"""What a column map (`dataset_columns`) may say, checked without looking at any row; the presets that ship with it.

`docs/data_formats.md` describes the language; `rm_scale.data.column_maps` reads rows by it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rm_scale.texts import did_you_mean
from rm_scale.yaml_files import read_yaml

PRESETS_FILE = Path(__file__).parent / "data" / "column_maps" / "presets.yaml"

ORDERS = ("ranks", "scores", "better", "soft_label")
"""What may say which of the `responses` is better."""
_VALUES = ("prompt", "system", "chosen", "rejected", "margin", "tools", "id", "subset")
_OTHERS = ("messages", "as_messages", "equal", "group_by", "tree", "not_meant")
NAMES = (*_VALUES, "responses", *ORDERS, *_OTHERS)
"""All names at the top of a map."""
PLACE_FORMS = {
    "path": frozenset({"path"}),
    "constant": frozenset({"constant"}),
    "first_of": frozenset({"first_of"}),
    "template": frozenset({"template"}),
    "join": frozenset({"join", "with"}),
    "dialogue": frozenset({"dialogue", "marks", "first"}),
    "mean": frozenset({"mean"}),
    "difference": frozenset({"difference"}),
}
"""The forms of a place that are more than a path: the key that tells each, and all its keys."""
SIDES = ("first", "second", "tie", "drop")
TO_FILL_IN = "VALUE"
"""What a suggested map has in place of a label whose meaning only the user knows."""
BETTER_FORMS = {
    "path": frozenset({"path", *SIDES}),
    "signed": frozenset({"signed", "negative", "zero", "margin"}),
    "higher": frozenset({"higher", "equal", "margin"}),
}
SOFT_LABEL_FORMS = {"votes": frozenset({"votes", *SIDES}), "counts": frozenset({"counts"})}
ROLES = ("system", "developer", "user", "assistant", "tool")
TEMPLATE_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_PATH = re.compile(r"(?:\[(?:-?\d+|\*)\]|[^.\[\]]+)(?:\.[^.\[\]]+|\[(?:-?\d+|\*)\])*\??")
_WHERE = "docs/data_formats.md"


# --- Presets ---------------------------------------------------------------------------------------------------------


@functools.cache
def preset_entries() -> Mapping[str, Any]:
    """Return the presets as their file has them, by name."""
    entries: dict[str, Any] = read_yaml(PRESETS_FILE)
    return entries


def reading_problems(preset: str | None, columns: Any, format: str, ignored: Iterable[str] = ()) -> list[str]:
    """Return what is wrong with the settings that say how rows of other columns are read, one text each.

    Args:
        preset: `dataset_preset`.
        columns: `dataset_columns`.
        format: `dataset_format`.
        ignored: `ignore_columns`.
    """
    problems = []
    if preset is not None and preset not in preset_entries():
        known = preset_entries()
        guess = did_you_mean(preset, known, "there is no such preset.")
        problems.append(f"dataset_preset={preset}: {guess} Fix: one of {', '.join(sorted(known))}.")
    if columns is None:
        named = preset if preset in preset_entries() else None
        columns = preset_entries()[named]["columns"] if named else None
        setting = f"dataset_preset={preset}"
    else:
        if preset is not None:
            problems.append(
                f"dataset_preset={preset} with dataset_columns: both say where the columns stand. Fix: leave one out; "
                "to change a preset, copy its map into dataset_columns."
            )
        problems += map_problems(columns)
        setting = "dataset_columns"
    if columns is None or problems:
        return problems
    if format != "auto" and format not in formats_of(columns):
        problems.append(
            f"{setting} with dataset_format={format}: the map makes rows of the format "
            f"{' or '.join(formats_of(columns))}. Fix: leave dataset_format out."
        )
    both = sorted(set(ignored) & {root_of(path, columns) for path, _ in paths_of(columns)})
    if both:
        problems.append(
            f"{setting} with ignore_columns={both[0]}: the map reads that column. Fix: take it out of one of them."
        )
    return problems


def formats_of(columns: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the formats that a map may make rows of."""
    if "responses" not in columns:
        return ("explicit_prompt", "implicit_prompt", "conversational", "hh_text")
    return ("ranked",) if "ranks" in columns or "scores" in columns else ("soft_label",)


# --- Paths of a map --------------------------------------------------------------------------------------------------


def paths_of(columns: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield each path that a map reads, and whether rows may lack it."""
    for name in (*_VALUES, "responses", *ORDERS):
        if name in columns:
            yield from _paths(columns[name])


def _paths(place: Any, may_lack: bool = False) -> Iterator[tuple[str, bool]]:
    if isinstance(place, str):
        yield place.removesuffix("?"), may_lack or place.endswith("?")
    elif isinstance(place, list):
        for part in place:
            yield from _paths(part, may_lack)
    elif isinstance(place, Mapping):
        for key in ("path", "signed", "higher", "mean", "difference", "dialogue", "votes", "counts"):
            if key in place:
                yield from _paths(place[key], may_lack)
        for key in ("first_of", "join"):
            if key in place:
                yield from _paths(place[key], True)
        if "template" in place:
            yield from _paths(template_fields(place["template"]), may_lack)


def template_fields(template: str) -> list[str]:
    """Return the paths between braces; doubled braces are braces."""
    return [found.group(1) for found in TEMPLATE_FIELD.finditer(template) if found.group(1) is not None]


def root_of(path: str, columns: Mapping[str, Any]) -> str:
    """Return the column of the file in which a path begins.

    Rows that are put together hold the file's own rows in lists, whose columns begin one step later.
    """
    steps = [step for step in re.split(r"[.\[\]]+", path) if step]
    lists = ("rows",) if "group_by" in columns else ("thread", "replies") if "tree" in columns else ()
    if lists and steps[0] in lists:
        rest = [step for step in steps[1:] if step != "*" and not step.lstrip("-").isdigit()]
        return rest[0] if rest else ""
    return steps[0] if steps else ""


# --- Checks ----------------------------------------------------------------------------------------------------------


def map_problems(columns: Any, setting: str = "dataset_columns") -> list[str]:
    """Return what is wrong with a column map, one text each: the value, the rule, the fix.

    Args:
        columns: the map.
        setting: what is named in the texts.
    """
    return [f"{setting}{at}: {text}" for at, text in _map_problems(columns)]


def _map_problems(columns: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(columns, Mapping):
        yield f"={columns!r}", f"is no map. Fix: {{prompt: PATH, chosen: PATH, rejected: PATH}} ({_WHERE})."
        return
    unknown = [name for name in columns if name not in NAMES]
    for name in unknown:
        guess = did_you_mean(str(name), NAMES, "a map can't say that.")
        yield f".{name}", f"{guess} Fix: one of {', '.join(NAMES)}."
    if not unknown:
        yield from _contradictions(columns)
    for name in _VALUES:
        if name in columns:
            yield from _place_problems(f".{name}", columns[name])
    for name in ("responses", "ranks", "scores"):
        if name in columns:
            yield from _list_problems(f".{name}", columns[name])
    if "better" in columns:
        yield from _better_problems(columns["better"])
    if "soft_label" in columns:
        yield from _soft_label_problems(columns["soft_label"])
    yield from _other_problems(columns)


def _contradictions(columns: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    pair = [name for name in ("chosen", "rejected") if name in columns]
    orders = [name for name in ORDERS if name in columns]
    if "responses" in columns:
        if pair:
            yield f".{pair[0]}", "stands beside responses: a row is a pair or a list. Fix: leave one out."
        if len(orders) != 1:
            seen = "nothing says" if not orders else f"{' and '.join(orders)} both say"
            yield ".responses", f"{seen} which of them is better. Fix: one of {', '.join(ORDERS)}."
        if "prompt" not in columns and orders and orders[0] in ("ranks", "scores"):
            yield "", "has no prompt for its responses. Fix: prompt: PATH."
    else:
        if len(pair) != 2:
            seen = f"only {pair[0]}" if pair else "neither chosen and rejected nor responses"
            yield "", f"has {seen}. Fix: chosen: PATH and rejected: PATH, or responses: [PATH, PATH] and better."
        for name in orders:
            yield f".{name}", "needs responses: chosen and rejected already say which is better. Fix: leave it out."
    two = [name for name in ("better", "soft_label") if name in columns]
    if two and isinstance(columns.get("responses"), list) and len(columns["responses"]) != 2:
        yield ".responses", f"has {len(columns['responses'])} places, and {two[0]} speaks of 2. Fix: ranks or scores."
    if "margin" in columns and {"ranks", "scores", "soft_label"} & set(columns):
        yield ".margin", "belongs to pairs with a better one: chosen and rejected, or better. Fix: leave it out."
    if "equal" in columns and not {"ranks", "scores"} & set(columns):
        yield ".equal", "says what two responses of equal ranks or scores are. Fix: leave it out."
    if "group_by" in columns and "tree" in columns:
        yield ".group_by", "stands beside tree: both put rows together. Fix: leave one out."


def _place_problems(at: str, place: Any) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with something that says where a value stands."""
    if isinstance(place, str):
        if not _PATH.fullmatch(place):
            yield f"{at}={place!r}", "is no path. Fix: names and numbers as in meta.question, answers[0].text."
        return
    if not isinstance(place, Mapping):
        yield (
            f"{at}={place!r}",
            f"is no place in a row. Fix: a path in quotes, or one of {', '.join(PLACE_FORMS)} ({_WHERE}).",
        )
        return
    form = yield from _form(at, place, PLACE_FORMS)
    value = place.get(form) if form else None
    if form == "path":
        yield from _place_problems(f"{at}.path", value if isinstance(value, str) else [value])
    elif form == "constant":
        yield from _key_problems(f"{at}.constant", value)
    elif form in ("first_of", "join"):
        yield from _some_places(f"{at}.{form}", value)
        if not isinstance(place.get("with", ""), str):
            yield f"{at}.with={place['with']!r}", 'is no text. Fix: with: "\\n".'
    elif form == "template":
        yield from _template_problems(f"{at}.template", value)
    elif form == "dialogue":
        yield from _dialogue_problems(at, place)
    elif form == "mean":
        yield from _some_places(f"{at}.mean", value) if isinstance(value, list) else _place_problems(at, value)
    elif form == "difference":
        yield from _two_places(f"{at}.difference", value)


def _form(at: str, place: Mapping[str, Any], forms: Mapping[str, frozenset[str]]) -> Any:
    """Yield what is wrong with the keys of a mapping, and return the form that they tell, if they tell one."""
    told = [name for name in forms if name in place]
    if len(told) != 1:
        seen = "says none" if not told else f"says {' and '.join(told)}"
        yield at, f"{seen} of {', '.join(forms)}, where one is needed. Fix: see {_WHERE}."
        return None
    for name in place:
        if name not in forms[told[0]]:
            yield f"{at}.{name}", f"is unknown beside {told[0]}. Fix: one of {', '.join(sorted(forms[told[0]]))}."
    return told[0]


def _some_places(at: str, places: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(places, list) or not places:
        yield f"{at}={places!r}", "is no list of places. Fix: [PATH, PATH]."
        return
    for number, place in enumerate(places):
        yield from _place_problems(f"{at}[{number}]", place)


def _two_places(at: str, places: Any) -> Iterator[tuple[str, str]]:
    if isinstance(places, str):
        yield from _place_problems(at, places)
    elif isinstance(places, list) and len(places) != 2:
        yield f"{at}={places!r}", "has not two places. Fix: [PATH, PATH]."
    else:
        yield from _some_places(at, places)


def _list_problems(at: str, places: Any) -> Iterator[tuple[str, str]]:
    yield from _some_places(at, places) if isinstance(places, list) else _place_problems(at, places)


def _template_problems(at: str, template: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(template, str) or not template_fields(template):
        yield f"{at}={template!r}", 'names no column. Fix: "{instruction}\\n{input}".'
        return
    for field in template_fields(template):
        if not _PATH.fullmatch(field):
            yield f"{at}", f"{{{field}}} is no path; braces that are text are doubled: {{{{ }}}}. Fix: correct it."
    if re.search(r"[{}]", TEMPLATE_FIELD.sub("", template)):
        yield f"{at}={template!r}", "has a single brace; as text it is doubled. Fix: {{ or }}."


def _dialogue_problems(at: str, place: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _place_problems(f"{at}.dialogue", place["dialogue"])
    marks = place.get("marks")
    if not isinstance(marks, Mapping) or not marks:
        yield f"{at}.marks={marks!r}", 'is no map from texts to roles. Fix: {"User: ": user, "Bot: ": assistant}.'
        marks = {}
    for role in [*marks.values(), place.get("first", "user")]:
        if role not in ROLES:
            yield at, f"{role!r} is no role. Fix: one of {', '.join(ROLES)}."
    yield from _key_problems(f"{at}.marks", marks)
    if "" in marks:
        yield f"{at}.marks", "an empty text marks nothing. Fix: the text before a turn."


def _better_problems(better: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(better, Mapping):
        yield f".better={better!r}", "does not say which value means which. Fix: {path: PATH, first: [1], second: [2]}."
        return
    form = yield from _form(".better", better, BETTER_FORMS)
    if form == "path":
        yield from _place_problems(".better.path", better["path"])
        yield from _side_problems(".better", better)
    elif form == "signed":
        yield from _place_problems(".better.signed", better["signed"])
        yield from _one_of(".better.negative", better.get("negative"), ("first", "second"))
        yield from _one_of(".better.zero", better.get("zero", "tie"), ("tie", "drop"))
    elif form == "higher":
        yield from _two_places(".better.higher", better["higher"])
        yield from _one_of(".better.equal", better.get("equal", "tie"), ("tie", "drop"))
    if not isinstance(better.get("margin", False), bool):
        yield f".better.margin={better['margin']!r}", "is neither true nor false. Fix: true reads the size as a margin."


def _soft_label_problems(label: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(label, Mapping) or not set(label) & set(SOFT_LABEL_FORMS):
        yield from _place_problems(".soft_label", label)
        return
    form = yield from _form(".soft_label", label, SOFT_LABEL_FORMS)
    if form == "votes":
        yield from _list_problems(".soft_label.votes", label["votes"])
        yield from _side_problems(".soft_label", label)
    elif form == "counts":
        yield from _list_problems(".soft_label.counts", label["counts"])
        if isinstance(label["counts"], list) and len(label["counts"]) not in (2, 3):
            yield ".soft_label.counts", "needs 2 or 3 places. Fix: those of votes for the first, the second, and ties."


def _side_problems(at: str, label: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    seen: dict[str, str] = {}
    for side in SIDES:
        values = label.get(side)
        if values is None and side in ("first", "second"):
            yield f"{at}.{side}", "is missing. Fix: a list of the values that mean it."
            continue
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            if not isinstance(value, str | int | float):
                yield f"{at}.{side}={value!r}", "is neither text, number nor true/false. Fix: a list of such values."
            elif value == TO_FILL_IN:
                yield f"{at}.{side}={value!r}", f"is still to be filled in. Fix: a list of the values that mean {side}."
            elif label_key(value) in seen:
                yield f"{at}.{side}={value!r}", f"already means {seen[label_key(value)]}. Fix: one meaning each."
            else:
                seen[label_key(value)] = side


def label_key(value: Any) -> str:
    """Return a label in a form in which equal ones are equal: 1, 1.0 and "1" are, as CSV has only texts."""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value).strip()
    try:
        number = float(text)
    except ValueError:
        return text.lower() if text.lower() in ("true", "false") else text
    return repr(number)


def _one_of(at: str, value: Any, choices: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if value not in choices:
        yield f"{at}={value!r}", f"Fix: {' or '.join(choices)}."


def _other_problems(columns: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not isinstance(columns.get("as_messages", False), bool):
        yield f".as_messages={columns['as_messages']!r}", "is neither true nor false. Fix: true makes texts messages."
    if "equal" in columns:
        yield from _one_of(".equal", columns["equal"], ("tie", "drop"))
    for name in ("group_by", "not_meant"):
        value = columns.get(name, ["a"])
        if not isinstance(value, list) or not value or not all(isinstance(part, str) and part for part in value):
            yield f".{name}={value!r}", "is no list of columns. Fix: [COLUMN, COLUMN]."
        elif name == "group_by" and "group_by" in columns:
            yield from _some_places(".group_by", value)
    if "messages" in columns:
        yield from _message_problems(columns["messages"])
    if "tree" in columns:
        yield from _tree_problems(columns["tree"])


def _message_problems(naming: Any) -> Iterator[tuple[str, str]]:
    keys = ("role", "content", "roles", "blocks")
    if not isinstance(naming, Mapping) or any(key not in keys for key in naming):
        yield f".messages={naming!r}", "Fix: {role: KEY, content: KEY, roles: {human: user}}, or {blocks: anthropic}."
        return
    for key in ("role", "content"):
        if not isinstance(naming.get(key, key), str):
            yield f".messages.{key}={naming[key]!r}", "is no key. Fix: its name, as text."
    roles = naming.get("roles", {})
    if not isinstance(roles, Mapping) or any(role not in ROLES for role in roles.values()):
        yield f".messages.roles={roles!r}", f"Fix: a map from the file's names to {', '.join(ROLES)}."
    yield from _key_problems(".messages.roles", roles)
    yield from _one_of(".messages.blocks", naming.get("blocks", "anthropic"), ("anthropic",))


def _tree_problems(tree: Any) -> Iterator[tuple[str, str]]:
    nested, flat = {"root", "replies"}, {"id", "parent"}
    keys = {*nested, *flat, "where", "ranked_by"}
    if not isinstance(tree, Mapping) or any(key not in keys for key in tree):
        yield f".tree={tree!r}", f"Fix: a map of {', '.join(sorted(keys))} ({_WHERE})."
        return
    told = set(tree) & {*nested, *flat}
    if told not in (nested, flat):
        yield ".tree", "needs root and replies (trees, one a row), or id and parent (messages, one a row)."
    for key in (*told, "ranked_by"):
        if key in tree and (not isinstance(tree[key], str) or not tree[key]):
            yield f".tree.{key}={tree[key]!r}", "is no name of a column. Fix: its name, as text."
    where = tree.get("where", {})
    if not isinstance(where, Mapping) or not all(isinstance(value, str | int | float) for value in where.values()):
        yield f".tree.where={where!r}", "is no map from columns to values. Fix: {role: assistant}."
    yield from _key_problems(".tree.where", where)


def _key_problems(at: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield which keys of mappings at any depth are no text; JSON, which rows are made of, has no others."""
    for key in _other_keys(value):
        yield at, f"the key {key!r} is no text. Fix: in quotes, '{key}'."


def _other_keys(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from (key for key in value if not isinstance(key, str))
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _other_keys(part)
