"""Put the rows of a file together before they are read: rows of one prompt (`group_by`), trees of messages (`tree`).

What is held in memory is a few numbers per row (hashes of keys, places), never the rows. The result is an Arrow file of
JSON rows, like that of a text file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rm_scale.config_columns import label_key
from rm_scale.data.column_maps.column_map import FIRST_ROW, ColumnMap, told_row
from rm_scale.data.column_maps.paths import value_at
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import Row, kind_name
from rm_scale.data.text_files import MAX_ROW_BYTES, RawRow

IntArray = npt.NDArray[np.int64]
KeyArray = npt.NDArray[np.uint64]
Read = Callable[[Sequence[int]], list[tuple[int, Any]]]
"""Returns number and value of some rows of a file, by their places; a `RejectedRow` for one that can't be read."""
_ROWS_AT_ONCE = 1000
_DEEPEST = 500
NO_KEY = np.uint64(0)


class Regrouping:
    """The rows that a map makes of the rows of a file.

    Args:
        column_map: with `group_by` or `tree`.
        read: returns rows of the file.
        num_rows: of the file.

    Attributes:
        told: what became of the file's rows, in words; known when all of `rows` was taken.
    """

    def __init__(self, column_map: ColumnMap, read: Read, num_rows: int) -> None:
        self._settings = column_map.settings
        self._read = read
        self._num_rows = num_rows
        self.told = ""

    def rows(self) -> Iterator[RawRow]:
        """Yield the rows, numbered from 0; one that can't be read or has no key keeps what is wrong with it.

        A row that is put together holds the number of its first row in the file as `first_row`.
        """
        for place, (number, raw, problem) in enumerate(self._made()):
            yield place, raw, f"{problem} ({told_row(number)})" if problem else ""

    def _made(self) -> Iterator[RawRow]:
        if "group_by" in self._settings:
            return self._grouped(self._settings["group_by"])
        tree = self._settings["tree"]
        return self._of_trees(tree) if "root" in tree else self._of_messages(tree)

    def _all(self) -> Iterator[tuple[int, int, Any]]:
        """Yield place, number and value of each row of the file."""
        for start in range(0, self._num_rows, _ROWS_AT_ONCE):
            places = range(start, min(start + _ROWS_AT_ONCE, self._num_rows))
            for place, (number, row) in zip(places, self._read(places), strict=True):
                yield place, number, row

    # --- Rows of one prompt ------------------------------------------------------------------------------------------

    def _grouped(self, names: Sequence[str]) -> Iterator[RawRow]:
        keys = np.zeros(self._num_rows, np.uint64)
        bad = 0
        for place, number, row in self._all():
            try:
                keys[place] = _hash(_key(row, names))
            except RejectedRow as rejected:
                bad += 1
                yield number, b"", f"{rejected.reason}: {rejected.detail}"
        groups = 0
        for places in _batches(_by_key(keys), _ROWS_AT_ONCE):
            wanted: list[int] = np.concatenate(places).tolist()
            found = dict(zip(wanted, self._read(wanted), strict=True))
            for group in places:
                for rows in _exactly_equal([found[place] for place in group.tolist()], names):
                    groups += 1
                    yield _packed(rows[0][0], {"rows": [row for _, row in rows]})
        self.told = (
            f"{self._num_rows - bad:,} rows with the same {' and '.join(names)} were put together to {groups:,} groups"
        )

    # --- Trees, one a row --------------------------------------------------------------------------------------------

    def _of_trees(self, tree: Mapping[str, Any]) -> Iterator[RawRow]:
        trees = messages = ranked = groups = 0
        for _, number, row in self._all():
            try:
                root = _node(value_at(_checked(row), tree["root"]), tree["root"])
                found = list(_walk(root, tree["replies"]))
            except RejectedRow as rejected:
                yield number, b"", f"{rejected.reason}: {rejected.detail}"
                continue
            trees += 1
            for thread, replies in found:
                messages += 1
                chosen = [reply for reply in replies if _counts(reply, tree)]
                if len(chosen) > 1:
                    groups, ranked = groups + 1, ranked + len(chosen)
                    yield _packed(number, _thread_row(thread, chosen, tree["replies"]))
        self.told = f"{trees:,} trees of {messages:,} messages became {_told_groups(groups, ranked)}"

    # --- Messages, one a row -----------------------------------------------------------------------------------------

    def _of_messages(self, tree: Mapping[str, Any]) -> Iterator[RawRow]:
        ids, parents = np.zeros(self._num_rows, np.uint64), np.zeros(self._num_rows, np.uint64)
        counts = np.zeros(self._num_rows, bool)
        bad = 0
        for place, number, row in self._all():
            try:
                ids[place] = _hash([label_key(value_at(_checked(row), tree["id"]))])
                parent = value_at(row, f"{tree['parent']}?")
                parents[place] = NO_KEY if parent in (None, "") else _hash([label_key(parent)])
                counts[place] = _counts(row, tree)
            except RejectedRow as rejected:
                bad += 1
                yield number, b"", f"{rejected.reason}: {rejected.detail}"
        above = _places_of(parents, ids)
        orphans = int(np.count_nonzero((parents != NO_KEY) & (above < 0)))
        ranked = groups = 0
        replies = np.where(counts & (above >= 0), above, -1)
        for children in _by_key((replies + 1).astype(np.uint64)):
            if len(children) < 2:
                continue
            thread = _thread_of(int(replies[children[0]]), above)
            found = self._read([*thread, *children.tolist()])
            rows = [row for _, row in found]
            groups, ranked = groups + 1, ranked + len(children)
            yield _packed(found[len(thread) - 1][0], {"thread": rows[: len(thread)], "replies": rows[len(thread) :]})
        lost = f", {orphans:,} answer a message that is not in the file" if orphans else ""
        self.told = f"{self._num_rows - bad:,} messages became {_told_groups(groups, ranked)}{lost}"


