"""`benchmarks/serving.py` measures both sides on the same texts, which no round has seen before."""

from __future__ import annotations

from argparse import Namespace

import pytest

from benchmarks.serving import Text, in_turns

TEXTS = [Text("a", str(n)) for n in range(8)]


def test_each_round_has_texts_of_its_own() -> None:
    seen: list[tuple[str, list[Text]]] = []

    def side(name: str, off: float) -> object:
        def score(some: list[Text]) -> list[float]:
            seen.append((name, some))
            return [float(text.completion) + off for text in some]

        return score

    found = in_turns(Namespace(rounds=2, texts=2, data="d"), TEXTS, side("here", 0.0), side("there", 0.5))  # type: ignore[arg-type]
    assert [name for name, _ in seen] == ["here", "there"] * 3
    assert [some for _, some in seen[::2]] == [some for _, some in seen[1::2]] == [TEXTS[:2], TEXTS[2:4], TEXTS[4:6]]
    assert len(found["rounds"]) == 2 and found["median_ratio"] > 0
    assert {one["largest_difference"] for one in found["rounds"]} == {0.5}


def test_too_few_texts() -> None:
    with pytest.raises(SystemExit, match=r"d: 8 texts are too few. Fix: fewer --texts or --rounds"):
        in_turns(Namespace(rounds=2, texts=3, data="d"), TEXTS, lambda _: [], lambda _: [])
