"""The sources of a run's data, as the settings `datasets` and `eval_datasets` list them: read and checked strictly.

Nothing is opened here. `rm_scale.data.source_list` finds the files and hub data sets that these name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, get_args

from rm_scale.config import RunConfig
from rm_scale.config_columns import reading_problems
from rm_scale.config_schedules import number_in
from rm_scale.errors import UserError
from rm_scale.files import user_path
from rm_scale.texts import nearest_name, one_line

LISTS = ("datasets", "eval_datasets")
"""The settings that are lists of sources."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_FILTER_RULES = ("equal", "one_of", "min", "max")
_MOST_SOURCES = 1_000
_MOST_EPOCHS = 1_000_000.0
_MOST_WEIGHT = 1_000_000_000.0


@dataclass(frozen=True)
class ColumnFilter:
    """Which values of a column a row must have to be read.

    Attributes:
        column: its name, or a path such as `meta.language`.
        one_of: the values it may have; `None` for any.
        minimum, maximum: bounds of a number, both included; `None` for none.
    """

    column: str
    one_of: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None

    def passes(self, value: Any) -> bool:
        """Tell whether a row with this value is kept. Numbers may be text, as CSV has them."""
        if self.one_of is not None and not any(_is_same(value, wanted) for wanted in self.one_of):
            return False
        if self.minimum is None and self.maximum is None:
            return True
        number = number_in(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int | float):
            return False
        return (self.minimum is None or number >= self.minimum) and (self.maximum is None or number <= self.maximum)


def _is_same(value: Any, wanted: Any) -> bool:
    if isinstance(value, bool) != isinstance(wanted, bool):
        return isinstance(value, str) and value.lower() == str(wanted).lower()
    return bool(value == wanted) or (isinstance(value, str) and value == str(wanted))


@dataclass(frozen=True)
class SourceSettings:
    """One entry of `datasets` or `eval_datasets`.

    Attributes:
        name: in metrics and reports; two sources have two names.
        paths: files, patterns or folders; empty for a hub data set.
        hub: name of a hub data set, with its `config`, `split`, `revision` and `data_dir`.
        format, preset, columns: how rows are read; all `None` for what the run says of its data.
        subset_column, ignore_columns: as the settings of the run; `None` for the run's.
        weight: share in what is trained on, in proportion to the other sources' weights.
        epochs: how often each group is used in an epoch of the run.
        max_samples: only the first groups, this many.
        filters: what rows must have to be read.
    """

    name: str
    paths: tuple[str, ...] = ()
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    data_dir: str | None = None
    format: str | None = None
    preset: str | None = None
    columns: Mapping[str, Any] | None = field(default=None)
    subset_column: str | None = None
    ignore_columns: tuple[str, ...] | None = None
    weight: float | None = None
    epochs: float | None = None
    max_samples: int | None = None
    filters: tuple[ColumnFilter, ...] = ()


# What TRL's mixtures, and other programs, call these; what to write instead.
_ELSEWHERE = {
    "data_files": "path: FILES",
    "fraction": "weight: a number; smaller sources are then repeated. TRL's fraction leaves groups of larger ones out, "
    "as max_samples does",
    "dataset_name": "hub: OWNER/NAME",
    "dataset_path": "path: FILES",
    "dataset_config": "config: NAME",
    "dataset_preset": "preset: NAME",
    "dataset_columns": "columns: {prompt: ..., chosen: ..., rejected: ...}",
    "dataset_format": "format: NAME",
    "subset": "subset_column: the column that names a row's subset, or config: the configuration of a hub data set",
    "proportion": "weight: a number",
    "probability": "weight: a number",
    "ratio": "weight: a number",
}
_KNOWN = (
    *("name", "path", "hub", "config", "split", "revision", "data_dir", "format", "preset", "columns"),
    *("subset_column", "ignore_columns", "weight", "epochs", "max_samples", "filters"),
)
_HUB_ONLY = ("config", "revision", "data_dir")
_FORMATS = get_args(RunConfig.model_fields["dataset_format"].annotation)


def sources_in(config: RunConfig, setting: str) -> tuple[SourceSettings, ...]:
    """Return the sources of `datasets` or `eval_datasets`, which have been checked; none where it is not set."""
    return _read(setting, getattr(config, setting) or ())[0]


