"""Scoring at a server of ours and at one that answers as vLLM: the model's scores, or a refusal that says why."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rm_scale.cli import main
from rm_scale.errors import ModelError
from rm_scale.inference.endpoint import Endpoint
from rm_scale.inference.endpoint_scorer import EndpointScorer
from rm_scale.inference.http_client import RemoteError
from rm_scale.inference.parallel_requests import THREAD_NAME
from rm_scale.inference.reward_function import reward_function
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.launching import read_lines
from tests.support.serving import served
from tests.support.vllm_server import VllmServer, problem, vllm_server

PROMPTS: list[Any] = ["2 + 2 =", "2 + 2 =", "Say no.", [{"role": "user", "content": "Hi"}]]
COMPLETIONS: list[Any] = [" 4", " ü 5", "", [{"role": "assistant", "content": "Hello"}]]


@pytest.fixture(scope="module")
def scorer(lora_run: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(lora_run, device="cpu")


@pytest.fixture(scope="module")
def ours(scorer: RewardScorer) -> Iterator[str]:
    with served(scorer) as (url, _):
        yield url


@pytest.fixture
def vllm(scorer: RewardScorer) -> Iterator[VllmServer]:
    with vllm_server(scorer) as server:
        yield server


def endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(url, **{"backoff_seconds": 0.01, "max_retries": 2, **options})


def rows_file(folder: Path, num_rows: int = 5) -> Path:
    rows = [{"id": n, "prompt": "2 + 2 =", "completion": f" {n}"} for n in range(num_rows)]
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- The same scores -------------------------------------------------------------------------------------------------


def test_a_server_gives_the_scores_of_the_model(
    lora_run: Path, scorer: RewardScorer, ours: str, vllm: VllmServer, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [scorer.score_one(*pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    with caplog.at_level("INFO", logger="rm_scale"):
        for url, dtype in ((ours, "float32"), (vllm.url, "unknown")):
            remote = EndpointScorer.from_folder(lora_run, endpoint(url), texts_per_request=2)
            assert remote.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
            assert remote.score("2 + 2 =", " 4", normalized=True) == pytest.approx(
                scorer.normalize(expected[:1])[0], abs=1e-4
            )
            assert remote.score_texts([scorer.encoder.render("2 + 2 =", " 4")])[0] == pytest.approx(
                expected[0], abs=1e-5
            )
            assert remote.dtype == dtype
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert f"{ours}: rm-scale" in told and "(model tiny, 1024 tokens, float32), found" in told
    assert f"{vllm.url}: vLLM 0.32.0 (model served, 4096 tokens), found" in told
    assert "golden scores of" in told and "allowed 0.0001 in float32)" in told
    assert all(body["use_activation"] is False and body["model"] == "served" for body in vllm.bodies)
    assert max(len(body["input"]) for body in vllm.bodies) == 2


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
def test_score_at_a_server(lora_run: Path, scorer: RewardScorer, vllm: VllmServer, tmp_path: Path, output: str) -> None:
    source, target = rows_file(tmp_path), tmp_path / output
    files = ["--model", str(lora_run), "--input", str(source), "--output", str(target)]
    assert main(["score", *files, "--endpoint", vllm.url]) == 0
    expected = scorer.score("2 + 2 =", [f" {n}" for n in range(5)])
    if output.endswith("jsonl"):
        found = [row["score"] for row in read_lines(target)]
    else:
        import pyarrow.parquet as pq

        found = pq.read_table(target)["score"].to_pylist()
    assert found == pytest.approx(expected, abs=1e-5)


def test_rank_at_a_server(lora_run: Path, scorer: RewardScorer, ours: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    answers = [" 4", " 5", " four", " 4"]
    source.write_text(json.dumps({"prompt": "2 + 2 =", "completions": answers}) + "\n")
    files = ["--model", str(lora_run), "--input", str(source), "--output", str(target)]
    assert main(["rank", *files, "--endpoint", ours]) == 0
    (row,) = read_lines(target)
    expected = sorted(scorer.score("2 + 2 =", answers), reverse=True)
    assert row["scores"] == pytest.approx(expected, abs=1e-5)


def test_a_reward_function_over_a_server(lora_run: Path, scorer: RewardScorer, vllm: VllmServer) -> None:
    """For a trainer; a text that the contract can't score gets no reward, and the others theirs."""
    remote = pickle.loads(pickle.dumps(EndpointScorer.from_folder(lora_run, vllm.url)))
    rewards = reward_function(remote)(["a", "a"], [" b", " 7" * 2000])
    assert rewards == [pytest.approx(scorer.score("a", " b"), abs=1e-5), None]


