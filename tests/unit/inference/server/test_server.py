"""The server: the scores of the model over every protocol, and every refusal provoked for real."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from rm_scale.errors import UserError
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.inference.server.app import build_app
from rm_scale.inference.server.batcher import Batcher, Filling, Job
from rm_scale.inference.server.prometheus_metrics import Metrics
from rm_scale.inference.server.request_limits import Refused
from rm_scale.inference.server.server_options import ServerOptions
from rm_scale.inference.server.service import Service
from tests.support.serving import served, wait_for
from tests.support.small_memory import small_memory
from tests.support.tiny_runs import evaluated_texts

PROMPT = "What is 2 + 2?"


@pytest.fixture(scope="module")
def scorer(lora_run: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(lora_run, device="cpu")


@pytest.fixture(scope="module")
def url(scorer: RewardScorer) -> Iterator[str]:
    with served(scorer, ServerOptions(max_items=50, max_body_bytes=200_000)) as (address, _):
        yield address


def post(url: str, path: str, body: Any, **kwargs: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=30, **kwargs)


# --- The same scores -------------------------------------------------------------------------------------------------


def test_every_protocol_gives_the_models_scores(url: str, scorer: RewardScorer) -> None:
    completions = [" 4", " 5", "", " it is 4", " 4"]
    expected = scorer.score([PROMPT] * 5, completions)
    close = pytest.approx(expected, abs=1e-5)
    items = [{"prompt": PROMPT, "completion": completion} for completion in completions]
    answer = post(url, "/score", {"items": items}).json()
    assert answer["scores"] == close and answer["model"] == "tiny" and answer["num_tokens"] > 0
    assert answer["normalized_scores"] == pytest.approx(scorer.normalize(expected), abs=1e-4)
    assert post(url, "/score", items[0]).json()["scores"] == pytest.approx(expected[:1], abs=1e-5)
    ranked = post(url, "/rank", {"prompt": PROMPT, "completions": completions, "top_k": 2}).json()
    assert ranked["scores"] == close
    best = sorted(range(5), key=lambda place: -expected[place])
    assert len(ranked["order"]) == 2 and expected[ranked["order"][0]] == pytest.approx(expected[best[0]], abs=1e-5)
    assert ranked["ranks"][0] == ranked["ranks"][4], "equal completions are equally good"
    texts = [scorer.encoder.render(PROMPT, completion) for completion in completions]
    for queries in (texts, [text.removesuffix(scorer.tokenizer.eos_token) for text in texts]):
        reward = post(url, "/get_reward", {"query": queries, "prompts": [PROMPT] * 5, "labels": [None] * 5}).json()
        assert reward["rewards"] == reward["scores"] == close
    for path in ("/pooling", "/v1/pooling"):
        pooled = post(url, path, {"model": "any", "input": texts}).json()
        assert [row["data"][0] for row in pooled["data"]] == close and pooled["object"] == "list"
    ids = [scorer.encoder.encode(PROMPT, completion) for completion in completions]
    by_ids = post(url, "/v1/classify", {"input": ids}).json()
    assert [row["probs"][0] for row in by_ids["data"]] == close and by_ids["data"][0]["num_classes"] == 1
    assert by_ids["usage"]["prompt_tokens"] == sum(map(len, ids))
    one = post(url, "/classify", {"input": texts[0], "use_activation": True}).json()
    assert one["data"][0]["probs"][0] == pytest.approx(float(torch.sigmoid(torch.tensor(expected[0]))), abs=1e-5)


def test_conversations(url: str, scorer: RewardScorer) -> None:
    if not scorer.encoder.chat_template:
        pytest.skip("the tiny model has no chat template")
    user, answer = {"role": "user", "content": PROMPT}, {"role": "assistant", "content": "4"}
    expected = scorer.score_one([user], [answer])
    bodies = (
        {"messages": [user, answer]},
        {"prompt": [user], "completion": [answer]},
        {"prompt": [user], "completion": "4"},
    )
    for body in bodies:
        assert post(url, "/score", body).json()["scores"][0] == pytest.approx(expected, abs=1e-5)
    pooled = post(url, "/pooling", {"messages": [user, answer]}).json()
    assert pooled["data"][0]["data"][0] == pytest.approx(expected, abs=1e-5)


def test_fields_that_clients_of_vllm_send_are_taken(url: str, scorer: RewardScorer) -> None:
    text = scorer.encoder.render(PROMPT, " 4")
    expected = pytest.approx(scorer.score(PROMPT, " 4"), abs=1e-5)
    others = {"model": "any", "user": "me", "priority": 0, "request_id": "r", "encoding_format": "float"}
    none = {"chat_template": None, "chat_template_kwargs": {}, "softmax": False, "activation": False, "normalize": None}
    body = {"input": text, **others, **none, "use_activation": None, "add_special_tokens": True, "task": "classify"}
    assert post(url, "/pooling", body).json()["data"][0]["data"][0] == expected
    assert post(url, "/v1/classify", body).json()["data"][0]["probs"][0] == expected


def test_rank_reads_a_prompt_once_that_all_repeat(url: str, scorer: RewardScorer) -> None:
    body = {"prompt": PROMPT, "completions": [f"{PROMPT} 4", f"{PROMPT} 5"]}
    assert post(url, "/rank", body).json()["scores"] == pytest.approx(scorer.score(PROMPT, [" 4", " 5"]), abs=1e-5)


def test_tools_of_a_conversation_are_rendered(scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = scorer.encoder.encode_many

    def encode_many(prompts: Any, completions: Any, tools: Any) -> Any:
        seen.extend(tools)
        return real(prompts, completions, [None] * len(prompts))

    monkeypatch.setattr(scorer.encoder, "encode_many", encode_many)
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "4"}]
    with served(scorer) as (url, _):
        for tools in ([{"name": "f"}], '[{"name": "f"}]'):
            assert post(url, "/pooling", {"messages": messages, "tools": tools}).status_code == 200
    assert seen == [[{"name": "f"}]] * 2


def test_many_clients_each_get_their_own_score(
    url: str, scorer: RewardScorer, lora_run: Path, pairs_file: Path
) -> None:
    prompts, completions = evaluated_texts(lora_run, pairs_file)
    prompts = [f"{prompt} ({number})" for number, prompt in enumerate(prompts * 4)]
    expected = scorer.score(prompts, completions * 4)

    def ask(number: int) -> tuple[float, str]:
        body = {"prompt": prompts[number], "completion": (completions * 4)[number]}
        answer = post(url, "/score", body, headers={"X-Request-Id": f"n{number}"})
        return answer.json()["scores"][0], answer.headers["x-request-id"]

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(ask, range(len(prompts))))
    assert [score for score, _ in found] == pytest.approx(expected, abs=1e-5)
    assert [name for _, name in found] == [f"n{number}" for number in range(len(prompts))]


def test_what_is_served(url: str, scorer: RewardScorer) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "alive"}
    assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
    info = httpx.get(f"{url}/info").json()
    assert info["max_length"] == 1024 and info["score_mean"] == scorer.contract.score_mean
    assert info["limits"]["max_items"] == 50 and (info["dtype"], info["exact"]) == ("float32", True)
    post(url, "/score", {"prompt": "a", "completion": "b"})
    counted = httpx.get(f"{url}/metrics").text
    for name in (
        'rm_scale_requests_total{route="/score",status="200"}',
        "rm_scale_scores_total",
        "rm_scale_queue_tokens",
    ):
        assert name in counted
    assert httpx.get(f"{url}/openapi.json").status_code == 200


# --- Refusals --------------------------------------------------------------------------------------------------------

BAD = [
    ("/score", {}, 422, "prompt and completion, or messages, or text"),
    ("/score", {"prompt": "a"}, 422, "item 0: missing_key"),
    ("/score", {"items": []}, 422, "at least 1"),
    ("/score", {"prompt": "a", "completion": " 7" * 2000}, 422, "item 0: a text is too long to be scored"),
    ("/score", {"prompt": "a", "completion": "b", "typo": 1}, 422, "typo"),
    ("/score", {"prompt": [{"content": "a"}], "completion": "b"}, 422, "prompt[0] has no role"),
    ("/score", {"messages": [{"role": "assistant", "content": "b"}]}, 422, "bad_conversation"),
    ("/score", {"items": [{"text": "a"}] * 51}, 413, "51 texts, at most 50 in a request"),
    ("/rank", {"prompt": "a", "completions": []}, 422, "at least 1"),
    ("/rank", {"prompt": "a", "completions": ["b"] * 51}, 413, "51 texts"),
    ("/get_reward", {"query": "not a list"}, 422, "query"),
    ("/pooling", {}, 422, "input or messages"),
    ("/pooling", {"input": []}, 422, "input is empty"),
    ("/pooling", {"input": [[]]}, 422, "0 tokens, from 1 to 1024"),
    ("/pooling", {"input": [[1, 999_999]]}, 422, "token ids are from 0 to"),
    ("/pooling", {"input": "a", "tools": [{"name": "f"}]}, 422, "tools need messages"),
    (
        "/pooling",
        {"input": "a", "chat_template": "{{ messages }}"},
        422,
        "chat_template: is not the scoring",
    ),
    ("/pooling", {"input": "a", "chat_template_kwargs": {"a": 1}}, 422, "chat_template_kwargs: Value error"),
    ("/classify", {"input": "a", "add_generation_prompt": True}, 422, "add_generation_prompt: Value error"),
    ("/classify", {"input": "a", "truncate_prompt_tokens": 2}, 422, "truncate_prompt_tokens: Value error"),
    ("/classify", {"input": "a", "softmax": True}, 422, "softmax: Value error"),
    ("/classify", {"input": "a", "activation": True}, 422, "activation: Value error"),
    ("/classify", {"input": "a", "normalize": True}, 422, "normalize: Value error"),
    ("/classify", {"input": "a", "task": "embed"}, 422, "task"),
    ("/classify", {"input": "a", "typo": 1}, 422, "typo"),
    ("/score", {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}, 422, "tools need messages"),
    ("/score", {"prompt": "a", "completion": "b", "text": "c"}, 422, "text holds 'c', which is not what is scored"),
    ("/score", {"prompt": "a", "text": "b"}, 422, "prompt holds 'a', which is not read"),
    ("/rank", {"prompt": "Is it?", "completions": ["Is it? No", "Yes"]}, 422, "response 0 repeats the prompt"),
    ("/rank", {"prompt": "a", "completions": ["b"], "tools": [{"name": "f"}]}, 422, "tools need messages"),
]


@pytest.mark.parametrize(("path", "body", "status", "text"), BAD)
def test_bad_requests_are_explained(url: str, path: str, body: Any, status: int, text: str) -> None:
    answer = post(url, path, body)
    assert answer.status_code == status and text in answer.json()["detail"], answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 5000, b'{"prompt": "\\ud800", "completion": "b"}'])
def test_bodies_that_are_no_json(url: str, content: bytes) -> None:
    answer = httpx.post(f"{url}/score", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in {400, 422} and answer.json()["detail"]


def test_bodies_that_are_too_large(url: str) -> None:
    answer = post(url, "/score", {"text": "a" * 300_000})
    assert answer.status_code == 413 and "larger than 200000 bytes" in answer.json()["detail"]

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"a" * 10_000

    streamed = httpx.post(f"{url}/score", content=endless(), timeout=600)
    assert streamed.status_code == 413


def whole_answer(url: str, request: bytes) -> bytes:
    """What a client gets that writes all of its request before it reads a byte."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        found = b""
        while part := client.recv(65536):
            found += part
        return found