def source_problems(setting: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return all that is wrong with a list of sources, a sentence each: the value, the rule, the fix."""
    return _read(setting, entries)[1]


def named_paths(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield every local file, pattern and folder of a run's data, each after the setting that names it."""
    for setting in ("dataset_path", "eval_dataset_path"):
        for path in getattr(config, setting) or []:
            yield setting, path
    for setting in LISTS:
        for entry in getattr(config, setting) or []:
            paths = _EntryReader("", entry).paths()  # also of a source that something else is wrong with
            name = entry.get("name") or _default_name(paths[0] if paths else "")
            for path in paths:
                yield f"{setting}: {name}: path", path


def with_paths(entries: Sequence[Mapping[str, Any]], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return a list of sources, which has been checked, with every path changed and every name as it was."""
    changed = []
    for entry in entries:
        path = entry.get("path")
        paths = [path] if isinstance(path, str) else path
        named = {"name": _default_name(paths[0]), **entry} if paths else dict(entry)
        changed.append({**named, **({"path": [change(one) for one in paths]} if paths else {})})
    return changed


def normalised(entries: Any) -> Any:
    """Return a list of sources as mappings: a text is a path, and one source needs no list."""
    if isinstance(entries, str | Mapping):
        entries = [entries]
    if not isinstance(entries, list):
        return entries
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


# --- A list ----------------------------------------------------------------------------------------------------------


def _read(setting: str, entries: Sequence[Mapping[str, Any]]) -> tuple[tuple[SourceSettings, ...], list[str]]:
    found, problems = [], []
    if len(entries) > _MOST_SOURCES:
        rule = f"{setting}: {len(entries):,} sources, more than {_MOST_SOURCES:,}. Fix: name a folder or a pattern."
        return (), [rule]
    for number, entry in enumerate(entries, 1):
        reader = _EntryReader(f"{setting}: {_label(number, entry)}", entry)
        source = reader.read()
        problems += reader.problems
        if source is not None:
            found.append(source)
    problems += _name_problems(setting, found)
    problems += _share_problems(setting, found)
    return tuple(found), problems


def _label(number: int, entry: Mapping[str, Any]) -> str:
    named = next((entry[key] for key in ("name", "hub", "path") if isinstance(entry.get(key), str)), None)
    return f"source {number}" if named is None else f"source {number} ({one_line(named, 60)})"


def _name_problems(setting: str, sources: Sequence[SourceSettings]) -> list[str]:
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    return [
        f"{setting}: {names.count(name)} sources are called {name}: metrics and reports tell sources by name. Fix: "
        "another name: for each of them."
        for name in twice
    ]


def _share_problems(setting: str, sources: Sequence[SourceSettings]) -> list[str]:
    weighted = [source.name for source in sources if source.weight is not None]
    repeated = [source.name for source in sources if source.epochs is not None]
    if setting == "eval_datasets":
        if weighted or repeated:
            return [
                f"{setting}: {', '.join(dict.fromkeys(weighted + repeated))}: weight and epochs are for training; each "
                "group is evaluated once. Fix: leave them out, or use max_samples."
            ]
        return []
    if weighted and repeated:
        return [
            f"{setting}: {', '.join(weighted)} with weight and {', '.join(repeated)} with epochs: shares follow from "
            "one or the other. Fix: weight for all sources, or epochs for those that are repeated."
        ]
    if weighted and len(weighted) < len(sources):
        without = ", ".join(source.name for source in sources if source.weight is None)
        return [f"{setting}: {without}: weight is missing, while {', '.join(weighted)} have one. Fix: weight for all."]
    if weighted and not any(source.weight for source in sources):
        return [
            f"{setting}: the weights of {', '.join(weighted)} add up to 0: nothing would be trained on. Fix: a weight "
            "above 0 for those to be used."
        ]
    return []


# --- One source ------------------------------------------------------------------------------------------------------


class _EntryReader:
    """Reads one entry and collects all that is wrong with it.

    Args:
        where: the setting, and which source of it; begins each problem.
        entry: the mapping that was written.
    """

    def __init__(self, where: str, entry: Mapping[str, Any]) -> None:
        self.where = where
        self.entry = {str(key): value for key, value in entry.items() if value is not None}
        self.problems: list[str] = []

    def read(self) -> SourceSettings | None:
        """Return the source; `None` where something is wrong with it."""
        self._check_keys()
        paths, hub = self.paths(), self._text("hub")
        self._check_place(paths, hub)
        self._check_reading()
        weight = self._number("weight", 0.0, _MOST_WEIGHT, f"a number from 0 to {_MOST_WEIGHT:,.0f}")
        epochs = self._number("epochs", 0.0, _MOST_EPOCHS, f"above 0 and at most {_MOST_EPOCHS:,.0f}", above=True)
        if weight is not None and epochs is not None:
            self._wrong("weight and epochs", "only one can say how often the source is used. Fix: keep one of them.")
        source = SourceSettings(
            name=self._name(paths, hub),
            paths=paths,
            hub=hub,
            config=self._text("config"),
            split=self._text("split"),
            revision=self._text("revision"),
            data_dir=self._text("data_dir"),
            format=self._text("format"),
            preset=self._text("preset"),
            columns=self._columns(),
            subset_column=self._text("subset_column"),
            ignore_columns=self._texts("ignore_columns"),
            weight=weight,
            epochs=epochs,
            max_samples=self._max_samples(),
            filters=self._filters(),
        )
        return None if self.problems else source

    def _wrong(self, what: str, rule: str) -> None:
        self.problems.append(f"{self.where}: {what}: {rule}")

    def _shown(self, key: str) -> str:
        return f"{key}={one_line(repr(self.entry[key]), 100)}"

    def _check_keys(self) -> None:
        for key in self.entry:
            if key in _KNOWN:
                continue
            nearest = nearest_name(key, _KNOWN)
            known = f"did you mean {nearest}?" if nearest else f"a source has {', '.join(_KNOWN)}."
            fix = f"{_ELSEWHERE[key]}." if key in _ELSEWHERE else known
            self._wrong(key, f"no such key of a source. Fix: {fix}")

    def _check_place(self, paths: tuple[str, ...], hub: str | None) -> None:
        if "path" in self.entry and "hub" in self.entry:
            self._wrong("path and hub", "a source is one or the other. Fix: keep one of them.")
        elif "path" not in self.entry and "hub" not in self.entry:
            self._wrong("path or hub", "neither is given. Fix: path: FILE, or hub: OWNER/NAME.")
        elif paths:
            for key in _HUB_ONLY:
                if key in self.entry:
                    self._wrong(self._shown(key), "is for hub data sets. Fix: leave it out, or hub: instead of path:.")

    def _check_reading(self) -> None:
        given = [key for key in ("preset", "columns", "format") if key in self.entry]
        if len(given) > 1:
            self._wrong(" and ".join(given), "only one can say how rows are read. Fix: keep one of them.")
        if isinstance(self.entry.get("columns"), list):
            self._wrong(
                self._shown("columns"),
                "must map our columns to the source's. Fix: {prompt: ..., chosen: ..., rejected: ...}; columns that "
                "are not to be read go to ignore_columns.",
            )
        preset, columns = self.entry.get("preset"), self.entry.get("columns")
        if len(given) == 1 and ((isinstance(preset, str) and preset.strip()) or isinstance(columns, Mapping)):
            found = reading_problems(preset, columns, "auto")
            self.problems += [f"{self.where}: {problem.removeprefix('dataset_')}" for problem in found]
        if isinstance(self.entry.get("format"), str) and self.entry["format"] not in _FORMATS:
            self._wrong(self._shown("format"), f"no such format. Fix: one of {', '.join(_FORMATS)}.")

    def _name(self, paths: tuple[str, ...], hub: str | None) -> str:
        name = self._text("name")
        if name is None:
            return _default_name(hub or (paths[0] if paths else ""))
        if not _NAME.fullmatch(name):
            self._wrong(
                self._shown("name"),
                "a source's name is part of metrics' names: letters, digits, _ and - only. Fix: e.g. "
                f"{_default_name(name)}. (A hub data set's configuration is config:.)",
            )
        return name

    def paths(self) -> tuple[str, ...]:
        """Return the files, patterns and folders that it names."""
        paths = []
        for path in self._texts("path") or ():
            try:
                paths.append(str(user_path(path)) if path.startswith("~") else path)
            except UserError as error:
                self.problems.append(f"{self.where}: {error}")
        if self.entry.get("path") == []:
            self._wrong("path=[]", "names no file. Fix: path: FILE.")
        return tuple(paths)

    def _text(self, key: str) -> str | None:
        value = self.entry.get(key)
        if value is None or (isinstance(value, str) and value.strip() and "\0" not in value):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool) and key in {"name", "config", "revision"}:
            return str(value)  # as YAML reads the name 2024
        self._wrong(self._shown(key), "must be a text. Fix: write a name, or leave it out.")
        return None

    def _texts(self, key: str) -> tuple[str, ...] | None:
        value = self.entry.get(key)
        if value is None:
            return None
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(one, str) and one.strip() and "\0" not in one for one in texts):
            return tuple(texts)
        self._wrong(self._shown(key), "must be a text, or a list of texts. Fix: write names, or leave it out.")
        return None

    def _columns(self) -> Mapping[str, Any] | None:
        value = self.entry.get("columns")
        if value is None or isinstance(value, Mapping):
            return value
        if not isinstance(value, list):
            self._wrong(self._shown("columns"), "must be a mapping. Fix: {prompt: ..., chosen: ..., rejected: ...}.")
        return None

    def _number(self, key: str, least: float, most: float, rule: str, above: bool = False) -> float | None:
        value = self.entry.get(key)
        value = number_in(value) if isinstance(value, str) else value
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if is_number and least <= value <= most and not (above and value == least):
            return float(value)
        self._wrong(self._shown(key), f"must be {rule}. Fix: e.g. {key}: 1, or leave it out.")
        return None

    def _max_samples(self) -> int | None:
        value = self.entry.get("max_samples")
        value = number_in(value) if isinstance(value, str) else value
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        self._wrong(self._shown("max_samples"), "must be a whole number of at least 1. Fix: e.g. max_samples: 1000.")
        return None

    def _filters(self) -> tuple[ColumnFilter, ...]:
        value = self.entry.get("filters")
        if value is None:
            return ()
        if not isinstance(value, Mapping):
            self._wrong(self._shown("filters"), "must map columns to what they must be. Fix: e.g. {score: {min: 3}}.")
            return ()
        return tuple(self._filter(str(column), rule) for column, rule in value.items())

    def _filter(self, column: str, rule: Any) -> ColumnFilter:
        what = f"filters: {column}"
        if not isinstance(rule, Mapping):
            rule = {"one_of": rule} if isinstance(rule, list) else {"equal": rule}
        for key in rule:
            if key not in _FILTER_RULES:
                nearest = nearest_name(str(key), _FILTER_RULES)
                fix = f"did you mean {nearest}?" if nearest else f"{', '.join(_FILTER_RULES)}."
                self._wrong(f"{what}: {key}", f"no such rule. Fix: {fix}")
        one_of = [rule["equal"]] if "equal" in rule else rule.get("one_of")
        if (
            not rule
            or ("one_of" in rule and (not isinstance(one_of, list) or not one_of))
            or {"equal", "one_of"} <= {*rule}
        ):
            self._wrong(
                what, "says no value to keep, or says it twice. Fix: equal: X, one_of: [X, Y], min: N or max: N."
            )
            one_of = None
        bounds = [self._bound(what, key, rule.get(key)) for key in ("min", "max")]
        if bounds[0] is not None and bounds[1] is not None and bounds[0] > bounds[1]:
            self._wrong(what, f"min={bounds[0]:g} is above max={bounds[1]:g}: no row passes. Fix: change them over.")
        return ColumnFilter(column, None if one_of is None else tuple(one_of), *bounds)

    def _bound(self, what: str, key: str, value: Any) -> float | None:
        number = number_in(value) if isinstance(value, str) else value
        if number is None or (
            isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        ):
            return number
        self._wrong(f"{what}: {key}={one_line(repr(value), 60)}", f"must be a number. Fix: e.g. {key}: 3.")
        return None


def _default_name(place: str) -> str:
    """Return the name of a source that was given none: its file's without endings, or a hub data set's own."""
    parts = [part for part in PurePath(place).parts if not set(part) & set("*?[")] or [place]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", parts[-1].split(".")[0]).strip("_") or "source"
