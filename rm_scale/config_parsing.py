"""Read a run's settings from the command line and a YAML file, and check them strictly; all problems are collected."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rm_scale.config import RunConfig
from rm_scale.config_rules import conflicts, unknown_key_problem
from rm_scale.config_schedules import number_in
from rm_scale.config_sources import LISTS, normalised
from rm_scale.config_trl import translate
from rm_scale.errors import ConfigError, UserError
from rm_scale.files import user_path
from rm_scale.texts import has_surrogates, one_line
from rm_scale.yaml_files import read_yaml

_MAX_TEXT = 4096
"""Characters of a text: the longest path that Linux takes."""


@dataclass(frozen=True)
class ParsedConfig:
    """What the command line and the YAML file say.

    Attributes:
        config: the settings; where a field was wrong, its default stands in so that further checks can still run.
        problems: everything found wrong so far, one sentence each.
        given: names of the fields the user set, by file or flag.
        broken: names of fields whose value could not be used.
        source: path of the YAML file, if there was one.
        is_unreadable: that file can't be read at all. Whatever else might be wrong is not known then, and not told.
    """

    config: RunConfig
    problems: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()
    source: str | None = field(default=None)
    is_unreadable: bool = False

    def raise_problems(self) -> None:
        """Raise `ConfigError` with all problems, if there are any."""
        if self.problems:
            raise ConfigError(self.problems)


def parse_config(argv: Sequence[str]) -> ParsedConfig:
    """Read `--config FILE.yaml` and `--field value` flags; flags win over the file.

    Never raises for wrong settings: all problems are collected in the result, so that they can be shown at once.
    """
    flags, problems = _read_flags(argv)
    source = flags.pop("config", None)
    values: dict[str, Any] = {}
    if source is not None and not isinstance(source, str):
        problems.append(f"config={source}: must be one YAML file. Fix: --config FILE.yaml.")
    if isinstance(source, str):
        values, wrong = _read_yaml(Path(source))
        if wrong is not None:
            nothing = RunConfig(model_name_or_path="")
            return ParsedConfig(nothing, (wrong,), frozenset(), frozenset(RunConfig.model_fields), source, True)
    values.update(flags)
    return _validate(values, problems, source if isinstance(source, str) else None, flags)


def config_from_dict(values: dict[str, Any]) -> ParsedConfig:
    """Check settings given from Python, with the same rules as the command line."""
    return _validate(dict(values), [], None)


def _read_flags(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Turn `--a 1 --b=2 --c x y --flag` into a dictionary of strings and lists of strings.

    Of a flag given twice the last counts: launch scripts append the user's flags to their own.
    """
    flags: dict[str, Any] = {}
    problems: list[str] = []
    current: str | None = None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            current = name.replace("-", "_")
            flags[current] = [value] if equals else []
        elif current is None:
            problems.append(f"{word}: expected a --flag before it. Fix: write settings as --name value.")
        else:
            flags[current].append(word)
    return {name: _flag_value(name, values) for name, values in flags.items()}, problems


def _flag_value(name: str, values: list[str]) -> Any:
    if not values:
        return True  # a bare --flag
    if name in LISTS:
        return " ".join(values)  # JSON, in which a comma separates no values
    if name in RunConfig.model_fields and _is_list_field(name):
        return [part for word in values for part in word.split(",") if part]
    return values[0] if len(values) == 1 else values


_SWITCHES = frozenset(name for name, info in RunConfig.model_fields.items() if info.annotation in (bool, bool | None))
"""Settings that are true or false."""


