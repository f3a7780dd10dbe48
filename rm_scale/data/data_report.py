"""Report what became of every input row and what the texts look like; stop when too many rows were rejected."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rm_scale.data.rejected_rows import REJECTION_REASONS
from rm_scale.errors import DataError
from rm_scale.files import replacing, write_whole
from rm_scale.logs import get_logger
from rm_scale.texts import one_line

logger = get_logger(__name__)

NUM_FIRST_ROWS = 5
_SHOWN_CHARACTERS = 200
_GROUPS_AT_ONCE = 1 << 18
IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class RejectionCount:
    """How many rows of one source were rejected for one reason, and the first of them.

    Attributes:
        count: rows rejected.
        first_rows: up to five row indexes, from 0.
        detail: what exactly was seen in the first of them.
    """

    count: int
    first_rows: tuple[int, ...]
    detail: str = ""

    def example(self) -> str:
        """Return the first row's detail in one line, with the row it is of; "" when nothing more is known."""
        if not self.detail or not self.first_rows:
            return ""
        return f"row {self.first_rows[0]}: {one_line(self.detail, _SHOWN_CHARACTERS)}"


@dataclass(frozen=True)
class SourceReport:
    """What became of the rows of one source: `rows_read` = `rows_used` + `rows_filtered` + all of `rejected`.

    Attributes:
        name: file or hub name.
        split: what it was read for: "train" or "eval".
        format: how its rows were read, and `format_reason` why so.
        rows_read: rows of the source, blank lines not counted.
        rows_used: rows that became groups.
        rejected: per reason of `REJECTION_REASONS`.
        ignored_columns: columns that the format does not read.
        rows_filtered: rows that the source's own filters leave out.
    """

    name: str
    split: str
    format: str
    format_reason: str
    rows_read: int
    rows_used: int
    rejected: Mapping[str, RejectionCount] = field(default_factory=dict)
    ignored_columns: tuple[str, ...] = ()
    rows_filtered: int = 0

    @property
    def rows_rejected(self) -> int:
        """Number of rows rejected, for whatever reason."""
        return sum(entry.count for entry in self.rejected.values())


@dataclass(frozen=True)
class SourceShare:
    """What became of one source of a list: its rows, and its part in what is trained or evaluated on.

    Attributes:
        name: as the list calls it.
        split: what it was read for: "train" or "eval".
        rows_read, rows_filtered, rows_rejected: rows of its files.
        groups: those that are trained or evaluated on, after limits and what is held out.
        held_out: groups of it that were moved to evaluation.
        weight: as given; `None` where it has none.
        share: of what is trained on, from 0 to 1; of the evaluation groups, for evaluation.
        groups_per_epoch: groups of it in an epoch; `None` where that depends on the global batch.
    """

    name: str
    split: str
    rows_read: int
    rows_filtered: int
    rows_rejected: int
    groups: int
    held_out: int = 0
    weight: float | None = None
    share: float | None = None
    groups_per_epoch: int | None = None


@dataclass(frozen=True)
class Spread:
    """Mean, 95th percentile and maximum of a count of tokens."""

    mean: float = 0.0
    p95: float = 0.0
    max: int = 0


@dataclass(frozen=True)
class TextStatistics:
    """Lengths of what is trained or evaluated on, and how far length alone predicts the labels.

    Attributes:
        num_groups: groups.
        num_pairs: pairs of differently ranked responses within groups.
        num_prompts: different prompts.
        num_duplicate_groups: groups whose prompt and responses all occurred before.
        prompt_tokens: tokens shared by a group's sequences, per group.
        response_tokens: tokens after the shared ones, per response.
        longest_sequence: tokens of the longest prompt and response together, which `max_length` must hold.
        chosen_longer_share: share of pairs whose better response has more tokens.
        longer_wins_accuracy: accuracy of "the longer response is better" over pairs, equal lengths counted half.
        shorter_wins_accuracy: the same for "the shorter response is better".
    """

    num_groups: int = 0
    num_pairs: int = 0
    num_prompts: int = 0
    num_duplicate_groups: int = 0
    prompt_tokens: Spread = field(default_factory=Spread)
    response_tokens: Spread = field(default_factory=Spread)
    longest_sequence: int = 0
    chosen_longer_share: float | None = None
    longer_wins_accuracy: float | None = None
    shorter_wins_accuracy: float | None = None


