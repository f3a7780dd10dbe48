"""A small server that answers as SGLang 0.5.23 does on the routes that scoring asks, with a model in this process.

Read in the code of that release, `python/sglang/srt/entrypoints/http_server.py` (`/model_info`, `/v1/models`,
`/classify`, `_create_error_response`) and `python/sglang/srt/managers/tokenizer_manager.py` (what an embedding is
answered with, and which lengths are refused). Nobody has run it against a real SGLang.
"""

from __future__ import annotations

from typing import Any

from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.vllm_server import Answer, VllmServer


class SglangServer(VllmServer):
    """What `python -m sglang.launch_server --is-embedding` answers.

    Attributes:
        is_generation: started without --is-embedding.
        width: numbers of an embedding; above 1 for a model without a classifier's class.
    """

    def __init__(self, scorer: RewardScorer) -> None:
        super().__init__(scorer)
        self.is_generation = False
        self.width = 1

    def facts(self, path: str) -> Answer:
        """Answer a GET."""
        if path == "/model_info":
            own = {"model_path": "/model", "served_model_name": self.names[0], "is_generation": self.is_generation}
            return 200, {**own, "tokenizer_path": "/model", "weight_version": "default", "model_type": "llama"}
        if path == "/v1/models":
            card = {"id": self.names[0], "object": "model", "created": 1, "owned_by": "sglang", "root": self.names[0]}
            return 200, {"object": "list", "data": [{**card, "parent": None, "max_model_len": self.max_model_len}]}
        return 404, {"detail": "Not Found"}

    def classify(self, path: str, body: Any) -> Answer:
        """Answer a POST."""
        if path != "/classify":
            return 404, {"detail": "Not Found"}
        self.bodies.append(body)
        given = self.answers.pop(0) if self.answers else None
        given = given(body) if callable(given) else given
        if given is not None:
            return given
        for ids in body["input_ids"]:
            if len(ids) >= self.max_model_len:
                length = f"model's context length ({self.max_model_len} tokens)."
                return 400, {"error": {"message": f"The input ({len(ids)} tokens) is longer than the {length}"}}
        scores = self.scorer.score_tokens(body["input_ids"])
        return 200, [
            {"embedding": [score] * self.width, "meta_info": {"id": str(n), "prompt_tokens": len(ids)}}
            for n, (score, ids) in enumerate(zip(scores, body["input_ids"], strict=True))
        ]
