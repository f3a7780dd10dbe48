"""Guess the language of a text from its script and its most common small words: enough for a mix, no more."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rm_scale.data_review.finding import NUM_EXAMPLES, Finding, Suggestion
from rm_scale.data_review.sample import SampledGroup

UNKNOWN = "not known"
_CHARACTERS = 2000
_FEWEST_WORDS = 2
_FEWEST_SHARE = 0.08

_SCRIPTS = {
    "Latin": r"A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff",
    "Cyrillic": r"\u0400-\u052f",
    "Greek": r"\u0370-\u03ff\u1f00-\u1fff",
    "Arabic": r"\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff",
    "Hebrew": r"\u0590-\u05ff",
    "Devanagari": r"\u0900-\u097f",
    "Bengali": r"\u0980-\u09ff",
    "Gurmukhi": r"\u0a00-\u0a7f",
    "Gujarati": r"\u0a80-\u0aff",
    "Tamil": r"\u0b80-\u0bff",
    "Telugu": r"\u0c00-\u0c7f",
    "Kannada": r"\u0c80-\u0cff",
    "Malayalam": r"\u0d00-\u0d7f",
    "Thai": r"\u0e00-\u0e7f",
    "Georgian": r"\u10a0-\u10ff",
    "Armenian": r"\u0530-\u058f",
    "Ethiopic": r"\u1200-\u137f",
    "Hangul": r"\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "Kana": r"\u3040-\u30ff",
    "Han": r"\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff",
}
_SCRIPT_PATTERNS = {name: re.compile(f"[{ranges}]") for name, ranges in _SCRIPTS.items()}
# Scripts that one language of preference data is nearly alone in writing.
_OF_SCRIPT = {
    **{"Greek": "Greek", "Hebrew": "Hebrew", "Devanagari": "Hindi or Marathi", "Bengali": "Bengali"},
    **{"Gurmukhi": "Punjabi", "Gujarati": "Gujarati", "Tamil": "Tamil", "Telugu": "Telugu", "Kannada": "Kannada"},
    **{"Malayalam": "Malayalam", "Thai": "Thai", "Georgian": "Georgian", "Armenian": "Armenian"},
    **{"Ethiopic": "Amharic", "Hangul": "Korean"},
}
_WORDS = {
    "English": "the of and to is in that it for you are with this was be have not can what how my your i do a",
    "German": "der die das und ist nicht ein eine zu den mit von für auf sie ich wie auch es im dem sind kann",
    "French": "le la les des est et une pour dans que qui pas sur vous je au avec ce il plus sont du un ne",
    "Spanish": "el los las una que es para por con del no se más como pero su al está y lo la de",
    "Portuguese": "o os as uma que é para com não do da em por mais como mas ao você são um dos das e",
    "Italian": "il lo gli una che è per non con di del della sono come più anche questo un e nel alla si",
    "Dutch": "het een van en is niet dat de voor op zijn met ik je aan ook maar hoe wat deze te",
    "Swedish": "och att det som en är på för inte med jag av till den har kan du ett var",
    "Danish": "og at det som en er på for ikke med jeg af til den har kan du et hvad",
    "Polish": "nie się jest na do że to jak w z co i o dla czy ale są przez oraz od",
    "Czech": "je na že se to v a pro jak nebo ale jsou s do co by z po které",
    "Turkish": "bir ve bu için da de ile çok olarak ne mi daha olan gibi değil var nasıl ben",
    "Indonesian": "yang dan di untuk dengan ini itu dari tidak adalah pada dalam saya anda akan atau bisa ke",
    "Vietnamese": "và của là có không được cho một các trong với này người những để bạn tôi khi",
    "Finnish": "ja on ei se että ole mutta kun voi tai oli niin hän mitä ovat myös sen",
    "Hungarian": "a az és hogy nem egy is van meg ez de vagy mint csak ha",
    "Romanian": "și în de la este nu pentru că cu un o pe mai sunt din care ce se",
    "Russian": "и в не на что с по это как для он но к из у я от так же вы или",
    "Ukrainian": "і в не на що з це як для та до у він але я від або за є",
    "Bulgarian": "и на да за се от не в е са с че по как но това ще",
    "Arabic": "في من على إلى أن هذا التي ما هو لا مع كان عن هذه هل أو",
    "Persian": "در به از که این را با است برای آن یک می های و تا",
    "Urdu": "کے میں ہے کی اور سے کا کو نہیں پر یہ ہیں ایک کہ نے",
}
_BY_WORD: dict[str, list[str]] = {}
for _language, _listed in _WORDS.items():
    for _word in _listed.split():
        _BY_WORD.setdefault(_word, []).append(_language)
_WORD = re.compile(r"[^\W\d_]+")
_BY_WORDS = {"Latin", "Cyrillic", "Arabic"}


def guess_language(text: str) -> str:
    """Return the language that a text seems to be in.

    Its script decides where one language is nearly alone in using it; else the language most of whose small words
    (the, of, and, ...) it holds. Code, names and very short texts give "not known".

    Args:
        text: its first 2,000 characters are looked at.
    """
    text = text[:_CHARACTERS]
    if text.isascii():
        script = "Latin"
    else:
        counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPT_PATTERNS.items()}
        script = max(counts, key=lambda name: counts[name])
        if counts[script] == 0:
            return UNKNOWN
        if script in {"Kana", "Han"}:
            return "Japanese" if counts["Kana"] * 10 > counts["Han"] else "Chinese"
    return _by_words(text) if script in _BY_WORDS else _OF_SCRIPT[script]


def _by_words(text: str) -> str:
    words = _WORD.findall(text.lower())
    scores = Counter(language for word in words for language in _BY_WORD.get(word, ()))
    best = scores.most_common(2)
    if not best or best[0][1] < max(_FEWEST_WORDS, _FEWEST_SHARE * len(words)):
        return UNKNOWN
    return UNKNOWN if len(best) > 1 and best[0][1] == best[1][1] else best[0][0]


def review_languages(groups: Sequence[SampledGroup]) -> tuple[list[dict[str, Any]], Finding]:
    """Return how many groups of each source and subset are in which language, and answers in another one than asked.

    A group's language is that of its prompt, or of its first response where the prompt's is not known.
    """
    mix: Counter[tuple[str, str, str]] = Counter()
    others = []
    asked_known = 0
    for group in groups:
        asked, said = guess_language(group.prompt), [guess_language(text) for text in group.responses]
        mix[group.source, group.subset, asked if asked != UNKNOWN else said[0]] += 1
        if asked != UNKNOWN:
            asked_known += 1
            if any(language not in {asked, UNKNOWN} for language in said):
                others.append((group, asked, said))
    rows = [
        {"source": source, "subset": subset, "language": language, "num_groups": count}
        for (source, subset, language), count in sorted(mix.items(), key=lambda one: (one[0][:2], -one[1]))
    ]
    return rows, _answers_in_another(others, asked_known)


def _answers_in_another(others: Sequence[tuple[SampledGroup, str, list[str]]], asked_known: int) -> Finding:
    suggestion = Suggestion(
        "Translations are asked for so, and they are sound. Where nobody asked, see whether the better response is the "
        "one in the language of the prompt."
    )
    return Finding(
        "other_language",
        "A response in another language than its prompt",
        "problem" if len(others) > 0.05 * asked_known else "note" if others else "nothing",
        len(others),
        asked_known,
        "groups",
        True,
        "Languages are a guess from script and small words.",
        tuple(
            group.example(guessed=f"prompt {asked}, responses {', '.join(said)}", **group.best_and_worst())
            for group, asked, said in others[:NUM_EXAMPLES]
        ),
        suggestion if others else None,
    )