def test_a_client_that_writes_all_first_gets_the_refusal(url: str, scorer: RewardScorer) -> None:
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    body = b"a" * 20_000_000
    sized = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    for request in (sized, chunked):
        answer = whole_answer(url, request)
        assert answer.startswith(b"HTTP/1.1 413 ") and b"larger than 200000 bytes" in answer
    with served(scorer, token="s3cret") as (guarded, _):
        assert whole_answer(guarded, sized).startswith(b"HTTP/1.1 401 ")


def test_a_client_that_asks_before_it_sends_is_not_told_to(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9999999\r\n\r\n")
        found = b""
        while part := client.recv(65536):
            found += part
    assert found.startswith(b"HTTP/1.1 413 ") and b"100 Continue" not in found


def test_headers_that_do_not_come(scorer: RewardScorer) -> None:
    with served(scorer, ServerOptions(header_timeout_seconds=0.3)) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        for begun in (b"", b"GET /health HTTP/1.1\r\nX-Slow: "):
            with socket.create_connection((host, int(port)), timeout=60) as client:
                client.sendall(begun)
                assert client.recv(4096) == b"", "closed"
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
            client.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
            while client.recv(4096):  # the rest of the first answer
                pass
        with httpx.Client(base_url=url, timeout=30) as whole:
            assert [whole.get("/health").status_code for _ in range(3)] == [200] * 3


def test_a_token_is_asked_for(scorer: RewardScorer) -> None:
    with served(scorer, token="s3cret") as (url, _):
        body = {"prompt": "a", "completion": "b"}
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "s3cret"},
            {"Authorization": "Basic s3cret"},
        ):
            answer = post(url, "/score", body, headers=header)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert post(url, "/score", body, headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/ready").status_code == 200
        assert post(url, "/score", body, headers={"Authorization": "Bearer"}).status_code == 401


def test_a_server_has_no_empty_token(scorer: RewardScorer) -> None:
    for token in ("", "  ", "\n"):
        with pytest.raises(UserError, match=r"token: is empty"):
            build_app(Service(scorer, "tiny", ServerOptions()), token)


def test_a_client_that_asks_too_often(scorer: RewardScorer) -> None:
    with served(scorer, ServerOptions(requests_per_second=2)) as (url, _):
        answers = [httpx.get(f"{url}/info") for _ in range(6)]
        assert [answer.status_code for answer in answers[:2]] == [200, 200]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1 and "more than 2 requests per second" in refused.text
        assert httpx.get(f"{url}/health").status_code == 200


class Slow:
    """A model that takes its time when told to."""

    def __init__(self, scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.num_batches = 0
        real = scorer.score_tokens

        def score_tokens(*args: Any, **kwargs: Any) -> list[float]:
            self.num_batches += 1
            self.gate.wait(600)
            return real(*args, **kwargs)

        self.gate.set()
        monkeypatch.setattr(scorer, "score_tokens", score_tokens)


@pytest.fixture
def slow(scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(scorer, monkeypatch)


def test_a_full_queue_and_an_answer_that_takes_too_long(scorer: RewardScorer, slow: Slow) -> None:
    limits = ServerOptions(max_queue_tokens=60, max_tokens_per_batch=30, request_timeout_seconds=1.0)
    with served(scorer, limits) as (url, service), ThreadPoolExecutor(8) as pool:
        slow.gate.clear()
        body = {"prompt": "a b c d e f", "completion": "g h i j k l"}
        first = pool.submit(post, url, "/score", body)
        wait_for(lambda: slow.num_batches > 1)  # the first is the golden scores
        others = [pool.submit(post, url, "/score", body) for _ in range(6)]
        answers = [future.result() for future in [first, *others]]
        assert sorted({answer.status_code for answer in answers}) == [429, 504]
        full = next(answer for answer in answers if answer.status_code == 429)
        assert "tokens wait already" in full.json()["detail"] and int(full.headers["retry-after"]) >= 1
        late = next(answer for answer in answers if answer.status_code == 504)
        assert "not scored in 1 s" in late.json()["detail"]
        batches = slow.num_batches
        slow.gate.set()
        assert post(url, "/score", body).status_code == 200
        assert slow.num_batches <= batches + 2, "what nobody waits for is not scored"
        wait_for(lambda: service.batcher._queued_tokens == 0)


def test_a_client_that_leaves_costs_nothing_more(scorer: RewardScorer, slow: Slow) -> None:
    with served(scorer, ServerOptions(max_tokens_per_batch=64)) as (url, service):
        slow.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            kept = pool.submit(post, url, "/score", {"prompt": "a", "completion": "b"})
            wait_for(lambda: slow.num_batches > 1)
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as client:
                content = json.dumps({"items": [{"text": f"text {number}"} for number in range(40)]}).encode()
                head = "POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
                client.sendall(f"{head}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
                wait_for(lambda: service.batcher._queued_tokens > 0)
            wait_for(lambda: any(job.future.cancelled() for job in service.batcher._jobs))
            batches = slow.num_batches
            slow.gate.set()
            assert kept.result().status_code == 200
            wait_for(lambda: service.batcher._queued_tokens == 0)
        assert slow.num_batches == batches
        assert b"rm_scale_dropped_total 40.0" in service.metrics.text()


def test_a_body_that_does_not_come(scorer: RewardScorer) -> None:
    with served(scorer, ServerOptions(body_timeout_seconds=0.3)) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            client.settimeout(10)
            assert b" 408 " in client.recv(4096)
        assert post(url, "/score", {"prompt": "a", "completion": "b"}).status_code == 200


def test_scoring_that_breaks_is_not_the_end(scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(scorer) as (url, _):
        with monkeypatch.context() as patch:
            patch.setattr(scorer, "score_tokens", lambda *_, **__: 1 / 0)
            broken = post(url, "/score", {"prompt": "a", "completion": "b"})
            assert broken.status_code == 503 and "scoring failed (ZeroDivisionError)" in broken.json()["detail"]
        assert post(url, "/score", {"prompt": "a", "completion": "b"}).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(scorer, "score_tokens", lambda sequences, **_: [float("nan")] * len(sequences))
            odd = post(url, "/score", {"prompt": "a", "completion": "not b, which is known now"})
            assert odd.status_code == 422 and "a score is not finite" in odd.json()["detail"]


# --- Memory that runs out --------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def either(request: pytest.FixtureRequest, lora_run: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(lora_run, device="cpu", packed=request.param)


def test_a_batch_too_large_for_memory_is_halved_and_later_ones_are_smaller(
    either: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [[7 + number] * (10 + number % 7) for number in range(60)]
    expected = either.score_tokens(texts)
    batcher = Batcher(either, ServerOptions(max_tokens_per_batch=1000), Metrics())
    with small_memory(either, 100, monkeypatch) as memory:
        first = [batcher.submit([text], [str(number)]) for number, text in enumerate(texts)]
        batcher.start()
        assert [future.result(30)[0] for future in first] == pytest.approx(expected, abs=1e-5)
        seen = memory.num_failures
        assert 3 <= seen <= 6, "one for each halving, not one for each batch"
        assert batcher.budget.tokens <= 100
        many = batcher.submit(texts, [str(number) for number in range(60)])
        assert many.result(30) == pytest.approx(expected, abs=1e-5)
        assert memory.num_failures == seen, "what was learnt is kept"
        shared = [[5] * 60 + [6 + number] for number in range(30)]
        together = batcher.submit(shared, ["p"] * 30)
        assert together.result(30) == pytest.approx(either.score_tokens(shared, max_tokens=61), abs=1e-5)
        assert memory.num_failures == seen
    assert batcher.stop(5)
    assert b"rm_scale_scores_total 150.0" in batcher.metrics.text(), "nothing was scored twice"


def test_completions_of_one_prompt_that_are_too_many_for_memory(
    scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their prompt is computed once, so that a budget of all their tokens would be far too large."""
    texts = [[5] * 50 + [6 + number] * 2 for number in range(64)]
    expected = scorer.score_tokens(texts)
    batcher = Batcher(scorer, ServerOptions(max_tokens_per_batch=4000), Metrics())
    with small_memory(scorer, 112, monkeypatch) as memory:
        found = [batcher.submit(texts, ["p"] * 64), batcher.submit(texts, ["q"] * 64)]
        batcher.start()
        for future in found:
            assert future.result(30) == pytest.approx(expected, abs=1e-5)
        assert memory.num_failures <= 3 and 50 < batcher.budget.tokens <= 112
    assert batcher.stop(5)


def test_only_a_text_that_memory_never_suffices_for_is_refused(
    either: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [[7 + number] * 9 for number in range(20)]
    expected = either.score_tokens(texts)
    batcher = Batcher(either, ServerOptions(max_tokens_per_batch=2000), Metrics())
    with small_memory(either, 200, monkeypatch) as memory:
        before = [batcher.submit([text], [str(number)]) for number, text in enumerate(texts[:10])]
        mixed = batcher.submit([[5] * 9, [6] * 300, [7] * 9], ["a", "b", "c"])
        after = [batcher.submit([text], [str(number)]) for number, text in enumerate(texts[10:], 10)]
        batcher.start()
        assert [future.result(30)[0] for future in before + after] == pytest.approx(expected, abs=1e-5)
        with pytest.raises(
            Refused, match=r"a text of 300 tokens does not fit .*not even alone\. Fix: a shorter text"
        ) as told:
            mixed.result(30)
        assert (told.value.status, told.value.reason) == (507, "out_of_memory")
        assert batcher.budget.tokens == 2000, "the others were not the cause"
        assert memory.num_failures <= 8
        assert batcher.submit(texts[:3], ["a", "b", "c"]).result(30) == pytest.approx(expected[:3], abs=1e-5)
    assert batcher.stop(5)


def test_clients_are_told_of_memory(scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(scorer) as (url, _), small_memory(scorer, 64, monkeypatch):
        short, long = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " 7" * 200}
        assert post(url, "/score", short).status_code == 200
        answer = post(url, "/score", long)
        assert answer.status_code == 507 and answer.json()["reason"] == "out_of_memory"
        assert "does not fit the server's memory" in answer.json()["detail"] and "retry-after" not in answer.headers
        assert post(url, "/score", short).status_code == 200


# --- The batcher -----------------------------------------------------------------------------------------------------


def test_a_huge_request_does_not_hold_up_a_small_one(scorer: RewardScorer, slow: Slow) -> None:
    batcher = Batcher(scorer, ServerOptions(max_tokens_per_batch=40), Metrics())
    huge = batcher.submit([[5] * 20] * 30, [str(number) for number in range(30)])
    small = batcher.submit([[6] * 20], ["small"])
    slow.gate.set()
    done: list[float] = []
    small.add_done_callback(lambda _: done.append(sum(len(job.scores) for job in batcher._jobs)))
    batcher.start()
    assert len(huge.result(30)) == 30 and len(small.result(30)) == 1
    assert done[0] <= 4, "it was in one of the first batches"
    assert batcher.stop(5)


def test_a_budget_holds_for_every_batch(scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = scorer.score_tokens

    def score_tokens(sequences: Any, **kwargs: Any) -> list[float]:
        seen.append(len(sequences))
        return real(sequences, **kwargs)

    monkeypatch.setattr(scorer, "score_tokens", score_tokens)
    batcher = Batcher(scorer, ServerOptions(max_tokens_per_batch=100), Metrics())
    shared = [[7] * 50 + [8 + number] for number in range(60)]  # one prompt, computed once for as many as fit
    future = batcher.submit(shared, ["p"] * 60)
    batcher.start()
    assert future.result(30) == pytest.approx(real(shared), abs=1e-5)
    assert max(seen) == 50 and sum(seen) == 60
    batcher.stop(5)


def test_requests_about_one_prompt_come_together_and_count_it_once(scorer: RewardScorer) -> None:
    batcher = Batcher(scorer, ServerOptions(max_tokens_per_batch=100), Metrics())
    first = [batcher.submit([[7] * 40 + [8 + number] * 5], ["p"]) for number in range(2)]
    others = [batcher.submit([[10 + number] * 45], [str(number)]) for number in range(3)]
    last = [batcher.submit([[7] * 40 + [30 + number] * 5], ["p"]) for number in range(9)]
    batches = []
    while batcher._jobs:
        batches.append([job.future for job, _ in batcher._take()])
    assert batches == [first + last, others[:2], others[2:]], "40 + 11 x 5 tokens fit, 45 more don't"
    assert batcher._queued_tokens == 0
    padding = Filling(100, shares_prompts=False)
    assert [padding.add("p", [[7] * 40 + [8] * 5]) for _ in range(3)] == [True, True, False]


def test_the_oldest_request_goes_first_however_many_share_another_prompt(scorer: RewardScorer) -> None:
    batcher = Batcher(scorer, ServerOptions(max_tokens_per_batch=60), Metrics())
    popular = [batcher.submit([[7] * 40 + [8 + number] * 5], ["p"]) for number in range(9)]
    lonely = batcher.submit([[9] * 45], ["other"])
    batches = []
    while batcher._jobs:
        batches.append([job.future for job, _ in batcher._take()])
        popular.append(batcher.submit([[7] * 40 + [50 + len(batches)] * 5], ["p"])) if len(batches) < 5 else None
    assert next(number for number, batch in enumerate(batches) if lonely in batch) == 3
    assert sum(map(len, batches)) == len(popular) + 1


def test_jobs_are_split_by_prompt() -> None:
    job = Job([[1, 2, 3], [1, 2, 4], [9, 9]], ["a", "a", "b"])
    job.split(100, shares_prompts=True)
    assert list(job.parts) == [([0, 1], 4), ([2], 2)] and job.num_tokens == 6
    alone = Job([[1, 2, 3], [1, 2, 4]], ["a", "a"])
    alone.split(100, shares_prompts=False)
    assert list(alone.parts) == [([0], 3), ([1], 3)]


def test_an_idle_batcher_waits_for_more_only_when_told(scorer: RewardScorer) -> None:
    batcher = Batcher(scorer, ServerOptions(max_wait_seconds=0.3, max_tokens_per_batch=1000), Metrics())
    batcher.start()
    started = time.monotonic()
    futures = [batcher.submit([[5, 6, 7]], ["a"]) for _ in range(3)]
    scores = [future.result(10)[0] for future in futures]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5), "the same text, in other places of a row"
    assert time.monotonic() - started >= 0.3
    assert b"rm_scale_batch_tokens_count 1.0" in batcher.metrics.text(), "one batch of all three"
    batcher.stop(5)
