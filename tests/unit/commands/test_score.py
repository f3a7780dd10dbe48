"""`rm-scale score` on files of every form, with rows of every kind."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rm_scale.cli import main
from rm_scale.inference.scoring.batch_scoring import ScoringJob, score_rows
from rm_scale.inference.scoring.ensemble import Ensemble
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.launching import read_lines

Score = Callable[..., int]
TEXTS = [("2 + 2 =", " 4"), ("2 + 2 =", " ü 5\n\x07"), ("Say no.", ""), ("", "alone, 'quoted' \"twice\"")]


@pytest.fixture(scope="module")
def scorer(lora_run: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(lora_run, device="cpu")


@pytest.fixture(scope="module")
def expected(scorer: RewardScorer) -> list[float]:
    return scorer.score(*map(list, zip(*TEXTS, strict=True)))


@pytest.fixture
def score(lora_run: Path, tmp_path: Path) -> Score:
    """Runs the command on a file in the folder at hand."""

    def call(source: str, output: str, *words: str) -> int:
        files = ["--input", str(tmp_path / source), "--output", str(tmp_path / output)]
        return main(["score", "--model", str(lora_run), *files, *words])

    return call


def write_jsonl(rows: list[Any], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ROWS = [{"id": n, "prompt": prompt, "completion": text} for n, (prompt, text) in enumerate(TEXTS)]


def test_every_form_of_file_gives_the_same(
    score: Score, expected: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(ROWS, tmp_path / "in.jsonl")
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress((tmp_path / "in.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "in.parquet")
    with (tmp_path / "in.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    for source, output in (
        ("in.jsonl", "out.parquet"),
        ("in.jsonl.gz", "out.jsonl.gz"),
        ("in.parquet", "out.csv"),
        ("in.csv", "out.jsonl"),
    ):
        assert score(source, output) == 0
        assert f"4 of 4 rows scored: {tmp_path / output}" in capsys.readouterr().out
    by_form = {
        "parquet": pq.read_table(tmp_path / "out.parquet").to_pylist(),
        "gz": [json.loads(line) for line in gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()).splitlines()],
        "csv": list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_bytes().decode(), newline=""))),
        "jsonl": read_lines(tmp_path / "out.jsonl"),
    }
    for form, rows in by_form.items():
        assert [float(row["score"]) for row in rows] == pytest.approx(expected, abs=1e-5), form
        assert list(rows[0]) == ["id", "prompt", "completion", "score", "normalized_score"], form
        seen = [(int(row["id"]), row["prompt"], row["completion"]) for row in rows]
        assert seen == [(row["id"], row["prompt"], row["completion"]) for row in ROWS], form


def test_every_kind_of_row_means_the_same(
    scorer: RewardScorer, score: Score, expected: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user, answer = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    rows: list[dict[str, Any]] = [{"text": scorer.encoder.render(prompt, text)} for prompt, text in TEXTS]
    rows += [{"messages": [user, answer]}, {"prompt": [user], "completion": [answer]}]
    rows += [{"text": scorer.encoder.render([user], [answer])}]
    write_jsonl(rows, tmp_path / "in.jsonl")
    assert score("in.jsonl", "out.jsonl") == 0
    found = [row["score"] for row in read_lines(tmp_path / "out.jsonl")]
    assert found[:4] == pytest.approx(expected, abs=1e-5)
    assert found[4:] == pytest.approx([scorer.score([user], [answer])] * 3, abs=1e-5)


def test_columns_that_are_not_read_are_refused_or_ignored_on_purpose(
    score: Score, expected: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "system": "Be short."} for row in ROWS]
    write_jsonl(rows, tmp_path / "in.jsonl")
    assert score("in.jsonl", "out.jsonl", "--on_bad_row", "stop") == 2
    assert "unread_context: system holds 'Be short.'" in (said := capsys.readouterr().err)
    assert "--ignore_columns system to score without" in said
    assert score("in.jsonl", "out.jsonl", "--ignore_columns", "system", "--restart") == 0
    found = read_lines(tmp_path / "out.jsonl")
    assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-5)
    assert [row["system"] for row in found] == ["Be short."] * len(rows), "it comes back with the row"


def test_a_text_that_stops_short_gets_the_end_that_training_gave_it(
    scorer: RewardScorer, score: Score, tmp_path: Path
) -> None:
    user, answer = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    chat = scorer.encoder.render([user], [answer]).removesuffix(str(scorer.tokenizer.eos_token))
    write_jsonl([{"text": "2 + 2 = 4"}, {"text": chat}, {"text": chat[:-1]}], tmp_path / "in.jsonl")
    assert score("in.jsonl", "out.jsonl", "--max_rejected_share", "1") == 0
    plain, conversation, unanswered = read_lines(tmp_path / "out.jsonl")
    assert plain["score"] == pytest.approx(scorer.score("2 + 2 =", " 4"), abs=1e-5)
    assert conversation["score"] == pytest.approx(scorer.score([user], [answer]), abs=1e-5)
    assert unanswered["score"] is None and unanswered["error"].startswith("unfinished_text: the text ends before")


def test_whole_texts_share_their_beginning(scorer: RewardScorer) -> None:
    begin = "a long beginning of many words " * 4
    texts = [scorer.encoder.render(begin, end) for end in (" yes", " no", " perhaps")]
    seen: list[int] = []
    hook = scorer.model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: seen.append(ids[0].numel()))
    rows = list(enumerate([{"text": text} for text in (*texts, scorer.encoder.render("other", ""))]))
    found = score_rows(rows, Ensemble([scorer]), ScoringJob(Path("x.jsonl"), {}))
    hook.remove()
    alone = scorer.score(begin, [" yes", " no", " perhaps"])
    assert [row["score"] for row in found[:3]] == pytest.approx(alone, abs=1e-5)
    assert sum(seen) < 2 * len(scorer.encoder.encode_one(begin, ""))


def test_bad_rows_come_back_or_stop(
    score: Score, expected: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl([*ROWS, {"id": 4, "prompt": "no answer"}], tmp_path / "in.jsonl")
    assert score("in.jsonl", "out.jsonl", "--on_bad_row", "stop") == 2
    said = capsys.readouterr().err
    assert "in.jsonl, row 4: missing_key: prompt and completion, or messages, or text; the row has id, prompt" in said
    assert "Fix: mend the row, or --on_bad_row null" in said and not (tmp_path / "out.jsonl").exists()
    assert score("in.jsonl", "out.jsonl") == 2
    assert "1 of 5 rows have no score, and --max_rejected_share is 0.05; nothing was written" in capsys.readouterr().err
    assert score("in.jsonl", "out.jsonl", "--max_rejected_share", "0.2") == 0
    rows = read_lines(tmp_path / "out.jsonl")
    assert [row["score"] for row in rows[:4]] == pytest.approx(expected, abs=1e-5)
    assert rows[4]["id"] == 4 and rows[4]["score"] is None and rows[4]["error"].startswith("missing_key")


def test_several_models(lora_run: Path, full_run: Path, tmp_path: Path) -> None:
    write_jsonl(ROWS, tmp_path / "in.jsonl")
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["score", "--model", str(lora_run), str(full_run), *files, "--ensemble", "min"]) == 0
    scorers = [RewardScorer.from_pretrained(folder, device="cpu") for folder in (lora_run, full_run)]
    prompts, completions = map(list, zip(*TEXTS, strict=True))
    standard = [scorer.score(prompts, completions, normalized=True) for scorer in scorers]
    rows = read_lines(tmp_path / "out.jsonl")
    assert [row["score"] for row in rows] == pytest.approx([min(p) for p in zip(*standard, strict=True)], abs=1e-4)
    assert [row["scores"][1] for row in rows] == pytest.approx(scorers[1].score(prompts, completions), abs=1e-5)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool", ""]), "content": JSON})
)
NAMES = st.sampled_from(["prompt", "completion", "messages", "text", "tools", "other", "score"])


@given(rows=st.lists(st.dictionaries(NAMES, JSON | MESSAGES, max_size=4) | JSON, min_size=1, max_size=6))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_have_a_score_or_an_error(scorer: RewardScorer, rows: list[Any]) -> None:
    found = score_rows(list(enumerate(rows)), Ensemble([scorer]), ScoringJob(Path("x.jsonl"), {}))
    assert len(found) == len(rows)
    for row, result in zip(rows, found, strict=True):
        assert isinstance(result["score"], float) or (result["score"] is None and result["error"])
        if isinstance(row, dict):
            assert {str(name) for name in row} <= set(result)
