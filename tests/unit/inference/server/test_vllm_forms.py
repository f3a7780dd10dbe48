"""vLLM's, SGLang's and OpenRLHF's forms, field by field: the contract's scores, in answers as their classes are."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import BaseModel

from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.inference.server import vllm_protocols as form
from rm_scale.inference.server.vllm_routes import shared_beginnings
from tests.support.serving import served
from tests.support.vllm_server import THEIRS, differences, vllm_server

PROMPT, ANSWERS = "What is 2 + 2?", [" 4", " 5", " four"]


@pytest.fixture(scope="module")
def scorer(lora_run: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(lora_run, device="cpu")


@pytest.fixture(scope="module")
def url(scorer: RewardScorer) -> Iterator[str]:
    with served(scorer) as (address, _):
        yield address


@pytest.fixture(scope="module")
def expected(scorer: RewardScorer) -> list[float]:
    return scorer.score(PROMPT, ANSWERS)


def post(url: str, path: str, body: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=30)


def good(url: str, path: str, body: Any) -> Any:
    answer = post(url, path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def close(values: Any) -> Any:
    return pytest.approx(values, abs=1e-5)


# --- Answers ---------------------------------------------------------------------------------------------------------


PAIRS = {"text_1": PROMPT, "text_2": ANSWERS}
BODIES = [
    ("/classify", {"input": ["a", "b"]}),
    ("/pooling", {"input": ["a", "b"]}),
    ("/pooling", {"input": "a", "encoding_format": "base64"}),
    ("/score", PAIRS),
    ("/rerank", {"query": PROMPT, "documents": [*ANSWERS, {"content": [{"type": "text", "text": "b"}]}]}),
    ("/v1/embeddings", {"input": ["a", "b"]}),
    ("/v1/models", None),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_answers_have_the_fields_of_vllms_own(url: str, path: str, body: Any) -> None:
    answer = httpx.get(url + path).json() if body is None else good(url, path, body)
    assert THEIRS["version"].startswith("vLLM 0.32.0")
    assert differences(path, answer) == []


def test_the_small_server_of_these_tests_answers_so_too(scorer: RewardScorer) -> None:
    with vllm_server(scorer) as server:
        body = {"model": "served", "input": [[1, 2]], "use_activation": False}
        assert differences("/classify", good(server.url, "/classify", body)) == []
        assert differences("/v1/models", httpx.get(f"{server.url}/v1/models").json()) == []


OURS: dict[str, tuple[type[BaseModel], ...]] = {
    "/classify": (form.PoolingRequest,) * 2,
    "/pooling": (form.PoolingRequest,) * 2,
    "/score": (form.TextScoreRequest, form.DocumentScoreRequest, form.ItemScoreRequest, form.DataScoreRequest),
    "/rerank": (form.RerankRequest,),
}


@pytest.mark.parametrize("path", OURS)
def test_every_field_of_vllms_requests_is_known(path: str) -> None:
    for fields, ours in zip(THEIRS["request_fields"][path].values(), OURS[path], strict=True):
        assert [name for name in fields if name not in ours.model_fields] == []


def test_an_answer_with_another_field_is_found() -> None:
    """The check above does not pass whatever it is given."""
    usage = {"prompt_tokens": 1, "total_tokens": 1, "completion_tokens": 0}
    answer = {"id": "a", "object": "list", "created": 1, "model": "m", "data": [], "usage": usage}
    assert "prompt_tokens_details" in " ".join(differences("/score", answer))


# --- Scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_a_pair_is_prompt_and_completion(url: str, expected: list[float], path: str) -> None:
    parts = [{"content": [{"type": "text", "text": answer}]} for answer in ANSWERS]
    for body in (
        PAIRS,
        {"queries": [PROMPT] * 3, "documents": ANSWERS},
        {"queries": {"content": [{"type": "text", "text": PROMPT}]}, "items": parts},
        {"data_1": [PROMPT], "data_2": ANSWERS, "use_activation": False, "max_tokens_per_doc": 0},
    ):
        answer = good(url, path, body)
        assert [row["score"] for row in answer["data"]] == close(expected), body
        assert [row["index"] for row in answer["data"]] == [0, 1, 2]
    sigmoid = torch.sigmoid(torch.tensor(expected)).tolist()
    asked = good(url, path, {**PAIRS, "use_activation": True})
    assert [row["score"] for row in asked["data"]] == close(sigmoid)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_come_best_first(url: str, expected: list[float], path: str) -> None:
    order = sorted(range(3), key=lambda place: -expected[place])
    found = good(url, path, {"query": PROMPT, "documents": ANSWERS})["results"]
    assert [row["index"] for row in found] == order
    assert [row["document"]["text"] for row in found] == [ANSWERS[place] for place in order]
    assert [row["relevance_score"] for row in found] == close([expected[place] for place in order])
    best = good(url, path, {"query": PROMPT, "documents": ANSWERS, "top_n": 1})["results"]
    assert [row["index"] for row in best] == order[:1]


def test_the_client_of_verl_for_vllm(url: str, scorer: RewardScorer) -> None:
    """verl 0.9.1 (`reward_loop.py`) takes the BOS off a rendered conversation, and reads `data[-1].probs[-1]`."""
    chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "4"}]
    text = scorer.tokenizer.apply_chat_template(chat, add_generation_prompt=False, tokenize=False)
    text = text.removeprefix(scorer.tokenizer.bos_token or "")
    answer = good(url, "/classify", {"model": "/path/of/verl", "input": text, "use_activation": False})
    assert answer["data"][-1]["probs"][-1] == close(scorer.score_one(chat[:1], chat[1:]))


def test_the_client_of_verl_for_sglang(url: str, scorer: RewardScorer, expected: list[float]) -> None:
    """verl (`reward_loop.py`) takes the BOS off a rendered text, and reads `data[-1].embedding[-1]`."""
    text = scorer.encoder.render(PROMPT, ANSWERS[0])
    answer = good(url, "/v1/embeddings", {"model": "/path/of/verl", "input": text})
    assert answer["data"][-1]["embedding"][-1] == close(expected[0])
    ids = scorer.encoder.encode(PROMPT, ANSWERS[0])
    assert good(url, "/v1/embeddings", {"input": ids})["data"][0]["embedding"] == close(expected[:1])


@pytest.mark.parametrize("path", ["/pooling", "/v1/embeddings"])
@pytest.mark.parametrize(
    ("dtype", "order", "code", "error"),
    [(None, None, "<f", 1e-6), ("float32", "big", ">f", 1e-6), ("float16", "little", "<e", 1e-2)],
)
def test_scores_as_bytes(
    url: str, scorer: RewardScorer, expected: list[float], path: str, dtype: Any, order: Any, code: str, error: float
) -> None:
    text = scorer.encoder.render(PROMPT, ANSWERS[0])
    body = {"input": text, "encoding_format": "base64", "embed_dtype": dtype, "endianness": order}
    (row,) = good(url, path, body)["data"]
    (score,) = struct.unpack(code, base64.b64decode(row.get("data") or row["embedding"]))
    assert score == pytest.approx(expected[0], abs=error * 10)


def test_messages_may_hold_parts(url: str, scorer: RewardScorer) -> None:
    """Joined with nothing in between, as in training."""
    user = {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "4"}]}
    expected = scorer.score_one([{"role": "user", "content": PROMPT}], [{"role": "assistant", "content": "4"}])
    for body in ({"messages": [user, answer]}, {"messages": [user, answer], "add_special_tokens": False}):
        assert good(url, "/classify", body)["data"][0]["probs"] == close([expected])
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    refused = post(url, "/classify", {"messages": [image, answer]})
    assert refused.status_code == 422 and "image_url" in refused.json()["detail"]


# --- Fields ----------------------------------------------------------------------------------------------------------

TAKEN = {
    **{"model": "any", "user": "me", "priority": 1, "request_id": "r", "cache_salt": "s", "rid": "1"},
    **{"truncation_side": "left", "padding": "do_not_pad", "use_activation": None, "task": "classify"},
    **dict.fromkeys(("truncate_prompt_tokens", "dimensions", "normalize", "chat_template", "softmax")),
    **{"add_generation_prompt": False, "continue_final_message": False, "chat_template_kwargs": {}},
    **{"encoding_format": "float", "embed_dtype": "float32", "endianness": "native"},
}
REFUSED = {
    **{"truncate_prompt_tokens": 5, "padding": "max_length", "mm_processor_kwargs": {"a": 1}, "dimensions": 1},
    **{"normalize": True, "task": "embed", "chat_template": "{{ messages }}", "chat_template_kwargs": {"a": 1}},
    **{"add_generation_prompt": True, "continue_final_message": True, "media_io_kwargs": {"a": {}}},
    **{"encoding_format": "bytes", "embed_dtype": "int8", "endianness": "middle", "activation": True, "typo": 1},
}
PAIR_REFUSED = {
    **{"instruction": "Judge.", "max_tokens_per_query": 4, "max_tokens_per_doc": 4, "chat_template_kwargs": {"a": 1}},
    **{"truncate_prompt_tokens": -1, "typo": 1},
}


@pytest.mark.parametrize("path", ["/classify", "/pooling"])
def test_fields_that_change_nothing_are_taken(url: str, scorer: RewardScorer, expected: list[float], path: str) -> None:
    text = scorer.encoder.render(PROMPT, ANSWERS[0])
    (row,) = good(url, path, {"input": text, **TAKEN})["data"]
    assert (row.get("probs") or row["data"]) == close(expected[:1])


def test_the_contracts_own_template_is_taken(url: str, scorer: RewardScorer) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    body = {"messages": messages, "chat_template": scorer.encoder.chat_template}
    assert good(url, "/classify", body) and scorer.encoder.chat_template


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_would_change_the_score_is_refused_by_name(url: str, name: str) -> None:
    for path in ("/classify", "/pooling"):
        answer = post(url, path, {"input": "a", name: REFUSED[name]})
        assert answer.status_code == 422 and name in answer.json()["detail"], answer.text


@pytest.mark.parametrize("name", PAIR_REFUSED)
def test_the_same_for_pairs(url: str, name: str) -> None:
    for path, body in (("/score", PAIRS), ("/v1/score", PAIRS), ("/rerank", {"query": "a", "documents": ["b"]})):
        answer = post(url, path, {**body, name: PAIR_REFUSED[name]})
        assert answer.status_code == 422 and name in answer.json()["detail"], answer.text


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        (
            "/score",
            {"text_1": ["a", "b"], "text_2": ["c"] * 3},
            "2 and 3 texts: must be as many, or one and any",
        ),
        ("/score", {"text_1": "a", "text_2": []}, "1 and 0 texts"),
        ("/score", {"text_1": "a"}, "text_2: Field required"),
        (
            "/rerank",
            {"query": "a", "documents": [{"content": [{"type": "image_url"}]}]},
            "'image_url': only text",
        ),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/v1/embeddings", {"input": []}, "input is empty"),
        ("/v1/embeddings", {"input": "a", "lora_path": "x"}, "lora_path"),
        ("/v1/score", {"text_1": "a", "text_2": " 7" * 2000}, "item 0: a text is too long to be scored"),
    ],
)
def test_refusals_are_said_in_openais_form_too(url: str, path: str, body: Any, text: str) -> None:
    answer = post(url, path, body)
    assert answer.status_code == 422 and text in answer.json()["detail"], answer.text
    error = answer.json()["error"]
    assert error["message"] == answer.json()["detail"] and error["code"] == 422 and error["param"] is None
    assert error["type"] == "UnprocessableEntityError"


def test_our_own_form_of_score_is_as_it_was(url: str, expected: list[float]) -> None:
    items = [{"prompt": PROMPT, "completion": answer} for answer in ANSWERS]
    answer = good(url, "/score", {"items": items})
    assert answer["scores"] == close(expected) and "data" not in answer
    refused = post(url, "/score", {**items[0], "typo": 1})
    assert refused.json()["detail"] == "body.item.typo: Extra inputs are not permitted. Fix: see /docs."


# --- OpenRLHF --------------------------------------------------------------------------------------------------------


def test_openrlhfs_client_is_told_why_in_the_only_place_that_it_shows(scorer: RewardScorer) -> None:
    """It logs status and reason phrase of an answer, and nothing that stands in its body."""
    with served(scorer, token="s3cret") as (url, _):
        headers = {"Authorization": "Bearer s3cret"}
        long = httpx.post(f"{url}/get_reward", json={"query": ["7 " * 3000]}, headers=headers)
        assert long.status_code == 422
        assert long.reason_phrase == long.json()["detail"] and "too long to be scored: " in long.reason_phrase
        assert "x-reason-phrase" not in long.headers
        odd = httpx.post(f"{url}/get_reward", json={"query": ["é\n" * 3000, "b"], "prompts": 3}, headers=headers)
        assert odd.reason_phrase.isascii() and "\n" not in odd.reason_phrase
        nobody = httpx.post(f"{url}/get_reward", json={"query": ["a"]})
        assert nobody.reason_phrase == "no valid token. Fix: Authorization: Bearer TOKEN."
        other = httpx.post(f"{url}/score", json={}, headers=headers)
        assert other.reason_phrase == "Unprocessable Entity" or other.reason_phrase == "Unprocessable Content"


# --- Token ids -------------------------------------------------------------------------------------------------------


def test_token_ids_that_begin_alike_share_a_prompt() -> None:
    keys = shared_beginnings([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9], [7, 8], [7, 8]])
    assert keys[0] == keys[1] == keys[2] != keys[3] and keys[3] == keys[4]
    assert len(set(shared_beginnings([[1], [2], [3]]))) == 3
