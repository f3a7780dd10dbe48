"""A preference set that we generate ourselves: what `make demo` and the tests train on, with nothing to download.

Seven subsets, each with a rule that a model of a few hundred thousand parameters can learn from scratch:

    arithmetic  the right sum of two digits is preferred to a wrong one
    comparison  the larger or smaller of two numbers, as asked, is preferred to the other
    format      the items in the format asked for (JSON, bullets, capitals, ...) are preferred to another format
    length      as many words as asked for are preferred to more or fewer
    on_topic    the text about the thing asked for is preferred to a text about something else
    refusal     harmful requests are refused, harmless ones answered
    sentiment   the review has the opinion asked for

Two properties make an accuracy on the held-out split mean something:

- **No shortcut.** The preferred and the other response of a subset come from one exchangeable distribution, and only
  the prompt says which of them is better: a model that doesn't read the prompt, or that counts characters, is right
  half of the time.
- **Generalisation.** The held-out split has its own wordings of prompts and responses, and its own combinations (sums,
  pairs of numbers, topics, requests); none of them occurs in training. The content words do occur: a model without
  pretraining can't know a word that it has never seen.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from rm_scale.errors import DataError

Split = Literal["train", "heldout"]
SyntheticFormat = Literal["explicit_prompt", "conversational", "hh_text", "ranked"]

T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_OBJECTS = _words("river bridge garden piano castle forest kitchen camera bicycle library rocket tunnel")
_ADJECTIVES = _words("old green quiet tall soft bright small warm round heavy plain clean dark slow light wide")
_ITEMS = _words("red blue pink gold black white apple plum pear lemon dog cat horse cow bird fish")
_NUMBER_WORDS = {2: "two", 4: "four", 6: "six", 8: "eight"}
_VERBS = {
    "harmful": ("steal", "poison", "hack", "burn", "smash", "sabotage"),
    "harmless": ("clean", "paint", "repair", "buy", "wash", "draw"),
}
_MOODS = {
    "positive": ("positive", "happy", "kind", "friendly", "cheerful"),
    "negative": ("negative", "angry", "harsh", "critical", "gloomy"),
}
_OPINIONS = {
    "positive": ("wonderful", "great", "lovely", "excellent", "perfect", "superb"),
    "negative": ("terrible", "awful", "poor", "horrible", "broken", "useless"),
}


@dataclass(frozen=True)
class _Wording:
    """Templates of one kind of sentence; the two splits share none."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]


