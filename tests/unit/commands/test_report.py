"""`rm-scale report` on runs and on records."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from rm_scale.cli import main
from rm_scale.reporting.benchmarks.sealed_records import write_record
from tests.support.records import record


def report(*words: object) -> int:
    return main(["report", *map(str, words)])


def test_a_runs_page(full_run: Path, tmp_path: Path) -> None:
    assert report(full_run, "--output", tmp_path / "run.html", "--title", "My run") == 0
    assert "<h1>My run</h1>" in (tmp_path / "run.html").read_text()


def test_watching_ends_with_the_run(full_run: Path, tmp_path: Path) -> None:
    shutil.copytree(full_run / "run", tmp_path / "out" / "run")
    attempts = tmp_path / "out" / "run" / "attempts.jsonl"
    whole = attempts.read_text()
    attempts.write_text("".join(f"{line}\n" for line in whole.splitlines() if '"end"' not in line))
    page = tmp_path / "run.html"
    seen: list[int] = []
    words = [tmp_path / "out", "--output", page, "--watch", "--every", 0.2]
    watching = threading.Thread(target=lambda: seen.append(report(*words)))
    watching.start()
    until = time.monotonic() + 600
    while time.monotonic() < until and not (page.is_file() and 'http-equiv="refresh"' in page.read_text()):
        time.sleep(0.05)
    assert 'http-equiv="refresh" content="1"' in page.read_text() and watching.is_alive()
    attempts.write_text(whole)
    watching.join(600)
    assert seen == [0] and "http-equiv" not in page.read_text()


def test_records_page_markdown_and_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(record([1, 4, 8, 6]), tmp_path / "new")
    write_record(record(), tmp_path / "old")
    page, tables = tmp_path / "bench.html", tmp_path / "bench.md"
    assert report(tmp_path / "new", "--output", page, "--markdown", tables) == 0
    assert "135m on A Processor" in page.read_text() and "| full, prefix_shared" in tables.read_text()
    assert report(tmp_path / "new", "--output", page, "--markdown", tables) == 0, "both are ours"
    assert report(tmp_path / "new", "--output", page, "--baseline", tmp_path / "old") == 1
    assert "regression: 135m full prefix_shared" in capsys.readouterr().err
    assert report(tmp_path / "old", "--output", page, "--baseline", tmp_path / "old") == 0


def test_a_refused_record_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(record(), tmp_path / "set")
    bad = write_record(record(method="lora"), tmp_path / "set")
    bad.write_text(bad.read_text().replace('"method":"lora"', '"method":"qlora"'))
    assert report(tmp_path / "set", "--output", tmp_path / "p.html") == 0
    assert f"{bad.name} line 2 is left out: the checksum" in capsys.readouterr().err
    assert "Records that were refused" in (tmp_path / "p.html").read_text()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["RUN", "--output", "p.html", "--markdown", "t.md"], "--markdown: is for benchmark records"),
        (["RUN", "RUN", "--output", "p.html"], "RUN_DIR: 2 given. Fix: one run per page"),
        (["SET", "--output", "p.html", "--watch"], "--watch: is for a run"),
        (["RUN", "--output", "p.html", "--watch", "--every", "nan"], "--every nan: must be above 0, and at most"),
        (["RUN", "--output", "p.html", "--watch", "--every", "inf"], "--every inf: must be above 0, and at most"),
        (["RUN", "--output", "p.html", "--watch", "--every", "0"], "--every 0: must be above 0"),
        (["RUN", "--output", "no/where/p.html"], "its folder does not exist"),
        (["nowhere", "--output", "p.html"], "nowhere: no such file or folder"),
        (["EMPTY", "--output", "p.html"], "no record that can be shown, and no run"),
    ],
)
def test_what_is_refused(
    words: list[str],
    text: str,
    full_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_record(record(), tmp_path / "set")
    (tmp_path / "empty").mkdir()
    places = {"RUN": full_run, "SET": tmp_path / "set", "EMPTY": tmp_path / "empty"}
    assert report(*[places.get(word, word) for word in words]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()
