"""Characters of data that would act on a terminal, a page or a model card are shown, not sent."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from rm_scale.config import RunConfig
from rm_scale.errors import UserError
from rm_scale.guard import run_guarded
from rm_scale.inference.export.export_card import write_export_card
from rm_scale.logs import get_logger, setup_logging
from rm_scale.reporting.evaluation.evaluation_summary import escape
from rm_scale.reporting.page import Page
from rm_scale.reporting.run import model_card
from rm_scale.texts import printable

CLEAR, TITLE, TURNED, C1 = "\x1b[2J", "\x1b]0;owned\x07", "\u202egnp.exe", "\x9b31m"
NASTY = f"math{CLEAR}{TITLE}{TURNED}{C1}\r"


def assert_harmless(text: str) -> None:
    assert not [
        c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c in "\u202e\u2066\u2028"
    ]


def test_what_is_shown_instead() -> None:
    assert printable("a\tb\nc ü 你 🙂 שלום") == "a\tb\nc ü 你 🙂 שלום"
    assert printable(CLEAR) == "\\x1b[2J" and printable(TURNED) == "\\u202egnp.exe" and printable(C1) == "\\x9b31m"
    assert printable("half \ud83d") == "half \\ud83d" and printable("a\u2028b\r") == "a\\u2028b\\x0d"
    assert_harmless(printable(NASTY))


def test_log_lines_and_messages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("rm_scale")
    for name, value in (("handlers", []), ("propagate", logger.propagate), ("level", logger.level)):
        monkeypatch.setattr(logger, name, value)  # as they were, afterwards
    setup_logging()
    get_logger("test").warning(f"subset {NASTY}")
    get_logger("test").warning("subset %s", NASTY)

    def refuse() -> int:
        raise UserError(f"row 3: role {NASTY!s}. Fix: another.")

    assert run_guarded(refuse) == 2
    told = capsys.readouterr().err
    assert told.count("math\\x1b[2J") == 3
    assert_harmless(told)


def test_pages_and_tables() -> None:
    page = Page("t")
    page.table(["subset"], [[NASTY]])
    assert "math\\x1b[2J" in page.html()
    assert_harmless(page.html())
    assert_harmless(escape(NASTY))


def test_a_card_s_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    part = {"num_pairs": 1, "accuracy": 1.0, "accuracy_ci95": [0.0, 1.0], "mean_margin": 0.5}

    class Result:
        score_mean, score_std = 0.0, 1.0

        def as_dict(self) -> dict[str, object]:
            return {**part, "subsets": {NASTY: part, f"a|b\n{model_card.END}": part}}

    text = model_card._results(Result())  # type: ignore[arg-type]
    assert_harmless(text)
    assert "math\\x1b[2J" in text and "a\\|b &lt;!-- rm_scale" in text and model_card.END not in text
    assert len(text.splitlines()) == 9, "a line each"


@pytest.mark.parametrize("given", ["outputs/base", "../base", "./base", "ABSOLUTE", "~/base"])
def test_an_exported_card_names_no_folder_as_base(given: str, tmp_path: Path) -> None:
    base = tmp_path / "outputs" / "base"
    base.mkdir(parents=True)
    name = str(base) if given == "ABSOLUTE" else given
    config = RunConfig(model_name_or_path=name, dataset_path=["a.jsonl"], output_dir="o")
    run, target = tmp_path / "run", tmp_path / "export"
    run.mkdir()
    target.mkdir()
    front = model_card._front_matter(config)
    (run / "README.md").write_text(
        f"{front}\n\n# Reward model from base\n\n| | |\n| --- | --- |\n| base model | {name} |\n\n"
        + model_card._usage(str(run), config)
    )
    text = write_export_card(run, target, str(base), [("made of", NASTY)]).read_text()
    assert "base_model:" not in text and "| base model | base |" in text and str(tmp_path) not in text
    assert text.startswith("---\nlibrary_name: transformers\n") and name not in text
    assert_harmless(text)


@pytest.mark.parametrize("name", ["models/a: b #1", "org/base-1.5", "- x", "1e3", "[a]"])
def test_a_cards_front_matter_is_yaml_whatever_the_base_is_called(name: str) -> None:
    config = RunConfig(model_name_or_path=name, dataset_path=["a.jsonl"], output_dir="o")
    front = model_card._front_matter(config).removeprefix("---").removesuffix("---")
    assert yaml.safe_load(front)["base_model"] == name


def test_an_exported_card_keeps_a_hub_name(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nbase_model: org/base-1.5\n---\n\n| base model | org/base-1.5 |\n")
    (tmp_path / "out").mkdir()
    text = write_export_card(tmp_path, tmp_path / "out", "org/base-1.5", []).read_text()
    assert "base_model: org/base-1.5\n" in text and "| base model | org/base-1.5 |" in text
    listed = "---\nbase_model:\n- /home/me/base\ntags:\n- trl\n---\n"
    (tmp_path / "README.md").write_text(listed)
    assert "/home/me" not in write_export_card(tmp_path, tmp_path / "out", "org/base-1.5", []).read_text()
