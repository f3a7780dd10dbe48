"""`EndpointScorer`: texts become tokens here, by the scoring contract, and scores at vLLM, SGLang or rm-scale serve.

Token ids are sent, not texts, so that nothing of a template, a BOS or an EOS can be done otherwise there. Before the
first score the contract's golden texts must score there as they did in training.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import ModelError
from rm_scale.files import read_json_object
from rm_scale.inference.endpoint import Endpoint
from rm_scale.inference.http_client import RemoteError
from rm_scale.inference.model_folder import local_folder, require_template
from rm_scale.inference.parallel_requests import ask_in_parallel
from rm_scale.inference.scoring.contract_scorer import ContractScorer
from rm_scale.logs import get_logger
from rm_scale.modeling.golden_scores import SCORE_TOLERANCE
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
        allow_other_scores: bool = False,
    ) -> EndpointScorer:
        """Read contract and tokenizer, and check that the server gives the contract's golden scores.

        Args:
            folder: holds `scoring_contract.json` and the tokenizer: a run's output directory, an export, or a hub name.
                Its weights are not read.
            endpoint: the server, or its address.
            dtype: the type that it was started with, "float32" or another; `None`: what it says itself.
            trust_remote_code: run Python code that comes with the tokenizer.
            chat_template: Jinja text to render conversations with; must be the contract's own.
            force_template: take another template than the contract's all the same, here and at the server.
            texts_per_request: token sequences of a request.
            requests_in_flight: requests that wait for their answers at the same time.
            allow_other_scores: take a server that does not give the golden scores, with a warning.

        Raises:
            ModelError: there is no contract or no golden score in it, the server takes shorter texts than the contract,
                names another template (rm-scale's own does), or does not give the golden scores.
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
        if not force_template:
            scorer._require_template_there(folder)
        scorer.check_golden_scores(str(folder), allow_other_scores)
        return scorer

    @property
    def dtype(self) -> str:
        """The type that the server computes in; "unknown" where neither it nor the user has said so."""
        return self._dtype or "unknown"

    # --- Is it this model? -------------------------------------------------------------------------------------------

    def _require_length(self, folder: Path) -> None:
        longest, takes = self.encoder.rules.max_length, self.endpoint.served.max_length
        if takes is not None and takes < longest:
            raise ModelError(
                f"{self.endpoint.url}: takes texts of {takes} tokens, the contract of {folder} has max_length "
                f"{longest}. Fix: {self._longer_texts(folder, longest)}."
            )

    def _longer_texts(self, folder: Path, longest: int) -> str:
        """Return how texts of `longest` tokens can be scored."""
        ours = f"rm-scale serve --model {folder}"
        if self.endpoint.served.kind == "rm_scale":
            return f"it serves a model with another contract; {ours}, or --model with the folder that is served there"
        engine, option = "SGLang", "sglang.launch_server ... --context-length"
        if self.endpoint.served.kind == "vllm":
            engine, option = "vLLM", "vllm serve ... --max-model-len"
        positions = _positions(folder)
        if positions is None or longest <= positions:
            return f"serve it with as much, {option} {longest}"
        end = f"{engine} goes no further: {ours}, or leave --endpoint out"
        return f"its config.json names {positions} positions, and {end}"

    def _require_template_there(self, folder: Path) -> None:
        # Texts are rendered here, so the scores would hold; but it shows that another model is served.
        there, here = self.endpoint.served.chat_template_sha256, self.contract.encoding.get("chat_template_sha256")
        if there is not None and there != here:
            raise ModelError(
                f"{self.endpoint.url}: its chat template (sha256 {there[:12]}) is not the one of {folder} "
                f"({(here or 'none')[:12]}). Fix: rm-scale serve --model {folder}, or --model with the folder that is "
                "served there; --force template where the weights are the same (force_template=True in Python)."
            )

    def check_golden_scores(self, where: str, allow_other_scores: bool = False) -> None:
        """Score the contract's golden texts at the server, and compare with those of training.

        Each may be off by the rounding of the coarsest type that is known to be involved, the contract's own two and
        the server's: `SCORE_TOLERANCE` of it, times the largest golden score if that is above 1. Texts whose scores lie
        further apart than that must keep their order. This is less than `allowed_drift` gives a model that is loaded:
        there the files are known to be the run's, here a neighbouring checkpoint must be told from the right one.

        Args:
            where: the folder of the contract, for messages.
            allow_other_scores: warn of a difference instead of refusing the server.

        Raises:
            ModelError: there are none, or some are off by more or in another order: names the texts and both numbers.
            RemoteError: the server can't be reached or refuses.
        """
        golden = self.contract.golden_scores
        if not golden:
            raise ModelError(
                f"{where}: its {CONTRACT_FILE} holds no golden scores, so what {self.endpoint.url} serves can't be "
                "checked. Fix: the folder of a run or an export of rm_scale."
            )
        expected = [one.score for one in golden]
        found: list[float] = []
        for one in self.try_score_tokens([one.input_ids for one in golden]):
            if isinstance(one, RejectedRow):
                raise self._refuses_golden(one)
            found.append(one)
        kind, allowed = self._allowed(expected)
        drifts = [abs(there - score) for there, score in zip(found, expected, strict=True)]
        off = {place for place, drift in enumerate(drifts) if not drift <= allowed}
        limit = f"allowed {allowed:.3g} in {kind}"
        if not off:
            off = _reordered(found, expected, allowed)
            limit += ", which they keep to, but not to the order of texts further apart than that" if off else ""
        if not off:
            figures = f"off by {max(drifts):.3g} at most, {limit}"
            logger.info(f"{self.endpoint.url}: gives the {len(golden)} golden scores of {where} ({figures})")
            return
        difference = (
            f"{self.endpoint.url}: {len(off)} of {len(golden)} golden texts of {where} score otherwise there "
            f"({limit}), so it serves another model, or otherwise:\n{self._texts(found, sorted(off))}"
        )
        if not allow_other_scores:
            raise ModelError(f"{difference}\nFix: {self._fix(found)}.")
        logger.warning(f"taken all the same, as asked (--allow_other_scores): {difference}")

    def _allowed(self, scores: Sequence[float]) -> tuple[str, float]:
        """Return the coarsest type that is known to be involved, and how far its rounding may move a score."""
        kinds = [self.contract.dtype, self.contract.compute_dtype, self._dtype]
        kind = max((one for one in kinds if one in SCORE_TOLERANCE), key=SCORE_TOLERANCE.__getitem__, default="float32")
        return kind, SCORE_TOLERANCE[kind] * max(1.0, *(abs(score) for score in scores))

    def _texts(self, found: Sequence[float], off: Sequence[int]) -> str:
        golden = self.contract.golden_scores
        lines = [
            f"  {found[place]:.6g} there, {golden[place].score:.6g} in the contract: {self._shown(place)!r}"
            for place in off[:_SHOWN_TEXTS]
        ]
        lines += [f"  and {len(off) - _SHOWN_TEXTS} more"] if len(off) > _SHOWN_TEXTS else []
        return "\n".join(lines)

    def _fix(self, found: Sequence[float]) -> str:
        expected = [_sigmoid(one.score) for one in self.contract.golden_scores]
        if all(math.isclose(score, one, abs_tol=1e-2) for score, one in zip(found, expected, strict=True)):
            return (
                "these are the sigmoids of the scores, as of a server that does not read use_activation; serve it with "
                "a newer vLLM, or with --pooler-config '{\"use_activation\": false}'"
            )
        return (
            "serve the model of this folder, or give --model the folder of the one that is served; where it is the "
            "same, the type: start it with --dtype float32, or --dtype here with the type that it was started with; "
            "--allow_other_scores takes its scores as they are"
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
    ) -> list[float | RejectedRow]:
        """Ask for the scores, several requests at a time; how many texts share a forward pass is for the server."""
        return list(
            itertools.chain.from_iterable(
                ask_in_parallel(self._ask, list(self._requests(sequences)), self.requests_in_flight)
            )
        )

    def _ask(self, sequences: Sequence[Sequence[int]], stop: threading.Event) -> list[float | RejectedRow]:
        """Ask for some scores. Where all of them are refused, it is asked whether the texts are what is wrong.

        Raises:
            RemoteError: the server fails, or refuses a golden text, too, which it has taken before.
        """
        found = self.endpoint.try_score(sequences, stop)
        if all(isinstance(one, RejectedRow) for one in found):
            (golden,) = self.endpoint.try_score([self.contract.golden_scores[0].input_ids], stop)
            if isinstance(golden, RejectedRow):
                raise self._refuses_golden(golden)
        return found

    def _refuses_golden(self, refused: RejectedRow) -> RemoteError:
        return RemoteError(
            f"{self.endpoint.url}: refuses golden texts of the contract: {refused.detail} Fix: see the server's log, "
            "and that it serves the model of this folder."
        )

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


def _reordered(found: Sequence[float], expected: Sequence[float], tie: float) -> set[int]:
    """Return the places of texts that are further apart than `tie`, and in another order there."""
    pairs = itertools.combinations(range(len(expected)), 2)
    return {
        place
        for pair in pairs
        for place in pair
        if abs(apart := expected[pair[0]] - expected[pair[1]]) > tie and apart * (found[pair[0]] - found[pair[1]]) <= 0
    }


def _positions(folder: Path) -> int | None:
    """Return the positions that a model's config.json names; `None` where it names none, or is not there."""
    config = read_json_object(folder / "config.json")
    text = config.get("text_config")
    positions = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return positions if isinstance(positions, int) else None
