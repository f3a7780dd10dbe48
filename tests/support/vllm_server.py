"""A small server that answers as vLLM 0.32 does, field by field, with the scores of a model in this process."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import jsonschema_rs

from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.launching import REPOSITORY

Answer = tuple[int, Any]
THEIRS = json.loads((REPOSITORY / "tests" / "data" / "vllm_answers.json").read_text())
"""What vLLM answers, and the fields of its requests: see `source` and `version` in it."""


def differences(path: str, answer: Any) -> list[str]:
    """What an answer has that vLLM's has not on this route, or lacks of it."""
    return [str(one) for one in jsonschema_rs.Draft202012Validator(_exact(THEIRS["answers"][path])).iter_errors(answer)]


def _exact(schema: Any) -> Any:
    """The schema of what vLLM writes: all of its fields, and no others."""
    if isinstance(schema, dict):
        # What a client sent as parts of a text comes back as it was.
        found = {key: value if "ContentPart" in key else _exact(value) for key, value in schema.items()}
        if isinstance(schema.get("properties"), dict):
            found.update(additionalProperties=False, required=list(schema["properties"]))
        return found
    return [_exact(part) for part in schema] if isinstance(schema, list) else schema


class VllmServer:
    """What `vllm serve --runner pooling` answers on /version, /v1/models and /classify, and what it was asked.

    Args:
        scorer: gives the scores.

    Attributes:
        names, max_model_len: of the models on /v1/models.
        reads_use_activation: else the sigmoid comes whatever is asked, as from old versions.
        answers: for the next requests to /classify, instead of scores: status and JSON, or a function of the body.
        refuses: the answer to a request that holds some token ids, as vLLM's to one text that it can't score.
        bodies: of the requests to /classify.
        headers: of all requests.
    """

    def __init__(self, scorer: RewardScorer) -> None:
        self.scorer = scorer
        self.names = ["served"]
        self.max_model_len = 4096
        self.reads_use_activation = True
        self.answers: list[Answer | Callable[[Any], Answer | None]] = []
        self.refuses: Callable[[list[int]], Answer | None] = lambda _: None
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self._one_at_a_time = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.headers.append(dict(self.headers))
                self._send(*server.facts(self.path))

            def do_POST(self) -> None:
                server.headers.append(dict(self.headers))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._send(*server.classify(self.path, body))

            def _send(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def facts(self, path: str) -> Answer:
        """Answer a GET."""
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/v1/models":
            return 200, {"object": "list", "data": [self._card(name) for name in self.names]}
        return 404, {"detail": "Not Found"}

    def _card(self, name: str) -> dict[str, Any]:
        own = {"id": name, "object": "model", "created": 1, "owned_by": "vllm", "root": "/model", "parent": None}
        return {**own, "max_model_len": self.max_model_len, "permission": []}

    def classify(self, path: str, body: Any) -> Answer:
        """Answer a POST."""
        if path != "/classify":
            return 404, {"detail": "Not Found"}
        self.bodies.append(body)
        given = self.answers.pop(0) if self.answers else None
        given = given(body) if callable(given) else given
        if given is not None:
            return given
        if body["model"] not in self.names:
            return 404, problem(f"The model `{body['model']}` does not exist.", "NotFoundError", 404)
        refused = next(filter(None, map(self.refuses, body["input"])), None)
        if refused is not None:
            return refused
        with self._one_at_a_time:
            scores = self.scorer.score_tokens(body["input"])
        if body["use_activation"] or not self.reads_use_activation:
            scores = [1 / (1 + math.exp(-score)) for score in scores]
        rows = [{"index": n, "label": "reward", "probs": [one], "num_classes": 1} for n, one in enumerate(scores)]
        tokens = sum(map(len, body["input"]))
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, **details}
        own = {"id": "classify-1", "object": "list", "created": 1, "model": body["model"]}
        return 200, {**own, "data": rows, "usage": usage}


def problem(message: str, kind: str = "BadRequestError", code: int = 400) -> dict[str, Any]:
    """vLLM's answer to what it refuses."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


Server = TypeVar("Server", bound=VllmServer)


@contextmanager
def vllm_server(scorer: RewardScorer) -> Iterator[VllmServer]:
    """Serve in a thread."""
    with serving(VllmServer(scorer)) as server:
        yield server


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Serve in a thread."""
    threading.Thread(target=server.server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()
