"""Continuous micro-batching: one loop scores whatever waits, as much at once as the token budget allows.

While a batch is computed, requests pile up; the next batch takes from all of them in turn, one prompt with its
completions each, so that a huge request doesn't hold up small ones. Requests about a prompt that is in the batch
anyway come with it, since they cost only their own tokens. Nothing waits for a batch to fill unless told to.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from rm_scale.inference.scorer import RewardScorer, fitting_parts
from rm_scale.inference.server.limits import Limits, Refused
from rm_scale.inference.server.metrics import Metrics
from rm_scale.logs import get_logger
from rm_scale.packing.layout import common_prefix_length, packed_length

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
        """Into parts that fit a batch."""
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


class Filling:
    """A batch while it is filled: the tokens in it, a shared prompt counted once.

    Args:
        max_tokens: its budget; the first texts fit, whatever they have.
        shares_prompts: whether texts with one key share a prompt.
    """

    def __init__(self, max_tokens: int, shares_prompts: bool) -> None:
        self.room = max_tokens
        self.shares_prompts = shares_prompts
        self._prompts: dict[str, _Prompt] = {}
        self._is_empty = True

    def add(self, key: str, sequences: Sequence[Sequence[int]]) -> bool:
        """Take texts of one prompt in; gives whether they fitted."""
        before = self._prompts.get(key) if self.shares_prompts else None
        after = _Prompt(sequences, before)
        tokens = after.num_tokens - (before.num_tokens if before else 0)
        if tokens > self.room and not self._is_empty:
            return False
        self._prompts[key] = after
        self.room -= tokens
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


class Batcher:
    """Scores jobs, in a thread of its own (`start`) or in the one that calls `run`.

    Args:
        scorer: the model.
        limits: token budget and queue length.
        metrics: what is counted.
    """

    def __init__(self, scorer: RewardScorer, limits: Limits, metrics: Metrics) -> None:
        self.scorer = scorer
        self.limits = limits
        self.metrics = metrics
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
        """Let it finish what waits and end; gives whether it ended in time."""
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
        job.split(self.limits.max_tokens_per_batch, self.scorer.packed)
        with self._changed:
            waiting = self._queued_tokens + job.num_tokens
            # An empty queue takes any request, however large: it could never be served otherwise.
            if self._queued_tokens and waiting > self.limits.max_queue_tokens:
                wait = self._queued_tokens / self._tokens_per_second if self._tokens_per_second else 1.0
                raise Refused(
                    429,
                    "queue_full",
                    f"{self._queued_tokens} tokens wait already, and at most {self.limits.max_queue_tokens} may. "
                    "Fix: try again later, or send less at once.",
                    retry_after_seconds=min(60.0, wait),
                )
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
                for job, _ in batch:
                    if not job.future.done():
                        job.future.set_exception(
                            Refused(503, "scoring_failed", f"scoring failed ({type(error).__name__}). Fix: try again.")
                        )

    def _next_batch(self) -> list[tuple[Job, list[int]]] | None:
        """Parts for one forward pass; `None` when there is nothing left to do and the server stops."""
        with self._changed:
            while not self._jobs:
                if self._stopping:
                    return None
                self._changed.wait()
            deadline = time.monotonic() + self.limits.max_wait_seconds
            while self._queued_tokens < self.limits.max_tokens_per_batch and not self._stopping:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return self._take()

    def _take(self) -> list[tuple[Job, list[int]]]:
        """From each job in turn, until the budget is used up; whoever is not done goes to the end."""
        batch: list[tuple[Job, list[int]]] = []
        filling = Filling(self.limits.max_tokens_per_batch, self.scorer.packed)
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
        """Jobs by the prompt that is next in each; none where a prompt can't be shared."""
        alike: dict[str, list[Job]] = {}
        for job in self._jobs if self.scorer.packed else ():
            alike.setdefault(job.next_key, []).append(job)
        return alike

    def _move(self, job: Job, filling: Filling, batch: list[tuple[Job, list[int]]]) -> bool:
        """A job's next part into the batch, if it fits."""
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
        sequences = [job.sequences[place] for job, part in batch for place in part]
        # Requests that ask about one prompt at the same time share it too.
        keys = [job.keys[place] for job, part in batch for place in part]
        started = time.perf_counter()
        scores = iter(
            self.scorer.score_tokens(sequences, prompt_keys=keys, max_tokens=self.limits.max_tokens_per_batch)
        )
        self._measure(sequences, time.perf_counter() - started)
        for job, part in batch:
            for place in part:
                job.scores[place] = next(scores)
            if len(job.scores) == len(job.sequences) and job.future.set_running_or_notify_cancel():
                job.future.set_result([job.scores[place] for place in range(len(job.sequences))])

    def _measure(self, sequences: Sequence[Sequence[int]], seconds: float) -> None:
        tokens = sum(map(len, sequences))
        self.metrics.scores.inc(len(sequences))
        self.metrics.tokens.inc(tokens)
        self.metrics.batch_tokens.observe(tokens)
        self.metrics.batch_seconds.observe(seconds)
        rate = tokens / max(seconds, 1e-9)
        self._tokens_per_second = rate if not self._tokens_per_second else 0.8 * self._tokens_per_second + 0.2 * rate
