"""What the labels pay for beside content: length, markdown, refusals, emoji, first words."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np

from rm_scale.data_review.finding import NUM_EXAMPLES, Finding, Suggestion
from rm_scale.data_review.sampled_pairs import FEWEST_PAIRS, IntArray, Mask, SampledPairs, is_biased

_START = 300
"""Characters in which a refusal or an apology is looked for: further down it may be a quotation."""
_BIAS = 0.1
_STRONG_BIAS = 0.2
_MANY_PAIRS = 0.02
_NUM_BINS = 8
_NUM_STARTS = 15

MARKERS = {
    "list": ("markdown list", re.compile(r"^\s*(?:[-*+•]|\d{1,3}[.)])\s+\S", re.MULTILINE)),
    "heading": ("markdown heading", re.compile(r"^#{1,6}\s+\S", re.MULTILINE)),
    "bold": ("bold text", re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")),
    "code_block": ("code block", re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)),
    "inline_code": ("inline code", re.compile(r"(?<!`)`[^`\n]+`(?!`)")),
    "table": ("markdown table", re.compile(r"^\s*\|.*\n\s*\|[\s:|-]+\|?\s*$", re.MULTILINE)),
    "link": ("link", re.compile(r"https?://|\]\(\S")),
    "emoji": ("emoji", re.compile(r"[\U0001F300-\U0001FAFF\u2600-\u27BF]")),
    "question": ("ends with a question", re.compile(r"\?[\s\"')*]*\Z")),
    "exclamation": ("exclamation mark", re.compile(r"!")),
    "unfinished": ("breaks off without an end mark", re.compile(r"[\w,;]\s*\Z")),
}
STARTS = {
    "refusal": (
        "refusal (“I can't …”)",
        re.compile(
            r"\bI(?:['’]m| am)?(?: really| afraid I)? (?:can['’]?t|cannot|can not|won['’]?t|will not|unable to"
            r"|not able to|not comfortable|not going to|don['’]t (?:think I (?:can|should)|feel comfortable))\b",
            re.IGNORECASE,
        ),
    ),
    "as_an_ai": (
        "“as an AI”",
        re.compile(
            r"\b(?:as|I['’]m(?: just| only)?|I am(?: just| only)?) an? (?:AI\b|artificial|(?:large )?language model)",
            re.IGNORECASE,
        ),
    ),
    "apology": ("apology", re.compile(r"\b(?:sorry|apologi[sz]e|apologies)\b", re.IGNORECASE)),
    "agreeing_start": (
        "begins with “Sure”, “Certainly”, “Great question” …",
        re.compile(
            r"\A\W*(?:sure|certainly|of course|absolutely|great question|good question|happy to)\b", re.IGNORECASE
        ),
    ),
}
_FORMAT = ("list", "heading", "bold", "code_block", "inline_code", "table", "link")
_FIRST_WORDS = re.compile(r"\w[\w'’]*")


def marks_of(text: str) -> list[bool]:
    """Return whether a response has each of `MARKERS` and `STARTS`, in their order."""
    start = text[:_START]
    found = [expression.search(text) is not None for _, expression in MARKERS.values()]
    return found + [expression.search(start) is not None for _, expression in STARTS.values()]


def review_form(pairs: SampledPairs) -> tuple[dict[str, Any], list[Finding]]:
    """Return how much more often the better response has each mark of form, and the biases among them."""
    table = np.asarray([marks_of(text) for text in pairs.responses], dtype=bool).reshape(len(pairs.responses), -1)
    rows, findings = [], []
    for place, (name, (title, _)) in enumerate({**MARKERS, **STARTS}.items()):
        has = table[:, place]
        row = {"name": name, "title": title, **pairs.preference(has)}
        rows.append(row)
        findings += _bias(pairs, has, row)
    length, found = review_length(pairs)
    if not findings:
        findings = [_no_bias(pairs)]
    return {"marks": rows, "starts": first_words(pairs), "length": length}, [*found, *findings]


def _bias(pairs: SampledPairs, has: Mask, row: dict[str, Any]) -> list[Finding]:
    decided = row["num_only_better"] + row["num_only_worse"]
    if not is_biased(row, decided, _BIAS):
        return []
    favoured = row["wins"] > 0.5
    better, worse = has[pairs.better], has[pairs.worse]
    chosen = (better & ~worse) if favoured else (worse & ~better)
    strong = abs(row["wins"] - 0.5) >= _STRONG_BIAS and decided >= _MANY_PAIRS * len(pairs)
    low, high = row["wins_ci95"]
    which = "the better one" if favoured else "the worse one"
    share = row["wins"] if favoured else 1 - row["wins"]
    ends = (low, high) if favoured else (1 - high, 1 - low)
    return [
        Finding(
            f"bias_{row['name']}",
            f"{'Paid for' if favoured else 'Paid against'}: {row['title']}",
            "problem" if strong else "note",
            int(chosen.sum()),
            decided,
            "pairs in which one response has it",
            True,
            f"Where exactly one of two responses has it, {which} does in {share:.1%} (95 %: {ends[0]:.1%} to "
            f"{ends[1]:.1%}); {row['share_better']:.1%} of the better and {row['share_worse']:.1%} of the worse "
            "responses have it. A reward model learns that first.",
            tuple(group.example() for group in pairs.examples(chosen, NUM_EXAMPLES)),
            _advice(row["name"]),
        )
    ]


def _advice(name: str) -> Suggestion:
    if name in _FORMAT:
        return Suggestion(
            "If such form is no merit where the model will be used, add pairs that differ in content alone, and see "
            "whether the model prefers style to substance (RM-Bench).",
            "rm-scale eval --model DIR --benchmark 'RM-Bench/data/*_filtered.json'",
        )
    if name in {"refusal", "as_an_ai", "apology"}:
        return Suggestion(
            "If the data is about harm alone, mix in harmless questions where the helpful answer is the better one, "
            "and see refusing and responding apart (RewardBench, Safety).",
            "rm-scale eval --model DIR --benchmark rewardbench.json",
        )
    return Suggestion("If it is no merit where the model will be used, add pairs in which it decides nothing.")


def _no_bias(pairs: SampledPairs) -> Finding:
    meaning = "No mark of form is on one side in 60 % or more of the pairs that it decides."
    return Finding("bias_form", "Bias to form", "nothing", 0, len(pairs), "pairs", True, meaning)


# --- Length ----------------------------------------------------------------------------------------------------------


def review_length(pairs: SampledPairs) -> tuple[dict[str, Any], list[Finding]]:
    """Return how often the longer response is the better one, over all and by how much longer it is, in tokens."""
    lengths = np.asarray(
        [length for group in pairs.groups for length in group.lengths or (0,) * len(group.responses)], dtype=np.int64
    )
    known = np.asarray([bool(group.lengths) for group in pairs.groups], dtype=bool)[pairs.group]
    difference = (lengths[pairs.better] - lengths[pairs.worse])[known]
    prompt = pairs.prompt[known]
    decided = difference != 0
    rate = pairs.win_rate(difference[decided] > 0, prompt[decided])
    figures = {
        "num_pairs": int(known.sum()),
        "num_equal": int((~decided).sum()),
        "longer_wins": rate["wins"],
        "longer_wins_ci95": rate["wins_ci95"],
        "bins": _length_bins(pairs, difference[decided], prompt[decided]),
    }
    return figures, [_length_finding(pairs, rate, difference, known)]


def _length_bins(pairs: SampledPairs, difference: IntArray, prompt: IntArray) -> list[dict[str, Any]]:
    """Return bins of about as many pairs each by how many tokens longer one response is."""
    if not len(difference):
        return []
    size = np.abs(difference)
    tops = np.unique(np.quantile(size, np.arange(1, _NUM_BINS + 1) / _NUM_BINS, method="inverted_cdf"))
    place = np.searchsorted(tops, size)
    bins = []
    for number in range(len(tops)):
        inside = place == number
        rate = pairs.win_rate(difference[inside] > 0, prompt[inside])
        low, high = int(size[inside].min()), int(size[inside].max())
        bins.append({"low": low, "high": high, "num_pairs": int(inside.sum()), **rate})
    return bins


def _length_finding(pairs: SampledPairs, rate: dict[str, Any], difference: IntArray, known: Mask) -> Finding:
    longer, decided = int((difference > 0).sum()), int((difference != 0).sum())
    biased = is_biased(rate, decided, _BIAS / 2)
    favoured = not biased or rate["wins"] > 0.5
    word, count = ("longer", longer) if favoured else ("shorter", decided - longer)
    chosen = np.zeros(len(pairs), dtype=bool)
    chosen[np.flatnonzero(known)] = (difference > 0) if favoured else (difference < 0)
    bounds = rate["wins_ci95"] or [0.0, 1.0]
    low, high = bounds if favoured else [1 - bounds[1], 1 - bounds[0]]
    share = count / decided if decided else 0.0
    level = "nothing" if not biased else "problem" if abs(rate["wins"] - 0.5) >= _BIAS else "note"
    return Finding(
        "length_bias",
        f"The {word} response wins",
        level,  # type: ignore[arg-type]
        count,
        decided,
        "pairs of different length",
        True,
        f"Choosing the {word} response without reading it is right in {share:.1%} (95 %: {low:.1%} to {high:.1%}). "
        "What a model adds to that is what it has learnt beside length.",
        tuple(group.example() for group in pairs.examples(chosen, NUM_EXAMPLES)) if biased else (),
        Suggestion(
            "Ask of the trained model that it is right where length misleads, too.",
            "rm-scale eval --model DIR --dataset_path FILE --require 'balanced_accuracy>=0.6'",
        )
        if biased
        else None,
    )


# --- First words -----------------------------------------------------------------------------------------------------


def first_words(pairs: SampledPairs) -> list[dict[str, Any]]:
    """Return the first two words that decide most pairs, with how often the better response begins with them."""
    starts = [" ".join(_FIRST_WORDS.findall(text[:100].lower())[:2]) for text in pairs.responses]
    common = [start for start, _ in Counter(starts).most_common(4 * _NUM_STARTS) if start]
    number_of = {start: number for number, start in enumerate(common)}
    place = np.asarray([number_of.get(start, -1) for start in starts], dtype=np.int64)
    rows = []
    for number, start in enumerate(common):
        row = {"start": start, **pairs.preference(place == number)}
        if row["num_only_better"] + row["num_only_worse"] >= FEWEST_PAIRS:
            rows.append(row)
    return sorted(rows, key=lambda row: -abs((row["wins"] or 0.5) - 0.5))[:_NUM_STARTS]
