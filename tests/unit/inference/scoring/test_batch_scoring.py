"""Scoring files: in parts, by several ranks, after a stop; and what several models make of a text."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rm_scale.distributed import World
from rm_scale.errors import DataError, ModelError, UserError
from rm_scale.inference.scoring import batch_scoring
from rm_scale.inference.scoring.batch_scoring import (
    ScoringJob,
    ScoringSummary,
    model_facts,
    open_parts,
    parts_held,
    run_job,
)
from rm_scale.inference.scoring.ensemble import Ensemble, Scored
from rm_scale.inference.scoring.row_files import Scorable, open_rows
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.launching import read_lines, scores
from tests.support.small_memory import small_memory
from tests.support.tiny_runs import evaluated_texts


@pytest.fixture(scope="module")
def lora(lora_run: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(lora_run, device="cpu")


@pytest.fixture(scope="module")
def full(full_run: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(full_run, device="cpu")


@pytest.fixture
def texts(lora_run: Path, pairs_file: Path, tmp_path: Path) -> Path:
    """The evaluation set's texts, and two rows that have no score."""
    path = tmp_path / "texts.jsonl"
    prompts, completions = evaluated_texts(lora_run, pairs_file)
    rows = [
        {"n": n, "prompt": prompt, "completion": completion}
        for n, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    lines = [json.dumps(row) for row in rows]
    lines[7:7] = ['{"prompt": "no completion"}', "{broken"]
    path.write_text("\n".join(lines) + "\n")
    return path


class Counting(Ensemble):
    """Counts what it is given; may stop in the middle."""

    def __init__(self, *args: Any, stop_after: int | None = None) -> None:
        super().__init__(*args)
        self.num_texts = 0
        self.stop_after = stop_after

    def score(self, texts: Sequence[Scorable], max_tokens: int) -> list[Scored]:
        if self.stop_after is not None and self.num_texts >= self.stop_after:
            raise KeyboardInterrupt
        self.num_texts += len(texts)
        return super().score(texts, max_tokens)


def job_for(output: Path, **changes: Any) -> ScoringJob:
    job = ScoringJob(output, {"input": 1}, chunk_rows=5, block_rows=1, max_tokens=200, max_rejected_share=0.1)
    return replace(job, **changes)


def test_rows_come_back_with_the_trainers_scores(
    lora: RewardScorer, lora_run: Path, texts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores.jsonl"
    seen: list[int] = []
    with open_rows(str(texts)) as rows:
        summary = run_job(job_for(output), rows, Ensemble([lora]), World(), seen.append)
    assert summary is not None and (summary.num_rows, summary.num_scored) == (26, 24)
    assert summary.lines()[0].startswith("1 rows have no score, missing_key: row 7 (prompt and completion")
    found = read_lines(output)
    assert [row["score"] for row in found if row["score"] is not None] == pytest.approx(scores(lora_run), abs=1e-5)
    assert [row["n"] for row in found if row["score"] is not None] == list(range(24)), "in their order"
    assert found[7]["error"].startswith("missing_key") and found[8]["error"].startswith("bad_json")
    mean, std = lora.contract.score_mean, lora.contract.score_std
    assert mean is not None and std is not None
    assert found[0]["normalized_score"] == pytest.approx((found[0]["score"] - mean) / std)
    assert seen[-1] == 26 and seen == sorted(seen)
    assert not job_for(output).parts_folder.exists()


def test_a_stopped_run_goes_on(lora: RewardScorer, texts: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    with open_rows(str(texts)) as rows:
        run_job(job_for(whole), rows, Ensemble([lora]), World())
        with pytest.raises(KeyboardInterrupt):
            run_job(job_for(stopped), rows, Counting([lora], stop_after=8), World())
        assert not stopped.exists() and len(list(job_for(stopped).parts_folder.glob("part-*"))) == 2
        again = Counting([lora])
        run_job(job_for(stopped), rows, again, World())
    assert stopped.read_bytes() == whole.read_bytes()
    assert again.num_texts == 24 - 8, "what was there was not scored again"


def test_parts_of_another_job_are_refused(lora: RewardScorer, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.jsonl"
    with open_rows(str(texts)) as rows:
        with pytest.raises(KeyboardInterrupt):
            run_job(job_for(output), rows, Counting([lora], stop_after=5), World())
        for changed, named in (({"facts": {"input": 2}}, "input"), ({"chunk_rows": 6}, "chunk_rows")):
            with pytest.raises(
                DataError, match=rf"scored with other {named}\. Fix: start it as it was begun, or .*--restart"
            ):
                run_job(job_for(output, **changed), rows, Ensemble([lora]), World())
        batch_scoring.forget_parts(job_for(output))
        assert run_job(job_for(output, chunk_rows=6), rows, Ensemble([lora]), World()) is not None


def test_the_folder_of_parts_is_held_by_one_start(lora: RewardScorer, texts: Path, tmp_path: Path) -> None:
    job = job_for(tmp_path / "scores.jsonl")
    with open_rows(str(texts)) as rows:
        with pytest.raises(KeyboardInterrupt), parts_held(job, World()):
            run_job(job, rows, Counting([lora], stop_after=8), World())
        with parts_held(job, World()):
            before = sorted(job.parts_folder.iterdir())
            with (
                pytest.raises(UserError, match=r"output=.*\.parts: another run writes there"),
                parts_held(job, World()),
            ):
                pass
            with parts_held(job, World(1, 2)):
                assert sorted(job.parts_folder.iterdir()) == before, "the other ranks of the same start"
            assert len(before) == 4, "two parts, their record and the lock"
            assert run_job(job, rows, Ensemble([lora]), World()) is not None
        assert not job.parts_folder.exists()
        (tmp_path / "other.jsonl.parts").mkdir()
        (tmp_path / "other.jsonl.parts" / "notes").write_text("mine")
        with pytest.raises(DataError, match="holds notes"), parts_held(job_for(tmp_path / "other.jsonl"), World()):
            pass
        assert [path.name for path in (tmp_path / "other.jsonl.parts").iterdir()] == ["notes"]


def test_a_rank_whose_folder_is_gone_says_so(lora: RewardScorer, texts: Path, tmp_path: Path) -> None:
    job = job_for(tmp_path / "scores.jsonl")

    class Removing(Counting):
        def score(self, texts: Sequence[Scorable], max_tokens: int) -> list[Scored]:
            batch_scoring.forget_parts(job)
            return super().score(texts, max_tokens)

    with open_rows(str(texts)) as rows:
        open_parts(job, World())
        with pytest.raises(DataError, match=r"\.parts: is gone, .*Fix: look at what rank 0 said"):
            run_job(job, rows, Removing([lora]), World(1, 2))


def test_ranks_share_the_work(lora: RewardScorer, texts: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    with open_rows(str(texts)) as rows:
        run_job(job_for(alone), rows, Ensemble([lora]), World())
        ranks = [Counting([lora]) for _ in range(2)]
        # The other rank starts first and waits for rank 0 to open the folder.
        other = threading.Thread(target=run_job, args=(job_for(together), rows, ranks[1], World(1, 2)))
        other.start()
        run_job(job_for(together), rows, ranks[0], World(0, 2))
        other.join()
    assert together.read_bytes() == alone.read_bytes()
    assert [rank.num_texts for rank in ranks] == [15, 9]


def test_bytes_do_not_depend_on_chunks_ranks_or_a_stop(full_run: Path, pairs_file: Path, tmp_path: Path) -> None:
    """In bfloat16, where a batch's shape shows in the second digit: blocks of 8 rows, in parts of any size."""
    scorer = RewardScorer.from_pretrained(full_run, device="cpu", dtype="bfloat16")
    prompts, completions = evaluated_texts(full_run, pairs_file)
    source = tmp_path / "rows.jsonl"
    pairs = list(zip(prompts, completions, strict=True))
    # The first five again, in other blocks and with other neighbours.
    rows = [{"prompt": prompt, "completion": text} for prompt, text in [*pairs, *pairs[:5], ("x", " y" * 200)]]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def written(name: str, **changes: Any) -> bytes:
        job = job_for(tmp_path / name, block_rows=8, max_tokens=2000, **changes)
        with open_rows(str(source)) as file:
            if name == "stopped.jsonl":
                with pytest.raises(KeyboardInterrupt):
                    run_job(job, file, Counting([scorer], stop_after=8), World())
            ranks = 3 if name == "ranks.jsonl" else 1
            for rank in reversed(range(ranks)):
                open_parts(job, World())
                run_job(job, file, Ensemble([scorer]), World(rank, ranks))
        return job.output.read_bytes()

    usual = written("usual.jsonl", chunk_rows=512)
    found = [json.loads(line)["score"] for line in usual.splitlines()]
    assert found[24:29] == found[:5], "the same tokens, the same score"
    assert written("small.jsonl", chunk_rows=3) == usual
    assert written("ranks.jsonl", chunk_rows=8) == usual
    assert written("stopped.jsonl", chunk_rows=8) == usual
    alone = [scorer.score_one(prompt, text) for prompt, text in pairs[:5]]
    assert alone != found[:5], "else this test would show nothing"


def test_a_rank_that_never_comes(lora: RewardScorer, texts: Path, tmp_path: Path) -> None:
    job = job_for(tmp_path / "scores.jsonl", stall_seconds=0.2)
    with (
        open_rows(str(texts)) as rows,
        pytest.raises(DataError, match=r"3 of 6 parts are missing, first part-00000001.* start it again, it goes on"),
    ):
        run_job(job, rows, Ensemble([lora]), World(0, 2))
    missing = job_for(tmp_path / "other.jsonl", stall_seconds=0.2)
    with pytest.raises(DataError, match=r"rank 0 has not made it .* on a disk that all ranks see"):
        open_parts(missing, World(1, 2))


def test_too_many_rows_without_a_score(lora: RewardScorer, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.jsonl"
    with open_rows(str(texts)) as rows:
        with pytest.raises(DataError, match=r"(?s)2 of 26 rows have no score.*nothing was written.*bad_json.*0\.08"):
            run_job(job_for(output, max_rejected_share=0.05), rows, Ensemble([lora]), World())
        assert not output.exists()
        again = Counting([lora])
        summary = run_job(job_for(output, max_rejected_share=0.08), rows, again, World())
    assert summary is not None and again.num_texts == 0 and len(read_lines(output)) == 26


@pytest.mark.parametrize("packed", [True, False])
def test_memory_that_does_not_suffice(
    packed: bool, lora_run: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer texts at once, for this part and later ones; the same scores, each row once."""
    scorer = RewardScorer.from_pretrained(lora_run, device="cpu", packed=packed)
    usual, small = tmp_path / "usual.jsonl", tmp_path / "small.jsonl"
    with open_rows(str(texts)) as rows, small_memory(scorer, 10**6, monkeypatch) as memory:
        run_job(job_for(usual, max_tokens=5000, chunk_rows=12, block_rows=12), rows, Ensemble([scorer]), World())
        largest = max(memory.passes)
        memory.num_tokens = largest // 3
        ensemble = Counting([scorer])
        summary = run_job(job_for(small, max_tokens=5000, chunk_rows=12, block_rows=12), rows, ensemble, World())
    assert summary is not None and summary.num_scored == 24
    assert 1 <= memory.num_failures <= 9, "the first part learns, the others know"
    assert ensemble.num_texts < 24 + 9 * 12
    before, after = read_lines(usual), read_lines(small)
    assert [row.get("n") for row in after] == [row.get("n") for row in before]
    for old, new in zip(before, after, strict=True):
        assert new["score"] == (None if old["score"] is None else pytest.approx(old["score"], abs=1e-5))


def test_a_row_that_memory_never_suffices_for(
    lora: RewardScorer, lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "texts.jsonl", tmp_path / "scores.jsonl"
    completions = [" 4"] * 8 + [" 7" * 300] + [" 5"] * 8
    source.write_text("".join(json.dumps({"prompt": "2 + 2 =", "completion": text}) + "\n" for text in completions))
    expected = lora.score(["2 + 2 ="] * 17, completions)
    with open_rows(str(source)) as rows, small_memory(lora, 200, monkeypatch):
        job = job_for(output, max_tokens=4000, chunk_rows=17, block_rows=17)
        summary = run_job(job, rows, Ensemble([lora]), World())
        with pytest.raises(DataError, match=r"row 8: out_of_memory: it does not fit .*not even alone"):
            job = replace(job, output=tmp_path / "other.jsonl", stop_at_bad_row=True)
            run_job(job, rows, Ensemble([lora]), World())
    assert summary is not None and summary.lines()[0].startswith("1 rows have no score, out_of_memory: row 8 (it does")
    found = [row["score"] for row in read_lines(output)]
    assert found[8] is None
    del found[8], expected[8]
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_model_is_known_by_its_files(lora_run: Path, full_run: Path) -> None:
    assert model_facts(lora_run) == model_facts(lora_run) != model_facts(full_run)


def test_summary_names_the_first_rows_of_each_reason() -> None:
    summary = ScoringSummary()
    for number in range(9):
        summary.add(number, {"score": None, "error": "over_long: 9 tokens"})
    assert summary.lines() == ["9 rows have no score, over_long: " + "; ".join(f"row {n} (9 tokens)" for n in range(5))]


# --- Several models --------------------------------------------------------------------------------------------------


def test_an_ensemble_combines_standard_scores(lora: RewardScorer, full: RewardScorer) -> None:
    text = [Scorable("What is 2 + 2?", " 4")]
    each = [scorer.score(["What is 2 + 2?"], [" 4"])[0] for scorer in (lora, full)]
    standard = [scorer.normalize([score])[0] for scorer, score in zip((lora, full), each, strict=True)]
    mean = Ensemble([lora, full])
    columns = mean.columns(mean.score(text, 100)[0])
    assert columns["scores"] == pytest.approx(each, abs=1e-5)
    assert columns["score"] == pytest.approx(sum(standard) / 2, abs=1e-4)
    assert columns["score_std"] == pytest.approx(abs(standard[0] - standard[1]) / 2, abs=1e-4)
    assert (columns["score_min"], columns["score_max"]) == pytest.approx((min(standard), max(standard)), abs=1e-4)
    least = Ensemble([lora, full], "min")
    assert least.columns(least.score(text, 100)[0])["score"] == pytest.approx(min(standard), abs=1e-4)
    raw = Ensemble([lora, full], raw=True)
    assert raw.columns(raw.score(text, 100)[0])["score"] == pytest.approx(sum(each) / 2, abs=1e-5)


def test_models_without_a_scale_are_not_combined(lora: RewardScorer, full_run: Path) -> None:
    other = RewardScorer.from_pretrained(full_run, device="cpu")
    other.contract = replace(other.contract, score_mean=None, score_std=None)
    with pytest.raises(ModelError, match=r"model 2: its contract has no score_mean .* Fix: --combine_raw"):
        Ensemble([lora, other])
    assert "normalized_score" not in Ensemble([other]).columns(Scored((1.0,)))
    assert Ensemble([lora, other], raw=True).columns(Scored((1.0, 3.0)))["score"] == 2.0


def test_a_rendered_text_is_scored_as_a_pipeline_reads_it(lora: RewardScorer) -> None:
    rendered = lora.encoder.render("What is 2 + 2?", " 4")
    both = Ensemble([lora]).score([Scorable("What is 2 + 2?", " 4"), Scorable(text=rendered)], 100)
    assert both[0].scores == pytest.approx(both[1].scores, abs=1e-5)
    (long,) = Ensemble([lora]).score([Scorable(text=" 7" * 2000)], 100)
    assert long.problem is not None and long.problem.startswith("over_long: ") and "max_length is 1024" in long.problem
    assert Ensemble([lora]).columns(long) == {"score": None, "error": long.problem}