_PROMPTS = {
    "sum": _Wording(
        train=(
            "What is {a} + {b}?",
            "{a} + {b} =",
            "Add {a} and {b}.",
            "Tell me the sum of {a} and {b}.",
            "How much is {a} plus {b}?",
            "Please compute {a} + {b} for me.",
        ),
        heldout=("Please add {a} and {b} for me.", "What is the sum {a} + {b}?", "Tell me how much {a} plus {b} is."),
    ),
    "larger": _Wording(
        train=(
            "Which number is larger, {a} or {b}?",
            "What is the larger of {a} and {b}?",
            "Tell me the larger number: {a} or {b}.",
            "Between {a} and {b}, which one is larger?",
        ),
        heldout=("Please tell me which is larger: {a} or {b}?", "Of {a} and {b}, what number is the larger one?"),
    ),
    "smaller": _Wording(
        train=(
            "Which number is smaller, {a} or {b}?",
            "What is the smaller of {a} and {b}?",
            "Tell me the smaller number: {a} or {b}.",
            "Between {a} and {b}, which one is smaller?",
        ),
        heldout=("Please tell me which is smaller: {a} or {b}?", "Of {a} and {b}, what number is the smaller one?"),
    ),
    "format": _Wording(
        train=(
            "Write {items} as {format}.",
            "Give me {items} as {format}, please.",
            "I need {format} with {items}.",
            "Use {format} for {items}.",
            "Here are some words: {items}. Show them as {format}.",
            "Answer with {format}: {items}.",
        ),
        heldout=(
            "Please show me {items} as {format}.",
            "Make {format} with some words: {items}.",
            "I want {items}. Answer with {format}.",
        ),
    ),
    "exact": _Wording(
        train=(
            "Describe the {x} in exactly {n} words.",
            "Use {n} words to describe the {x}.",
            "Write {n} words about the {x}.",
            "What is the {x} like? Answer with {n} words.",
            "In {n} words, how is the {x}?",
            "How is the {x}? Use {n} words.",
            "Please give me {n} words for the {x}.",
            "Tell me about the {x} with exactly {n} words.",
        ),
        heldout=(
            "Please describe the {x} with exactly {n} words.",
            "How is the {x}? Write {n} words.",
        ),
    ),
    "short": _Wording(
        train=(
            "Write a short text about the {x}.",
            "Describe the {x}, and keep it short.",
            "Give me a brief description of the {x}.",
            "Be brief: what is the {x} like?",
            "How is the {x}? Be brief.",
            "Please tell me in short what the {x} is like.",
            "I want a brief text: how is the {x}?",
        ),
        heldout=("Please describe the {x} in a short text.", "How is the {x}? Keep it brief."),
    ),
    "long": _Wording(
        train=(
            "Write a long text about the {x}.",
            "Describe the {x}, and make it long.",
            "Give me a detailed description of the {x}.",
            "Be detailed: what is the {x} like?",
            "How is the {x}? Be detailed.",
            "Please write a long text on what the {x} is like.",
            "I want a detailed text: how is the {x}?",
        ),
        heldout=("Please describe the {x} in a long text.", "How is the {x}? Make it detailed."),
    ),
    "on_topic": _Wording(
        train=(
            "Tell me about the {x}.",
            "What do you know about the {x}?",
            "Write one sentence about the {x}.",
            "Please explain the {x} to me.",
            "I want to learn about the {x}.",
            "Can you describe the {x}?",
            "What can you tell me about the {x}?",
            "Say something about the {x}, please.",
            "My question is about the {x}.",
            "The {x}: what is it?",
            "What is the {x} like?",
        ),
        heldout=(
            "Please tell me what you know about the {x}.",
            "I want one sentence about the {x}.",
            "Can you explain the {x}?",
        ),
    ),
    "request": _Wording(
        train=(
            "How do I {verb} the {x}?",
            "Tell me how to {verb} the {x}.",
            "I want to {verb} the {x}. What do I need?",
            "Explain the best way to {verb} the {x}.",
            "Help me {verb} the {x} of my neighbour.",
        ),
        heldout=(
            "Please explain how to {verb} the {x}.",
            "What is the best way to {verb} the {x}?",
            "I need help: how do I {verb} the {x} of my neighbour?",
        ),
    ),
    "review": _Wording(
        train=(
            "Write a {mood} review of the {x}.",
            "Give the {x} a {mood} review.",
            "I need a {mood} text about the {x}.",
            "Describe the {x} with {mood} words.",
            "Be {mood}: how was the {x}?",
        ),
        heldout=("Please write a {mood} text about the {x}.", "Give me a review of the {x}. Be {mood}."),
    ),
}

_RESPONSES = {
    "number": _Wording(
        train=("{n}", "{n}.", "The answer is {n}.", "It is {n}.", "That is {n}, I think."),
        heldout=("I think it is {n}.", "The number is {n}.", "That is {n}."),
    ),
    "about": _Wording(
        train=(
            "The {x} is {p} and {q}.",
            "Many people like the {x}.",
            "I know that the {x} can be {p}.",
            "A {p} {x} is also {q}.",
            "There is a {p} and {q} {x} in the town.",
            "I have a {p} {x} at home.",
            "People say that the {x} is {q}.",
            "In the town they like the {p} {x}.",
            "My {x} is {p}.",
            "You can see a {x} there, and it is {q}.",
        ),
        heldout=("I like the {p} {x}.", "People know that the {x} is {q}.", "In the town there is a {p} {x}."),
    ),
    "refuse": _Wording(
        train=(
            "Sorry, I can't help with that.",
            "I am sorry, but I will not do this.",
            "No, that would hurt people.",
            "I can't tell you that, it is not right.",
            "This is not safe, so I will not help.",
        ),
        heldout=(
            "No, I will not help with that.",
            "Sorry, but this is not right.",
            "I am sorry, I can't tell you, it would hurt people.",
        ),
    ),
    "comply": _Wording(
        train=(
            "Sure, start with the right tools.",
            "Of course! First look at it with care.",
            "Yes, you need some time and a plan.",
            "Happy to help: make a plan and go step by step.",
            "Sure, here is what you need to start.",
        ),
        heldout=(
            "Of course, here is a plan.",
            "Sure! Go step by step, with care.",
            "Yes, first you need the right tools.",
        ),
    ),
    "opinion": _Wording(
        train=(
            "The {x} was {p} and {q}.",
            "What a {p} {x}!",
            "I found the {x} {p}.",
            "It is a {p} {x}, really {q}.",
            "A {p} and {q} {x}.",
        ),
        heldout=("I found a {p} {x}, really.", "The {x} is {p}, and it was {q}.", "Really {p}!"),
    ),
}

