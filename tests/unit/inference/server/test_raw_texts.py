"""Every door for whole texts gives a policy's decoded tokens the score of their messages, or refuses them by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.errors import DataError
from rm_scale.inference.scoring.ensemble import Ensemble
from rm_scale.inference.scoring.row_files import Scorable
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.inference.server.server_options import ServerOptions
from rm_scale.modeling.scoring_contract import BaseModel, ScoringContract
from tests.support.serving import served
from tests.support.template_shapes import SHAPES, tokenizer_of

USER = {"role": "user", "content": "How many legs has a spider?"}
ANSWERS = ["Eight.", "A spider has eight legs.\n\nAn ant has six.", " Six. "]


def scorer_of(shape: str) -> RewardScorer:
    tokenizer = tokenizer_of(shape)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.score.weight, std=1.0)
    return RewardScorer(
        model,
        tokenizer,
        ScoringContract(
            encoding=TextEncoder(tokenizer, EncodingRules()).describe(),
            pad_token_id=int(tokenizer.pad_token_id),
            vocab_size=len(tokenizer),
            dtype="float32",
            compute_dtype="float32",
            base_model=BaseModel("none"),
        ),
    )


@pytest.fixture(scope="module", params=["qwen2_5-instruct", "qwen2_5-base", "gemma", "llama2", "phi3"])
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def scorer(shape: str) -> RewardScorer:
    return scorer_of(shape)


@pytest.fixture(scope="module")
def url(scorer: RewardScorer) -> Iterator[str]:
    with served(scorer, ServerOptions()) as (address, _):
        yield address


def post(url: str, path: str, body: Any) -> Any:
    return httpx.post(url + path, json=body, timeout=30)


def policy_texts(scorer: RewardScorer, shape: str) -> list[str]:
    """Prompt and response tokens decoded, as OpenRLHF sends them: up to the end of turn, or cut before it."""
    asked = scorer.tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    return [f"{asked}{answer}{SHAPES[shape][3]}" for answer in ANSWERS] + [f"{asked}{ANSWERS[0]}"]


def test_every_door_gives_the_score_of_the_messages(scorer: RewardScorer, shape: str, url: str) -> None:
    answers = [[{"role": "assistant", "content": answer}] for answer in (*ANSWERS, ANSWERS[0])]
    expected = pytest.approx(scorer.score([[USER]] * len(answers), answers), abs=1e-5)
    texts = policy_texts(scorer, shape)
    assert post(url, "/get_reward", {"query": texts}).json()["rewards"] == expected
    pad = scorer.tokenizer.pad_token
    assert post(url, "/get_reward", {"query": [pad + text + pad for text in texts]}).json()["rewards"] == expected
    assert [row["probs"][0] for row in post(url, "/classify", {"input": texts}).json()["data"]] == expected
    assert [row["data"][0] for row in post(url, "/pooling", {"input": texts}).json()["data"]] == expected
    assert post(url, "/score", {"items": [{"text": text} for text in texts]}).json()["scores"] == expected
    assert scorer.score_texts(texts) == expected
    scored = Ensemble([scorer]).score([Scorable(text=text) for text in texts], 4096)
    assert [one.scores[0] for one in scored] == expected


def test_a_text_without_an_answer_is_refused_by_name(scorer: RewardScorer, shape: str, url: str) -> None:
    asked = scorer.tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    good = policy_texts(scorer, shape)[0]
    for path, body in (
        ("/get_reward", {"query": [good, asked]}),
        ("/classify", {"input": [good, asked]}),
        ("/pooling", {"input": [good, asked]}),
        ("/score", {"items": [{"text": good}, {"text": asked}]}),
    ):
        answer = post(url, path, body)
        assert (answer.status_code, answer.json()["reason"]) == (422, "unfinished_text"), path
        assert "item 1: unfinished_text: the text ends before the assistant says anything" in answer.json()["detail"]
    with pytest.raises(DataError, match=r"text 1: unfinished_text: .* Fix: give the text up to the end of the answer"):
        scorer.score_texts([good, str(asked)])
    (scored,) = Ensemble([scorer]).score([Scorable(text=str(asked))], 4096)
    assert scored.problem is not None and scored.problem.startswith("unfinished_text: ")


def test_a_text_with_its_own_special_tokens_is_whole(scorer: RewardScorer, url: str) -> None:
    """`add_special_tokens` false: nothing is added to the text, so it must begin with the BOS of training."""
    text = scorer.encoder.render([USER], [{"role": "assistant", "content": ANSWERS[0]}])
    expected = pytest.approx([scorer.score_texts([text])[0]], abs=1e-5)
    bos = scorer.tokenizer.bos_token if scorer.encoder.adds_bos else ""
    answer = post(url, "/classify", {"input": f"{bos}{text}", "add_special_tokens": False})
    assert answer.json()["data"][0]["probs"] == expected
    bare = post(url, "/classify", {"input": text, "add_special_tokens": False})
    messages = {"messages": [USER, {"role": "assistant", "content": ANSWERS[0]}]}
    added = post(url, "/classify", {**messages, "add_special_tokens": True})
    if bos:
        assert bare.status_code == added.status_code == 422
        assert f"the text does not begin with {bos!r}, as all of training did. Fix: begin it" in bare.json()["detail"]
        assert "true would add a BOS to what the chat template writes. Fix: leave it out" in added.json()["detail"]
    else:
        assert bare.json()["data"][0]["probs"] == expected
        assert added.json()["data"] == post(url, "/classify", messages).json()["data"]


def test_some_of_these_add_a_bos() -> None:
    assert {scorer_of(shape).encoder.adds_bos for shape in ("qwen2_5-instruct", "llama2")} == {False, True}
