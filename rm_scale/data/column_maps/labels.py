"""Turn what says which of two responses is better into one form: a side, a probability, and how much better."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rm_scale.config_columns import SIDES, SOFT_LABEL_FORMS, label_key
from rm_scale.data.column_maps.places import as_number, is_blank, read_numbers, read_place, read_places
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.data.row_values import Row, kind_name, number_value


@dataclass(frozen=True)
class Label:
    """What a row says of its two responses.

    Attributes:
        first: the probability that the first is better: 1, 0, 0.5 for a tie, or a share of votes.
        is_share: `first` is such a share, and no side even at 0 or 1.
        margin: how much better, `None` when not given.
    """

    first: float
    is_share: bool = False
    margin: float | None = None

    def columns(self) -> dict[str, Any]:
        """Return the label in the columns of the format `soft_label`."""
        if self.is_share or self.first == 0.5:
            return {"soft_label": self.first}
        side = {"better_response_id": 0 if self.first == 1 else 1}
        return side if self.margin is None else {**side, "margin": self.margin}


def read_better(row: Row, better: Mapping[str, Any]) -> Label:
    """Return the label by the value of a column, by the sign of a number, or by which score is higher.

    Raises:
        RejectedRow: `bad_label` for a value without a meaning; `no_preference` for one that the map leaves out.
    """
    if "signed" in better:
        return _signed(row, better)
    if "higher" in better:
        first, second = _two_numbers(row, better["higher"])
        return _by_size(first - second, better.get("equal", "tie"), better, better["higher"])
    return Label(_SHARES[_side(read_place(row, better["path"]), better, better["path"])])


def read_soft_label(row: Row, label: Any) -> Label:
    """Return the label that is a probability, or the share of votes for the first response.

    Raises:
        RejectedRow: `bad_label` where there is none in [0, 1], or no vote.
    """
    if not isinstance(label, Mapping) or not set(label) & set(SOFT_LABEL_FORMS):
        return Label(number_value(as_number(read_place(row, label)), "soft_label"), is_share=True)
    if "counts" in label:
        return _share(_counts(row, label["counts"]), str(label["counts"]))
    values = read_places(row, label["votes"])
    if not isinstance(values, list):
        raise RejectedRow("wrong_type", f"{label['votes']} is {kind_name(values)}, not a list of votes")
    sides = [_side(value, label, label["votes"], may_drop=True) for value in values if not is_blank(value)]
    return _share([sides.count(side) for side in ("first", "second", "tie")], str(label["votes"]))


_SHARES = {"first": 1.0, "second": 0.0, "tie": 0.5}


def _side(value: Any, label: Mapping[str, Any], where: Any, may_drop: bool = False) -> str:
    key = label_key(value)
    for side in SIDES:
        if key in _keys(label.get(side)):
            if side == "drop" and not may_drop:
                raise RejectedRow("no_preference", f"{where}={value!r} is a label that the map leaves out")
            return side
    known = [part for side in SIDES for part in _listed(label.get(side))]
    raise RejectedRow("bad_label", f"{where}={value!r:.60} is none of the labels {known}")


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [] if values is None else [values]


def _keys(values: Any) -> Collection[str]:
    return [label_key(value) for value in _listed(values)]


def _signed(row: Row, better: Mapping[str, Any]) -> Label:
    value = number_value(as_number(read_place(row, better["signed"])), str(better["signed"]))
    towards_first = -value if better["negative"] == "first" else value
    return _by_size(towards_first, better.get("zero", "tie"), better, better["signed"])


def _by_size(towards_first: float, zero: str, better: Mapping[str, Any], where: Any) -> Label:
    if towards_first == 0:
        if zero == "drop":
            raise RejectedRow("no_preference", f"{where}: neither response is better")
        return Label(0.5)
    return Label(float(towards_first > 0), margin=abs(towards_first) if better.get("margin") else None)


def _two_numbers(row: Row, places: Any) -> tuple[float, float]:
    numbers = read_numbers(row, places)
    if len(numbers) != 2:
        raise RejectedRow("bad_label", f"{places} has {len(numbers)} numbers, not 2")
    return numbers[0], numbers[1]


def _counts(row: Row, places: Any) -> list[float]:
    counts = read_numbers(row, places)
    if len(counts) not in (2, 3) or any(count < 0 for count in counts):
        raise RejectedRow("bad_label", f"{places} are no 2 or 3 numbers of votes")
    return counts


def _share(counts: list[Any], where: str) -> Label:
    """Return the share of votes for the first response; ties count half."""
    first, second, ties = (*counts, 0)[:3]
    total = first + second + ties
    if total == 0:
        raise RejectedRow("bad_label", f"{where}: nobody voted")
    return Label((first + ties / 2) / total, is_share=True)
