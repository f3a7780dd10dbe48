"""Scoring at a server that answers as SGLang: token ids there, one number each back, checked by the golden scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rm_scale.cli import main
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import ModelError
from rm_scale.inference.endpoint import Endpoint
from rm_scale.inference.endpoint_scorer import EndpointScorer
from rm_scale.inference.http_client import RemoteError
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.launching import read_lines
from tests.support.sglang_server import SglangServer
from tests.support.vllm_server import serving


@pytest.fixture(scope="module")
def scorer(lora_run: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(lora_run, device="cpu")


@pytest.fixture
def sglang(scorer: RewardScorer) -> Iterator[SglangServer]:
    with serving(SglangServer(scorer)) as server:
        yield server


@pytest.mark.parametrize("words", [(), ("--endpoint_kind", "sglang")])
def test_score_at_sglang(
    lora_run: Path,
    scorer: RewardScorer,
    sglang: SglangServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    completions = [f" {n}" for n in range(5)]
    source.write_text("".join(json.dumps({"prompt": "2 + 2 =", "completion": one}) + "\n" for one in completions))
    files = ["--model", str(lora_run), "--input", str(source), "--output", str(target)]
    assert main(["score", *files, "--endpoint", sglang.url, "--texts_per_request", "2", *words]) == 0
    found = [row["score"] for row in read_lines(target)]
    assert found == pytest.approx(scorer.score("2 + 2 =", completions), abs=1e-5)
    assert all(set(body) == {"input_ids"} and len(body["input_ids"]) <= 2 for body in sglang.bodies)
    assert f"{sglang.url}: SGLang (model served, 4096 tokens), {'as was said' if words else 'found'}" in (
        capsys.readouterr().err
    )


def test_a_text_that_it_refuses(lora_run: Path, scorer: RewardScorer, sglang: SglangServer) -> None:
    """Of as many tokens as its context, which it counts as too long."""
    remote = EndpointScorer.from_folder(lora_run, sglang.url)
    sglang.max_model_len = longest = 1024
    found = remote.try_score_tokens([[5, 6, 7], [5] * longest, [5, 6]])
    assert isinstance(found[1], RejectedRow)
    assert found[1].detail.startswith("status 400, The input (1024 tokens) is longer than the model's context length")
    assert [found[0], found[2]] == pytest.approx(scorer.score_tokens([[5, 6, 7], [5, 6]]), abs=1e-5)


def test_what_is_no_reward_model_there(lora_run: Path, full_run: Path, sglang: SglangServer) -> None:
    sglang.width = 32
    with pytest.raises(RemoteError, match=r"gives 32 numbers per text, a reward model gives 1\. Fix: serve a reward"):
        EndpointScorer.from_folder(lora_run, sglang.url)
    sglang.width = 1
    with pytest.raises(ModelError, match=r"golden texts of .* score otherwise there"):
        EndpointScorer.from_folder(full_run, sglang.url)
    sglang.max_model_len = 100
    with pytest.raises(ModelError, match=r"takes texts of 100 tokens, .* Fix: .*--context-length 1024"):
        EndpointScorer.from_folder(lora_run, sglang.url)
    with pytest.raises(RemoteError, match=r"has no model mine; there: served"):
        Endpoint(sglang.url, model="mine")
    sglang.is_generation = True
    with pytest.raises(RemoteError, match=r"serves a language model .* Fix: .*--is-embedding"):
        Endpoint(sglang.url)


@pytest.mark.parametrize("answer", [{"data": []}, [{"embedding": []}], [{"text": "a"}], ["a"], []])
def test_answers_that_hold_no_scores(sglang: SglangServer, answer: object) -> None:
    endpoint = Endpoint(sglang.url, "sglang")
    sglang.answers = [(200, answer)]
    with pytest.raises(RemoteError, match=r"does not hold 1 scores but 0"):
        endpoint.try_score([[1, 2, 3]])
