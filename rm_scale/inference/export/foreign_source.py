"""What an export of another project's reward model needs: a contract, room for its padding, a head without constant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rm_scale.errors import ModelError
from rm_scale.inference.model_folder import contract_of_plain_model
from rm_scale.logs import get_logger
from rm_scale.modeling.head import active_head
from rm_scale.modeling.scoring_contract import CONTRACT_FILE, ScoringContract
from rm_scale.modeling.tokenizers import load_tokenizer, read_tokenizer

logger = get_logger(__name__)


def contract_of_source(source: Path, trust_remote_code: bool, allow_missing: bool) -> ScoringContract:
    """Return a source's contract; of another project's model one that is made from its tokenizer and config.

    Args:
        source: a reward model's folder.
        trust_remote_code: run Python code that comes with it.
        allow_missing: the user wants a model without a contract.

    Raises:
        ModelError: there is none, and that was not allowed; or its scores are read before EOS, where none of an
            export's are.
    """
    if (source / CONTRACT_FILE).exists():
        return ScoringContract.load(source)
    contract = contract_of_plain_model(source, trust_remote_code, asked=allow_missing)
    if contract.pad_token_id == contract.encoding["eos_token_id"]:
        raise ModelError(
            f"{source}: its padding token is EOS, so that transformers reads its scores at the token before EOS; an "
            "export is read at the last token, and its scores would be others. Fix: score it as it is, with "
            "--no_contract (in Python allow_missing_contract=True): transformers loads this folder already."
        )
    return contract


def tokenizer_of_source(source: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return a source's tokenizer, as it is saved where a contract belongs to it, else with a padding token settled."""
    read = read_tokenizer if (source / CONTRACT_FILE).exists() else load_tokenizer
    return read(str(source), trust_remote_code=trust_remote_code)


def fit_to_plain_classifier(model: Any, contract: ScoringContract, source: Path) -> float:
    """Give the embedding a row for an added padding token, and take off the constant of the head; return it.

    transformers' classifiers have no place for a constant.
    """
    if contract.pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(contract.pad_token_id + 1, mean_resizing=False)
    head = active_head(model)
    constant, head.offset = head.offset, 0.0
    if constant:
        logger.warning(
            f"{source}: the constant of its head ({constant:.6g}) is left out, since transformers' classifiers have "
            "none. Every score of the export is lower by it; differences of scores stay as they were"
        )
    return constant
