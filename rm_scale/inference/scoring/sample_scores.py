"""Log the scores of a few groups of the data by a saved model: what a person looks at first."""

from __future__ import annotations

from pathlib import Path

import datasets
import torch

from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.logs import get_logger
from rm_scale.texts import one_line

logger = get_logger(__name__)


def show_sample_scores(folder: str | Path, groups: datasets.Dataset, most: int, trust_remote_code: bool) -> None:
    """Log how the model in a folder scores some groups, as it was saved.

    Args:
        folder: the model, verified already.
        groups: encoded groups to choose from.
        most: so many groups at most.
        trust_remote_code: let the model's own code run.
    """
    count = min(most, len(groups))
    if count == 0:
        return
    scorer = RewardScorer.from_pretrained(
        folder,
        device="cpu",
        dtype="saved",
        trust_remote_code=trust_remote_code,
        check_scores=False,  # the save was verified, on the device of training
    )
    rows = groups.select(torch.linspace(0, len(groups) - 1, count).long().tolist())
    logger.info(f"scores of {count} groups by the saved model:")
    for row in rows:
        scores = scorer.score_tokens(row["input_ids"])
        for rank, score, ids in sorted(zip(row["ranks"], scores, row["input_ids"], strict=True)):
            text = one_line(scorer.tokenizer.decode(ids, skip_special_tokens=True))
            logger.info(f"  rank {rank}  {score:8.3f}  {text if len(text) <= 100 else '...' + text[-97:]}")
