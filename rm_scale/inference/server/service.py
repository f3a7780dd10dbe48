"""`Service`: a served model that encodes texts, hands them to the batcher and returns the scores to the request."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastapi import Request

from rm_scale.data.encoding import unscorable_text
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.inference.scoring.contract_scorer import prompt_keys
from rm_scale.inference.scoring.golden_check import check_golden_scores
from rm_scale.inference.scoring.row_files import Scorable
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.inference.server.batcher import Batcher
from rm_scale.inference.server.middleware import Admission
from rm_scale.inference.server.prometheus_metrics import Metrics
from rm_scale.inference.server.request_limits import Refused, late_answer, require_few_texts
from rm_scale.inference.server.server_options import ServerOptions


class Service:
    """A model that answers requests.

    Args:
        scorer: the model.
        name: what it is called in answers.
        options: how much it takes on.
        scores_in_thread: score in a thread of its own; else whoever serves runs `batcher.run`.
    """

    def __init__(self, scorer: RewardScorer, name: str, options: ServerOptions, scores_in_thread: bool = True) -> None:
        self.scorer = scorer
        self.name = name
        self.options = options
        self.metrics = Metrics()
        self.batcher = Batcher(scorer, options, self.metrics)
        self.scores_in_thread = scores_in_thread
        self.admission = Admission()
        # One thread, off the event loop: tokenizers of the fast kind keep state while they encode.
        self.encoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoding")
        self.ready = False

    def start(self) -> None:
        """Start scoring, and check that the model returns its golden scores.

        Raises:
            ModelError: it doesn't.
        """
        if self.scores_in_thread:
            self.batcher.start()
        check_golden_scores(self.scorer, self.name)
        self.ready = True

    @property
    def dtype(self) -> str:
        """The type of the backbone as it was loaded."""
        return self.scorer.dtype

    def close(self) -> None:
        """Finish what waits, and stop."""
        self.ready = False
        self.batcher.stop(self.options.drain_seconds)
        self.encoding.shutdown(wait=False, cancel_futures=True)

    # --- Texts to scores ---------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[Scorable]) -> list[list[int]]:
        """Return the token ids of each text; runs in the encoding thread.

        Raises:
            Refused: a text can't be scored.
        """
        encoder = self.scorer.encoder
        found: list[list[int] | RejectedRow] = [[] for _ in texts]
        pairs = [number for number, text in enumerate(texts) if text.text is None]
        encoded = encoder.encode_many(
            [texts[number].prompt for number in pairs],
            [texts[number].completion for number in pairs],
            [texts[number].tools for number in pairs],
        )
        for number, ids in zip(pairs, encoded, strict=True):
            found[number] = ids
        for number, text in enumerate(texts):
            if text.text is not None:
                found[number] = encoder.encode_rendered(text.text)
        return require_tokens(found)

    async def score(self, request: Request, texts: Sequence[Scorable]) -> tuple[list[float], int]:
        """Return the raw scores of texts, and how many tokens they have.

        Raises:
            Refused: too many, one can't be scored, the queue is full, or it took too long.
        """
        require_few_texts(len(texts), self.options)
        loop = asyncio.get_running_loop()
        sequences = await loop.run_in_executor(self.encoding, self.encode, texts)
        keys = prompt_keys([text.prompt or uuid.uuid4().hex for text in texts], [text.tools for text in texts])
        return await self.score_tokens(request, sequences, keys)

    async def score_tokens(
        self, request: Request, sequences: Sequence[Sequence[int]], keys: Sequence[str]
    ) -> tuple[list[float], int]:
        """Return the same for token ids. Equal ones are computed once, so that they tie to the last digit."""
        places: dict[tuple[int, ...], int] = {}
        which = [places.setdefault(tuple(ids), len(places)) for ids in sequences]
        first = {place: number for number, place in reversed(list(enumerate(which)))}
        future = self.batcher.submit(list(places), [keys[first[place]] for place in range(len(places))])
        found = await self._wait(request, future)
        scores = [found[place] for place in which]
        if not all(math.isfinite(score) for score in scores):
            raise Refused(422, "not_finite", "a score is not finite. Fix: --dtype float32 or bfloat16 on the server.")
        return scores, sum(map(len, sequences))

    async def _wait(self, request: Request, future: Future[list[float]]) -> list[float]:
        """Wait for the scores, the timeout or the client to leave; what nobody waits for any more is not scored."""
        waiting = asyncio.wrap_future(future)
        # Nothing polls here: each look would take the interpreter from the thread that scores.
        leaving = asyncio.create_task(_client_leaves(request))
        try:
            seconds = self.options.request_timeout_seconds
            either: list[asyncio.Future[Any]] = [waiting, leaving]
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            if leaving.done():
                raise Refused(499, "client_left", "the client has left")
            raise late_answer(self.options)
        finally:
            leaving.cancel()
            if not waiting.done():
                future.cancel()

    def normalized(self, scores: Sequence[float]) -> list[float] | None:
        """Return normalised scores, where the contract knows mean and deviation; else `None`."""
        contract = self.scorer.contract
        return self.scorer.normalize(scores) if contract.score_mean is not None and contract.score_std else None

    def query(self, text: str) -> str:
        """Turn an OpenRLHF query into a text: without padding, and without a BOS that the tokenizer adds again.

        Its end is put right with that of every whole text, in `TextEncoder.encode_rendered`.
        """
        pad, bos = self.scorer.tokenizer.pad_token, self.scorer.tokenizer.bos_token
        while pad and (text.startswith(pad) or text.endswith(pad)):
            text = text.removeprefix(pad).removesuffix(pad)
        return text.removeprefix(bos) if bos and self.scorer.encoder.adds_bos else text


async def _client_leaves(request: Request) -> None:
    """Wait until the connection ends; the body has been read, so nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def require_tokens(found: Sequence[list[int] | RejectedRow]) -> list[list[int]]:
    """Return the token ids, or raise `Refused` with the first text that can't be scored."""
    for number, ids in enumerate(found):
        if isinstance(ids, RejectedRow):
            raise Refused(422, ids.reason, f"item {number}: {unscorable_text(ids)}")
    return [ids for ids in found if not isinstance(ids, RejectedRow)]