@dataclass(frozen=True)
class DataReport:
    """Everything about the data of a run that a reader may want to know; `to_dict` returns it as JSON values.

    Attributes:
        sources: what became of the rows, per source.
        train, eval: statistics of training and evaluation data (`eval` is `None` without evaluation data).
        held_out: groups moved from the training data to evaluation.
        left_out_by_limit: usable groups beyond `max_train_samples`, `max_eval_samples` and sources' `max_samples`.
        shared_prompts: number of prompts that occur in both.
        shared_groups: evaluation groups that occur, prompt and responses, in the training data too.
        nearly_shared_prompts: evaluation groups whose prompt is in the training data in other writing alone: another
            case, white space, punctuation or message form.
        mixture: what became of each source of `datasets` and `eval_datasets`; empty without such lists.
        hub: name and commit of each hub data set.
        is_stream: the training data is streamed, and all that is told of it is told of its first rows.
    """

    sources: tuple[SourceReport, ...]
    train: TextStatistics = field(default_factory=TextStatistics)
    eval: TextStatistics | None = None
    held_out: int = 0
    left_out_by_limit: int = 0
    shared_prompts: int = 0
    shared_groups: int = 0
    nearly_shared_prompts: int = 0
    mixture: tuple[SourceShare, ...] = ()
    hub: tuple[Mapping[str, Any], ...] = ()
    is_stream: bool = False

    @property
    def rows_read(self) -> int:
        """Number of rows of all sources."""
        return sum(source.rows_read for source in self.sources)

    @property
    def rows_rejected(self) -> int:
        """Number of rejected rows of all sources."""
        return sum(source.rows_rejected for source in self.sources)

    @property
    def rows_filtered(self) -> int:
        """Number of rows that the sources' own filters leave out."""
        return sum(source.rows_filtered for source in self.sources)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with totals and the meaning of each reason that occurs."""
        reasons = sorted({reason for source in self.sources for reason in source.rejected})
        return {
            "rows_read": self.rows_read,
            "rows_used": self.rows_read - self.rows_rejected - self.rows_filtered,
            "rows_rejected": self.rows_rejected,
            "rows_filtered": self.rows_filtered,
            **json.loads(json.dumps(asdict(self))),
            "reasons": {reason: REJECTION_REASONS[reason] for reason in reasons},
        }


# --- Too much lost -------------------------------------------------------------------------------------------------


def raise_if_too_many(report: DataReport, max_share: float, files: Iterable[Path] = ()) -> None:
    """Stop when more than `max_share` of the rows read for training, or of those for evaluation, were rejected.

    Args:
        report: what became of the rows.
        max_share: share that may be lost.
        files: where every rejected row stands with its detail, to be named.

    Raises:
        DataError: lists reasons, counts, the first rows of each and the fix.
    """
    for split in ("train", "eval"):
        sources = [source for source in report.sources if source.split == split]
        read, lost = sum(s.rows_read for s in sources), sum(s.rows_rejected for s in sources)
        if lost > max_share * read:
            raise DataError(too_many_text(sources, read, lost, max_share, files))


def too_many_text(
    sources: Sequence[SourceReport], read: int, lost: int, max_share: float, files: Iterable[Path] = ()
) -> str:
    """Return the message for a data set of which too many rows would be lost, with an example of each reason."""
    share = lost / max(read, 1)
    lines = [f"{lost:,} of {read:,} rows can't be used ({share:.1%}); at most {max_share:.1%} may be lost:"]
    for source in sources:
        for reason, entry in sorted(source.rejected.items(), key=lambda item: -item[1].count):
            rows = ", ".join(map(str, entry.first_rows)) + (", ..." if entry.count > len(entry.first_rows) else "")
            lines.append(
                f"  {source.name}: {reason} {entry.count:,} (rows {rows}; from 0): {REJECTION_REASONS[reason]}"
            )
            if entry.detail:
                lines.append(f"    {entry.example()}")
    lines += [f"  every row: {path}" for path in files]
    reasons = {reason for source in sources for reason in source.rejected}
    lines.append(f"Fix: {', or '.join(_fixes(reasons, read, lost))}.")
    return "\n".join(lines)


def _fixes(reasons: Set[str], read: int, lost: int) -> list[str]:
    """Return what would let these rows be used, or the run go on without them."""
    fixes = []
    if "over_long" in reasons:
        fixes.append("read longer rows (over_long) with --max_length or --overlong_policy truncate_prompt_left")
    if reasons - {"over_long"}:
        fixes.append("correct these rows")
    if lost < read:  # a run needs at least one row, whatever share may be lost
        needed = min(1.0, float(np.ceil(lost / read * 1000) / 1000))
        fixes.append(f"accept the loss with --max_rejected_share {needed:g}")
    return fixes


def log_summary(report: DataReport) -> None:
    """Log one line per source and reason, and one on the texts to train on and one on those to evaluate on."""
    for source in report.sources:
        share = source.rows_rejected / max(source.rows_read, 1)
        logger.info(
            f"{source.name} ({source.split}): {source.rows_read:,} rows read as {source.format}, "
            f"{source.rows_used:,} used, {source.rows_rejected:,} rejected ({share:.1%})"
            + (f", {source.rows_filtered:,} left out by its filters" if source.rows_filtered else "")
        )
        for reason, entry in source.rejected.items():
            rows = ", ".join(map(str, entry.first_rows))
            example = f"; {entry.example()}" if entry.detail else ""
            logger.warning(f"  {reason}: {entry.count:,} rows, first {rows}: {REJECTION_REASONS[reason]}{example}")
    for part in report.mixture:
        logger.info(_share_line(part))
    for name, side in (("train", report.train), ("eval", report.eval)):
        if side is not None:
            logger.info(_side_line(name, side))
    if report.is_stream:
        logger.info("streaming: these are the first training rows; the others are read when training comes to them")
    _warn_about_shared(report)


def _warn_about_shared(report: DataReport) -> None:
    """Warn when evaluation measures what was trained on, with how to see and to leave out these rows."""
    if not report.shared_prompts and not report.nearly_shared_prompts:
        return
    found = []
    if report.shared_prompts:
        found.append(f"{report.shared_prompts:,} prompts occur both in training and in evaluation data")
    if report.shared_groups:
        found.append(f"{report.shared_groups:,} evaluation groups are there with all their responses")
    if report.nearly_shared_prompts:
        found.append(f"{report.nearly_shared_prompts:,} evaluation groups have a training prompt in other writing")
    logger.warning(
        f"{'; '.join(found)}. Fix: rm-scale data --against EVALUATION_FILE shows them and finds more; with --kept DIR "
        "it writes the training data without them."
    )


def _share_line(part: SourceShare) -> str:
    per_epoch = f", {part.groups_per_epoch:,} in an epoch" if part.groups_per_epoch is not None else ""
    share = f", share {part.share:.2%}" if part.share is not None else ""
    return f"{part.name} ({part.split}): {part.groups:,} groups{share}{per_epoch}"


def _side_line(name: str, side: TextStatistics) -> str:
    longer = "" if side.longer_wins_accuracy is None else f", 'longer wins' is right in {side.longer_wins_accuracy:.1%}"
    prompt, response = side.prompt_tokens, side.response_tokens
    return (
        f"{name}: {side.num_groups:,} groups, {side.num_pairs:,} pairs, tokens per prompt {prompt.mean:.0f} "
        f"(max {prompt.max:,}), per response {response.mean:.0f} (max {response.max:,}), longest sequence "
        f"{side.longest_sequence:,}{longer}, "
        f"{side.num_duplicate_groups:,} duplicates"
    )


def write_data_report(report: DataReport, rejected: Iterable[Mapping[str, Any]], run_dir: str | Path) -> None:
    """Write `data_report.json` and `rejected_rows.jsonl` (source, row, reason, detail per line) to `run_dir`."""
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "data_report.json", json.dumps(report.to_dict(), indent=2) + "\n")
    with replacing(folder / "rejected_rows.jsonl") as path, path.open("w", encoding="utf-8") as stream:
        for row in rejected:
            stream.write(json.dumps(dict(row)) + "\n")


# --- Statistics ----------------------------------------------------------------------------------------------------


def text_statistics(
    prompt_lengths: IntArray, lengths: IntArray, ranks: IntArray, sizes: IntArray, prompts: IntArray, groups: IntArray
) -> TextStatistics:
    """Compute the statistics of G groups with R responses in all.

    Args:
        prompt_lengths: (G,) shared tokens per group.
        lengths: (R,) tokens per sequence (shared ones included), group after group.
        ranks: (R,) ranks in the same order.
        sizes: (G,) responses per group; their sum is R.
        prompts: (G,) hashes of the prompt.
        groups: (G,) hashes of prompt and responses.
    """
    if len(sizes) == 0:
        return TextStatistics()
    longer, equal, pairs = _length_comparisons(lengths, ranks, sizes)
    accuracy = (longer + equal / 2) / pairs if pairs else None
    return TextStatistics(
        num_groups=len(sizes),
        num_pairs=pairs,
        num_prompts=len(distinct(prompts)),
        num_duplicate_groups=len(groups) - len(distinct(groups)),
        prompt_tokens=_spread(prompt_lengths),
        response_tokens=_spread(lengths - np.repeat(prompt_lengths, sizes)),
        longest_sequence=int(lengths.max()),
        chosen_longer_share=longer / pairs if pairs else None,
        longer_wins_accuracy=accuracy,
        shorter_wins_accuracy=None if accuracy is None else 1 - accuracy,
    )


def distinct(values: IntArray) -> IntArray:
    """Return the different values, in order.

    By sorting: `np.unique` fills a hash table, which takes a minute for ten million hashes.
    """
    ordered = np.sort(values)
    is_new = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
    return ordered[is_new]


def _spread(values: IntArray) -> Spread:
    return Spread(float(values.mean()), float(np.percentile(values, 95)), int(values.max()))


def _length_comparisons(lengths: IntArray, ranks: IntArray, sizes: IntArray) -> tuple[int, int, int]:
    """Count, over pairs of different rank: the better response is longer, it is as long, pairs in all."""
    counts = np.zeros(3, np.int64)
    place = 0
    # In blocks: the indices of ten million groups at once would take a gigabyte.
    for start in range(0, len(sizes), _GROUPS_AT_ONCE):
        block = sizes[start : start + _GROUPS_AT_ONCE]
        end = place + int(block.sum())
        counts += _comparisons_of(lengths[place:end], ranks[place:end], block)
        place = end
    longer, equal, pairs = map(int, counts)
    return longer, equal, pairs


def _comparisons_of(lengths: IntArray, ranks: IntArray, sizes: IntArray) -> tuple[int, int, int]:
    starts = np.cumsum(sizes) - sizes
    longer = equal = pairs = 0
    for size in np.flatnonzero(np.bincount(sizes)):
        rows = starts[sizes == size][:, None] + np.arange(size)
        for first in range(size - 1):
            own, later = rows[:, first : first + 1], rows[:, first + 1 :]
            order = ranks[later] - ranks[own]
            ahead = np.sign(order) * (lengths[own] - lengths[later])
            decided = order != 0
            longer += int((ahead[decided] > 0).sum())
            equal += int((ahead[decided] == 0).sum())
            pairs += int(decided.sum())
    return longer, equal, pairs
