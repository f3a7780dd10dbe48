"""What to say when a map, a preset or every format does not fit a file: what is missing, and what would fit."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from rm_scale.config_columns import TO_FILL_IN, label_key
from rm_scale.data.column_maps.presets import fitting_presets
from rm_scale.data.context_columns import holds_context
from rm_scale.data.row_values import Row
from rm_scale.texts import did_you_mean, one_line, some_names

if TYPE_CHECKING:
    from rm_scale.data.reading import Reading

_PAIRS = (("1", "2"), ("0", "1"), ("a", "b"), ("A", "B"), ("one", "two"), ("first", "second"))
_BETTER_NAMES = ("chosen", "preferred", "better", "winner", "win", "good", "accepted", "positive", "best")
_WORSE_NAMES = ("rejected", "dispreferred", "non_preferred", "worse", "loser", "lose", "bad", "negative", "worst")
_LABELS = ("label", "labels", "winner", "preference", "preferred", "better", "choice", "answer", "verdict")
_SCORES = ("score", "rating", "reward")
_SHOWN_LABELS = 5
_PROMPT_ORDER = ("prompt", "instruction", "question", "query", "input", "context")


def misfit_text(name: str, reading: Reading, missing: Sequence[str], sample: Sequence[Row]) -> str:
    """Return the error of a map that reads what no row of a sample has.

    Args:
        name: of the source.
        reading: with the map or preset.
        missing: the paths that were not found.
        sample: the source's first rows.
    """
    columns = list(dict.fromkeys(column for row in sample for column in row))
    seen = f"{name} has no {' and no '.join(missing)} in any of its first {len(sample)} rows"
    has = f"its columns are {some_names(columns)}"
    if reading.columns is not None:
        near = did_you_mean(missing[0], columns, "")
        return f"dataset_columns: {seen}; {has}. Fix: {near or 'name a column that is there.'}"
    return f"dataset_preset={reading.preset}: {seen}; {has}. Fix: {_what_fits(columns, sample)}"


def what_would_fit(columns: Sequence[str], sample: Sequence[Row]) -> str:
    """Return the presets that fit a file's rows, or a column map that might, as text to paste; "" for neither."""
    fitting = fitting_presets(sample) if sample else []
    if fitting:
        return f"--dataset_preset {' or '.join(fitting)}, whose columns these are."
    suggestion = _suggested_map(columns, sample)
    return f"check and paste this map (docs/data_formats.md):\n{suggestion}" if suggestion else ""


def _what_fits(columns: Sequence[str], sample: Sequence[Row]) -> str:
    return what_would_fit(columns, sample) or "leave the preset out, or say in dataset_columns what stands where."


# --- A map to begin with ---------------------------------------------------------------------------------------------


def _suggested_map(columns: Sequence[str], sample: Sequence[Row]) -> str:
    """Return a map for a file whose columns look like a prompt and two responses, in YAML; "" for any other."""
    texts = [name for name in columns if _has_text(name, sample)]
    pair = _better_and_worse(texts)
    two = None if pair else _two_responses(texts)
    if not pair and not two:
        return ""
    prompts = [name for name in texts if name not in (pair or two or ()) and holds_context(name)]
    prompts.sort(key=lambda name: _PROMPT_ORDER.index(name) if name in _PROMPT_ORDER else len(_PROMPT_ORDER))
    lines = ["dataset_columns:"]
    if len(prompts) > 1:
        lines.append(f'  prompt: {{join: [{", ".join(_quoted(name) for name in prompts)}], with: "\\n"}}')
    else:
        lines.append(f"  prompt: {_quoted(prompts[0]) if prompts else 'COLUMN'}")
    if pair:
        lines += [f"  chosen: {_quoted(pair[0])}", f"  rejected: {_quoted(pair[1])}"]
    elif two:
        lines.append(f"  responses: [{_quoted(two[0])}, {_quoted(two[1])}]")
        lines += _order_lines(two, columns, sample)
    return "\n".join([*lines, "  as_messages: true"])


