"""Check that a loaded model gives the golden scores of its contract: one rule for all that scores and serves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from rm_scale.errors import ModelError
from rm_scale.logs import get_logger
from rm_scale.modeling.golden_scores import SCORE_TOLERANCE, allowed_drift
from rm_scale.modeling.scoring_contract import ScoringContract
from rm_scale.modeling.token_scores import as_in_training

if TYPE_CHECKING:
    from rm_scale.inference.scoring.scorer import RewardScorer

logger = get_logger(__name__)


def check_golden_scores(scorer: RewardScorer, where: str) -> None:
    """Score the contract's golden texts, a few short ones, in the type of training, and compare.

    What precision and kernels explain is `allowed_drift` of the coarsest type involved. A drift within it that is more
    than rounding is warned about, with the figures.

    Args:
        scorer: a loaded model with its contract.
        where: its folder or name, for messages.

    Raises:
        ModelError: a score is off by more, or not finite.
    """
    contract = scorer.contract
    golden = contract.golden_scores
    if not golden:
        return
    device = torch.device(scorer.device).type
    loaded_in = str(next(scorer.model.parameters()).dtype).removeprefix("torch.")
    # A trainer that loads a reward model may be in a mixed precision of its own, which is not the contract's.
    with torch.autocast(device, enabled=False), as_in_training(contract, device, loaded_in):
        found = scorer.score_tokens([one.input_ids for one in golden])
    kinds = [kind for kind in (contract.dtype, contract.compute_dtype, loaded_in) if kind in SCORE_TOLERANCE]
    allowed = max((allowed_drift(contract, kind) for kind in kinds), default=SCORE_TOLERANCE["float32"])
    drifts = [abs(score - one.score) for score, one in zip(found, golden, strict=True)]
    worst = math.nan if any(math.isnan(drift) for drift in drifts) else max(drifts)
    off = f"off by {worst:.3g}, allowed {allowed:.3g}" if math.isfinite(worst) else "one is not finite"
    figures = f"{off}; on {device} in {loaded_in}"
    if not worst <= allowed:
        raise ModelError(
            f"{where}: the model does not give its golden scores ({figures}): weights, adapter, base model or contract "
            "are not those of training. Fix: copy the whole folder from the run again, and for an adapter the base "
            "model that it was trained on; in Python check_scores=False scores all the same."
        )
    scale = max(1.0, *(abs(one.score) for one in golden))
    if worst > max((SCORE_TOLERANCE[kind] for kind in kinds), default=0.0) * scale:
        logger.warning(f"{where}: scores move away from those of training by more than rounding ({figures})")


def require_golden_tokens(contract: ScoringContract, num_embeddings: int, where: str) -> None:
    """Refuse golden texts that this model can't read: on a GPU an unknown token would end the process.

    Raises:
        ModelError: names the first token.
    """
    for one in contract.golden_scores:
        for token in one.input_ids or [-1]:
            if not isinstance(token, int) or not 0 <= token < num_embeddings:
                raise ModelError(
                    f"{where}: a golden text of its scoring contract holds token {token!r}, the model has "
                    f"{num_embeddings}. Fix: copy scoring_contract.json and the weights from the same run."
                )