def _is_list_field(name: str) -> bool:
    annotation = RunConfig.model_fields[name].annotation
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return any(typing.get_origin(option) is list for option in options)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _read_yaml(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return the settings in a file, and what is wrong with the file as a whole."""
    try:
        values = read_yaml(path)
    except ValueError as error:
        fix = "correct the file" if str(error).startswith("not valid YAML") else "give the path of a YAML file in UTF-8"
        return {}, f"config={path}: can't be read ({error}). Fix: {fix}."
    if values is None:
        return {}, None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        return {}, f"config={path}: must be a mapping of setting names to values. Fix: write 'name: value' lines."
    return values, None


def _validate(
    values: dict[str, Any], problems: list[str], source: str | None, flags: Collection[str] = ()
) -> ParsedConfig:
    """Check names, values and combinations; what can't be used is reported and left at its default.

    Args:
        values: settings by name.
        problems: found so far.
        source: the file that all settings come from but those given by flags.
        flags: names given by flags.
    """
    known = RunConfig.model_fields
    problems = list(problems)
    where = f" (in {source})" if source else ""
    values, refused = translate(values, _SWITCHES, where)
    problems += [_without_file(problem, where, flags) for problem in refused]
    for name in [name for name in values if name not in known]:
        problems.append(unknown_key_problem(name, known, "" if name in flags else where))
        del values[name]
    values = {name: _normalise(name, value) for name, value in values.items()}
    rules = {name: _text_rule(value) or _path_rule(name, value) for name, value in values.items()}
    wrong = {name: rule for name, rule in rules.items() if rule is not None}
    problems += [f"{name}={_shown(values.pop(name))}: {rule}" for name, rule in wrong.items()]
    broken = set(wrong)
    if "model_name_or_path" in wrong:
        values["model_name_or_path"] = ""  # required: it would be reported a second time, as missing
    try:
        config = RunConfig(**values)
    except ValidationError as error:
        for item in error.errors():
            name = str(item["loc"][0])
            if name not in broken:
                problems.append(_field_problem(name, item, values))
            broken.add(name)
        good = {name: value for name, value in values.items() if name not in broken}
        good.setdefault("model_name_or_path", "")
        config = RunConfig(**good)
    problems += conflicts(config, broken)
    return ParsedConfig(config, tuple(problems), frozenset(values), frozenset(broken), source)


def _without_file(problem: str, where: str, flags: Collection[str]) -> str:
    """Return the problem of a setting; where a flag gave it, without the file that the others are in."""
    name = problem.partition(where)[0].partition("=")[0] if where else ""
    return problem.replace(where, "", 1) if name in flags else problem


def _normalise(name: str, value: Any) -> Any:
    """Accept `none` from a flag, and one string where a list is meant."""
    annotation = RunConfig.model_fields[name].annotation
    optional = _is_union(annotation) and type(None) in typing.get_args(annotation)
    if optional and isinstance(value, str) and value.lower() in {"none", "null"}:
        return None
    if name in LISTS:
        return normalised(_from_json(value))
    if name == "dataset_columns":
        return _from_json(value)  # the name of a column may look like a number
    if _is_list_field(name):
        if isinstance(value, list) and [str(part).lower() for part in value] in (["none"], ["null"]):
            return None if optional else []
        if isinstance(value, str):
            value = [] if value.lower() == "none" else [value]
    if annotation == dict[str, Any] | None:
        return _mapping(value)
    return _at_home(value) if name in _PATHS else value


def _mapping(value: Any) -> Any:
    """Read a mapping from JSON, as which flags have it, and its numbers from text, as which YAML has 1e-6."""
    value = _from_json(value)
    if not isinstance(value, dict):
        return value
    return {key: number_in(item) if isinstance(item, str) else item for key, item in value.items()}


def _from_json(value: Any) -> Any:
    """Return what a text that is a JSON mapping or list says; any other value as it is."""
    if isinstance(value, str) and value.startswith(("{", "[")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


# What may begin with "~". The shell leaves it as it is in a YAML file and in `--output_dir=~/run`.
_PATHS = {
    *("model_name_or_path", "chat_template_path", "dataset_path", "eval_dataset_path", "dataset_cache_dir"),
    *("deepspeed", "hardware", "output_dir", "resume_from_checkpoint"),
}


def _at_home(value: Any) -> Any:
    """Return a path, or each of a list, with "~" replaced by the user's home; what can't be stays for `_path_rule`."""
    if isinstance(value, list):
        return [_at_home(part) for part in value]
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    try:
        return str(user_path(value))
    except UserError:
        return value


def _path_rule(name: str, value: Any) -> str | None:
    """Return why a path can't be used: its home is nobody's."""
    for part in (value if isinstance(value, list) else [value]) if name in _PATHS else []:
        if isinstance(part, str) and part.startswith("~"):
            try:
                user_path(part)
            except UserError as error:
                return str(error).partition(": ")[2]
    return None


def _field_problem(name: str, item: Any, values: dict[str, Any]) -> str:
    if item["type"] == "missing":
        return f"{name}: is required. Fix: add '{name}: ...' to the YAML file or --{name} ... to the command."
    rule = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{name}={_shown(values.get(name))}: must be {rule}. Fix: {RunConfig.model_fields[name].description}"


def _text_rule(value: Any) -> str | None:
    """Return why a text, or one in a list, can't be the value of any setting."""
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            continue
        if not text.strip():
            return "must not be empty. Fix: give a value, or leave the setting out."
        if len(text) > _MAX_TEXT:
            return f"must have at most {_MAX_TEXT:,} characters, and has {len(text):,}. Fix: shorten it."
        if "\0" in text:
            return "must not hold a NUL character. Fix: take it out."
        if not text.isascii() and has_surrogates(text):
            return "must be valid UTF-8. Fix: write it in UTF-8, and rename files whose names are not."
    return None


def _shown(value: Any) -> str:
    """Return a value for a message: it may be as large as the file it came from."""
    return one_line(ascii(value) if isinstance(value, str) and has_surrogates(value) else repr(value), 200)
