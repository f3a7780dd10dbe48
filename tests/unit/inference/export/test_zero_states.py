"""Shards put together: what their config says of padding is not passed over in silence."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import LlamaConfig

from rm_scale.inference.export.zero_states import _warn_of_padding


@pytest.mark.parametrize(("pad", "eos", "warns"), [(2, 2, True), (2, [1, 2], True), (0, 2, False), (None, 2, False)])
def test_padding_that_was_eos_is_warned_of(
    pad: int | None,
    eos: int | list[int],
    warns: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("rm_scale"), "propagate", True)
    _warn_of_padding(Path("checkpoint-9"), LlamaConfig(pad_token_id=pad, eos_token_id=eos))
    assert ("its padding token is EOS" in caplog.text) == warns
