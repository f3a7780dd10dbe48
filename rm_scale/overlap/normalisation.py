"""Bring texts to a form in which case, white space, punctuation and the way of writing a character don't count."""

from __future__ import annotations

import hashlib
import unicodedata

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
    if category[0] in _BETWEEN_WORDS:
        return " "
    if any(first <= code <= last for first, last in _UNSPACED):
        return f"{_JOINED if category[0] == 'M' else ' '}{character} "
    return character


_REPLACEMENTS = _Replacements()


def tokens(text: str) -> list[str]:
    """Split a text into normalised tokens.

    Unicode NFKC and case folding; punctuation, symbols and white space separate. A token is a word, or one character
    (with its marks) of a script that is written without spaces: Han, Kana, Thai, Lao, Khmer, Myanmar.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    if not folded.isascii():
        folded = unicodedata.normalize("NFKC", folded)
    separated = folded.translate(_REPLACEMENTS)
    if _JOINED in separated:
        separated = separated.replace(f" {_JOINED}", "").replace(_JOINED, "")
    return separated.split()


def normalise(text: str) -> str:
    """Return the tokens of a text with one space between them; "" where it has none, as for "?!"."""
    return " ".join(tokens(text))


def exact_key(text: str) -> int:
    """Return 64 bits that stand for a text, as a number that int64 holds."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def normalised_key(text: str) -> int:
    """Return 64 bits that stand for a text's normalised form, or for the text itself where that is empty."""
    return exact_key(normalise(text) or text)