def test_eval_at_a_server(lora_run: Path, vllm: VllmServer, pairs_file: Path, tmp_path: Path) -> None:
    """The same numbers as with the model here, and the page says where they come from."""
    found = []
    for words in ((), ("--endpoint", vllm.url)):
        output = tmp_path / f"eval{len(words)}"
        command = ["eval", "--model", str(lora_run), "--dataset_path", str(pairs_file), "--output", str(output)]
        assert main([*command, "--max_samples", "20", "--num_resamples", "100", *words]) == 0
        found.append(json.loads((output / "evaluation.json").read_text()))
    here, there = found
    assert there["accuracy"] == here["accuracy"] and there["num_pairs"] == here["num_pairs"] == 20
    assert there["mean_margin"] == pytest.approx(here["mean_margin"], abs=1e-4)
    assert vllm.url in json.dumps(there) and vllm.url not in json.dumps(here)


def test_two_models_at_two_servers(
    lora_run: Path, full_run: Path, scorer: RewardScorer, vllm: VllmServer, tmp_path: Path
) -> None:
    other = RewardScorer.from_pretrained(full_run, device="cpu")
    source, target = rows_file(tmp_path), tmp_path / "out.jsonl"
    files = ["--model", str(lora_run), str(full_run), "--input", str(source), "--output", str(target)]
    with served(other) as (url, _):
        assert main(["score", *files, "--endpoint", vllm.url, url]) == 0
    completions = [f" {n}" for n in range(5)]
    both = zip(scorer.score("2 + 2 =", completions), other.score("2 + 2 =", completions), strict=True)
    assert [row["scores"] for row in read_lines(target)] == [pytest.approx(pair, abs=1e-5) for pair in both]


# --- While a server is busy, or goes away ----------------------------------------------------------------------------


def test_requests_are_in_flight_together(lora_run: Path, scorer: RewardScorer, vllm: VllmServer) -> None:
    remote = EndpointScorer.from_folder(lora_run, endpoint(vllm.url), texts_per_request=1, requests_in_flight=4)
    together = threading.Barrier(4)

    def wait(_: Any) -> None:
        together.wait(60)

    vllm.answers = [wait] * 8
    completions = [f" {n}" for n in range(8)]
    found = remote.score("2 + 2 =", completions)
    assert found == pytest.approx(scorer.score("2 + 2 =", completions), abs=1e-5)


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(lora_run: Path, vllm: VllmServer) -> None:
    remote = EndpointScorer.from_folder(lora_run, endpoint(vllm.url))
    asked = len(vllm.bodies)
    vllm.answers = [(503, problem("later", "ServiceUnavailableError", 503)), (429, problem("slower"))]
    assert remote.score("a", " b") == pytest.approx(vllm.scorer.score("a", " b"), abs=1e-5)
    assert len(vllm.bodies) == asked + 3
    vllm.answers = [(500, problem("broken", "InternalServerError", 500))]
    with pytest.raises(RemoteError, match=r"/classify: status 500, broken Fix: "):
        remote.score("a", " c")
    assert len(vllm.bodies) == asked + 4
    vllm.answers = [(503, problem("never", "ServiceUnavailableError", 503))] * 3
    with pytest.raises(RemoteError, match=r"no score after 3 tries, .*status 503, never\. Fix: see that a server runs"):
        remote.score("a", " d")


def test_a_failure_ends_the_other_requests(lora_run: Path, vllm: VllmServer) -> None:
    """At once, though another hangs, and what hung is not asked again."""
    remote = EndpointScorer.from_folder(lora_run, endpoint(vllm.url), texts_per_request=1, requests_in_flight=2)
    asked, both, release = len(vllm.bodies), threading.Barrier(2), threading.Event()
    answered = []

    def hang(_: Any) -> Any:
        both.wait(60)
        release.wait(60)
        answered.append(True)
        return 503, problem("later", "ServiceUnavailableError", 503)

    def refuse(_: Any) -> Any:
        both.wait(60)
        return 500, problem("no such thing", "InternalServerError", 500)

    vllm.answers = [hang, refuse]
    with pytest.raises(RemoteError, match="status 500, no such thing"):
        remote.score("a", [f" {n}" for n in range(6)])
    assert not answered
    release.set()
    for thread in threading.enumerate():
        if thread.name == THREAD_NAME:
            thread.join(60)
    assert answered and len(vllm.bodies) == asked + 2