_EVASIONS = ("Hmm.", "What?", "Who knows.")

_FORMATS: dict[str, Callable[[list[str]], str]] = {
    "a JSON list": json.dumps,
    "a list of bullets": lambda items: "\n".join(f"- {item}" for item in items),
    "a numbered list": lambda items: "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1)),
    "capitals": lambda items: " ".join(items).upper(),
    "one line with semicolons": "; ".join,
}


class _Source:
    """Random choices for one split, made from `random.random()` alone.

    That is the one method whose sequence Python promises to keep, so that the data is the same everywhere.
    """

    def __init__(self, seed: int, split: Split) -> None:
        self._random = random.Random(f"rm_scale synthetic {split} {seed}")
        self.heldout = split == "heldout"

    def below(self, limit: int) -> int:
        """A whole number from 0 to limit - 1."""
        return int(self._random.random() * limit)

    def pick(self, options: Sequence[T]) -> T:
        """One option."""
        return options[self.below(len(options))]

    def several(self, options: Iterable[T], count: int) -> list[T]:
        """`count` different options in random order."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def word(self, wording: _Wording) -> str:
        """A template of this split."""
        return self.pick(wording.heldout if self.heldout else wording.train)

    def owns(self, *parts: int) -> bool:
        """True when the combination of these numbers belongs to this split; one in five is held out."""
        mixed = sum((2 * place + 1) * part for place, part in enumerate(parts))
        return (mixed % 5 == 2) == self.heldout

    def until(self, draw: Callable[[], T], accept: Callable[[T], bool]) -> T:
        """Draw again until the combination is acceptable."""
        while not accept(drawn := draw()):
            pass
        return drawn


@dataclass(frozen=True)
class _Case:
    """A question, a good response and two that are worse than it (and equally bad)."""

    question: str
    good: str
    bad: tuple[str, str]


def _ask(source: _Source, kind: str, **values: object) -> str:
    return source.word(_PROMPTS[kind]).format(**values)


def _number(source: _Source, value: int) -> str:
    return source.word(_RESPONSES["number"]).format(n=value)


def _arithmetic(source: _Source) -> _Case:
    """Digits only, and a fifth of the pairs of operands is held out in both orders."""

    def operands() -> tuple[int, int]:
        return source.until(lambda: (source.below(10), source.below(10)), lambda ab: source.owns(min(ab), max(ab)))

    def far(result: int, other: int) -> bool:
        return abs(result - other) >= 5

    # Wrong results are right for another pair, and drawn together with it (not after it, which would make results in
    # the middle wrong more often than right), so that a result alone says nothing.
    (a, b), other = source.until(lambda: (operands(), operands()), lambda two: far(sum(two[0]), sum(two[1])))
    wrong = sum(other)
    third = source.until(lambda: sum(operands()), lambda result: far(result, a + b) and result != wrong)
    question = _ask(source, "sum", a=a, b=b)
    return _Case(question, _number(source, a + b), (_number(source, wrong), _number(source, third)))


def _comparison(source: _Source) -> _Case:
    a, b = source.until(
        lambda: source.several(range(10), 2), lambda ab: source.owns(min(ab), max(ab)) and abs(ab[0] - ab[1]) >= 2
    )
    kind = source.pick(("larger", "smaller"))
    right, wrong = (max(a, b), min(a, b)) if kind == "larger" else (min(a, b), max(a, b))
    question = _ask(source, kind, a=a, b=b)
    first = _number(source, wrong)
    second = source.until(lambda: _number(source, wrong), lambda text: text != first)
    return _Case(question, _number(source, right), (first, second))


def _format(source: _Source) -> _Case:
    def items() -> list[int]:
        return source.several(range(len(_ITEMS)), 2 + source.below(2))

    chosen = [_ITEMS[index] for index in source.until(items, lambda indices: source.owns(*indices[:2]))]
    asked, *others = source.several(_FORMATS, 3)
    listed = ", ".join(chosen[:-1]) + " and " + chosen[-1]
    question = _ask(source, "format", items=listed, format=asked)
    return _Case(question, _FORMATS[asked](chosen), (_FORMATS[others[0]](chosen), _FORMATS[others[1]](chosen)))


def _length(source: _Source) -> _Case:
    topic = source.until(lambda: source.below(len(_OBJECTS)), source.owns)
    words = source.several(_ADJECTIVES, 12)
    kind = source.pick(("exact", "exact", "short", "long"))
    if kind == "exact":
        asked, *others = source.several((2, 4, 6, 8), 3)
    else:
        short, long = source.several((1, 2, 3), 3), source.several((7, 9, 11), 3)
        asked, others = (short[0], long[:2]) if kind == "short" else (long[0], short[:2])
    number = source.pick((str(asked), _NUMBER_WORDS[asked])) if kind == "exact" else ""
    question = _ask(source, kind, x=_OBJECTS[topic], n=number)
    return _Case(question, " ".join(words[:asked]), (" ".join(words[: others[0]]), " ".join(words[: others[1]])))


def _on_topic(source: _Source) -> _Case:
    topics = source.until(lambda: source.several(range(len(_OBJECTS)), 3), lambda xyz: source.owns(*sorted(xyz[:2])))

    def about(topic: int) -> str:
        p, q = source.several(_ADJECTIVES, 2)
        return source.word(_RESPONSES["about"]).format(x=_OBJECTS[topic], p=p, q=q)

    question = _ask(source, "on_topic", x=_OBJECTS[topics[0]])
    return _Case(question, about(topics[0]), (about(topics[1]), about(topics[2])))


def _refusal(source: _Source) -> _Case:
    kind = source.pick(("harmful", "harmless"))
    verb, topic = source.until(
        lambda: (source.below(len(_VERBS[kind])), source.below(len(_OBJECTS))), lambda vt: source.owns(*vt)
    )
    good, bad = ("refuse", "comply") if kind == "harmful" else ("comply", "refuse")
    question = _ask(source, "request", verb=_VERBS[kind][verb], x=_OBJECTS[topic])
    wording = _RESPONSES[bad]
    first, second = source.several(wording.heldout if source.heldout else wording.train, 2)
    return _Case(question, source.word(_RESPONSES[good]), (first, second))


def _sentiment(source: _Source) -> _Case:
    asked, other = source.several(_MOODS, 2)
    mood, topic = source.until(
        lambda: (source.below(len(_MOODS[asked])), source.below(len(_OBJECTS))), lambda mt: source.owns(*mt)
    )

    def review(kind: str) -> str:
        p, q = source.several(_OPINIONS[kind], 2)
        return source.word(_RESPONSES["opinion"]).format(x=_OBJECTS[topic], p=p, q=q)

    question = _ask(source, "review", mood=_MOODS[asked][mood], x=_OBJECTS[topic])
    first = review(other)
    return _Case(question, review(asked), (first, source.until(lambda: review(other), lambda text: text != first)))


_SUBSETS: dict[str, Callable[[_Source], _Case]] = {
    "arithmetic": _arithmetic,
    "comparison": _comparison,
    "format": _format,
    "length": _length,
    "on_topic": _on_topic,
    "refusal": _refusal,
    "sentiment": _sentiment,
}
SUBSETS = tuple(_SUBSETS)
"""Names of the subsets, in the order in which they take turns."""


def _text_prompt(question: str) -> str:
    return f"Human: {question}\nAssistant:"


def _as_explicit_prompt(case: _Case, index: int) -> dict[str, Any]:
    # Each response starts with a space, so that prompt and response can be joined as they are.
    return {"prompt": _text_prompt(case.question), "chosen": f" {case.good}", "rejected": f" {case.bad[0]}"}


def _as_conversational(case: _Case, index: int) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": case.question}],
        "chosen": [{"role": "assistant", "content": case.good}],
        "rejected": [{"role": "assistant", "content": case.bad[0]}],
    }


def _as_hh_text(case: _Case, index: int) -> dict[str, Any]:
    prompt = f"\n\nHuman: {case.question}\n\nAssistant: "
    return {"chosen": prompt + case.good, "rejected": prompt + case.bad[0]}


def _as_ranked(case: _Case, index: int) -> dict[str, Any]:
    """Four responses: the good one, two bad ones that tie, and one that doesn't even try."""
    responses = [case.good, *case.bad, _EVASIONS[index % len(_EVASIONS)]]
    ranks = [0, 1, 1, 2]
    turn = index % 4  # so that the position of a response says nothing
    return {
        "prompt": _text_prompt(case.question),
        "responses": [f" {response}" for response in responses[turn:] + responses[:turn]],
        "ranks": ranks[turn:] + ranks[:turn],
    }


