"""Bring texts to a form in which case, white space, punctuation and the way of writing a character don't count."""

from __future__ import annotations

import hashlib
import re
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
# But "3.5" is not 35, and neither "2 - 3" nor "-5" is the same without its sign. These stay, as private characters.
_KEPT = {sign: chr(0xE000 + number) for number, sign in enumerate("-*/^.")}
_KEPT["\u2212"] = _KEPT["-"]
_DIGITS_FOLLOW = re.compile("[-\u2212*/^.](?=\\s?\\d)")
_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}\b)")
_APOSTROPHES = "'’‘ʼ"
# Marks of typeset English. Without them its texts are ASCII, which Python folds and translates ten times as fast.
_TYPESET = (*((mark, "'") for mark in "’‘"), *((mark, " ") for mark in "“”–—"))
_HAS_DIGITS = re.compile(r"\d")
_BETWEEN_DIGITS = re.compile(r"(?<=\d) +(?=\d)")
_GAP = chr(0xE005)
# A vowel or tone mark stays with the character that it is written on. No normalised text holds this character.
_JOINED = "\0"
_VARIATION_SELECTORS = range(0xFE00, 0xFE10)


class _Replacements(dict[int, str | None]):
    """What `str.translate` puts for a character (`None`: nothing); each is decided once.

    Args:
        spaced: with spaces between tokens, or with nothing.
    """

    def __init__(self, spaced: bool) -> None:
        super().__init__()
        self._spaced = spaced

    def __missing__(self, code: int) -> str | None:
        spaced = _replacement(code)
        self[code] = found = spaced if self._spaced or spaced is None else spaced.strip(f" {_JOINED}") or None
        return found


def _replacement(code: int) -> str | None:
    """Return what stands for a character in a text with spaces between tokens."""
    character = chr(code)
    category = unicodedata.category(character)
    if category == "Cf" or code in _VARIATION_SELECTORS or character in _APOSTROPHES:
        return None  # a soft hyphen, a zero-width joiner
    if character in _KEPT.values():
        return character
    if category == "Sm":
        return f" {character} "  # plus, equals, less than
    if category[0] in _BETWEEN_WORDS:
        return " "
    if any(first <= code <= last for first, last in _UNSPACED):
        return f"{_JOINED if category[0] == 'M' else ' '}{character} "
    return character


_SPACED, _COMPACT = _Replacements(spaced=True), _Replacements(spaced=False)
# Bytes are rid of these ten times as fast as characters.
_LEFT_OUT = bytes(code for code in range(128) if _COMPACT[code] is None)


def tokens(text: str) -> list[str]:
    """Split a text into normalised tokens.

    Unicode NFKC and case folding; punctuation, symbols and white space separate, apostrophes are left out.
    Mathematical symbols, signs of numbers and decimal points count. A token is a word, or one character (with its
    marks) of a script that is written without spaces: Han, Kana, Thai, Lao, Khmer, Myanmar.
    """
    return _separated(_folded(text)).split()


def normalise(text: str) -> str:
    """Return a text's tokens in one form: without spaces, and a mark between digits; "" where it has none, as for "?!".

    A line break within a word, or a hyphen instead of a space, makes no other text.
    """
    folded = _folded(text)
    if _HAS_DIGITS.search(folded):
        return _BETWEEN_DIGITS.sub(_GAP, _separated(folded)).replace(" ", "")
    return folded.encode().translate(None, _LEFT_OUT).decode() if folded.isascii() else folded.translate(_COMPACT)


def _folded(text: str) -> str:
    if text.isascii():
        return text.lower()
    plain = unicodedata.normalize("NFKC", text)
    for mark, ascii_mark in _TYPESET:
        plain = plain.replace(mark, ascii_mark)
    folded = plain.casefold()
    return folded if folded.isascii() else unicodedata.normalize("NFKC", folded)


def _separated(folded: str) -> str:
    """Return the tokens of a folded text with spaces between them."""
    if _HAS_DIGITS.search(folded):
        folded = _DIGITS_FOLLOW.sub(_kept_sign, _THOUSANDS.sub("", folded))
    separated = folded.translate(_SPACED)
    if _JOINED in separated:
        separated = separated.replace(f" {_JOINED}", "").replace(_JOINED, "")
    return separated


def _kept_sign(found: re.Match[str]) -> str:
    """Return what stands for a character before a number: itself, or a sign or point that counts."""
    text, place, sign = found.string, found.start(), found[0]
    before, after = text[place - 1 : place], text[place + 1]
    if sign == ".":
        return _KEPT[sign] if before.isdecimal() and after.isdecimal() else sign
    left = text[place - 2 : place - 1] if before.isspace() else before
    is_minus = sign in "-\u2212" and after.isdecimal() and not (before.isalnum() or before in ("_", ")", "]"))
    return f" {_KEPT[sign]} " if left.isdecimal() or is_minus else sign


def exact_key(text: str) -> int:
    """Return 64 bits that stand for a text, as a number that int64 holds."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def normalised_key(text: str) -> int:
    """Return 64 bits that stand for a text's normalised form, or for the text itself where that is empty."""
    return exact_key(normalise(text) or text)