def _told_groups(groups: int, ranked: int) -> str:
    return f"{groups:,} groups of {ranked:,} ranked replies, and no other message has two of them"


# --- Keys ------------------------------------------------------------------------------------------------------------


def _checked(row: Any) -> Row:
    if isinstance(row, RejectedRow):
        raise row
    if not isinstance(row, Mapping):
        raise RejectedRow("wrong_type", f"the row is {kind_name(row)}, not an object with columns")
    return row


def _key(row: Any, names: Sequence[str]) -> list[Any]:
    values = [value_at(_checked(row), name) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is None:
            raise RejectedRow("missing_key", name)
    return values


def _hash(key: Sequence[Any]) -> np.uint64:
    text = json.dumps(key, sort_keys=True, default=str).encode()
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1)


def _by_key(keys: KeyArray) -> Iterator[IntArray]:
    """Yield the places of each key but 0, those in order, the keys by where they first occur."""
    order = np.argsort(keys, kind="stable")
    order = order[np.searchsorted(keys, NO_KEY, "right", sorter=order) :]
    if not len(order):
        return
    in_order = keys[order]
    starts = np.flatnonzero(np.r_[True, in_order[1:] != in_order[:-1]])
    ends = np.r_[starts[1:], len(order)]
    for number in np.argsort(order[starts], kind="stable"):
        yield order[starts[number] : ends[number]]


def _places_of(keys: KeyArray, among: KeyArray) -> IntArray:
    """Return for each key the place among others where it stands, -1 for none."""
    order = np.argsort(among, kind="stable")
    found = np.minimum(np.searchsorted(among, keys, sorter=order), len(among) - 1)
    places = order[found]
    return np.where((among[places] == keys) & (keys != NO_KEY), places, -1)


def _thread_of(place: int, above: IntArray) -> list[int]:
    """Return the places of the messages from the first one of a conversation to this one."""
    thread = [place]
    while above[thread[-1]] >= 0 and len(thread) < _DEEPEST:
        thread.append(int(above[thread[-1]]))
    return thread[::-1]


def _batches(groups: Iterator[IntArray], size: int) -> Iterator[list[IntArray]]:
    batch: list[IntArray] = []
    for group in groups:
        batch.append(group)
        if sum(map(len, batch)) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def _exactly_equal(rows: Sequence[tuple[int, Any]], names: Sequence[str]) -> list[list[tuple[int, Any]]]:
    """Split rows of one hash by their keys, which may differ once in billions."""
    groups: list[tuple[list[Any], list[tuple[int, Any]]]] = []
    for number, row in rows:
        key = _key(row, names)
        for other, group in groups:
            if other == key:
                group.append((number, row))
                break
        else:
            groups.append((key, [(number, row)]))
    return [group for _, group in groups]


# --- Trees -----------------------------------------------------------------------------------------------------------


def _node(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RejectedRow("wrong_type", f"{where} is {kind_name(value)}, not a message with replies")
    return value


def _walk(root: Mapping[str, Any], name: str) -> Iterator[tuple[list[Mapping[str, Any]], list[Any]]]:
    """Yield each message of a tree with those before it, and its replies."""
    waiting = [[root]]
    while waiting:
        thread = waiting.pop()
        replies = thread[-1].get(name)
        if not isinstance(replies, list | None):
            raise RejectedRow("wrong_type", f"{name} is {kind_name(replies)}, not a list of messages")
        replies = [_node(reply, name) for reply in replies or []]
        yield thread, replies
        if len(thread) < _DEEPEST:
            waiting += [[*thread, reply] for reply in reversed(replies)]


def _counts(reply: Row, tree: Mapping[str, Any]) -> bool:
    """Tell whether a reply is one of those that are compared: it has the values that the map asks for, and a rank."""
    ranked_by = tree.get("ranked_by")
    if ranked_by is not None and (reply.get(ranked_by) is None or reply[ranked_by] != reply[ranked_by]):
        return False
    return all(label_key(reply.get(name)) == label_key(value) for name, value in tree.get("where", {}).items())


def _thread_row(thread: Sequence[Row], replies: Sequence[Row], name: str) -> dict[str, Any]:
    def alone(message: Row) -> dict[str, Any]:
        return {key: value for key, value in message.items() if key != name}

    return {"thread": [alone(part) for part in thread], "replies": [alone(part) for part in replies]}


def _packed(number: int, row: Mapping[str, Any]) -> RawRow:
    raw = json.dumps({FIRST_ROW: number, **row}, ensure_ascii=False, default=str).encode(
        "utf-8", errors="surrogatepass"
    )
    if len(raw) > MAX_ROW_BYTES:
        return number, b"", f"too_large: the rows put together have more than {MAX_ROW_BYTES >> 20} MB"
    return number, raw, ""
