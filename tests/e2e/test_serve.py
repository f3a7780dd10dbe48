"""`rm-scale serve` as a process: signals, the token, what a fuzzer finds, and wrong requests."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.launching import run
from tests.support.serving import serving_process, wait_for

pytestmark = pytest.mark.e2e

CLI = [sys.executable, "-m", "rm_scale.cli"]


@pytest.fixture(scope="module")
def server(lora_run: Path) -> Iterator[str]:
    with serving_process(lora_run, "--request_timeout", "20", "--max_items", "64") as (url, _):
        yield url


def test_it_gives_the_models_scores(server: str, lora_run: Path) -> None:
    expected = RewardScorer.from_pretrained(lora_run, device="cpu").score(["2 + 2 ="] * 3, [" 4", " 5", " üñ🦀"])
    body = {"items": [{"prompt": "2 + 2 =", "completion": text} for text in (" 4", " 5", " üñ🦀")]}
    assert httpx.post(f"{server}/score", json=body).json()["scores"] == pytest.approx(expected, abs=1e-5)


def test_no_input_breaks_it(server: str) -> None:
    """Property-based requests from its own OpenAPI description: never a 500, and answers are as described."""
    schema = schemathesis.openapi.from_url(f"{server}/openapi.json")
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    seen: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=True,
            phases=[Phase.generate],
        )
        def once(case: schemathesis.Case) -> None:
            answer = case.call(base_url=server, timeout=600)
            case.validate_response(answer, checks=checks)
            seen.setdefault(case.path, set()).add(answer.status_code)

        once()
    assert {"/score", "/rank", "/get_reward", "/pooling", "/classify", "/rerank", "/v1/embeddings"} <= set(seen)
    assert any(200 in seen[path] for path in ("/score", "/rank", "/get_reward")), seen
    assert httpx.get(f"{server}/ready").status_code == 200


def test_terminated_it_answers_what_it_has_accepted(lora_run: Path) -> None:
    with serving_process(lora_run, "--max_tokens_per_batch", "64") as (url, process), ThreadPoolExecutor(24) as pool:
        body = {"items": [{"prompt": f"What is {n} + 2?", "completion": f" {n + 2}"} for n in range(64)]}
        started = threading.Event()
        statuses: list[int] = []

        def ask() -> int | None:
            started.set()
            try:
                status = httpx.post(f"{url}/score", json=body, timeout=600).status_code
            except httpx.ConnectError:
                return None  # it had stopped listening: not accepted
            statuses.append(status)
            return status

        futures = [pool.submit(ask) for _ in range(24)]
        started.wait()
        wait_for(lambda: statuses)  # some are answered, the others are queued or on their way
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: _stops(url) or process.poll() is not None)
        outcomes = [future.result() for future in futures]
        assert process.wait(600) == 0
    assert set(outcomes) <= {200, 503, None} and outcomes.count(200) >= 2
    assert process.stdout is not None


def _stops(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=30).status_code == 503
    except httpx.TransportError:
        return True


def test_a_second_signal_ends_it_at_once(lora_run: Path) -> None:
    with serving_process(lora_run, "--drain_seconds", "3600", "--body_timeout", "3600") as (url, process):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: _stops(url))
            assert process.poll() is None, "it waits for the request that it has let in"
            process.send_signal(signal.SIGTERM)
            assert process.wait(600) == 0


def test_the_token_comes_from_file_or_environment(lora_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret-of-mine\n")
    with serving_process(lora_run, "--token_file", str(file), RM_SCALE_SERVE_TOKEN="other") as (url, process):
        assert httpx.get(f"{url}/info").status_code == 401
        assert httpx.get(f"{url}/info", headers={"Authorization": "Bearer s3cret-of-mine"}).status_code == 200
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=600)
    assert "s3cret" not in output and "serving run on http://127.0.0.1:" in output


def test_wrong_requests(lora_run: Path, tiny_model: Path, tmp_path: Path) -> None:
    done = run([*CLI, "serve", "--model", str(lora_run), "--port", "99999", "--max_items", "0", "--rate_limit", "-1"])
    assert done.code == 2
    for text in (
        "port=99999: must be from 0 to 65535",
        "max_items=0: must be above 0",
        "rate_limit=-1: must be above 0",
    ):
        assert text in done.output
    assert "is a LlamaForCausalLM" in run([*CLI, "serve", "--model", str(tiny_model)]).output
    empty = tmp_path / "empty"
    empty.write_text("\n")
    refused = run([*CLI, "serve", "--model", str(lora_run), "--token_file", str(empty)])
    assert refused.code == 2 and "is empty. Fix: a file with one line" in refused.output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        busy = run([*CLI, "serve", "--model", str(lora_run), "--port", str(port)])
    assert busy.code == 2 and f"port={port}: can't be listened on (Address already in use)" in busy.output
