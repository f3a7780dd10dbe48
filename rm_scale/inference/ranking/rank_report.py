"""Count what became of every prompt and completion that was ranked, and say it in a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rm_scale.inference.ranking.rank_candidates import UNSCORED_REASONS, RankedGroup
from rm_scale.inference.ranking.selection import LEFT_OUT_REASONS, NO_PAIR_REASONS, OutputFormat, Selected

_NUM_EXAMPLES = 5


@dataclass
class RankReport:
    """What became of every prompt and completion.

    Attributes:
        num_prompts: groups read; each is in `num_prompts_written` or in `left_out`.
        num_completions: their completions; each is in `num_scored` or in `unscored`.
        num_repeated: scored completions whose text occurred before in their prompt.
        num_tied: scored completions that share their score with a different text of their prompt.
        num_prompts_tied_best: prompts whose best score belongs to several different texts.
        num_rows_written: output rows.
        noted: prompts that were written, but are nothing to choose from: `one_completion`, `equal_scores`.
        left_out, unscored, no_pairs: counts by reason.
        examples: input rows of the first prompts of each reason of `left_out` and `unscored`.
    """

    num_prompts: int = 0
    num_prompts_written: int = 0
    num_completions: int = 0
    num_scored: int = 0
    num_repeated: int = 0
    num_tied: int = 0
    num_prompts_tied_best: int = 0
    num_rows_written: int = 0
    noted: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    unscored: Counter[str] = field(default_factory=Counter)
    no_pairs: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[int]] = field(default_factory=dict)

    def add(self, ranked: RankedGroup, selected: Selected) -> None:
        """Count one group."""
        self.num_prompts += 1
        self.num_completions += len(ranked.scores)
        self.num_scored += len(ranked.order)
        for reason in ranked.problems:
            if reason is not None:
                self.unscored[reason] += 1
                self._example(reason, ranked)
        self._count_ties(ranked)
        self.num_rows_written += len(selected.rows)
        self.no_pairs.update(selected.no_pairs)
        if selected.left_out is not None:
            self.left_out[selected.left_out] += 1
            self._example(selected.left_out, ranked)
            return
        self.num_prompts_written += 1
        if len(ranked.order) == 1:
            self.noted["one_completion"] += 1
        elif ranked.ranks[-1] == 0:
            self.noted["equal_scores"] += 1

    def _count_ties(self, ranked: RankedGroup) -> None:
        texts: dict[int, Counter[str]] = {}
        for position, rank in enumerate(ranked.ranks):
            texts.setdefault(rank, Counter())[ranked.text_at(position)] += 1
        for rank, found in texts.items():
            self.num_repeated += found.total() - len(found)
            if len(found) > 1:
                self.num_tied += found.total()
                self.num_prompts_tied_best += rank == 0

    def _example(self, reason: str, ranked: RankedGroup) -> None:
        rows = self.examples.setdefault(reason, [])
        if len(rows) < _NUM_EXAMPLES and ranked.group.rows[0] not in rows:
            rows.append(ranked.group.rows[0])

    def to_json(self) -> dict[str, Any]:
        """Return the counts as they are written to a file."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    def text(self, output_format: OutputFormat) -> str:
        """Return the summary a user reads."""
        written = "pairs" if output_format == "pairs" else "rows"
        lines = [
            f"prompts      {self.num_prompts}: {self.num_prompts_written} written, {self.left_out.total()} left out",
            f"completions  {self.num_completions}: {self.num_scored} scored; {self.num_repeated} repeat a text",
            f"ties         {self.num_tied} completions share their score with another text of their prompt; "
            f"{self.num_prompts_tied_best} prompts have no single best one",
            f"{written:<11}  {self.num_rows_written} written",
        ]
        lines += self._reasons("left out", self.left_out, LEFT_OUT_REASONS)
        lines += self._reasons("written, but nothing to choose from", self.noted, LEFT_OUT_REASONS)
        lines += self.unscored_lines()
        lines += self._reasons("comparisons without a pair", self.no_pairs, NO_PAIR_REASONS)
        return "\n".join(lines)

    def unscored_lines(self) -> list[str]:
        """Return why completions have no score, a line for each reason."""
        return self._reasons("completions without a score", self.unscored, UNSCORED_REASONS)

    def _reasons(self, title: str, counts: Mapping[str, int], meanings: Mapping[str, str]) -> list[str]:
        lines = []
        for reason, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
            rows = self.examples.get(reason, [])
            where = f" (rows {', '.join(map(str, rows))}{', ...' if count > len(rows) else ''})" if rows else ""
            lines.append(f"{title}: {reason} {count}: {meanings[reason]}{where}")
        return lines
