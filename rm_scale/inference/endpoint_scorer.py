"""`EndpointScorer`: texts become tokens here, by the scoring contract, and scores at a server: vLLM, or rm-scale serve.

Token ids are sent, not texts, so that nothing of a template, a BOS or an EOS can be done otherwise there. Before the
first score the contract's golden texts must score there as they did in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rm_scale.errors import ModelError
from rm_scale.inference.endpoint import Endpoint
from rm_scale.inference.model_folder import local_folder, require_template
from rm_scale.inference.scoring.contract_scorer import ContractScorer
from rm_scale.logs import get_logger
from rm_scale.modeling.golden_scores import SCORE_TOLERANCE, allowed_drift
from rm_scale.modeling.scoring_contract import CONTRACT_FILE, ScoringContract
from rm_scale.modeling.tokenizers import read_tokenizer
from rm_scale.texts import one_line

logger = get_logger(__name__)

_SHOWN_TEXTS = 4
_TOKENS_PER_REQUEST = 2**17
"""A request's tokens, about: a body of a megabyte."""


class EndpointScorer(ContractScorer):
    """Scores as `RewardScorer` does, with the model at a server.

    Args:
        endpoint: the server.
        tokenizer: the model's.
        contract: how a text becomes a score.
        dtype: the type that the server computes in; `None`: what it says itself.
        texts_per_request: token sequences of a request.
        requests_in_flight: requests that wait for their answers at the same time.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        tokenizer: PreTrainedTokenizerBase,
        contract: ScoringContract,
        dtype: str | None = None,
        texts_per_request: int = 32,
        requests_in_flight: int = 8,
    ) -> None:
        super().__init__(tokenizer, contract, endpoint.url)
        self.endpoint = endpoint
        self.texts_per_request = texts_per_request
        self.requests_in_flight = requests_in_flight
        self._dtype = dtype or endpoint.served.dtype

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        endpoint: Endpoint | str,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        force_template: bool = False,
        texts_per_request: int = 32,
        requests_in_flight: int = 8,
    ) -> EndpointScorer:
        """Read contract and tokenizer, and check that the server gives the contract's golden scores.

        Args:
            folder: holds `scoring_contract.json` and the tokenizer: a run's output directory, an export, or a hub name.
                Its weights are not read.
            endpoint: the server, or its address.
            dtype: the type that it was started with, "float32" or another; `None`: what it says itself.
            trust_remote_code: run Python code that comes with the tokenizer.
            chat_template: Jinja text to render conversations with; must be the contract's own.
            force_template: take another template than the contract's all the same.
            texts_per_request: token sequences of a request.
            requests_in_flight: requests that wait for their answers at the same time.

        Raises:
            ModelError: there is no contract or no golden score in it, the server takes shorter texts than the contract,
                or it does not give the golden scores.
            RemoteError: the server can't be reached or refuses.
        """
        endpoint = Endpoint(endpoint) if isinstance(endpoint, str) else endpoint
        folder = local_folder(folder)
        if not (folder / CONTRACT_FILE).is_file():
            raise ModelError(
                f"{folder}: holds no {CONTRACT_FILE}, so what {endpoint.url} serves can't be checked. Fix: the folder "
                "of the model that is served there, with its contract and tokenizer."
            )
        contract = ScoringContract.load(folder)
        tokenizer = read_tokenizer(str(folder), trust_remote_code=trust_remote_code)
        if chat_template is not None:
            contract = require_template(contract, chat_template, force_template)
        scorer = cls(endpoint, tokenizer, contract, dtype, texts_per_request, requests_in_flight)
        scorer._require_length(folder)
        scorer.check_golden_scores(str(folder))
        return scorer

    @property
    def dtype(self) -> str:
        """The type that the server computes in; "unknown" where neither it nor the user has said so."""
        return self._dtype or "unknown"

    # --- Is it this model? -------------------------------------------------------------------------------------------

    def _require_length(self, folder: Path) -> None:
        longest, takes = self.encoder.rules.max_length, self.endpoint.served.max_length
        if takes is not None and takes < longest:
            fix = f"vllm serve ... --max-model-len {longest}" if self.endpoint.served.kind == "vllm" else str(folder)
            raise ModelError(
                f"{self.endpoint.url}: takes texts of {takes} tokens, the contract of {folder} has max_length "
                f"{longest}. Fix: serve it with as much: {fix}."
            )

    def check_golden_scores(self, where: str) -> None:
        """Score the contract's golden texts at the server, and compare with those of training.

        What is allowed is `allowed_drift` of the coarsest type that is known to be involved: the contract's own two,
        and the server's.

        Args:
            where: the folder of the contract, for messages.

        Raises:
            ModelError: there are none, or one is off by more: names the texts and both numbers.
            RemoteError: the server can't be reached or refuses.
        """
        contract = self.contract
        golden = contract.golden_scores
        if not golden:
            raise ModelError(
                f"{where}: its {CONTRACT_FILE} holds no golden scores, so what {self.endpoint.url} serves can't be "
                "checked. Fix: the folder of a run or an export of rm_scale."
            )
        found = self.score_tokens([one.input_ids for one in golden])
        kinds = [kind for kind in (contract.dtype, contract.compute_dtype, self._dtype) if kind in SCORE_TOLERANCE]
        kind = max(kinds, key=lambda one: allowed_drift(contract, one), default="float32")
        allowed = allowed_drift(contract, kind)
        drifts = [abs(score - one.score) for score, one in zip(found, golden, strict=True)]
        off = [place for place, drift in enumerate(drifts) if not drift <= allowed]
        if off:
            raise ModelError(self._difference(where, found, off, f"{allowed:.3g} in {kind}"))
        figures = f"off by {max(drifts):.3g} at most, allowed {allowed:.3g} in {kind}"
        logger.info(f"{self.endpoint.url}: gives the {len(golden)} golden scores of {where} ({figures})")
        if max(drifts) > SCORE_TOLERANCE[kind] * max(1.0, *(abs(one.score) for one in golden)):
            logger.warning(
                f"{self.endpoint.url}: scores move away from those of training by more than rounding ({figures})"
            )

    def _difference(self, where: str, found: Sequence[float], off: Sequence[int], allowed: str) -> str:
        golden = self.contract.golden_scores
        lines = [
            f"  {found[place]:.6g} there, {golden[place].score:.6g} in the contract: {self._shown(place)!r}"
            for place in off[:_SHOWN_TEXTS]
        ]
        lines += [f"  and {len(off) - _SHOWN_TEXTS} more"] if len(off) > _SHOWN_TEXTS else []
        bare = all(
            math.isclose(score, _sigmoid(one.score), abs_tol=1e-2) for score, one in zip(found, golden, strict=True)
        )
        fix = (
            "these are the sigmoids of the scores, as of a server that does not read use_activation; serve it with a "
            "newer vLLM, or with --pooler-config '{\"use_activation\": false}'"
            if bare
            else "serve the model of this folder, or give --model the folder of the one that is served; where it is "
            "the same, the type: vllm serve --dtype float32, or --dtype here with the type that it was started with"
        )
        return (
            f"{self.endpoint.url}: {len(off)} of {len(golden)} golden texts of {where} score otherwise there (allowed "
            f"{allowed}), so it serves another model, or otherwise:\n" + "\n".join(lines) + f"\nFix: {fix}."
        )

    def _shown(self, place: int) -> str:
        return one_line(self.tokenizer.decode(self.contract.golden_scores[place].input_ids), 80)

    # --- Scores ------------------------------------------------------------------------------------------------------

    def _score_different(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int,
        prompt_keys: Sequence[str] | None,
        max_tokens: int | None,
    ) -> list[float]:
        """Ask for the scores, several requests at a time; how many texts share a forward pass is for the server."""
        parts = list(self._requests(sequences))
        with ThreadPoolExecutor(max(1, min(self.requests_in_flight, len(parts)))) as pool:
            futures = [pool.submit(self.endpoint.score, part) for part in parts]
            try:
                return [score for future in futures for score in future.result()]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _requests(self, sequences: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
        parts: list[list[Sequence[int]]] = []
        tokens = 0
        for ids in sequences:
            if not parts or len(parts[-1]) >= self.texts_per_request or tokens + len(ids) > _TOKENS_PER_REQUEST:
                parts.append([])
                tokens = 0
            parts[-1].append(ids)
            tokens += len(ids)
        return parts


def _sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score)) if score >= 0 else 1 - 1 / (1 + math.exp(score))
