"""`review_data`: read all rows of a run's training sources once, and return what was found, as JSON values."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rm_scale.config import RunConfig
from rm_scale.data.cache import DEFAULT_CACHE_DIR
from rm_scale.data.data_report import DataReport
from rm_scale.data.encoding import TextEncoder
from rm_scale.data.preference_group import PreferenceGroup
from rm_scale.data.preparation import find_sources
from rm_scale.data.sources import Source
from rm_scale.data_review.copies import review_copies
from rm_scale.data_review.finding import Example, Finding, cut, cut_left
from rm_scale.data_review.form_bias import review_form
from rm_scale.data_review.languages import review_languages
from rm_scale.data_review.lengths import review_lengths
from rm_scale.data_review.noise import review_noise
from rm_scale.data_review.pair_hashes import PairHashes
from rm_scale.data_review.read_groups import SourceGroups, plain_text, read_groups
from rm_scale.data_review.sample import MAX_CHARACTERS, SAMPLE_GROUPS, SampledGroup, Sampler, choose_rows
from rm_scale.data_review.sampled_pairs import SampledPairs
from rm_scale.data_review.scan import scan
from rm_scale.data_review.template_problems import TemplateChecker, review_templates
from rm_scale.data_review.word_model import review_words
from rm_scale.logs import get_logger
from rm_scale.version import __version__

logger = get_logger(__name__)

DOCUMENT_VERSION = 1
IntArray = npt.NDArray[np.int64]


@dataclass
class AllGroups:
    """All groups of the open sources: hashes of every one, and a sample of their texts.

    Attributes:
        sources: in the order in which their groups are numbered.
        hashes: of the pairs.
        sample: the groups to look at closely.
        rows: (G,) row of each group, of each source.
    """

    sources: list[SourceGroups]
    hashes: PairHashes
    sample: list[SampledGroup]
    rows: list[IntArray]

    @property
    def num_groups(self) -> int:
        """Groups of all sources."""
        return sum(map(len, self.rows))

    def example(self, numbers: Sequence[int]) -> Example:
        """Return groups, by their numbers, as one example; their rows are read again."""
        found = [self._place(number) for number in numbers]
        texts: dict[str, str] = {}
        for source, row in found:
            group = source.at(row)
            if isinstance(group, PreferenceGroup):
                texts |= _texts(group, row)
        return Example(
            " and ".join(dict.fromkeys(source.name for source, _ in found)), tuple(r for _, r in found), texts
        )

    def refused_example(self, name: str, row: int) -> Example | None:
        """Return a row that was refused, by the name of its source; `None` where the texts can't be read either."""
        source = next((source for source in self.sources if source.name == name), None)
        group = source.at(row) if source is not None else None
        texts = _texts(group, row) if isinstance(group, PreferenceGroup) else {}
        return Example(name, (row,), texts) if texts else None

    def _place(self, number: int) -> tuple[SourceGroups, int]:
        for source, rows in zip(self.sources, self.rows, strict=True):
            if number < len(rows):
                return source, int(rows[number])
            number -= len(rows)
        raise IndexError(number)


def _texts(group: PreferenceGroup, row: int) -> dict[str, str]:
    best, worst = int(np.argmin(group.ranks)), int(np.argmax(group.ranks))
    if group.soft_label is not None:
        best, worst = (0, 1) if group.soft_label >= 0.5 else (1, 0)
    return {
        "prompt": cut_left(plain_text(group.prompt)),
        f"row {row}, better": cut(plain_text(group.responses[best])),
        f"row {row}, worse": cut(plain_text(group.responses[worst])),
    }


def read_all(sources: Sequence[SourceGroups], encoder: TextEncoder, seed: int, num_processes: int = 1) -> AllGroups:
    """Read every row of the sources once.

    Args:
        sources: what to read.
        encoder: how the run turns text into tokens.
        seed: of the sample.
        num_processes: that read rows.

    Raises:
        DataError: a process was killed.
    """
    counts = [len(source) for source in sources]
    chosen = np.split(choose_rows(sum(counts), seed), np.cumsum(counts)[:-1])
    hashes, sampler = PairHashes(), Sampler(encoder, TemplateChecker(encoder).problems)
    rows: list[list[IntArray]] = [[] for _ in sources]
    num_groups = 0
    for number, found in scan(sources, chosen, num_processes):
        hashes.extend(found.hashes, num_groups)
        for row, group in found.sampled:
            sampler.add(sources[number].name, row, group)
        rows[number].append(found.rows)
        num_groups += len(found.rows)
    joined = [np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64) for parts in rows]
    return AllGroups(list(sources), hashes, sampler.finish(), joined)


def review_data(config: RunConfig, encoder: TextEncoder, report: DataReport) -> dict[str, Any]:
    """Examine the training sources of a run.

    Args:
        config: which sources, and the settings that findings speak of.
        encoder: how the run turns text into tokens.
        report: what became of every row.

    Returns:
        JSON values: `findings` as `Finding.to_dict`, the most serious first, and the figures of each examination.

    Raises:
        DataError: a source can't be read.
    """
    sources, _ = find_sources(config)
    seed = config.seed if config.data_seed is None else config.data_seed
    root = Path(config.dataset_cache_dir or DEFAULT_CACHE_DIR).expanduser()
    with ExitStack() as stack:
        opened = [_open(source, root, stack) for source in sources]
        logger.info(f"examining {sum(map(len, opened)):,} rows of {len(opened)} source{'s' * (len(opened) != 1)}")
        groups = read_all(opened, encoder, seed, _num_processes(config))
        document, findings = _examine(groups, config, report, seed)
    return {
        "version": DOCUMENT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "rm_scale": __version__,
        "model": config.model_name_or_path,
        "seed": seed,
        "num_rows": sum(source.rows_read for source in report.sources if source.split == "train"),
        "num_groups": groups.num_groups,
        "num_pairs": len(groups.hashes),
        "sample": {"num_groups": len(groups.sample), "most": SAMPLE_GROUPS, "max_characters": MAX_CHARACTERS},
        "findings": [finding.to_dict() for finding in _by_weight(findings)],
        **document,
        "report": report.to_dict(),
    }


def _examine(
    groups: AllGroups, config: RunConfig, report: DataReport, seed: int
) -> tuple[dict[str, Any], list[Finding]]:
    """Return the figures of each examination, and all findings."""
    pairs = SampledPairs.of(groups.sample)
    lengths, of_lengths = review_lengths(groups.sample, config, seed)
    form, of_form = review_form(pairs)
    words, of_words = review_words(pairs, seed)
    languages, of_languages = review_languages(groups.sample)
    read = [source for source in report.sources if source.split == "train"]
    findings = [
        *review_noise(groups.hashes.arrays(), groups.example),
        *review_copies(groups.sample),
        *of_lengths,
        *of_form,
        *of_words,
        of_languages,
        *review_templates(groups.sample, read, groups.refused_example),
    ]
    figures = {"lengths": lengths, "form": form, "words": words, "languages": languages}
    return figures, findings


def _num_processes(config: RunConfig) -> int:
    return config.dataset_num_proc or len(os.sched_getaffinity(0))


def _open(source: Source, root: Path, stack: ExitStack) -> SourceGroups:
    work = stack.enter_context(tempfile.TemporaryDirectory(prefix="review-", dir=root, ignore_cleanup_errors=True))
    return read_groups(source, Path(work))


def _by_weight(findings: Sequence[Finding]) -> list[Finding]:
    levels = ("problem", "note", "nothing")
    return sorted(findings, key=lambda finding: (levels.index(finding.level), -(finding.share or 0)))
