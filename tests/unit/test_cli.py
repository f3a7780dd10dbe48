"""The command line: quick to start, and the small commands that need no file of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from rm_scale.cli import main as cli


def test_help_is_quick_and_loads_no_torch() -> None:
    command = [
        sys.executable,
        "-c",
        "import sys, rm_scale.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n",
    ]
    command[-1] += "print('torch' in sys.modules)"
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "assets" in done.stdout
    assert time.perf_counter() - started < 30  # a hang, not a timing


def test_assets_tiny_makes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["assets", "tiny", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")


def test_data_reports_and_refuses(tiny_model: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["data", "--model_name_or_path", str(tiny_model)]
    assert cli([*common, "--dataset_path", str(pairs_file)]) == 0
    assert "120 used" in capsys.readouterr().err
    assert cli([*common, "--dataset_path", "gone.jsonl"]) == 2
    assert "gone.jsonl" in capsys.readouterr().err
    assert cli([*common, "--dataset_pth", "x"]) == 2
    assert "did you mean dataset_path" in capsys.readouterr().err


def test_unknown_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli(["assets", "tiny", "x", "--nonsense"])
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
