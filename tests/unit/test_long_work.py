"""Ranks that are done wait for slow ones without a collective, and notice those that are gone."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed  # noqa: F401  here once, rather than in each of the processes

from rm_scale import long_work
from rm_scale.distributed import World, agreed_errors, init_process_group
from rm_scale.errors import DataError, UserError
from rm_scale.files import free_port
from rm_scale.long_work import left_together

FORK = multiprocessing.get_context("fork")


def as_ranks(work: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch, timeout_seconds: int = 60) -> list[str]:
    """Run a function as two ranks; return what each returned or raised.

    Args:
        work: takes the rank.
        monkeypatch: the test's.
        timeout_seconds: after this their collectives end.
    """
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(long_work, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(long_work, "_LOOK_AGAIN_SECONDS", 0.05)

    def run(rank: int, answer: Any) -> None:
        os.environ["RANK"] = str(rank)
        init_process_group(World(rank, 2, rank, "torchrun", 2), False, timeout_seconds)
        try:
            answer.send(f"returned {work(rank)}")
        except Exception as error:
            answer.send(f"{type(error).__name__}: {error}")
        answer.recv()  # the store is rank 0's: it stays until both have answered
        os._exit(0)

    pipes, ranks = [], []
    for rank in range(2):
        here, other = FORK.Pipe()
        ranks.append(FORK.Process(target=run, args=(rank, other), daemon=True))
        ranks[-1].start()
        other.close()  # so that the end of the process is the end of the pipe
        pipes.append(here)
    answers = []
    for here in pipes:
        try:
            answers.append(here.recv())
        except EOFError:
            answers.append("gone")
    for here, answer in zip(pipes, answers, strict=True):
        if answer != "gone":
            here.send(None)
    for process in ranks:
        process.join()
    return answers


def test_a_slow_rank_is_waited_for_longer_than_a_collective_would(monkeypatch: pytest.MonkeyPatch) -> None:
    timeout_seconds = 2

    def work(rank: int) -> str:
        with agreed_errors(), left_together("encoding"):
            time.sleep(rank * (timeout_seconds + 0.5))
        return f"as {rank}"

    assert as_ranks(work, monkeypatch, timeout_seconds) == ["returned as 0", "returned as 1"]


def test_an_error_of_one_rank_is_told_at_once_and_raised_on_all_when_all_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, ended = FORK.Event(), FORK.Event()
    monkeypatch.setattr(long_work.logger, "error", lambda text: told.set() if "no room" in text else None)

    def work(rank: int) -> None:
        with agreed_errors(), left_together("encoding"):
            if rank == 0:
                raise DataError("no room")
            assert told.wait(60), "nothing is told while another rank is at work"
            ended.set()
        raise AssertionError("not reached")

    assert as_ranks(work, monkeypatch) == ["DataError: no room"] * 2
    assert ended.is_set()


def test_an_error_that_all_ranks_meet_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = FORK.SimpleQueue()
    monkeypatch.setattr(long_work.logger, "error", lines.put)

    def work(rank: int) -> None:
        with left_together("encoding"):
            raise DataError("no file. Fix: name one.")

    assert as_ranks(work, monkeypatch) == ["DataError: no file. Fix: name one."] * 2
    lines.put("end")
    assert list(iter(lines.get, "end")) == [
        "encoding: no file. Fix: name one. (This rank waits for the others, which may still be at work.)"
    ]


def test_a_rank_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_work, "SILENT_SECONDS", 1.0)

    def work(rank: int) -> None:
        with left_together("encoding the data"):
            if rank == 1:
                os._exit(9)

    first, second = as_ranks(work, monkeypatch)
    assert second == "gone"
    assert first.startswith("UserError: encoding the data: nothing has been heard of rank 1 for 1 s. Fix: look")


def test_a_rank_0_that_is_gone_is_noticed_by_its_store(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> None:
        with agreed_errors(), left_together("encoding the data"):
            if rank == 0:
                os._exit(9)

    first, second = as_ranks(work, monkeypatch)
    assert first == "gone"
    assert second.startswith("UserError: encoding the data: rank 0, which the others meet at, can't be reached (")
    assert second.endswith("what is encoded is kept.")


def test_waiting_says_for_whom(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(long_work, "_LOG_SECONDS", 0.0)
    told: list[str] = []
    monkeypatch.setattr(long_work.logger, "info", told.append)

    def work(rank: int) -> list[str]:
        with left_together("encoding"):
            time.sleep(rank * 0.5)
        return told[:1]

    first, second = as_ranks(work, monkeypatch)
    assert first == "returned ['encoding: waiting for 1 of 2 ranks that are still at it']"
    assert second == "returned []"


def test_a_process_alone_waits_for_nobody() -> None:
    with left_together("encoding"):
        pass
    with pytest.raises(UserError, match="x"), left_together("encoding"):
        raise UserError("x")
