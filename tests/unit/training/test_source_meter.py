"""Figures per source are exact: they equal those of the source's groups alone, for pairs and for rankings."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch

from rm_scale.batching.collator import PackedCollator, PaddedCollator
from rm_scale.batching.sampler import StepCollator
from rm_scale.training.losses import LossSettings, num_loss_terms, preference_loss
from rm_scale.training.source_meter import SourceMeter

NAMES = ("a", "b", "c")
SOURCES = np.array([0, 1, 0, 2, 1, 0], dtype=np.int32)


def group(index: int, size: int, counted: bool = True, **more: Any) -> dict[str, Any]:
    ids = [[1, 2, 3 + place] for place in range(size)]
    row = {"input_ids": ids, "prompt_length": 2, "ranks": list(range(size)), "margin": None, "soft_label": None}
    return {**row, **more, "index": index, "counted": counted}


def figures(kind: Literal["bradley_terry", "plackett_luce"], collate: Any) -> tuple[dict[str, Any], list[Any], Any]:
    settings = LossSettings(kind)
    steps = [
        [[group(0, 2), group(1, 3), group(2, 2, ranks=[0, 0])], [group(4, 2, margin=0.5), group(4, 2, counted=False)]],
        [[group(5, 4)], [group(1, 3, counted=False)]],
    ]
    make = StepCollator(collate, SOURCES, len(NAMES))
    meter = SourceMeter(NAMES, settings)
    seen = []
    torch.manual_seed(0)
    for step in steps:
        for groups, batch in zip(step, make([step])["micro_batches"], strict=True):
            rewards = torch.randn(sum(len(one["ranks"]) for one in groups))
            meter.add(rewards, batch)
            seen.append((groups, rewards))
    return meter.read(), seen, meter


@pytest.mark.parametrize("kind", ["bradley_terry", "plackett_luce"])
@pytest.mark.parametrize("collate", [PaddedCollator(0), PackedCollator(0, share_prompts=True)])
def test_figures_are_those_of_each_source_alone(kind: Literal["bradley_terry", "plackett_luce"], collate: Any) -> None:
    found, seen, meter = figures(kind, collate)
    settings, plain = LossSettings(kind), PaddedCollator(0)
    for number, name in enumerate(NAMES[:2]):
        loss, terms, right, pairs, groups = 0.0, 0, 0, 0, 0
        for batch_groups, rewards in seen:
            place = 0
            for one in batch_groups:
                own = rewards[place : place + len(one["ranks"])]
                place += len(one["ranks"])
                if SOURCES[one["index"]] != number or not one["counted"]:
                    continue
                batch = plain([one])
                loss += float(preference_loss(own, batch, settings))
                terms += num_loss_terms(batch, settings)
                labelled = batch["pair_target"] != 0.5
                right += int((labelled & (own[batch["pair_better"]] > own[batch["pair_worse"]])).sum())
                pairs += int(labelled.sum())
                groups += 1
        assert found[f"source/{name}/loss"] == pytest.approx(loss / terms, rel=1e-6)
        assert found[f"source/{name}/accuracy"] == right / pairs
        assert found[f"source/{name}/groups"] == groups
    assert found["source/c/groups"] == 0 and "source/c/loss" not in found, "a source that had no group"
    assert meter.read() == {f"source/{name}/groups": 0 for name in NAMES}, "counted anew"


def test_a_step_that_is_not_finite_spoils_no_figure() -> None:
    step = [[group(0, 2), group(1, 2)]]
    meter = SourceMeter(NAMES, LossSettings())
    (batch,) = StepCollator(PaddedCollator(0), SOURCES, len(NAMES))([step])["micro_batches"]
    meter.add(torch.tensor([float("nan"), 1.0, 2.0, 1.0]), batch)
    assert meter.read()["source/b/loss"] == pytest.approx(float(torch.nn.functional.softplus(torch.tensor(-1.0))))


def test_without_a_mixture_nothing_is_added() -> None:
    meter = SourceMeter((), LossSettings())
    (batch,) = StepCollator(PaddedCollator(0))([[[group(0, 2)]]])["micro_batches"]
    assert "row_source" not in batch and "source_groups" not in batch
    meter.add(torch.zeros(2), batch)
    assert meter.read() == {}
