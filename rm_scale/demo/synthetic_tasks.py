"""The seven tasks of the synthetic preference set: each draws a question, a good response and two worse ones.

`RandomChoices.owns` splits the combinations of content (operands, topics, requests) between training and held-out data.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rm_scale.demo.synthetic_sentences import (
    ADJECTIVES,
    ITEMS,
    MOODS,
    NUMBER_WORDS,
    OBJECTS,
    OPINIONS,
    PROMPTS,
    RESPONSES,
    VERBS,
    Wording,
)

Split = Literal["train", "heldout"]
T = TypeVar("T")

_FORMATS: dict[str, Callable[[list[str]], str]] = {
    "a JSON list": json.dumps,
    "a list of bullets": lambda items: "\n".join(f"- {item}" for item in items),
    "a numbered list": lambda items: "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1)),
    "capitals": lambda items: " ".join(items).upper(),
    "one line with semicolons": "; ".join,
}


class RandomChoices:
    """Random choices for one split, made from `random.random()` alone.

    Python promises that this one method draws the same sequence in every version, so the data is the same everywhere.
    """

    def __init__(self, seed: int, split: Split) -> None:
        self._random = random.Random(f"rm_scale synthetic {split} {seed}")
        self.heldout = split == "heldout"

    def below(self, limit: int) -> int:
        """Return a whole number from 0 to limit - 1."""
        return int(self._random.random() * limit)

    def pick(self, options: Sequence[T]) -> T:
        """Return one option."""
        return options[self.below(len(options))]

    def several(self, options: Iterable[T], count: int) -> list[T]:
        """Return `count` different options in random order."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def template(self, wording: Wording) -> str:
        """Return a sentence template of this split."""
        return self.pick(wording.heldout if self.heldout else wording.train)

    def owns(self, *parts: int) -> bool:
        """Tell whether a combination of these numbers belongs to this split; one in five is held out."""
        mixed = sum((2 * place + 1) * part for place, part in enumerate(parts))
        return (mixed % 5 == 2) == self.heldout

    def until(self, draw: Callable[[], T], accept: Callable[[T], bool]) -> T:
        """Draw until `accept` is true of what was drawn, and return that."""
        while not accept(drawn := draw()):
            pass
        return drawn


@dataclass(frozen=True)
class Case:
    """A question, a good response and two that are worse than it (and equally bad)."""

    question: str
    good: str
    bad: tuple[str, str]


def _ask(choices: RandomChoices, kind: str, **values: object) -> str:
    return choices.template(PROMPTS[kind]).format(**values)


def _number(choices: RandomChoices, value: int) -> str:
    return choices.template(RESPONSES["number"]).format(n=value)


def _arithmetic(choices: RandomChoices) -> Case:
    """Ask for the sum of two digits. A pair of operands is held out in both orders or in none."""

    def operands() -> tuple[int, int]:
        return choices.until(lambda: (choices.below(10), choices.below(10)), lambda ab: choices.owns(min(ab), max(ab)))

    def far(result: int, other: int) -> bool:
        return abs(result - other) >= 5

    # The wrong result is the sum of another pair of operands, drawn together with the first. Were it drawn after it,
    # sums of medium size would be wrong more often than right, and a result alone would hint at the better response.
    (a, b), other = choices.until(lambda: (operands(), operands()), lambda two: far(sum(two[0]), sum(two[1])))
    wrong = sum(other)
    third = choices.until(lambda: sum(operands()), lambda result: far(result, a + b) and result != wrong)
    question = _ask(choices, "sum", a=a, b=b)
    return Case(question, _number(choices, a + b), (_number(choices, wrong), _number(choices, third)))


def _comparison(choices: RandomChoices) -> Case:
    a, b = choices.until(
        lambda: choices.several(range(10), 2), lambda ab: choices.owns(min(ab), max(ab)) and abs(ab[0] - ab[1]) >= 2
    )
    kind = choices.pick(("larger", "smaller"))
    right, wrong = (max(a, b), min(a, b)) if kind == "larger" else (min(a, b), max(a, b))
    question = _ask(choices, kind, a=a, b=b)
    first = _number(choices, wrong)
    second = choices.until(lambda: _number(choices, wrong), lambda text: text != first)
    return Case(question, _number(choices, right), (first, second))


