"""Score probes with transformers alone, in a process of its own: what anybody who loads an export would see.

Reads a job from standard input and prints one line of JSON; imports nothing else of this package.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline


def main() -> None:
    """Read `{"folder", "dtypes", "trust_remote_code", "probes"}`, print `{"by_ids", "by_text"}` for each type."""
    job = json.load(sys.stdin)
    print(json.dumps({dtype: scores(job, dtype) for dtype in job["dtypes"]}))


def scores(job: dict[str, Any], dtype: str) -> dict[str, list[Any]]:
    """Return the scores of all probes with the model loaded in one type."""
    trust = {"trust_remote_code": True} if job["trust_remote_code"] else {}
    model = AutoModelForSequenceClassification.from_pretrained(
        job["folder"], dtype=getattr(torch, dtype), use_safetensors=True, **trust
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["folder"], **trust)
    # No function_to_apply: the folder itself must say that scores are raw.
    rewarder = pipeline("text-classification", model=model, tokenizer=tokenizer)
    answer: dict[str, list[Any]] = {"by_ids": [], "by_text": []}
    for probe in job["probes"]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([probe["input_ids"]])).logits
        answer["by_ids"].append(float(logits[0, 0]))
        text = probe["text"]
        answer["by_text"].append(None if text is None else float(rewarder(text)[0]["score"]))
    return answer


if __name__ == "__main__":
    main()
