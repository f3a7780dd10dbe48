"""Write tests/data/vllm_answers.json: the answers of vLLM's pooling endpoints, and the fields of their requests.

To be run with the Python of an environment that has vLLM, from the repository's root:

    outputs/compat/vllm/venv/bin/python tests/compat/vllm_schemas.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from vllm import __version__
from vllm.entrypoints.pooling.classify import protocol as classify
from vllm.entrypoints.pooling.embed import protocol as embed
from vllm.entrypoints.pooling.pooling import protocol as pooling
from vllm.entrypoints.pooling.scoring import protocol as scoring
from vllm.entrypoints.serve.engine import protocol as engine

TARGET = Path("tests/data/vllm_answers.json")
ANSWERS = {
    "/classify": classify.ClassificationResponse,
    "/pooling": pooling.PoolingResponse,
    "/score": scoring.ScoreResponse,
    "/rerank": scoring.RerankResponse,
    "/v1/embeddings": embed.EmbeddingResponse,
    "/v1/models": engine.ModelList,
}
REQUESTS = {
    "/classify": [classify.ClassificationCompletionRequest, classify.ClassificationChatRequest],
    "/pooling": [pooling.PoolingCompletionRequest, pooling.PoolingChatRequest],
    "/score": [
        scoring.ScoreTextRequest,
        scoring.ScoreQueriesDocumentsRequest,
        scoring.ScoreQueriesItemsRequest,
        scoring.ScoreDataRequest,
    ],
    "/rerank": [scoring.RerankRequest],
}


def without_words(schema: Any) -> Any:
    """The schema without titles and descriptions, which nothing is held against."""
    if isinstance(schema, dict):
        return {
            key: without_words(value)
            for key, value in schema.items()
            if not (key in {"title", "description"} and isinstance(value, str))
        }
    return [without_words(part) for part in schema] if isinstance(schema, list) else schema


def main() -> None:
    """Write the file."""
    schemas = {path: TypeAdapter(kind).json_schema(mode="serialization") for path, kind in ANSWERS.items()}
    fields = {path: {kind.__name__: sorted(kind.model_fields) for kind in kinds} for path, kinds in REQUESTS.items()}
    source = "the pydantic classes of vllm/entrypoints/pooling/*/protocol.py, by tests/compat/vllm_schemas.py"
    version = f"vLLM {__version__}"
    found = {"source": source, "version": version, "answers": without_words(schemas), "request_fields": fields}
    TARGET.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
