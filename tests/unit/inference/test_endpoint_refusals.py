"""A text that a server refuses, or gives no finite score, has none: the others are scored, and it is counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rm_scale.cli import main
from rm_scale.errors import DataError
from rm_scale.inference.endpoint import Endpoint
from rm_scale.inference.endpoint_scorer import EndpointScorer
from rm_scale.inference.http_client import RemoteError
from rm_scale.inference.reward_function import reward_function
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.launching import read_lines
from tests.support.serving import served
from tests.support.vllm_server import Answer, VllmServer, problem, vllm_server

TOO_LONG = problem("This model's maximum context length is 4096 tokens. However, your prompt has 5000 tokens.")
NOT_FINITE = problem("Out of range float values are not JSON compliant: nan")
"""What vLLM 0.32 answers where a score is NaN: its JSON can't hold one."""


@pytest.fixture(scope="module")
def scorer(lora_run: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(lora_run, device="cpu")


@pytest.fixture
def vllm(scorer: RewardScorer) -> Iterator[VllmServer]:
    with vllm_server(scorer) as server:
        yield server


def refusing(scorer: RewardScorer, words: dict[str, Answer]) -> Callable[[list[int]], Answer | None]:
    """A server's rule: the answer to a request with a text that holds one of these words."""

    def answer(ids: list[int]) -> Answer | None:
        text = scorer.tokenizer.decode(ids)
        return next((answer for word, answer in words.items() if word in text), None)

    return answer


def scoring(folder: Path, model: Path, url: str, completions: list[str], *words: str) -> tuple[int, Path]:
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    rows = [{"prompt": "2 + 2 =", "completion": text} for text in completions]
    if not source.exists():
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--model", str(model), "--input", str(source), "--output", str(target), "--endpoint", url]
    return main(["score", *files, *words]), target


COMPLETIONS = [*(f" {n}" for n in range(20)), " long", *(f" {n}" for n in range(20, 38)), " odd"]


def test_score(
    lora_run: Path, scorer: RewardScorer, vllm: VllmServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm.refuses = refusing(scorer, {"long": (400, TOO_LONG), "odd": (400, NOT_FINITE)})
    code, target = scoring(tmp_path, lora_run, vllm.url, COMPLETIONS)
    assert code == 0
    rows = read_lines(target)
    expected = scorer.score("2 + 2 =", COMPLETIONS)
    for number, row in enumerate(rows):
        if number not in {20, 39}:
            assert row["score"] == pytest.approx(expected[number], abs=1e-5) and "error" not in row
    assert rows[20]["score"] is None and rows[39] == {
        "prompt": "2 + 2 =",
        "completion": " odd",
        "score": None,
        "error": "not_finite: the score is nan",
    }
    assert rows[20]["error"] == f"refused_by_server: status 400, {TOO_LONG['error']['message']}"
    told = capsys.readouterr()
    text = told.out + told.err
    assert "1 rows have no score, refused_by_server: row 20 (status 400, This model's maximum" in text
    assert "1 rows have no score, not_finite: row 39" in text


def test_too_many_refused(
    lora_run: Path, scorer: RewardScorer, vllm: VllmServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same limit as for rows that are refused here."""
    vllm.refuses = refusing(scorer, {"long": (422, TOO_LONG), "odd": (422, TOO_LONG)})
    code, target = scoring(tmp_path, lora_run, vllm.url, COMPLETIONS, "--max_rejected_share", "0.04")
    assert code == 2 and not target.exists()
    told = capsys.readouterr().err
    assert (
        "2 of 40 rows have no score, and --max_rejected_share is 0.04" in told and "refused_by_server: row 20" in told
    )
    code, target = scoring(tmp_path, lora_run, vllm.url, COMPLETIONS, "--max_rejected_share", "0.05")
    assert code == 0 and sum(row["score"] is None for row in read_lines(target)) == 2


def test_our_own_server_refuses_too(lora_run: Path, scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tokens that are none, and a NaN."""
    real = scorer.score_tokens
    odd = scorer.encoder.encode("a", " odd")

    def score_tokens(sequences: Any, **options: Any) -> list[float]:
        rewards = real(sequences, **options)
        return [float("nan") if list(ids) == odd else one for ids, one in zip(sequences, rewards, strict=True)]

    with served(scorer) as (url, _):
        remote = EndpointScorer.from_folder(lora_run, url)
        monkeypatch.setattr(scorer, "score_tokens", score_tokens)
        good = scorer.encoder.encode("a", " b")
        assert isinstance(good, list) and isinstance(odd, list)
        found = remote.try_score_tokens([good, [10**6], odd, good[1:]])
    assert [found[0], found[3]] == pytest.approx(real([good, good[1:]]), abs=1e-5)
    assert str(found[1]).startswith("refused_by_server: status 422, token ids are from 0 to")
    assert found[2] != found[2]


def test_python_says_which(lora_run: Path, scorer: RewardScorer, vllm: VllmServer) -> None:
    remote = EndpointScorer.from_folder(lora_run, vllm.url)
    vllm.refuses = refusing(scorer, {"long": (400, TOO_LONG), "large": (413, {"detail": "too many bytes"})})
    with pytest.raises(DataError, match=r"^text 2: refused_by_server: status 400, This model's maximum .* Fix: "):
        remote.score("a", [" b", " c", " long"])
    with pytest.raises(DataError, match=r"^text 1: refused_by_server: status 413, too many bytes"):
        remote.score("a", [" b", " large"])
    rewards = reward_function(remote)(["a", "a"], [" b", " long"])
    assert rewards == [pytest.approx(scorer.score("a", " b"), abs=1e-5), None]


def test_rank(
    lora_run: Path, scorer: RewardScorer, vllm: VllmServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm.refuses = refusing(scorer, {"long": (400, TOO_LONG), "odd": (400, NOT_FINITE)})
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "2 + 2 =", "completions": [" 4", " long", " 5", " odd"]}) + "\n")
    files = ["--model", str(lora_run), "--input", str(source), "--output", str(target), "--endpoint", vllm.url]
    assert main(["rank", *files]) == 2
    assert "2 of 4 completions can't be used, and --max_rejected_share is 0.05" in capsys.readouterr().err
    assert main(["rank", *files, "--max_rejected_share", "0.5"]) == 0
    (row,) = read_lines(target)
    assert row["scores"] == pytest.approx(sorted(scorer.score("2 + 2 =", [" 4", " 5"]), reverse=True), abs=1e-5)
    left_out = read_lines(target.with_name("out.jsonl.left_out.jsonl"))
    assert [(one["place"], one["reason"]) for one in left_out] == [(1, "refused_by_server"), (3, "not_finite")]


def test_eval(
    lora_run: Path, scorer: RewardScorer, vllm: VllmServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A group with a text that is refused is left out, and counted as one that can't be encoded is."""
    vllm.refuses = refusing(scorer, {"long": (400, TOO_LONG)})
    source = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": "2 + 2 =", "chosen": f" {n}", "rejected": f" {n} no"} for n in range(20)]
    pairs[7]["rejected"] = " long"
    source.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    words = ["--num_resamples", "100", "--endpoint", vllm.url]
    command = ["eval", "--model", str(lora_run), "--dataset_path", str(source), "--output", str(tmp_path / "out")]
    assert main([*command, *words]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["num_pairs"] == 19
    data = found["models"][0]["data"]
    assert data["rows_read"] == 20 and data["rows_used"] == 19
    (entry,) = data["rejected"]
    assert entry["reason"] == "refused_by_server" and entry["count"] == 1 and entry["first_rows"] == [7]
    assert main([*command, *words, "--max_rejected_share", "0.04", "--output", str(tmp_path / "none")]) == 2
    told = capsys.readouterr().err
    assert "1 of 20 groups" in told and "row 7" in told and "--max_rejected_share is 0.04" in told


def test_a_server_that_has_begun_to_refuse_everything_ends_the_job(
    lora_run: Path, vllm: VllmServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is asked for a golden text again before a text is blamed, so that nothing of it is kept."""
    asked = []

    def broken(ids: list[int]) -> Answer | None:
        asked.append(ids)
        return (400, problem("gone wrong")) if len(asked) > 16 else None

    vllm.refuses = broken
    code, target = scoring(tmp_path, lora_run, vllm.url, COMPLETIONS, "--chunk_rows", "64")
    assert code == 2 and not target.exists()
    told = capsys.readouterr().err
    assert "refuses golden texts of the contract: status 400, gone wrong" in told
    assert not list(tmp_path.glob("out.jsonl.parts/part-*"))


def test_a_golden_text_that_is_refused(lora_run: Path, vllm: VllmServer) -> None:
    vllm.refuses = lambda _: (400, problem("no such field: use_activation"))
    with pytest.raises(RemoteError, match=r"refuses golden texts .* status 400, no such field: use_activation Fix: "):
        EndpointScorer.from_folder(lora_run, Endpoint(vllm.url))
