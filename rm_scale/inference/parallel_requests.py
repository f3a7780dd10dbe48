"""`ask_in_parallel`: several requests at the same time; the first that fails ends them all."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Part = TypeVar("Part")
Answer = TypeVar("Answer")

THREAD_NAME = "rm-scale-request"


def ask_in_parallel(
    ask: Callable[[Part, threading.Event], Answer], parts: Sequence[Part], num_threads: int
) -> list[Answer]:
    """Return the answer to each part, in their order.

    Args:
        ask: asks for one part. The event is set when its answer is no longer wanted.
        parts: what is asked.
        num_threads: parts that are asked at the same time.

    Raises:
        BaseException: what `ask` raised first. It is raised at once: requests that still wait for their answers are
            left to themselves, and nothing more is asked.
    """
    stop = threading.Event()
    waiting: queue.SimpleQueue[tuple[int, Part]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Answer | None, BaseException | None]] = queue.SimpleQueue()
    for numbered in enumerate(parts):
        waiting.put(numbered)

    def work() -> None:
        while not stop.is_set():
            try:
                number, part = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, ask(part, stop), None))
            except BaseException as error:
                done.put((number, None, error))
                return

    for _ in range(min(num_threads, len(parts))):
        # Not an executor's threads: Python waits for those before it ends, however long a server hangs.
        threading.Thread(target=work, name=THREAD_NAME, daemon=True).start()
    found: dict[int, Answer] = {}
    try:
        while len(found) < len(parts):
            number, answer, error = done.get()
            if error is not None:
                raise error
            found[number] = answer  # type: ignore[assignment]
    finally:
        stop.set()
    return [found[number] for number in range(len(parts))]
