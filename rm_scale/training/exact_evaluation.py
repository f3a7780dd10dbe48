"""Evaluation between steps: every response is scored once, by all ranks together, and the pairs are counted exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from rm_scale.batching.device_transfer import move_batch, pin_batch
from rm_scale.batching.sampler import Batching, GroupRef, read_groups
from rm_scale.distributed import gather_from_ranks
from rm_scale.modeling.known_scores import sequence_key
from rm_scale.modeling.token_scores import batch_rewards
from rm_scale.training.pair_counts import EvaluationResult, ScoredGroup


def score_groups(
    model: torch.nn.Module,
    groups: datasets.Dataset,
    batching: Batching,
    args: TrainingArguments,
    beat: Callable[[str], None],
    sets: Sequence[str] = (),
) -> list[ScoredGroup]:
    """Return all groups with their rewards, in the data set's order, on every rank. A collective.

    Args:
        model: as the forward pass calls it, engine included.
        groups: encoded groups.
        batching: how they become batches.
        args: of the run; its device, rank and number of ranks are used.
        beat: called before each batch, for the watchdog.
        sets: name of the evaluation set of each group, if there are several.
    """
    world, rank = args.world_size, args.process_index
    batches = batching.scoring_batches(groups)
    model.eval()
    rewards: dict[int, list[float]] = {}
    for start in range(0, len(batches), world):
        beat("evaluation")
        # A rank without a batch of its own repeats the first: under ZeRO-3 nobody may skip a forward pass.
        mine = batches[start + rank] if start + rank < len(batches) else batches[start]
        rewards.update(_score_batch(model, groups, mine, batching, args.device))
    of_all: dict[int, list[float]] = {}
    for part in gather_from_ranks(rewards):
        of_all.update(part)
    rows = groups.select_columns(["ranks", "margin", "soft_label", "subset", "id", "input_ids"])
    known: dict[bytes, float] = {}
    return [
        _scored_group(rows[index], of_all[index], known, sets[index] if sets else "") for index in range(len(groups))
    ]


def _scored_group(row: dict[str, Any], rewards: list[float], known: dict[bytes, float], of_set: str) -> ScoredGroup:
    """Return a row with its rewards; tokens that an earlier row had have the reward that they got there."""
    pairs = zip(row["input_ids"], rewards, strict=True)
    same = [known.setdefault(sequence_key(ids), reward) for ids, reward in pairs]
    return ScoredGroup.of_row(row, same, source=of_set)


def _score_batch(
    model: torch.nn.Module, groups: datasets.Dataset, indices: list[int], batching: Batching, device: torch.device
) -> dict[int, list[float]]:
    """Return the rewards of a few groups by their index."""
    rows = read_groups(groups, [GroupRef(index, True) for index in indices])
    batch = move_batch(pin_batch(batching.collate(rows), device), device)
    with torch.no_grad():
        flat = batch_rewards(model, batch).tolist()
    scores: dict[int, list[float]] = {}
    for index, row in zip(indices, rows, strict=True):
        scores[index], flat = flat[: len(row["ranks"])], flat[len(row["ranks"]) :]
    return scores


def logged_metrics(result: EvaluationResult, prefix: str) -> dict[str, Any]:
    """Return an evaluation's figures as one flat dictionary, as loggers want it, each name with `prefix_` before it."""
    values = result.as_dict()
    flat = {name: values[name] for name in ("accuracy", "loss", "mean_margin", "num_pairs", "num_ties")}
    low, high = values["accuracy_ci95"]
    flat |= {"accuracy_ci95_low": low, "accuracy_ci95_high": high, "score_std": values["score_std"]}
    flat |= {f"{name}_accuracy": part["accuracy"] for name, part in values["subsets"].items()}
    for name, counts in sorted(result.sources.items()):
        part = counts.as_dict()
        flat |= {f"{name}_{figure}": part[figure] for figure in ("accuracy", "loss", "mean_margin", "num_pairs")}
    return {f"{prefix}_{name}": value for name, value in flat.items()}