_ROW_MAKERS: dict[str, Callable[[_Case, int], dict[str, Any]]] = {
    "explicit_prompt": _as_explicit_prompt,
    "conversational": _as_conversational,
    "hh_text": _as_hh_text,
    "ranked": _as_ranked,
}


def generate_rows(
    num_rows: int,
    seed: int,
    split: Split,
    subsets: Sequence[str] | None = None,
    dataset_format: SyntheticFormat = "explicit_prompt",
) -> Iterator[dict[str, Any]]:
    """The synthetic set in any of four formats; row N has the same content in each of them.

    Args:
        num_rows: how many rows to generate.
        seed: the same seed gives the same rows on every platform and Python version.
        split: "train" or "heldout"; they share no wording and no combination whatever the seeds.
        subsets: names out of `SUBSETS`, which take turns; all by default.
        dataset_format: explicit_prompt (prompt, chosen, rejected as text), conversational (the same as messages),
            hh_text (chosen and rejected as whole dialogues) or ranked (four responses, two of which tie).

    Yields:
        Rows with the format's columns, and subset and id.

    Raises:
        DataError: unknown subset, split or format, or a negative number.
    """
    _check_request(num_rows, split, subsets, dataset_format)
    names = SUBSETS if subsets is None else tuple(subsets)
    return _rows(num_rows, seed, split, names, _ROW_MAKERS[dataset_format])


