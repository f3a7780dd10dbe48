"""`RewardScorer`: a saved reward model that scores prompts and completions by its scoring contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rm_scale.batching.packed.backend_choice import choose_backend, has_sinks, head_size
from rm_scale.batching.packed.layout import common_prefix_length
from rm_scale.inference.model_folder import (
    contract_of_plain_model,
    local_folder,
    require_reward_model,
    require_template,
)
from rm_scale.inference.scoring.contract_scorer import ContractScorer
from rm_scale.inference.scoring.golden_check import check_golden_scores, require_golden_tokens
from rm_scale.logs import get_logger
from rm_scale.modeling.loading import load_reward_model
from rm_scale.modeling.packed_model import enable_packed_rows
from rm_scale.modeling.scoring_contract import CONTRACT_FILE, ScoringContract
from rm_scale.modeling.token_scores import score_packed, score_sequences
from rm_scale.modeling.tokenizers import load_tokenizer, read_tokenizer
from rm_scale.planning.layout_choice import is_tested

logger = get_logger(__name__)


class RewardScorer(ContractScorer):
    """Scores texts exactly as training did.

    Args:
        model: a reward model in eval mode.
        tokenizer: its tokenizer.
        contract: how a text becomes a score.
        device: where the model is.
        packed: the model takes packed rows (`rm_scale.modeling.packed_model`), so that a prompt is computed once for
            all its completions.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        contract: ScoringContract,
        device: torch.device | str = "cpu",
        packed: bool = False,
    ) -> None:
        super().__init__(tokenizer, contract, device)
        self.packed = packed
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
        packed: bool | None = None,
        chat_template: str | None = None,
        force_template: bool = False,
        allow_missing_contract: bool = False,
        check_scores: bool = True,
    ) -> RewardScorer:
        """Load a run's output directory, an export, or a hub name.

        Args:
            folder: holds the model or adapter, the tokenizer and `scoring_contract.json`.
            device: default the GPU when there is one.
            dtype: type of the backbone; "saved" is what it was saved in. Default float32 on a processor, so that a
                score does not depend on what it is computed with, and elsewhere, or for a backbone in 4 bits, "saved".
            trust_remote_code: run Python code that comes with the model.
            packed: compute shared prompts once; default for architectures that are tested with it.
            chat_template: Jinja text to render conversations with; must be the contract's own.
            force_template: take another template than the contract's all the same.
            allow_missing_contract: score with a plain transformers reward model, by its tokenizer and config alone.
            check_scores: score the contract's golden texts, a few short ones, and refuse a model that does not give
                their scores.

        Raises:
            ModelError: the folder does not hold a reward model; or not its contract, and that was not allowed; or the
                template is another one; or the golden scores are not found again.
        """
        folder = local_folder(folder)
        require_reward_model(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        is_plain = not (folder / CONTRACT_FILE).exists()
        if is_plain:
            contract = contract_of_plain_model(folder, trust_remote_code, asked=allow_missing_contract)
            tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
        else:
            contract = ScoringContract.load(folder)
            tokenizer = read_tokenizer(str(folder), trust_remote_code=trust_remote_code)
        if chat_template is not None:
            contract = require_template(contract, chat_template, force_template)
        loaded_in = _type_to_load(dtype, contract, device)
        model = load_reward_model(folder, loaded_in, device, trust_remote_code=trust_remote_code)
        if is_plain:
            _give_padding(model, contract)
        if dtype is None:
            _tell_precision(folder, contract, str(next(model.parameters()).dtype).removeprefix("torch."))
        require_golden_tokens(contract, model.get_input_embeddings().num_embeddings, str(folder))
        scorer = cls(model, tokenizer, contract, device, _enable_packing(model, device, packed))
        if check_scores:
            check_golden_scores(scorer, str(folder))
        return scorer

    @property
    def dtype(self) -> str:
        """The type of the backbone as it was loaded."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    # --- Token sequences ---------------------------------------------------------------------------------------------

    def _score_different(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int,
        prompt_keys: Sequence[str] | None,
        max_tokens: int | None,
    ) -> list[float]:
        if self.packed:
            return self._score_packed(sequences, batch_size, prompt_keys, max_tokens)
        scores = [0.0] * len(sequences)
        for places in padded_batches([len(sequence) for sequence in sequences], batch_size, max_tokens):
            batch = [sequences[place] for place in places]
            rewards = score_sequences(self.model, batch, self.contract.pad_token_id, len(batch), self.device)
            for place, reward in zip(places, rewards, strict=True):
                scores[place] = reward
        return scores

    def _score_packed(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int,
        prompt_keys: Sequence[str] | None,
        max_tokens: int | None,
    ) -> list[float]:
        members: dict[Any, list[int]] = {}
        for place in range(len(sequences)):
            members.setdefault(prompt_keys[place] if prompt_keys is not None else place, []).append(place)
        if max_tokens is None:
            max_tokens = batch_size * max(len(sequence) for sequence in sequences)
        # A prompt with very many completions is cut, or its row would outgrow every budget.
        places = [part for group in members.values() for part in fitting_parts(group, sequences, max_tokens)]
        groups = [[sequences[place] for place in part] for part in places]
        rewards = score_packed(self.model, groups, self.contract.pad_token_id, max_tokens, self.device)
        scores = [0.0] * len(sequences)
        for part, values in zip(places, rewards, strict=True):
            for place, value in zip(part, values, strict=True):
                scores[place] = value
        return scores


def fitting_parts(places: Sequence[int], sequences: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """Split completions of one prompt into parts whose tokens fit, the shared prompt counted once in each."""
    if len(places) == 1:
        yield list(places)
        return
    shared = common_prefix_length([sequences[place] for place in places])
    part, tokens = [places[0]], len(sequences[places[0]])
    for place in places[1:]:
        own = len(sequences[place]) - shared
        if tokens + own > max_tokens:
            yield part
            part, tokens = [], shared
        part.append(place)
        tokens += own
    yield part


def padded_batches(lengths: Sequence[int], batch_size: int, max_tokens: int | None) -> Iterator[list[int]]:
    """Return the places of sequences that are computed together: longest first, which pads least.

    It also shows at once whether memory suffices.

    Args:
        lengths: tokens of each sequence.
        batch_size: most sequences of a batch.
        max_tokens: most tokens of a batch, padding included, instead.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    start = 0
    while start < len(order):
        size = batch_size if max_tokens is None else max(1, max_tokens // lengths[order[start]])
        yield order[start : start + size]
        start += size


def _type_to_load(
    dtype: torch.dtype | str | None, contract: ScoringContract, device: torch.device | str
) -> torch.dtype | None:
    """Return the type to load a backbone in; `None`: what it was saved in."""
    if dtype is None and torch.device(device).type == "cpu" and not contract.base_model.quantization:
        return torch.float32
    if isinstance(dtype, str):
        return None if dtype == "saved" else getattr(torch, dtype)
    return dtype


def _tell_precision(folder: Path, contract: ScoringContract, dtype: str) -> None:
    """Say that a model is scored in fp32, unasked, though it was trained in a lower type."""
    if dtype == "float32" and contract.compute_dtype != "float32":
        logger.info(
            f"{folder} was trained in {contract.compute_dtype} and is scored in float32: no score depends on its "
            f"batch, and all differ from those of training. To be near those: --dtype {contract.compute_dtype}; see "
            "docs/using.md."
        )


def _give_padding(model: Any, contract: ScoringContract) -> None:
    """Let a plain model know the padding token that was settled on, which may be new to its embedding."""
    if contract.pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(contract.pad_token_id + 1, mean_resizing=False)
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = contract.pad_token_id


def _enable_packing(model: Any, device: torch.device | str, asked: bool | None) -> bool:
    """Let the model take packed rows where its architecture is tested with them, or as asked."""
    backbone = model.get_base_model() if isinstance(model, PeftModel) else model
    packed = is_tested(backbone.config.to_dict()) if asked is None else asked
    if packed:
        softcap = getattr(backbone.config.get_text_config(), "attn_logit_softcapping", None)
        dtype_name = str(backbone.dtype).removeprefix("torch.")
        kind, head = torch.device(device).type, head_size(backbone.config)
        backend = choose_backend("auto", kind, dtype_name, softcap is not None, head, has_sinks(backbone))
        enable_packed_rows(backbone, backend)
    return packed