def _format(choices: RandomChoices) -> Case:
    def items() -> list[int]:
        return choices.several(range(len(ITEMS)), 2 + choices.below(2))

    chosen = [ITEMS[index] for index in choices.until(items, lambda indices: choices.owns(*indices[:2]))]
    asked, *others = choices.several(_FORMATS, 3)
    listed = ", ".join(chosen[:-1]) + " and " + chosen[-1]
    question = _ask(choices, "format", items=listed, format=asked)
    return Case(question, _FORMATS[asked](chosen), (_FORMATS[others[0]](chosen), _FORMATS[others[1]](chosen)))


def _length(choices: RandomChoices) -> Case:
    topic = choices.until(lambda: choices.below(len(OBJECTS)), choices.owns)
    words = choices.several(ADJECTIVES, 12)
    kind = choices.pick(("exact", "exact", "short", "long"))
    if kind == "exact":
        asked, *others = choices.several((2, 4, 6, 8), 3)
    else:
        short, long = choices.several((1, 2, 3), 3), choices.several((7, 9, 11), 3)
        asked, others = (short[0], long[:2]) if kind == "short" else (long[0], short[:2])
    number = choices.pick((str(asked), NUMBER_WORDS[asked])) if kind == "exact" else ""
    question = _ask(choices, kind, x=OBJECTS[topic], n=number)
    return Case(question, " ".join(words[:asked]), (" ".join(words[: others[0]]), " ".join(words[: others[1]])))


def _on_topic(choices: RandomChoices) -> Case:
    topics = choices.until(lambda: choices.several(range(len(OBJECTS)), 3), lambda xyz: choices.owns(*sorted(xyz[:2])))

    def about(topic: int) -> str:
        p, q = choices.several(ADJECTIVES, 2)
        return choices.template(RESPONSES["about"]).format(x=OBJECTS[topic], p=p, q=q)

    question = _ask(choices, "on_topic", x=OBJECTS[topics[0]])
    return Case(question, about(topics[0]), (about(topics[1]), about(topics[2])))


def _refusal(choices: RandomChoices) -> Case:
    kind = choices.pick(("harmful", "harmless"))
    verb, topic = choices.until(
        lambda: (choices.below(len(VERBS[kind])), choices.below(len(OBJECTS))), lambda vt: choices.owns(*vt)
    )
    good, bad = ("refuse", "comply") if kind == "harmful" else ("comply", "refuse")
    question = _ask(choices, "request", verb=VERBS[kind][verb], x=OBJECTS[topic])
    wording = RESPONSES[bad]
    first, second = choices.several(wording.heldout if choices.heldout else wording.train, 2)
    return Case(question, choices.template(RESPONSES[good]), (first, second))


def _sentiment(choices: RandomChoices) -> Case:
    asked, other = choices.several(MOODS, 2)
    mood, topic = choices.until(
        lambda: (choices.below(len(MOODS[asked])), choices.below(len(OBJECTS))), lambda mt: choices.owns(*mt)
    )

    def review(kind: str) -> str:
        p, q = choices.several(OPINIONS[kind], 2)
        return choices.template(RESPONSES["opinion"]).format(x=OBJECTS[topic], p=p, q=q)

    question = _ask(choices, "review", mood=MOODS[asked][mood], x=OBJECTS[topic])
    first = review(other)
    return Case(question, review(asked), (first, choices.until(lambda: review(other), lambda text: text != first)))


TASKS: dict[str, Callable[[RandomChoices], Case]] = {
    "arithmetic": _arithmetic,
    "comparison": _comparison,
    "format": _format,
    "length": _length,
    "on_topic": _on_topic,
    "refusal": _refusal,
    "sentiment": _sentiment,
}