def _order_lines(two: tuple[str, str], columns: Sequence[str], sample: Sequence[Row]) -> list[str]:
    """Return the lines that say which response is better, with what a file does not tell left to be filled in."""
    scores = _two_responses([name for name in columns if _has_number(name, sample) and _is_named(name, _SCORES)])
    if scores:
        return [f"  better: {{higher: [{_quoted(scores[0])}, {_quoted(scores[1])}]}}"]
    label = next((name for name in columns if name not in two and _is_named(name, _LABELS)), None)
    to_fill_in = f"first: [{TO_FILL_IN}], second: [{TO_FILL_IN}]"
    if label is None:
        return [f"  better: {{path: COLUMN, {to_fill_in}}}"]
    seen = {label_key(row[label]): row[label] for row in sample if row.get(label) is not None}
    values = sorted(seen.values(), key=repr)
    sides = _named_sides(values, two)
    if sides:
        return [f"  better: {{path: {_quoted(label)}, {sides}}}"]
    shown = some_names((repr(value) for value in values), most=_SHOWN_LABELS)
    held = f"  # {one_line(label, 80)} holds {shown or 'nothing'} in the first {len(sample)} rows: fill in which"
    if _are_around_0(values):
        return [
            f"{held} response those below 0 favour",
            f"  better: {{signed: {_quoted(label)}, negative: first|second}}",
        ]
    return [
        f"{held} mean the first response and which the second (tie, drop: docs/data_formats.md)",
        f"  better: {{path: {_quoted(label)}, {to_fill_in}}}",
    ]


def _named_sides(values: Sequence[Any], two: tuple[str, str]) -> str:
    """Return the labels of each side where every one names its side itself and both sides occur; otherwise "".

    Their order says nothing: of 0 and 1, even beside columns numbered 0 and 1, the 1 may say that the first is better.
    """
    marks = _marks(two)
    words = [
        {name} if marks == ("0", "1") else {name, mark, f"model_{mark}"} for name, mark in zip(two, marks, strict=True)
    ]
    keys = [{label_key(word).lower() for word in side} for side in words]
    named: dict[str, list[str]] = {"first": [], "second": [], "tie": []}
    for value in values:
        key = label_key(value).lower()
        side = "first" if key in keys[0] else "second" if key in keys[1] else "tie" if key == "tie" else None
        if side is None:
            return ""
        named[side].append(repr(value))
    if not named["first"] or not named["second"]:
        return ""
    return ", ".join(f"{side}: [{', '.join(listed)}]" for side, listed in named.items() if listed)


def _marks(two: tuple[str, str]) -> tuple[str, str]:
    """Return the parts in which the names of two responses differ."""
    before = _num_equal(*two)
    after = _num_equal(two[0][before:][::-1], two[1][before:][::-1])
    one, other = (name[before : len(name) - after] for name in two)
    return one, other


def _num_equal(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)


def _are_around_0(values: Sequence[Any]) -> bool:
    try:
        return any(number < 0 for number in [float(value) for value in values])
    except (TypeError, ValueError):
        return False


def _better_and_worse(names: Collection[str]) -> tuple[str, str] | None:
    found = [next((name for name in names if _is_named(name, words)), None) for words in (_BETTER_NAMES, _WORSE_NAMES)]
    worse = found[1]
    better = next((name for name in names if name != worse and _is_named(name, _BETTER_NAMES)), None)
    return (better, worse) if better and worse else None


def _two_responses(names: Collection[str]) -> tuple[str, str] | None:
    """Return two columns whose names differ in 1 and 2, a and b, or the like."""
    for name in names:
        for one, other in _PAIRS:
            for found in re.finditer(rf"(?<![A-Za-z0-9]){one}(?![A-Za-z0-9])|(?<=[a-z]){one}(?![A-Za-z0-9])", name):
                twin = name[: found.start()] + other + name[found.end() :]
                if twin in names and twin != name:
                    return name, twin
    return None


def _is_named(name: str, words: Sequence[str]) -> bool:
    parts = re.split(r"[^a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())
    return any(word in parts or word == name.lower() for word in words)


def _has_text(name: str, sample: Sequence[Row]) -> bool:
    return any(isinstance(row.get(name), str | list) and row[name] for row in sample)


def _has_number(name: str, sample: Sequence[Row]) -> bool:
    return any(isinstance(row.get(name), int | float) for row in sample)


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name) else repr(name)
