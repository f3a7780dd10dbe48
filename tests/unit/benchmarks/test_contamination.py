"""`benchmarks/contamination.py`: the rules that change texts, and the page's tables."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from benchmarks.contamination import CHINESE, LENGTHS, OUTPUT, PAGE, look_up_changed, texts_of, with_tables
from benchmarks.paraphrases import (
    RULES,
    in_template,
    pieces,
    truncated,
    with_dropped_words,
    with_other_order,
    with_synonyms,
    with_typos,
)
from rm_scale.overlap.normalisation import tokens

TEXT = "The big dog, the cat and a very small bird want to find food. They begin to look for it early in the morning."


def test_page_has_the_tables_of_the_record() -> None:
    page = PAGE.read_text(encoding="utf-8")
    record = json.loads(OUTPUT.read_text(encoding="utf-8"))
    assert with_tables(page, record) == page, "run python benchmarks/contamination.py --table"
    assert [row["kind"] for row in record["recall"]] == [kind for kind, (_, rates, _) in RULES.items() for _ in rates]
    assert {label for row in record["recall"] for label in row["recall"]} == {
        CHINESE,
        *(name for name, _, _ in LENGTHS),
    }
    assert all(row["matched"] == row["whole"] for row in record["halves"]), "a false alarm"


def test_rates_are_kept() -> None:
    words = [f"word{number}" for number in range(5_000)]
    text = " ".join(words)
    changed = with_typos(text, 0.1, random.Random(1)).split()
    assert sum(one != other for one, other in zip(words, changed, strict=True)) == pytest.approx(500, abs=80)
    assert len(with_dropped_words(text, 0.2, random.Random(1)).split()) == pytest.approx(4_000, abs=120)
    assert truncated(text, 0.5, random.Random(1)).split() == words[:2_500]
    assert truncated("一二三四", 0.5, random.Random(1)) == "一二"


def test_rules_change_what_they_say() -> None:
    generator = random.Random(0)
    assert "".join(pieces(TEXT)) == TEXT
    assert with_synonyms(TEXT, 1.0, generator).startswith("this large dog, this cat plus one really little bird")
    assert sorted(tokens(with_other_order(TEXT, 1.0, generator))) == sorted(tokens(TEXT))
    assert TEXT in in_template(TEXT, 1.0, generator)


@pytest.mark.skipif("RM_SCALE_HH_DATA" not in os.environ, reason="RM_SCALE_HH_DATA does not name the HH file")
def test_recall_on_real_texts_is_as_recorded() -> None:
    """On a part of HH, texts of 40 tokens and more: all of those in a template, nearly all with a few typing errors."""
    file = Path(os.environ["RM_SCALE_HH_DATA"])
    texts = [text for text in texts_of([file.name], file.parent)[:1_500] if len(tokens(text)) >= 40]
    assert len(texts) > 400
    assert sum(look_up_changed(texts, texts, in_template, 1.0).values()) == len(texts)
    assert sum(look_up_changed(texts, texts, with_typos, 0.05).values()) >= 0.97 * len(texts)
