"""Bring texts to a form in which case, white space, punctuation and the way of writing a character don't count."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

# Scripts that are written without spaces between words, as ranges of code points: each character is a token.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # ideographic iteration mark and zero
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana extensions
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han, compatibility
    (0x20000, 0x3FFFF),  # Han
)
# Punctuation, symbols, separators and control characters stand between words and are no part of them.
_BETWEEN_WORDS = "PSZC"
# But "3.5" is not 35, and neither "2 - 3" nor "-5" is the same without its sign. These stay, as private characters.
_KEPT = {sign: chr(0xE000 + number) for number, sign in enumerate("-*/^.")}
_KEPT["\u2212"] = _KEPT["-"]
_IN_NUMBERS = re.compile(r"(?<=\d)\.(?=\d)|(?<=\d)\s?[-\u2212*/^]\s?(?=\d)|(?<![\w)\]])[-\u2212](?=\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_APOSTROPHES = re.compile(r"(?<=[^\W\d_])['’ʼ](?=[^\W\d_])")
_HAS_DIGITS = re.compile(r"\d")
_NOT_BETWEEN_DIGITS = re.compile(r"(?<!\d) | (?!\d)")
# A vowel or tone mark stays with the character that it is written on. No normalised text holds this character.
_JOINED = "\0"
_VARIATION_SELECTORS = range(0xFE00, 0xFE10)


class _Replacements(dict[int, str]):
    """What `str.translate` puts for a character; each is decided once."""

    def __missing__(self, code: int) -> str:
        self[code] = replacement = _replacement(code)
        return replacement


def _replacement(code: int) -> str:
    character = chr(code)
    category = unicodedata.category(character)
    if category == "Cf" or code in _VARIATION_SELECTORS:
        return ""  # an invisible mark within a word: a soft hyphen, a zero-width joiner
    if character in _KEPT.values():
        return character
    if category == "Sm":
        return f" {character} "  # plus, equals, less than
    if category[0] in _BETWEEN_WORDS:
        return " "
    if any(first <= code <= last for first, last in _UNSPACED):
        return f"{_JOINED if category[0] == 'M' else ' '}{character} "
    return character


_REPLACEMENTS = _Replacements()


def tokens(text: str) -> list[str]:
    """Split a text into normalised tokens.

    Unicode NFKC and case folding; punctuation, symbols and white space separate, apostrophes within words are left out.
    Mathematical symbols, signs of numbers and decimal points count. A token is a word, or one character (with its
    marks) of a script that is written without spaces: Han, Kana, Thai, Lao, Khmer, Myanmar.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    if not folded.isascii():
        folded = unicodedata.normalize("NFKC", folded)
    folded = _APOSTROPHES.sub("", folded)
    if _HAS_DIGITS.search(folded):
        folded = _IN_NUMBERS.sub(_kept_sign, _THOUSANDS.sub("", folded))
    separated = folded.translate(_REPLACEMENTS)
    if _JOINED in separated:
        separated = separated.replace(f" {_JOINED}", "").replace(_JOINED, "")
    return separated.split()


def _kept_sign(found: re.Match[str]) -> str:
    sign = found[0].strip()
    return _KEPT[sign] if sign == "." else f" {_KEPT[sign]} "


def normalise(words: Sequence[str]) -> str:
    """Return the one form of a text's tokens: without spaces, but between digits; "" of no tokens, as for "?!".

    A line break within a word, or a hyphen instead of a space, makes no other text.
    """
    joined = "".join(words)
    return _NOT_BETWEEN_DIGITS.sub("", " ".join(words)) if _HAS_DIGITS.search(joined) else joined


def exact_key(text: str) -> int:
    """Return 64 bits that stand for a text, as a number that int64 holds."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def normalised_key(text: str) -> int:
    """Return 64 bits that stand for a text's normalised form, or for the text itself where that is empty."""
    return exact_key(normalise(tokens(text)) or text)
