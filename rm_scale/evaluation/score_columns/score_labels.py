"""What the right answer is, where scores lie in columns: by the columns' names, or by a column of labels.

A label becomes ranks, 0 is best. See `LabelReader`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rm_scale.errors import DataError
from rm_scale.evaluation.score_columns.score_values import ScoreColumns, UnusableScores, find
from rm_scale.json_values import as_number, as_whole
from rm_scale.texts import did_you_mean, one_line

# Columns that are read as labels unasked, in the order of search.
LABEL_COLUMNS = (
    "ranks",
    "num_correct",
    "label",
    "labels",
    "winner",
    "better_response_id",
    "correct",
    "is_correct",
    "soft_label",
    "chosen_probability",
    "preference_probability",
    "scores",
)
_SOFT = ("soft_label", "chosen_probability", "preference_probability")
_FIRST_WINS = ("a>b", "a>>b", "a", "model_a", "response_a", "assistant_a", "output_1", "response_1", "first", "chosen")
_SECOND_WINS = ("b>a", "b>>a", "b", "model_b", "response_b", "assistant_b", "output_2", "response_2", "second")
_NONE_WINS = ("a=b", "b=a", "tie", "tie (bothbad)", "both", "neither", "equal")
# Columns of one of those words, which are read as labels unasked; a number in them may count from 0 or from 1.
_WORD_COLUMNS = (
    *("preference", "human_preference", "overall_preference", "preferred", "preferred_response"),
    *("better", "better_response", "best_response"),
)
# Names of columns that look like labels, in lower case with "_" between words.
_LABEL_NAME = re.compile(
    r"(.*_)?(labels?|preferences?|preferred|winners?|better|best|correct|votes?|verdict|rank|ranks|ranking)"
    r"|(chosen|preferred|better|best|winning|winner)_(index|idx|id|number|response|answer|completion|output|model)"
)
_PERSONS_NAME = re.compile(r"(human|annotators?|crowd|expert)_.*")
_LONGEST_WORD = 20
"""Characters of a text that may be a label; longer ones are responses or remarks."""


@dataclass(frozen=True)
class Label:
    """The right answer of one row.

    Attributes:
        ranks: one per score, 0 is best.
        soft_label: probability that the first of two is the better one; `None` when labels are hard.
    """

    ranks: tuple[int, ...]
    soft_label: float | None = None


@dataclass(frozen=True)
class LabelReader:
    """Reads the label of a row.

    Without a column of labels the first column, or the first score of a list, is the better one, and all others are
    worse. With one, its values may be: `ranks` (smallest is best); `num_correct` (that many come first); one number or
    truth value per score (highest is best); a text such as "A>B" or "model_b" or "tie"; the number of the best one,
    from 0 or from 1 as the whole file shows; a probability (`soft_label`).

    Attributes:
        column: of the labels; `None` without one.
        first_number: 0 or 1: what the number of the first response is.
        one_means_first: labels are 1 where the first of two is preferred and 0 where the second is, as in Stanford
            Human Preferences (its card: https://huggingface.co/datasets/stanfordnlp/SHP).
    """

    column: str | None
    first_number: int = 0
    one_means_first: bool = False

    @property
    def text(self) -> str:
        """How the right answer is found, for people."""
        if self.column is None:
            return "the first score is of the better response"
        if self.one_means_first:
            return f"labels from {self.column}, 1 where the first is preferred"
        counted = f", counted from {self.first_number}" if self.first_number else ""
        return f"labels from {self.column}{counted}"

    def read(self, row: Mapping[str, Any], counts: Sequence[int]) -> Label:
        """Return the label.

        Args:
            row: the row.
            counts: number of scores in each column.

        Raises:
            UnusableScores: there is no label, it can't be read, or it does not fit the number of scores.
        """
        total = sum(counts)
        if self.column is None:
            if total < 2:
                raise UnusableScores("ragged_scores", "the row has one score, and nothing to compare it with")
            first = counts[0] if len(counts) > 1 else 1
            return Label((0,) * first + (1,) * (total - first))
        value = find(row, self.column)
        if value is None:
            raise UnusableScores("bad_label", f"{self.column} is absent or null")
        if isinstance(value, list):
            return Label(_ranks_of_list(value, self.column, total))
        if total < 2:
            raise UnusableScores("ragged_scores", "the row has one score, and nothing to compare it with")
        return self._of_value(value, total)

    def _of_value(self, value: Any, total: int) -> Label:
        column = str(self.column)
        if column == "num_correct":
            number = as_whole(value)
            if number is None or not 0 < number < total:
                raise UnusableScores(
                    "bad_label", f"num_correct={value!r} with {total} scores leaves nothing to compare"
                )
            return Label((0,) * number + (1,) * (total - number))
        if column in _SOFT:
            return _soft(value, column, total)
        ranks = _ranks_of_word(value)
        if ranks is not None and total == 2:
            return Label(ranks)
        number = label_number(value)
        if self.one_means_first:
            if number is None or number not in (0, 1) or total != 2:
                raise UnusableScores(
                    "bad_label",
                    f"{column}={one_line(repr(value), 60)} with {total} scores must be 1 where the first of two is "
                    "preferred, 0 where the second is",
                )
            return Label((1 - number, number))
        place = -1 if number is None else number - self.first_number
        if not 0 <= place < total:
            raise UnusableScores("bad_label", f"{column}={one_line(repr(value), 60)} names none of {total} responses")
        return Label(tuple(int(one != place) for one in range(total)))


def label_number(value: Any) -> int | None:
    """Return a label that is the number of a response, also as text; truth values are none."""
    if isinstance(value, str) and value.strip().isdigit():
        return as_whole(int(value)) if len(value) < 10 else None
    return as_whole(value)


def _ranks_of_word(value: Any) -> tuple[int, int] | None:
    """Return the ranks of two responses of which a word names the better one; `None` for all else."""
    if not isinstance(value, str):
        return None
    word = value.strip().strip("[]").lower()
    for names, ranks in ((_FIRST_WINS, (0, 1)), (_SECOND_WINS, (1, 0)), (_NONE_WINS, (0, 0))):
        if word in names:
            return ranks
    return None


def _soft(value: Any, column: str, total: int) -> Label:
    number = as_number(value)
    if number is None or not 0 <= number <= 1 or total != 2:
        raise UnusableScores("bad_label", f"{column}={value!r} must be between 0 and 1, for two scores")
    return Label((0, 1) if number >= 0.5 else (1, 0), number)


def _ranks_of_list(values: Sequence[Any], column: str, total: int) -> tuple[int, ...]:
    if len(values) != total:
        raise UnusableScores("ragged_scores", f"{total} scores, and {len(values)} values of {column}")
    numbers = [float(value) if isinstance(value, bool) else as_number(value) for value in values]
    known = [number for number in numbers if number is not None]
    if len(known) < total:
        raise UnusableScores("bad_label", f"{column} holds {one_line(repr(values), 60)}")
    return ranks_of_labels(known, smallest_is_best=is_rank_column(column))


def is_rank_column(name: str) -> bool:
    """Tell whether a column's smallest value is the best: it is called rank or ranks."""
    return name.rpartition(".")[2].lower() in {"rank", "ranks"}


def ranks_of_labels(values: Sequence[float], smallest_is_best: bool) -> tuple[int, ...]:
    """Return ranks from 0 without gaps.

    Args:
        values: one label per response.
        smallest_is_best: of ranks; otherwise the highest value is best.

    Raises:
        UnusableScores: all are equal, so nothing is preferred.
    """
    places = sorted(set(values), reverse=not smallest_is_best)
    if len(places) < 2 and len(values) != 2:
        raise UnusableScores("no_preference", "all responses have the same label", 0)
    return tuple(places.index(value) for value in values)


def label_reader(
    columns: ScoreColumns,
    asked: str | None,
    rows: Iterable[Mapping[str, Any]],
    has_chosen: bool,
    taken: Sequence[str],
    name: str,
) -> LabelReader:
    """Find out where the labels are.

    Args:
        columns: the scores.
        asked: the column that the user names; `None` looks for a known one, unless the scores' names say chosen.
        rows: all readable rows.
        has_chosen: the rows hold `chosen` and `rejected`, to which a list of scores belongs in this order.
        taken: columns that are no labels: scores of this set or of another, and those that the user ignores.
        name: of the file, for messages.

    Raises:
        DataError: the column is not there, numbers in it may count from 0 or from 1, or nothing says which response
            is better but a column that looks like a label and can't be read for certain.
    """
    rows = list(rows)
    known = list(dict.fromkeys(str(column) for row in rows[:200] for column in row))
    column = asked
    if asked is not None and not any(find(row, asked) is not None for row in rows):
        hint = did_you_mean(asked, known, f"it has {', '.join(known[:20])}")
        raise DataError(f"--label_column {asked}: {name} has no such column. Fix: {hint}.")
    if asked is None and not columns.says_chosen:
        candidates = [one for one in known if one not in taken]
        column = _known_labels(candidates, rows, has_chosen)
        if column is None and not has_chosen:
            _refuse_unread_labels(candidates, rows, name)
    if column is None:
        return LabelReader(None)
    if _is_shp(column, rows):
        return LabelReader(column, one_means_first=True)
    return LabelReader(column, _first_number(column, rows, name))


def _known_labels(candidates: Sequence[str], rows: Sequence[Mapping[str, Any]], has_chosen: bool) -> str | None:
    """Return the column that is read as labels unasked; `None` where there is none."""
    for column in LABEL_COLUMNS:
        if column in candidates and not _is_foreign(column, rows, has_chosen):
            return column
    for column in _WORD_COLUMNS if not has_chosen else ():
        values = _values(column, rows) if column in candidates else []
        if values and all(_ranks_of_word(value) is not None for value in values):
            return column
    return None


def _refuse_unread_labels(candidates: Sequence[str], rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raise `DataError` where the first score would be the better one although a column seems to say which is."""
    for column in candidates:
        values = _values(column, rows)
        if values and _looks_like_labels(column, values):
            raise DataError(
                f"{name}: {column} (the first is {one_line(repr(values[0]), 60)}) looks like a label, and its form "
                "does not say which response it prefers; without a label the first score counts as the better "
                f"response's. Fix: --label_column {column} where it is the number of the better response or one number "
                f"per score, highest is best; --ignore_columns {column} where it is no label."
            )


def _looks_like_labels(column: str, values: Sequence[Any]) -> bool:
    """Tell whether a column's name and all its values are of the kind that labels have."""
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[.\- ]", "_", column).lower()
    if _LABEL_NAME.fullmatch(plain):
        return all(_is_number_like(one) or (isinstance(one, str) and len(one) <= _LONGEST_WORD) for one in values)
    if _PERSONS_NAME.fullmatch(plain):
        return all(_is_number_like(one) or _ranks_of_word(one) is not None for one in values)
    return False


def _is_number_like(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) > 1 and all(isinstance(one, bool | int | float) for one in value)
    return isinstance(value, bool | int | float)


def _values(column: str, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [row[column] for row in rows if row.get(column) not in (None, "")]


def _is_shp(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether labels are those of Stanford Human Preferences: a number beside its two columns of responses."""
    first = next((row for row in rows if row.get(column) is not None), {})
    is_number = not isinstance(first.get(column), list | str) or label_number(first.get(column)) is not None
    return column == "labels" and "human_ref_A" in first and "human_ref_B" in first and is_number


def _is_foreign(column: str, rows: Sequence[Mapping[str, Any]], has_chosen: bool) -> bool:
    """Tell whether a column of a known name is no label: scores of a model, or a class beside two responses."""
    first = next((row for row in rows if row.get(column) is not None), None)
    value = None if first is None else first[column]
    if column == "scores":
        # As in training data, or right and wrong as in PPE; else they are what another model gave.
        is_ranked = first is not None and any(isinstance(first.get(key), list) for key in ("responses", "completions"))
        return not isinstance(value, list) or not (is_ranked or all(one in (0, 1) for one in value))
    if column in {"labels", "correct", "is_correct"}:
        return not isinstance(value, list) and not _is_shp(column, rows)
    return value is None or (column == "label" and has_chosen)


def _first_number(column: str, rows: Iterable[Mapping[str, Any]], name: str) -> int:
    if column in {"num_correct", "better_response_id", *_SOFT}:
        return 0
    numbers = {label_number(find(row, column)) for row in rows} - {None}
    if not numbers or 0 in numbers:
        return 0
    if numbers != {1}:
        return 1
    raise DataError(
        f"{name}: {column} is 1 in every row, which may be the first response (from 1) or the second (from 0). Fix: "
        'write "A>B" or "B>A", or put the better score first and leave the column out.'
    )
