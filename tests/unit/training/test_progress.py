"""What a run shows while it goes on."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from rm_scale.logs import setup_logging
from rm_scale.texts import duration
from rm_scale.training import progress
from rm_scale.training.progress import Progress


def state(step: int, is_main: bool = True) -> Any:
    return SimpleNamespace(global_step=step, max_steps=1200, is_world_process_zero=is_main)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def shown(capsys: pytest.CaptureFixture[str], *logs: dict[str, Any], clock: Any, is_main: bool = True) -> list[str]:
    """The lines that a run resumed at step 1,000 shows at step 1,040."""
    setup_logging()
    callback = Progress(bar=False)
    callback.on_train_begin(None, state(1000, is_main), None)
    clock.seconds += 40
    for line in logs:
        callback.on_log(None, state(1040, is_main), None, logs=line)
    return [line.partition("INFO ")[2] for line in capsys.readouterr().err.splitlines()]


LINE = {"loss": 0.61234, "accuracy": 0.6667, "margin": 0.25, "learning_rate": 1e-5, "grad_norm": 3.0, "num_pairs": 12}
LINE |= {"pairs_per_second": 1234.5}


def test_one_line_per_logged_step(capsys: pytest.CaptureFixture[str], clock: Any) -> None:
    lines = shown(capsys, LINE, {"eval_accuracy": 0.75, "eval_loss": 0.5}, {"train_runtime": 3.0}, clock=clock)
    assert lines == [
        "1,040 of 1,200 steps: loss 0.6123, accuracy 0.667, margin 0.250, lr 1e-05, grad norm 3, 1,234.5 pairs/s, "
        "3 min left",
        "evaluation: accuracy 0.7500, loss 0.5000",
    ]


def test_what_a_step_lacks_is_left_out(capsys: pytest.CaptureFixture[str], clock: Any) -> None:
    (line,) = shown(capsys, {"loss": float("nan"), "accuracy": None}, clock=clock)
    assert line == "1,040 of 1,200 steps: loss nan, 3 min left"


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], clock: Any) -> None:
    assert shown(capsys, LINE, clock=clock, is_main=False) == []


def test_a_terminal_gets_a_bar_with_the_same_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    callback = Progress()
    callback.on_train_begin(None, state(1000), None)
    callback.on_step_end(None, state(1040), None)
    callback.on_log(None, state(1040), None, logs=LINE)
    callback.on_train_end(None, state(1200), None)
    drawn = capsys.readouterr().err
    assert (
        "1040/1200" in drawn
        and "loss 0.6123, accuracy 0.667, margin 0.250, lr 1e-05, grad norm 3, 1,234.5 pairs/s" in drawn
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (3569, "59 min"),
        (3600, "1 h 00 min"),
        (11100, "3 h 05 min"),
        (190_000, "2 d 4 h"),
    ],
)
def test_times_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