def test_what_is_too_large_at_once_is_halved(lora_run: Path, scorer: RewardScorer, vllm: VllmServer) -> None:
    remote = EndpointScorer.from_folder(lora_run, endpoint(vllm.url))
    vllm.answers = [lambda body: (413, {"detail": "too large"}) if len(body["input"]) > 2 else None] * 9
    completions = [f" {n}" for n in range(7)]
    assert remote.score("2 + 2 =", completions) == pytest.approx(scorer.score("2 + 2 =", completions), abs=1e-5)


def test_what_was_scored_is_not_asked_again(
    lora_run: Path, scorer: RewardScorer, vllm: VllmServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = rows_file(tmp_path, 8), tmp_path / "out.jsonl"
    command = ["score", "--model", str(lora_run), "--input", str(source), "--output", str(target)]
    command += ["--chunk_rows", "2", "--endpoint", vllm.url]
    vllm.answers = [lambda _: None, lambda _: None, lambda _: None, (500, problem("gone wrong"))]
    assert main(command) == 2
    assert "status 500, gone wrong" in capsys.readouterr().err and not target.exists()
    vllm.bodies.clear()
    assert main(command) == 0
    golden = len(scorer.contract.golden_scores)
    assert sum(len(body["input"]) for body in vllm.bodies) == golden + 4
    expected = scorer.score("2 + 2 =", [f" {n}" for n in range(8)])
    assert [row["score"] for row in read_lines(target)] == pytest.approx(expected, abs=1e-5)


def test_parts_of_a_model_here_are_not_taken_for_those_of_a_server(
    lora_run: Path, vllm: VllmServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = rows_file(tmp_path, 4), tmp_path / "out.jsonl"
    command = ["score", "--model", str(lora_run), "--input", str(source), "--output", str(target), "--chunk_rows", "2"]
    vllm.answers = [lambda _: None, lambda _: None, (500, problem("gone wrong"))]
    assert main([*command, "--endpoint", vllm.url]) == 2
    assert main(command) == 2
    assert "holds parts that were scored with other" in capsys.readouterr().err


# --- Is it this model? -----------------------------------------------------------------------------------------------


def test_another_model_is_refused_with_the_texts_and_both_numbers(
    lora_run: Path, full_run: Path, scorer: RewardScorer
) -> None:
    other = RewardScorer.from_pretrained(full_run, device="cpu")
    golden = scorer.contract.golden_scores[0]
    there = other.score_tokens([golden.input_ids])[0]
    with vllm_server(other) as server, pytest.raises(ModelError) as caught:
        EndpointScorer.from_folder(lora_run, endpoint(server.url))
    text = str(caught.value)
    assert f"golden texts of {lora_run} score otherwise there (allowed 0.0001 in float32)" in text
    shown = " ".join(scorer.tokenizer.decode(golden.input_ids).split())[:60]
    assert f"{there:.6g} there, {golden.score:.6g} in the contract: {shown!r}"[:-1] in text
    assert "Fix: serve the model of this folder, or give --model the folder of the one that is served" in text


def test_a_lower_type_is_taken_when_it_is_said(
    lora_run: Path, scorer: RewardScorer, vllm: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each score a little off, as from a backbone in bfloat16."""
    real = scorer.score_tokens
    monkeypatch.setattr(scorer, "score_tokens", lambda ids: [one + 0.02 for one in real(ids)])
    with pytest.raises(ModelError, match=r"or --dtype here with the type that it was started with"):
        EndpointScorer.from_folder(lora_run, endpoint(vllm.url))
    assert EndpointScorer.from_folder(lora_run, endpoint(vllm.url), dtype="bfloat16").dtype == "bfloat16"


def changed_contract(folder: Path, target: Path, **values: Any) -> Path:
    """A copy of a model whose contract holds other values."""
    shutil.copytree(folder, target)
    path = target / "scoring_contract.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return target


def test_a_lower_type_allows_for_its_rounding_and_no_more(
    lora_run: Path, scorer: RewardScorer, vllm: VllmServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor where the evaluation set's scores are far apart: a neighbouring checkpoint is within their deviation."""
    folder = changed_contract(lora_run, tmp_path / "model", score_std=4.0)
    largest = max(1.0, *(abs(one.score) for one in scorer.contract.golden_scores))
    real = scorer.score_tokens
    monkeypatch.setattr(scorer, "score_tokens", lambda ids: [one + 0.06 * largest for one in real(ids)])
    with pytest.raises(ModelError, match=r"score otherwise there \(allowed 0\.05\d* in bfloat16"):
        EndpointScorer.from_folder(folder, endpoint(vllm.url), dtype="bfloat16")


def test_golden_texts_keep_their_order(
    lora_run: Path, scorer: RewardScorer, vllm: VllmServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each is within a lower type's rounding, but two that lie further apart than that come the other way round."""
    golden = [{"input_ids": one.input_ids, "score": 0.0} for one in scorer.contract.golden_scores]
    golden[1] = {**golden[1], "score": 0.06}
    folder = changed_contract(lora_run, tmp_path / "model", golden_scores=golden)
    found = {"scores": [0.02, 0.04]}
    monkeypatch.setattr(scorer, "score_tokens", lambda ids: [*found["scores"], *[0.0] * len(ids)][: len(ids)])
    assert EndpointScorer.from_folder(folder, endpoint(vllm.url), dtype="bfloat16").dtype == "bfloat16"
    found["scores"] = [0.04, 0.02]
    with pytest.raises(
        ModelError, match=r": 2 of .* but not to the order .*\n  0\.04 there, 0 .*\n  0\.02 there, 0\.06"
    ):
        EndpointScorer.from_folder(folder, endpoint(vllm.url), dtype="bfloat16")


def test_other_scores_are_taken_when_that_is_asked_for(
    lora_run: Path, full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = RewardScorer.from_pretrained(full_run, device="cpu")
    source, target = rows_file(tmp_path), tmp_path / "out.jsonl"
    command = ["score", "--model", str(lora_run), "--input", str(source), "--output", str(target)]
    with vllm_server(other) as server:
        assert main([*command, "--endpoint", server.url]) == 2
        assert "--allow_other_scores takes its scores as they are" in capsys.readouterr().err
        assert main([*command, "--endpoint", server.url, "--allow_other_scores"]) == 0
    told = capsys.readouterr().err
    assert "taken all the same, as asked (--allow_other_scores)" in told and "score otherwise there" in told
    assert [row["score"] for row in read_lines(target)] == pytest.approx(
        other.score("2 + 2 =", [f" {n}" for n in range(5)]), abs=1e-5
    )


def test_another_template_at_our_own_server_is_refused(lora_run: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    other = RewardScorer.from_pretrained(lora_run, device="cpu", chat_template=template, force_template=True)
    with served(other) as (url, _):
        with pytest.raises(ModelError, match=r"its chat template \(sha256 \w{12}\) is not .* Fix: rm-scale serve"):
            EndpointScorer.from_folder(lora_run, endpoint(url))
        assert EndpointScorer.from_folder(lora_run, endpoint(url), force_template=True).dtype == "float32"


def test_a_server_of_shorter_texts(lora_run: Path, scorer: RewardScorer, vllm: VllmServer, tmp_path: Path) -> None:
    """Each is told what to start; vLLM never more than the model has positions."""
    longer = changed_contract(lora_run, tmp_path / "longer", encoding={**scorer.contract.encoding, "max_length": 5000})
    with served(scorer) as (url, _), pytest.raises(ModelError) as caught:
        EndpointScorer.from_folder(longer, endpoint(url))
    assert f"another contract; rm-scale serve --model {longer}, or --model with the folder that" in str(caught.value)
    (longer / "config.json").write_text('{"max_position_embeddings": 8192}')
    with pytest.raises(ModelError, match=r"max_length 5000\. Fix: .* vllm serve \.\.\. --max-model-len 5000\."):
        EndpointScorer.from_folder(longer, endpoint(vllm.url))
    (longer / "config.json").write_text('{"text_config": {"max_position_embeddings": 4096}}')
    with pytest.raises(ModelError, match=r"names 4096 positions, and vLLM goes no further: rm-scale serve") as caught:
        EndpointScorer.from_folder(longer, endpoint(vllm.url))
    assert "--max-model-len" not in str(caught.value)


def test_sigmoids_are_recognised(lora_run: Path, vllm: VllmServer) -> None:
    vllm.reads_use_activation = False
    with pytest.raises(ModelError, match=r"Fix: these are the sigmoids of the scores, .*--pooler-config"):
        EndpointScorer.from_folder(lora_run, endpoint(vllm.url))


def test_what_can_not_be_checked_is_refused(lora_run: Path, vllm: VllmServer, tmp_path: Path) -> None:
    vllm.max_model_len = 512
    with pytest.raises(ModelError, match=r"takes texts of 512 tokens, .* has max_length 1024\. Fix: .*len 1024"):
        EndpointScorer.from_folder(lora_run, endpoint(vllm.url))
    folder = tmp_path / "model"
    shutil.copytree(lora_run, folder)
    contract = json.loads((folder / "scoring_contract.json").read_text())
    (folder / "scoring_contract.json").write_text(json.dumps({**contract, "golden_scores": []}))
    vllm.max_model_len = 4096
    with pytest.raises(ModelError, match=r"holds no golden scores, so what http.* serves can't be checked\. Fix: "):
        EndpointScorer.from_folder(folder, endpoint(vllm.url))
    (folder / "scoring_contract.json").unlink()
    with pytest.raises(ModelError, match=r"holds no scoring_contract\.json, so what .* can't be checked\. Fix: "):
        EndpointScorer.from_folder(folder, endpoint(vllm.url))


# --- What kind of server it is ---------------------------------------------------------------------------------------


def test_the_kind_of_server_is_found_or_said(ours: str, vllm: VllmServer) -> None:
    assert endpoint(ours).served.kind == "rm_scale" and endpoint(vllm.url).served.kind == "vllm"
    assert endpoint(f"{vllm.url}/classify", kind="vllm").url == vllm.url
    with pytest.raises(RemoteError, match=r"/info: status 404.*\n.*not known to be rm-scale serve\. Fix: .*kind vllm"):
        endpoint(vllm.url, kind="rm_scale")


def test_one_of_several_models_must_be_named(ours: str, vllm: VllmServer) -> None:
    vllm.names = ["a", "b"]
    with pytest.raises(RemoteError, match=r"which model of it is not said; there: a, b\. Fix: --endpoint_model"):
        endpoint(vllm.url)
    with pytest.raises(RemoteError, match=r"has no model c; there: a, b\. Fix: --endpoint_model"):
        endpoint(vllm.url, model="c")
    with pytest.raises(RemoteError, match=r"has no model c; there: tiny\. Fix"):
        endpoint(ours, model="c")
    assert endpoint(vllm.url, model="b").served.model == "b"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"detail": "Not Found"}), r"/classify: is not served there\. Fix: vllm serve MODEL --runner pooling"),
        ((200, {"data": [{"index": 0, "probs": [0.1, 0.9]}]}), r"gives 2 numbers per text, a reward model gives 1"),
        ((200, {"data": []}), r"does not hold 1 scores but 0\. Fix: a server of a reward model"),
        ((200, {"data": [{"index": 0, "probs": ["1.5"]}]}), r"does not hold 1 scores but 0"),
        ((200, {"data": "no"}), r"does not hold 1 scores but 0"),
        ((401, {"error": "Unauthorized"}), r"status 401, .*Fix: RM_SCALE_SERVE_TOKEN in the environment is not set"),
    ],
)
def test_answers_that_hold_no_scores(vllm: VllmServer, answer: Any, message: str) -> None:
    vllm.answers = [answer]
    with pytest.raises(RemoteError, match=message):
        endpoint(vllm.url).try_score([[1, 2, 3]])


def test_the_token_goes_along(vllm: VllmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    endpoint(vllm.url, token_env="MY_TOKEN").try_score([[1, 2, 3]])
    assert all(headers["Authorization"] == "Bearer s3cret" for headers in vllm.headers)


# --- Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--endpoint", "http://a:1", "http://b:1"], "--endpoint: 2 given for 1 models. Fix: one for each --model"),
        (
            ["--endpoint", "http://a:1", "--device", "cpu"],
            "--device with --endpoint: nothing is loaded. Fix",
        ),
        (["--endpoint", "http://a:1", "--no_contract"], "--no_contract with --endpoint: its golden scores are"),
        (["--endpoint_model", "m"], "--endpoint_model: only --endpoint URL reads it. Fix: leave it out, or give one."),
        (["--allow_other_scores"], "--allow_other_scores: only --endpoint URL reads it."),
        (["--endpoint", "http://h:abc"], "url=http://h:abc: is no address of a server, its host or port can't be read"),
        (["--endpoint_kind", "vllm"], "--endpoint_kind: only --endpoint URL reads it."),
        (["--endpoint", "http://a:1", "--texts_per_request", "0"], "--texts_per_request 0: must be from 1 to 4096."),
        (
            ["--endpoint", "http://a:1", "--request_timeout", "0"],
            "--request_timeout 0: must be above 0, at most",
        ),
        (["--endpoint", "host:8000"], "url=host:8000: is no address of a server. Fix: http://HOST:PORT"),
    ],
)
def test_options_that_make_no_sense(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    files = ["--model", str(lora_run), "--input", str(rows_file(tmp_path)), "--output", str(tmp_path / "out.jsonl")]
    assert main(["score", *files, *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_rank_needs_a_folder_beside_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--input", str(rows_file(tmp_path)), "--output", str(tmp_path / "out.jsonl")]
    assert main(["rank", *files, "--score_column", "id", "--endpoint", "http://a:1"]) == 2
    assert "--endpoint: without --model. Fix: --model DIR" in " ".join(capsys.readouterr().err.split())
