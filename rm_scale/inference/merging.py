"""Fold a trained adapter into its backbone: one plain model that scores the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from rm_scale.errors import ModelError
from rm_scale.logs import get_logger
from rm_scale.modeling.contract import ScoringContract, check_golden
from rm_scale.modeling.head import ScalarHead, active_head
from rm_scale.modeling.loading import describe_as_reward_model, load_reward_model
from rm_scale.modeling.scoring import score_sequences

logger = get_logger(__name__)


def merge_adapter(folder: str | Path, target: str | Path, trust_remote_code: bool = False) -> Path:
    """Write the merged model, its tokenizer and its contract to `target`, and check its scores.

    The sum is formed in fp32 and stored in the type the backbone was trained in. A QLoRA adapter is merged into the
    unquantised backbone, which moves the scores a little; the drift is logged and the contract's golden scores are
    the merged model's own.

    Args:
        folder: a run's output directory with an adapter.
        target: where the merged model goes.
        trust_remote_code: run Python code that comes with the base model.

    Raises:
        ModelError: there is no adapter.
        CheckpointError: the merged model does not score as backbone and adapter do, both unquantised.
    """
    folder, target = Path(folder), Path(target)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: holds no adapter to merge. Fix: give the output directory of a LoRA or QLoRA run.")
    contract = ScoringContract.load(folder)
    adapted = load_reward_model(folder, dtype=torch.float32, quantized=False, trust_remote_code=trust_remote_code)
    sequences = [golden.input_ids for golden in contract.golden_scores]
    exact = score_sequences(adapted, sequences, contract.pad_token_id, batch_size=1, device="cpu")
    head = active_head(adapted).effective_weight().detach().clone()
    merged = adapted.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    describe_as_reward_model(merged, tokenizer)
    merged = merged.to(getattr(torch, contract.dtype))
    _set_head(merged, head)
    merged.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    _write_contract(contract, exact, target, trust_remote_code)
    return target


def _set_head(model: torch.nn.Module, weight: torch.Tensor) -> None:
    heads = [module for module in model.modules() if isinstance(module, ScalarHead)]
    assert len(heads) == 1, "a merged model has one head"
    heads[0].weight.data = weight


def _write_contract(contract: ScoringContract, exact: list[float], target: Path, trust_remote_code: bool) -> None:
    """Score the merged model as it lies on disk, compare with the unmerged one in fp32, and write its contract."""
    merged = load_reward_model(target, trust_remote_code=trust_remote_code)
    sequences = [golden.input_ids for golden in contract.golden_scores]
    scores = score_sequences(merged, sequences, contract.pad_token_id, batch_size=1, device="cpu")
    check_golden(exact, scores, contract.dtype, str(target))
    trained = [golden.score for golden in contract.golden_scores]
    drift = max((abs(a - b) for a, b in zip(trained, scores, strict=True)), default=0.0)
    base = replace(contract.base_model, quantization=None)
    replace(contract, base_model=base).with_golden(sequences, scores).save(target)
    logger.info(f"merged model in {target}: largest score difference to training {drift:.3g}")
