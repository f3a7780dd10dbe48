"""Rewrite a row of any columns as one that a format reads: `dataset_columns`, or the map of a preset.

A map says for each column of a format where its value stands in the row. `docs/data_formats.md` describes its language,
and `rm_scale.config_columns` checks it.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rm_scale.config_columns import formats_of, map_problems, paths_of, root_of
from rm_scale.data.column_maps.labels import Label, read_better, read_soft_label
from rm_scale.data.column_maps.message_forms import in_conversation, named_messages, tools_from_anthropic
from rm_scale.data.column_maps.places import as_number, read_numbers, read_place, read_places
from rm_scale.data.conversations import as_text, split_shared_messages
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import Row, kind_name
from rm_scale.errors import DataError

FIRST_ROW = "first_row"
"""What a row that was put together holds the number of its first row in the file as."""
_LISTS = ("rows", "thread", "replies")


@dataclass(frozen=True)
class ColumnMap:
    """Where each column of a format stands in the rows of a source.

    Attributes:
        settings: the declaration, as in YAML.

    Raises:
        DataError: it is wrong; the text says where and why.
    """

    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        problems = map_problems(self.settings)
        if problems:
            raise DataError("\n".join(problems))

    @property
    def regroups(self) -> bool:
        """Whether several rows of the file make one row, or one row several: `group_by` and `tree`."""
        return "group_by" in self.settings or "tree" in self.settings

    @property
    def format(self) -> str:
        """The format of its rows where its own settings say it, "auto" where the values have to be seen."""
        formats = formats_of(self.settings)
        return formats[0] if len(formats) == 1 else "auto"

    @functools.cached_property
    def paths(self) -> tuple[tuple[str, bool], ...]:
        """Each path that it reads, and whether rows may lack it."""
        found: dict[str, bool] = {}
        for path, may_lack in paths_of(self.settings):
            found[path] = may_lack and found.get(path, True)
        return tuple(found.items())

    @functools.cached_property
    def columns_read(self) -> frozenset[str]:
        """The columns of the file that it reads, and those that it says are not meant to be."""
        roots = {root_of(path, self.settings) for path, _ in self.paths}
        names = {path for path, _ in self.paths}  # a column may have dots in its name
        tree = self.settings.get("tree", {})
        keys = {tree[key] for key in ("root", "replies", "id", "parent", "ranked_by") if key in tree}
        grouped = {*(root_of(path, {}) for path in self.settings.get("group_by", ())), *keys, *tree.get("where", ())}
        naming = self.settings.get("messages", {})
        whole = {naming.get(key, key) for key in ("role", "content")} if "" in roots else set()
        return frozenset({*roots, *names, *grouped, *whole, *self.settings.get("not_meant", ())})

    def missing_before(self, sample: Sequence[Row]) -> list[str]:
        """Return what no row of a sample has, of what is needed to put rows together; the rows are the file's own."""
        tree = self.settings.get("tree", {})
        if "root" in tree:
            needed = {tree["root"]}
        else:
            roots = {root_of(path, self.settings) for path, may_lack in self.paths if not may_lack}
            keys = {tree[key] for key in ("id", "parent", "ranked_by") if key in tree}
            needed = {*roots, *keys, *tree.get("where", ()), *self.settings.get("group_by", ())} - {""}
        return sorted(path for path in needed if not _is_there(path, sample))

    def columns_of(self, row: Row) -> dict[str, Any]:
        """Return a row in the file's own columns; of rows that were put together each column holds the list of all."""
        if not self.regroups:
            return dict(row)
        found: dict[str, list[Any]] = {}
        for name in _LISTS:
            for part in row.get(name) or ():
                for column, value in part.items() if isinstance(part, Mapping) else ():
                    if value is not None:
                        found.setdefault(column, []).append(value)
        return found

    def apply(self, row: Row) -> dict[str, Any]:
        """Return the row in the columns of a format.

        Raises:
            RejectedRow: a column that the map names is absent, a label is none of those that it names, or a value is
                not of the type that it needs.
        """
        found = {name: read_place(row, self.settings[name]) for name in ("id", "subset") if name in self.settings}
        prompt = self._messages(read_place(row, self.settings["prompt"]), "user") if "prompt" in self.settings else None
        if "tools" in self.settings:
            found["tools"] = self._tools(read_place(row, self.settings["tools"]))
        if "responses" not in self.settings:
            return found | self._pair(row, prompt)
        values = read_places(row, self.settings["responses"])
        if not isinstance(values, list):
            raise RejectedRow("wrong_type", f"responses is {kind_name(values)}, not a list")
        prompt, responses = self._conversation(row, prompt, [self._messages(value, "assistant") for value in values])
        order = self._order(row, responses)
        if isinstance(order, dict):
            return found | {"prompt": prompt, "responses": responses} | order
        return found | self._two(row, prompt, responses, order)

    def _pair(self, row: Row, prompt: Any) -> dict[str, Any]:
        pair = [self._messages(read_place(row, self.settings[name]), "assistant") for name in ("chosen", "rejected")]
        prompt, (chosen, rejected) = self._conversation(row, prompt, pair)
        found = {} if prompt is None and "prompt" not in self.settings else {"prompt": prompt}
        return found | {"chosen": chosen, "rejected": rejected} | self._margin(row)

    def _order(self, row: Row, responses: Sequence[Any]) -> Label | dict[str, Any]:
        """Return the label of two responses, or the column that orders all of them."""
        if "better" in self.settings:
            return read_better(row, self.settings["better"])
        if "soft_label" in self.settings:
            return read_soft_label(row, self.settings["soft_label"])
        name = "ranks" if "ranks" in self.settings else "scores"
        numbers = read_numbers(row, self.settings[name])
        if self.settings.get("equal") == "tie" and len(responses) == 2 and len(set(numbers)) == 1 == len(numbers) - 1:
            return Label(0.5)
        return {name: numbers}

    def _two(self, row: Row, prompt: Any, responses: Sequence[Any], label: Label) -> dict[str, Any]:
        if len(responses) != 2:
            raise RejectedRow("bad_label", f"{len(responses)} responses, and the label speaks of 2")
        first, second = responses
        if "prompt" not in self.settings:
            first, second = as_text(first, "response 0"), as_text(second, "response 1")
            if isinstance(first, str) or isinstance(second, str):
                raise RejectedRow("missing_key", "prompt: the responses are no whole conversations")
            prompt, (first, second) = split_shared_messages(first, second)
        found = {"prompt": prompt, "response_0": first, "response_1": second, **label.columns()}
        return found | self._margin(row) if "better_response_id" in found else found

    def _margin(self, row: Row) -> dict[str, Any]:
        if "margin" not in self.settings:
            return {}
        return {"margin": as_number(read_place(row, self.settings["margin"]))}

    def _messages(self, value: Any, said_by: str) -> Any:
        naming = self.settings.get("messages")
        return value if naming is None else named_messages(value, naming, said_by)

    def _tools(self, value: Any) -> Any:
        blocks = self.settings.get("messages", {}).get("blocks")
        return tools_from_anthropic(value) if blocks == "anthropic" else value

    def _conversation(self, row: Row, prompt: Any, responses: list[Any]) -> tuple[Any, list[Any]]:
        """Return prompt and responses as messages, where the map says so."""
        if not self.settings.get("as_messages") and "system" not in self.settings:
            return prompt, responses
        system = read_place(row, self.settings["system"]) if "system" in self.settings else None
        return in_conversation(prompt, responses, system)


def told_row(number: int) -> str:
    """Return which row of a file it is, for messages about rows that were put together."""
    return f"row {number} of the file"


def with_first_row(rejected: RejectedRow, row: Row) -> RejectedRow:
    """Return why a row is refused, if it was put together with where in the file it begins."""
    if FIRST_ROW in row:
        rejected.detail = f"{rejected.detail} ({told_row(row[FIRST_ROW])})".strip()
    return rejected


def missing_paths(column_map: ColumnMap, sample: Sequence[Row]) -> list[str]:
    """Return the paths of a map that no row of a sample has, of those that rows may not lack."""
    return [path for path, may_lack in column_map.paths if not may_lack and not _is_there(path, sample)]


def _is_there(path: str, sample: Collection[Row]) -> bool:
    for row in sample:
        try:
            read_place(row, path)
        except RejectedRow as rejected:
            if rejected.reason == "missing_key":
                continue
        return True
    return False
