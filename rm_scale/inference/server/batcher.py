"""Batch requests together: one loop scores whatever waits, as much at once as the token budget allows.

While a batch is computed, requests pile up; the next batch takes from all of them in turn, one prompt with its
completions each, so that a huge request doesn't hold up small ones. Requests about a prompt that is in the batch
anyway come with it, since they cost only their own tokens. Nothing waits for a batch to fill unless told to. A batch
that memory doesn't suffice for is computed in halves, and later ones are smaller.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from rm_scale.batching.packed.layout import common_prefix_length, packed_length
from rm_scale.inference.scoring.out_of_memory_retry import TokenBudget
from rm_scale.inference.scoring.scorer import RewardScorer, fitting_parts
from rm_scale.inference.server.prometheus_metrics import Metrics
from rm_scale.inference.server.request_limits import Refused, require_short_queue, text_beyond_memory
from rm_scale.inference.server.server_options import ServerOptions
from rm_scale.logs import get_logger
from rm_scale.modeling.known_scores import KnownScores

logger = get_logger(__name__)


@dataclass(eq=False)
class Job:
    """The texts of one request.

    Attributes:
        sequences: token ids of each text.
        keys: texts with the same key share a prompt.
        future: gets the raw scores, in order.
        parts: places that are still to be scored, those of one prompt together, and their tokens.
        num_tokens: that wait, of all parts.
    """

    sequences: Sequence[Sequence[int]]
    keys: Sequence[str]
    future: Future[list[float]] = field(default_factory=Future)
    parts: deque[tuple[list[int], int]] = field(default_factory=deque)
    num_tokens: int = 0
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def next_key(self) -> str:
        """The prompt of the next part."""
        return self.keys[self.parts[0][0][0]]

    def split(self, max_tokens: int, shares_prompts: bool) -> None:
        """Split the texts into parts that fit a batch."""
        members: dict[str, list[int]] = {}
        for place, key in enumerate(self.keys):
            members.setdefault(key if shares_prompts else str(place), []).append(place)
        for places in members.values():
            for part in fitting_parts(places, self.sequences, max_tokens):
                group = [self.sequences[place] for place in part]
                shared = common_prefix_length(group) if len(group) > 1 else 0
                tokens = int(packed_length(sum(map(len, group)), shared, len(group)))
                self.parts.append((part, tokens))
                self.num_tokens += tokens

    def refuse(self, refused: Refused) -> None:
        """Tell the one who waits that there will be no scores, unless nobody does any more."""
        with suppress(InvalidStateError):  # answered, or left, a moment ago
            self.future.set_exception(refused)


class Filling:
    """A batch while it is filled: the tokens in it, a shared prompt counted once.

    Args:
        max_tokens: its budget; the first texts fit, whatever they have.
        shares_prompts: whether texts with one key share a prompt.
    """

    def __init__(self, max_tokens: int, shares_prompts: bool) -> None:
        self.tokens_left = max_tokens
        self.shares_prompts = shares_prompts
        self._prompts: dict[str, _Prompt] = {}
        self._is_empty = True

    def add(self, key: str, sequences: Sequence[Sequence[int]]) -> bool:
        """Take texts of one prompt in; return whether they fitted."""
        before = self._prompts.get(key) if self.shares_prompts else None
        after = _Prompt(sequences, before)
        tokens = after.num_tokens - (before.num_tokens if before else 0)
        if tokens > self.tokens_left and not self._is_empty:
            return False
        self._prompts[key] = after
        self.tokens_left -= tokens
        self._is_empty = False
        return True


class _Prompt:
    """Texts of one prompt: what they share, and what they cost together."""

    def __init__(self, sequences: Sequence[Sequence[int]], before: _Prompt | None) -> None:
        self.example: Sequence[int] = before.example if before else sequences[0]
        self.count: int = len(sequences) + (before.count if before else 0)
        self.total: int = sum(map(len, sequences)) + (before.total if before else 0)
        self.shared: int = before.shared if before and before.count > 1 else len(self.example)
        if self.count > 1:
            self.shared = min(self.shared, common_prefix_length([self.example, *sequences]))
        self.num_tokens = int(packed_length(self.total, self.shared, self.count))


@dataclass(frozen=True)
class _Text:
    """One text of a batch: the request it is of, and its place there."""

    job: Job
    place: int

    @property
    def sequence(self) -> Sequence[int]:
        return self.job.sequences[self.place]

    @property
    def key(self) -> str:
        return self.job.keys[self.place]


class Batcher:
    """Scores jobs, in a thread of its own (`start`) or in the one that calls `run`.

    Args:
        scorer: the model.
        options: token budget and queue length.
        metrics: what is counted.

    Attributes:
        budget: tokens of a batch: as the options have it, or what memory has been found to suffice for.
    """

    def __init__(self, scorer: RewardScorer, options: ServerOptions, metrics: Metrics) -> None:
        self.scorer = scorer
        self.options = options
        self.metrics = metrics
        self.budget = TokenBudget(options.max_tokens_per_batch)
        # The same text asked for again has the same score, whatever else was in either batch.
        self._known = KnownScores()
        self._jobs: deque[Job] = deque()
        self._queued_tokens = 0
        self._tokens_per_second = 0.0
        self._changed = threading.Condition()
        self._stopping = False
        self._ended = threading.Event()

    def start(self) -> None:
        """Run in a thread."""
        threading.Thread(target=self.run, name="scoring", daemon=True).start()

    def run(self) -> None:
        """Score until `stop`, and then what still waits."""
        try:
            self._work()
        finally:
            self._ended.set()

    def stop(self, timeout_seconds: float) -> bool:
        """Let it finish what waits and end; return whether it ended in time."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        return self._ended.wait(timeout_seconds)

    def submit(self, sequences: Sequence[Sequence[int]], keys: Sequence[str]) -> Future[list[float]]:
        """Queue texts; cancelling the future drops what has not been scored yet.

        Args:
            sequences: token ids.
            keys: texts with the same key share a prompt.

        Raises:
            Refused: the queue is full.
        """
        job = Job(sequences, keys)
        if not sequences:
            job.future.set_result([])
            return job.future
        job.split(self.budget.tokens, self.scorer.packed)
        with self._changed:
            require_short_queue(self._queued_tokens, job.num_tokens, self._tokens_per_second, self.options)
            self._jobs.append(job)
            self._count(job.num_tokens)
            self._changed.notify_all()
        return job.future

    def _count(self, tokens: int) -> None:
        self._queued_tokens += tokens
        self.metrics.queue_tokens.set(self._queued_tokens)

    # --- The loop ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            batch = self._next_batch()
            if batch is None:
                return
            if not batch:
                continue  # nobody waits any more for what was there
            try:
                self._score(batch)
            except Exception as error:  # whatever it is, the server goes on, and those who wait are told
                logger.exception("a batch could not be scored")
                text = f"scoring failed ({type(error).__name__}). Fix: try again."
                for job, _ in batch:
                    job.refuse(Refused(503, "scoring_failed", text))

    def _next_batch(self) -> list[tuple[Job, list[int]]] | None:
        """Return parts for one forward pass; `None` when there is nothing left to do and the server stops."""
        with self._changed:
            while not self._jobs:
                if self._stopping:
                    return None
                self._changed.wait()
            deadline = time.monotonic() + self.options.max_wait_seconds
            while self._queued_tokens < self.budget.tokens and not self._stopping:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return self._take()

    def _take(self) -> list[tuple[Job, list[int]]]:
        """Take parts from each job in turn, until the budget is used up; a job that is not done goes to the end."""
        batch: list[tuple[Job, list[int]]] = []
        filling = Filling(self.budget.tokens, self.scorer.packed)
        alike = self._waiting_by_prompt()
        while self._jobs:
            job = self._jobs[0]
            if job.future.done():
                self._drop(self._jobs.popleft())
                continue
            key = job.next_key
            if not self._move(job, filling, batch):
                break
            for other in alike.pop(key, []):
                if other is not job and other.parts and other.next_key == key and not other.future.done():
                    self._move(other, filling, batch)
        return batch

    def _waiting_by_prompt(self) -> dict[str, list[Job]]:
        """Return the jobs by the prompt that is next in each; none where a prompt can't be shared."""
        alike: dict[str, list[Job]] = {}
        for job in self._jobs if self.scorer.packed else ():
            alike.setdefault(job.next_key, []).append(job)
        return alike

    def _move(self, job: Job, filling: Filling, batch: list[tuple[Job, list[int]]]) -> bool:
        """Move a job's next part into the batch; return whether it fitted."""
        part, tokens = job.parts[0]
        if not filling.add(job.next_key, [job.sequences[place] for place in part]):
            return False
        self._jobs.remove(job)
        job.parts.popleft()
        batch.append((job, part))
        job.num_tokens -= tokens
        self._count(-tokens)
        if job.parts:
            self._jobs.append(job)
        return True

    def _drop(self, job: Job) -> None:
        self.metrics.dropped.inc(sum(len(part) for part, _ in job.parts))
        self._count(-job.num_tokens)

    def _score(self, batch: list[tuple[Job, list[int]]]) -> None:
        texts = [_Text(job, place) for job, part in batch for place in part]
        found = self.budget.score(texts, self._compute, self._num_tokens)
        for text, score in zip(texts, found, strict=True):
            if score is None:
                text.job.refuse(text_beyond_memory(len(text.sequence)))
            else:
                text.job.scores[text.place] = score
        for job in dict.fromkeys(job for job, _ in batch):
            if len(job.scores) == len(job.sequences) and job.future.set_running_or_notify_cancel():
                job.future.set_result([job.scores[place] for place in range(len(job.sequences))])

    def _compute(self, texts: Sequence[_Text], max_tokens: int) -> list[float]:
        """Return the raw scores of some texts, in their order."""
        sequences = [text.sequence for text in texts]
        # Requests that ask about one prompt at the same time share it too.
        keys = [text.key for text in texts]

        def compute(places: list[int]) -> list[float]:
            some, their_keys = [sequences[place] for place in places], [keys[place] for place in places]
            started = time.perf_counter()
            scores = self.scorer.score_tokens(some, prompt_keys=their_keys, max_tokens=max_tokens)
            self._measure(some, time.perf_counter() - started)
            return scores

        scores = self._known.score(sequences, compute)
        self.metrics.scores.inc(len(sequences))
        self.metrics.tokens.inc(sum(map(len, sequences)))
        return scores

    def _num_tokens(self, texts: Sequence[_Text]) -> int:
        """Return the tokens of texts computed at once: a shared prompt counted once, or padding counted too."""
        if not self.scorer.packed:
            return len(texts) * max(len(text.sequence) for text in texts)
        by_prompt: dict[str, list[Sequence[int]]] = {}
        for text in texts:
            by_prompt.setdefault(text.key, []).append(text.sequence)
        return sum(_Prompt(sequences, None).num_tokens for sequences in by_prompt.values())

    def _measure(self, sequences: Sequence[Sequence[int]], seconds: float) -> None:
        tokens = sum(map(len, sequences))
        self.metrics.batch_tokens.observe(tokens)
        self.metrics.batch_seconds.observe(seconds)
        rate = tokens / max(seconds, 1e-9)
        self._tokens_per_second = rate if not self._tokens_per_second else 0.8 * self._tokens_per_second + 0.2 * rate