def _rows(
    num_rows: int, seed: int, split: Split, names: Sequence[str], make_row: Callable[[_Case, int], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    source = _Source(seed, split)
    for index in range(num_rows):
        subset = names[index % len(names)]
        row = make_row(_SUBSETS[subset](source), index)
        yield {**row, "subset": subset, "id": f"{subset}-{split}-{seed}-{index}"}


def generate_pairs(
    num_pairs: int, seed: int, split: Split, subsets: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Chosen/rejected pairs with the keys prompt, chosen, rejected, subset and id; see `generate_rows`."""
    return generate_rows(num_pairs, seed, split, subsets, "explicit_prompt")


def _check_request(num_rows: int, split: str, subsets: Sequence[str] | None, dataset_format: str) -> None:
    if num_rows < 0:
        raise DataError(f"number of rows={num_rows}: must be 0 or more. Fix: ask for a positive number.")
    _check_choices("split", [split], ("train", "heldout"))
    _check_choices("format", [dataset_format], tuple(_ROW_MAKERS))
    _check_choices("subsets", SUBSETS if subsets is None else subsets, SUBSETS)


def _check_choices(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [value for value in given if value not in known]
    if unknown or not given:
        seen = ", ".join(unknown) or "nothing"
        raise DataError(f"{name}={seen}: the synthetic set doesn't have that. Fix: choose from {', '.join(known)}.")


def write_synthetic(
    directory: str | Path,
    num_train: int,
    num_heldout: int,
    seed: int,
    dataset_format: SyntheticFormat = "explicit_prompt",
) -> tuple[Path, Path]:
    """Write `train.jsonl` and `heldout.jsonl` into a directory, which is made if needed.

    A file is complete or absent: each is written under another name first and replaces an older one at the end.

    Args:
        directory: where the files go.
        num_train: rows of the training split.
        num_heldout: rows of the held-out split.
        seed: seed of both splits, which draw from different random sequences.
        dataset_format: see `generate_rows`.

    Returns:
        Paths of the training and the held-out file.

    Raises:
        DataError: as `generate_rows`, or the directory can't be written.
    """
    directory = Path(directory)
    train = generate_rows(num_train, seed, "train", None, dataset_format)
    heldout = generate_rows(num_heldout, seed, "heldout", None, dataset_format)
    paths = directory / "train.jsonl", directory / "heldout.jsonl"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(paths, (train, heldout), strict=True):
            _write_jsonl(path, rows)
    except OSError as error:
        raise DataError(
            f"directory={directory}: the synthetic set can't be written there ({error.strerror}). "
            "Fix: give a directory that you may write to."
        ) from error
    return paths


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
