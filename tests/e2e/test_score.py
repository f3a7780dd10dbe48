"""`rm-scale score` as a user runs it: on two ranks, killed and started again, wrong requests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rm_scale.cli import main
from tests.support.launching import environment, read_lines, run, scores
from tests.support.tiny_runs import evaluated_texts

pytestmark = pytest.mark.e2e

CLI = [sys.executable, "-m", "rm_scale.cli"]


@pytest.fixture(scope="module")
def texts(lora_run: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    prompts, completions = evaluated_texts(lora_run, pairs_file)
    rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 20))
    return path


@pytest.fixture(scope="module")
def one_rank(lora_run: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scored by one process, undisturbed."""
    output = tmp_path_factory.mktemp("scores") / "scores.jsonl"
    words = ["--model", str(lora_run), "--input", str(texts), "--output", str(output), "--chunk_rows", "64"]
    done = run([*CLI, "score", *words])
    assert done.code == 0 and "480 of 480 rows scored" in done.output, done.output
    return output


def test_each_row_has_the_trainers_score(one_rank: Path, lora_run: Path) -> None:
    assert [row["score"] for row in read_lines(one_rank)] == pytest.approx(scores(lora_run) * 20, abs=1e-5)


def test_killed_it_goes_on(
    one_rank: Path, lora_run: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.jsonl"
    words = ["--model", str(lora_run), "--input", str(texts), "--output", str(output), "--chunk_rows", "64"]
    process = subprocess.Popen([*CLI, "score", *words], env=environment(), stderr=subprocess.DEVNULL)
    parts = Path(f"{output}.parts")
    until = time.monotonic() + 600
    while len(list(parts.glob("part-*"))) < 2 and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    before = {path.name: path.read_bytes() for path in parts.iterdir()}
    for more in ([], ["--restart"]):
        assert main(["score", *words, *more]) == 2, "a second start beside the first"
        said = capsys.readouterr().err
        assert f"output={parts}: another run writes there (process {process.pid} on" in said, said
        assert "Fix: another --output, or kill" in said
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == before
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    begun = {path.name: path.read_bytes() for path in parts.glob("part-*")}
    assert 2 <= len(begun) < 8
    assert main(["score", *words, "--dtype", "bfloat16"]) == 2
    assert "scored with other settings. Fix: start it as it was begun, or begin anew with --restart" in (
        capsys.readouterr().err
    )
    done = run([*CLI, "score", *words])
    assert done.code == 0 and f"{len(begun)} parts of 64 rows are there already" in done.output, done.output
    assert output.read_bytes() == one_rank.read_bytes() and list(tmp_path.iterdir()) == [output]


def wait_for(happens: Callable[[], bool]) -> None:
    """Wait for a state, however slow the machine."""
    until = time.monotonic() + 600
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.01)


def two_ranks(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """The processes of both ranks, once they are there."""
    found: dict[str, psutil.Process] = {}

    def both_are_there() -> bool:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if (rank := child.environ().get("RANK")) is not None:
                    found.setdefault(rank, child)
        return len(found) == 2

    wait_for(both_are_there)
    return found


@pytest.mark.long
def test_two_ranks_end_when_one_dies_and_go_on_to_the_same_file(
    one_rank: Path, lora_run: Path, texts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores.jsonl"
    words = ["--model", str(lora_run), "--input", str(texts), "--output", str(output), "--chunk_rows", "64"]
    command = [*CLI, "score", *words, "--num_processes", "2"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ranks = two_ranks(process)
    ranks["1"].suspend()  # so that it can't be done before it is killed
    wait_for(lambda: bool(list(Path(f"{output}.parts").glob("part-*"))) or process.poll() is not None)
    ranks["1"].kill()
    said, _ = process.communicate(timeout=600)
    assert process.returncode != 0 and "a rank ended with code" in said, said
    assert "(killed by signal 9, by somebody, or by something that left no sign of itself" in said, said
    assert "the same command again, it goes on from there" in said
    assert not output.exists() and not any(child.is_running() for child in ranks.values()), "none is left behind"
    done = run(command)
    assert done.code == 0 and "parts of 64 rows are there already" in done.output, done.output
    assert done.output.count("480 of 480 rows scored") == 1 and list(tmp_path.iterdir()) == [output]
    assert output.read_bytes() == one_rank.read_bytes(), "whatever the number of ranks, and of threads in each"


def test_wrong_requests_are_all_named_at_once(lora_run: Path, texts: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.jsonl"
    taken.write_text("x")
    words = ["--model", str(lora_run), "--input", str(tmp_path / "no.jsonl"), "--output", str(taken)]
    done = run([*CLI, "score", *words, "--chunk_rows", "0", "--max_rejected_share", "2"])
    assert done.code == 2
    for text in (
        "chunk_rows=0: must be at least 1",
        "max_rejected_share=2: must be from 0 to 1",
        "no.jsonl: there is no such file",
        "taken.jsonl: exists. Fix: another name, or --overwrite",
    ):
        assert text in done.output
    same = run([*CLI, "score", "--model", str(lora_run), "--input", str(taken), "--output", str(taken), "--overwrite"])
    assert same.code == 2 and "is the input; it is not written over. Fix: another name" in same.output
    assert taken.read_text() == "x"
    words = ["--model", str(lora_run), "--input", str(texts), "--output", str(tmp_path / "a.jsonl")]
    template = run([*CLI, "score", *words, "--chat_template_path", str(tmp_path / "none.jinja")])
    assert template.code == 2 and "none.jinja: can't be read" in template.output
