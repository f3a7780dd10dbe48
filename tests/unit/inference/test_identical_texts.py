"""Texts with the same tokens tie exactly, wherever they are scored and whatever is beside them.

In bfloat16, where a batch's shape shows in the second digit.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from rm_scale.evaluation.scored_groups import score_texts
from rm_scale.inference.ranking.candidates import CandidateGroup
from rm_scale.inference.ranking.rank_candidates import score_groups
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.inference.server.batcher import Batcher
from rm_scale.inference.server.prometheus_metrics import Metrics
from rm_scale.inference.server.server_options import ServerOptions
from rm_scale.training import exact_evaluation


@pytest.fixture(scope="module")
def scorer(full_run: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(full_run, device="cpu", dtype="bfloat16")


def test_the_server_gives_a_text_one_score_whatever_waits_beside_it(scorer: RewardScorer) -> None:
    batcher = Batcher(scorer, ServerOptions(), Metrics())
    texts = [[5 + number] * (9 + 7 * number) for number in range(8)]
    beside = [[90] * length for length in (40, 90, 7)]
    batcher.start()
    alone = [batcher.submit([text], ["a"]).result(30)[0] for text in texts]
    keys = [str(number) for number in range(11)]
    assert batcher.submit([*beside, *texts], keys).result(30)[3:] == alone
    assert batcher.stop(5)
    assert scorer.score_tokens([*beside, *texts])[3:] != alone, "else this test would show nothing"
    assert b"rm_scale_scores_total 19.0" in batcher.metrics.text()


def test_candidates_tie_across_groups_and_chunks(scorer: RewardScorer) -> None:
    groups = [
        CandidateGroup("2 + 2 =", (" 4", other), (None, None), (number,))
        for number, other in enumerate([" 5", " y" * 90])
    ]
    ranked = list(score_groups(groups, scorer, chunk_completions=1))
    assert ranked[0].scores[0] == ranked[1].scores[0]


def test_benchmark_items_tie_across_batches(scorer: RewardScorer) -> None:
    prompts = ["2 + 2 =", *(f"{number} + 1 =" + " x" * number for number in range(40)), "2 + 2 ="]
    found = score_texts(prompts, [[" 4", " 5"]] * len(prompts), scorer, batch_size=1)
    assert found[0] == found[-1]


def test_training_evaluates_the_same_tokens_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [[[1, 2], [3]], [[3], [1, 2]], [[4], [3]]]
    column = {
        "ranks": [[0, 1]] * 3,
        "margin": [None] * 3,
        "soft_label": [None] * 3,
        "subset": ["s"] * 3,
        "id": ["i"] * 3,
    }
    groups = datasets.Dataset.from_dict({**column, "input_ids": ids})
    rounded = {0: [1.0, 2.0], 1: [2.25, 1.25], 2: [4.0, 1.75]}

    def score_batch(_model: Any, _groups: Any, indices: list[int], *_: Any) -> dict[int, list[float]]:
        return {index: rounded[index] for index in indices}

    monkeypatch.setattr(exact_evaluation, "_score_batch", score_batch)
    batching = SimpleNamespace(scoring_batches=lambda _: [[2], [1, 0]])
    args = SimpleNamespace(world_size=1, process_index=0, device="cpu")
    model = SimpleNamespace(eval=lambda: None)
    found = exact_evaluation.score_groups(model, groups, batching, args, lambda _: None)  # type: ignore[arg-type]
    assert [list(group.rewards) for group in found] == [[1.0, 2.0], [2.0, 1.0], [4.0, 2.0]]
