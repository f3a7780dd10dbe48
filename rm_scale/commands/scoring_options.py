"""Options that the commands which load a model to score with share: score, rank and serve."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rm_scale.errors import UserError
from rm_scale.files import read_small_text

if TYPE_CHECKING:
    from rm_scale.inference.scoring.scorer import RewardScorer

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Default tokens per forward pass."""
MAX_TEMPLATE_BYTES = 1_000_000


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a model is loaded and run."""
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--max_tokens_per_batch", type=int, metavar="N", help="tokens of a forward pass")
    what = "of the backbone; auto: float32 on a processor, else as it was saved"
    scoring.add_argument("--dtype", choices=DTYPES, default="auto", help=what)
    scoring.add_argument("--device", help="cpu, cuda (a rank's own GPU) or cuda:N; default: the GPU when there is one")
    scoring.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    scoring.add_argument("--no_contract", action="store_true", help="take a model without scoring_contract.json")
    scoring.add_argument("--chat_template_path", metavar="FILE", help="must be the template of the contract")
    scoring.add_argument("--force", action="append", default=[], choices=["template"], help="template: another one")


def tokens_per_batch(options: argparse.Namespace, device: str) -> int:
    """Return the tokens of a forward pass: what was asked for, or the default of "cpu" or "cuda:N"."""
    return options.max_tokens_per_batch or MAX_TOKENS[device.split(":")[0]]


def read_template(path: str | None) -> str | None:
    """Return the text of a chat template's file; `None` where none was given.

    Raises:
        UserError: it can't be read.
    """
    if path is None:
        return None
    try:
        return read_small_text(path, MAX_TEMPLATE_BYTES)
    except ValueError as error:
        raise UserError(f"chat_template_path={path}: can't be read ({error}). Fix: give a Jinja file.") from error


def load_scorer(folder: str, options: argparse.Namespace, device: str) -> RewardScorer:
    """Load a model as the options of `add_scoring_arguments` say.

    Raises:
        UserError: the chat template can't be read, or the folder is not a reward model that may be used so.
    """
    from rm_scale.inference.scoring.scorer import RewardScorer

    return RewardScorer.from_pretrained(
        folder,
        device=device,
        dtype=None if options.dtype == "auto" else options.dtype,
        trust_remote_code=options.trust_remote_code,
        chat_template=read_template(options.chat_template_path),
        force_template="template" in options.force,
        allow_missing_contract=options.no_contract,
    )
