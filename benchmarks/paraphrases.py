"""Paraphrases by rules, at stated rates: what `benchmarks/contamination.py` measures recall on.

Each rule is a function of a text, a rate and a random generator. They stand for what happens to texts between a
benchmark and a training set: typing, editing, cutting, templates. None is a paraphrase by a person or a model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

# Common words that mean nearly the same, each way.
SYNONYMS = {
    "big": "large",
    "small": "little",
    "begin": "start",
    "help": "assist",
    "make": "create",
    "show": "display",
    "tell": "inform",
    "ask": "request",
    "give": "provide",
    "get": "obtain",
    "buy": "purchase",
    "find": "locate",
    "need": "require",
    "want": "wish",
    "think": "believe",
    "know": "understand",
    "write": "compose",
    "answer": "reply",
    "explain": "describe",
    "good": "fine",
    "bad": "poor",
    "best": "finest",
    "people": "persons",
    "person": "individual",
    "child": "kid",
    "job": "work",
    "money": "cash",
    "way": "manner",
    "thing": "item",
    "home": "house",
    "many": "numerous",
    "very": "really",
    "also": "too",
    "maybe": "perhaps",
    "often": "frequently",
    "about": "regarding",
    "sure": "certain",
    "hard": "difficult",
    "easy": "simple",
    "fast": "quick",
    "kill": "murder",
    "steal": "rob",
    "the": "this",
    "a": "one",
    "is": "remains",
    "are": "remain",
    "can": "could",
    "will": "would",
    "but": "yet",
    "and": "plus",
}
_BOTH_WAYS = {**{new: old for old, new in SYNONYMS.items()}, **SYNONYMS}
TEMPLATES = (
    "### Instruction:\n{}\n\n### Response:",
    "You are a helpful assistant. Read the question below and answer it.\n\nQuestion: {}\n\nThink step by step.",
    "<|user|>\n{}\n<|assistant|>",
)
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")

Rule = Callable[[str, float, random.Random], str]


def pieces(text: str) -> list[str]:
    """Return the words of a text, each with the white space after it; the characters of Chinese and Japanese."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+\s*|\s+", text)


def rewritten(text: str, rate: float, generator: random.Random) -> str:
    """Capitals, no punctuation that ends or quotes (but what stands before a digit), each word on a line."""
    return "\n".join(re.sub(r"[.,!?;:\"'“”‘’…](?!\s?\d)", "", text).upper().split())


def with_typos(text: str, rate: float, generator: random.Random) -> str:
    """Swap two neighbouring letters in this share of the words."""
    return "".join(_swapped(piece, generator) if generator.random() < rate else piece for piece in pieces(text))


def _swapped(word: str, generator: random.Random) -> str:
    places = [n for n in range(len(word) - 1) if word[n].isalpha() and word[n + 1].isalpha() and word[n] != word[n + 1]]
    if not places:
        return word
    place = generator.choice(places)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def with_dropped_words(text: str, rate: float, generator: random.Random) -> str:
    """Leave out this share of the words."""
    return "".join(piece for piece in pieces(text) if generator.random() >= rate)


def with_synonyms(text: str, rate: float, generator: random.Random) -> str:
    """Replace this share of those words that have a synonym in the table."""

    def replaced(found: re.Match[str]) -> str:
        word = found[0]
        other = _BOTH_WAYS.get(word.lower())
        return word if other is None or generator.random() >= rate else other

    return re.sub(r"[A-Za-z]+", replaced, text)


def with_other_order(text: str, rate: float, generator: random.Random) -> str:
    """Shuffle the sentences, and turn lists ("a, b and c") round."""
    turned = re.sub(r"(\w+), (\w+),? (and|or) (\w+)", r"\4, \2 \3 \1", text)
    sentences = re.split(r"(?<=[.!?。！？])\s*|\n+", turned)
    generator.shuffle(sentences)
    return " ".join(sentence for sentence in sentences if sentence)


def truncated(text: str, rate: float, generator: random.Random) -> str:
    """Keep this share of the words, from the start."""
    kept = pieces(text)
    return "".join(kept[: max(1, round(rate * len(kept)))])


def in_template(text: str, rate: float, generator: random.Random) -> str:
    """Put one of `TEMPLATES` around it."""
    return generator.choice(TEMPLATES).format(text)


RULES: dict[str, tuple[Rule, tuple[float, ...], str]] = {
    "capitals, no punctuation, a word per line": (rewritten, (1.0,), ""),
    "put into a template": (in_template, (1.0,), ""),
    "only the start kept": (truncated, (0.75, 0.5, 0.25), "of the words kept"),
    "sentences shuffled, lists turned round": (with_other_order, (1.0,), ""),
    "typing errors": (with_typos, (0.02, 0.05, 0.1, 0.2), "of the words"),
    "words left out": (with_dropped_words, (0.02, 0.05, 0.1, 0.2), "of the words"),
    "synonyms": (with_synonyms, (0.25, 0.5, 1.0), "of the words in the table"),
}
"""Each kind: its rule, the rates it is measured at, and what they are shares of."""
ENGLISH_ONLY = ("typing errors", "synonyms")
