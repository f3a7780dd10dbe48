"""Train in this process: for what a process of its own proves nothing more about, as starting one takes seconds."""

from __future__ import annotations

import os

import pytest

from tests.support.launching import Finished


def train_here(flags: list[str], captured: pytest.CaptureFixture[str]) -> Finished:
    """Run `rm_scale.train.main`, and undo what a process would take along at its end.

    Args:
        flags: settings, as on the command line.
        captured: the test's `capfd`, so that what libraries print is seen too.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from rm_scale.train import main

    captured.readouterr()
    environment = dict(os.environ)
    try:
        code = main(flags)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        os.environ.clear()
        os.environ.update(environment)
    printed = captured.readouterr()
    return Finished(code, printed.out + printed.err)
