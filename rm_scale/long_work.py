"""Wait for ranks that work for hours, without a collective: one that waits longer than `ddp_timeout` ends the run.

Ranks that are done count themselves in the process group's key-value store and look there for the others. Those still
at work beat there meanwhile, so that a rank that is gone is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

from rm_scale.errors import UserError
from rm_scale.logs import get_logger
from rm_scale.texts import first_line

logger = get_logger(__name__)

BEAT_SECONDS = 10.0
SILENT_SECONDS = 600.0
"""Without a beat of any rank that is still at work: all of these are gone, or can't reach rank 0."""

_LOOK_AGAIN_SECONDS = 0.5
_LOG_SECONDS = 60.0
_blocks = itertools.count()


@contextlib.contextmanager
def left_together(what: str) -> Iterator[None]:
    """Run a block that may take hours on every rank, and leave it when all ranks have come to its end.

    All ranks run the same blocks in the same order. A `UserError` ends the block too: it is logged at once, the others
    are waited for, and it is then raised. Any other exception is raised at once, as the process ends with it.

    Args:
        what: what the block does, as in "encoding the data", for messages.

    Raises:
        UserError: ranks are gone, or rank 0 can't be reached.
    """
    number = next(_blocks)
    ranks = _Ranks.meeting(number, what)
    if ranks is None:
        yield
        return
    failure: UserError | None = None
    with ranks.beating():
        try:
            yield
        except UserError as error:
            failure = error
    if failure is not None:
        ranks.tell(failure)
    ranks.wait()
    if failure is not None:
        raise failure


class _Ranks:
    """The ranks of one block.

    Args:
        store: the process group's, for this block alone.
        rank, size: of this process.
        what: what the block does.
    """

    def __init__(self, store: Any, rank: int, size: int, what: str) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.what = what

    @classmethod
    def meeting(cls, number: int, what: str) -> _Ranks | None:
        """Return the ranks of a process group, or `None` for a process alone."""
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return None
        store = distributed.distributed_c10d._get_default_store()
        prefixed = distributed.PrefixStore(f"rm_scale/long_work/{number}", store)
        return cls(prefixed, distributed.get_rank(), distributed.get_world_size(), what)

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Count beats in the store during the block, from a thread of its own."""
        ended = threading.Event()

        def beat() -> None:
            with contextlib.suppress(RuntimeError):  # rank 0 is gone: whoever waits for something there will say so
                while not ended.wait(BEAT_SECONDS):
                    self.store.add("beats", 1)

        thread = threading.Thread(target=beat, name="beat of long work", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def tell(self, error: UserError) -> None:
        """Log an error of this rank, unless another has logged the same: hours may pass before it can be raised."""
        text = str(error)
        try:
            is_first = self.store.add(f"told/{hashlib.sha256(text.encode(errors='replace')).hexdigest()}", 1) == 1
        except RuntimeError:  # rank 0 is gone, as `wait` will say
            is_first = True
        if is_first:
            logger.error(f"{self.what}: {text} (This rank waits for the others, which may still be at work.)")

    def wait(self) -> None:
        """Count this rank as done and wait for all.

        Raises:
            UserError: those that are not done have not beaten for long, or the store is gone.
        """
        try:
            self._wait()
        except RuntimeError as error:  # of the store's calls: DistStoreError, DistNetworkError
            seen = f"rank 0, which the others meet at, can't be reached ({first_line(error)})"
            raise self._ended_by(seen) from error

    def _wait(self) -> None:
        self.store.set(f"done/{self.rank}", "")
        num_done = self.store.add("done", 1)
        beats, heard = -1, time.monotonic()
        told = heard
        while num_done < self.size:
            time.sleep(_LOOK_AGAIN_SECONDS)
            num_done, now = self.store.add("done", 0), time.monotonic()
            counted = self.store.add("beats", 0)
            # Ranks that are done beat no more, so whatever is heard is from one at work.
            if counted != beats:
                beats, heard = counted, now
            if now - heard > SILENT_SECONDS:
                raise self._gone(now - heard)
            if now - told > _LOG_SECONDS:
                told = now
                logger.info(
                    f"{self.what}: waiting for {self.size - num_done} of {self.size} ranks that are still at it"
                )

    def _gone(self, seconds: float) -> UserError:
        missing = [rank for rank in range(self.size) if not self.store.check([f"done/{rank}"])]
        named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        return self._ended_by(f"nothing has been heard of rank {named} for {seconds:.0f} s")

    def _ended_by(self, seen: str) -> UserError:
        return UserError(
            f"{self.what}: {seen}. Fix: look for the end of its log (killed, out of memory, node lost?) and start "
            "again; what is encoded is kept."
        )
