"""A run under ZeRO in bfloat16: its folder gives, in the shortest snippet, the scores that the evaluation gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import pipeline

from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.launching import read_json, scores
from tests.support.tiny_runs import evaluated_texts, train_tiny


def test_the_shortest_snippet_gives_the_scores_of_the_evaluation(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    run = train_tiny(tiny_model, pairs_file, tmp_path / "run", "--deepspeed", "zero2", "--bf16", "true")
    assert read_json(run / "config.json")["dtype"] == "float32"
    with safe_open(str(run / "model.safetensors"), "pt") as tensors:
        types = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    assert types.pop("score.weight") == "F32" and set(types.values()) == {"BF16"}
    scorer = RewardScorer.from_pretrained(run, device="cpu")
    prompts, completions = evaluated_texts(run, pairs_file)
    rewarder = pipeline("text-classification", model=str(run), function_to_apply="none")
    texts = [scorer.encoder.render(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
    found = [rewarder(text)[0]["score"] for text in texts]
    assert found == pytest.approx(scorer.score(prompts, completions), abs=1e-5), "what rm-scale eval and score give"
    assert found == pytest.approx(scores(run), abs=5e-2), "what training computed in bfloat16"
