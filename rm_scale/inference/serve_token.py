"""The token between `rm-scale serve` and its clients: what it may be, read the same way on both sides."""

from __future__ import annotations

import os

from rm_scale.errors import UserError
from rm_scale.files import read_small_text

TOKEN_VARIABLE = "RM_SCALE_SERVE_TOKEN"
_MOST_BYTES = 16_384


def checked_token(token: str, where: str, fix: str) -> str:
    """Return a token without the white space around it.

    Args:
        token: as it was given.
        where: how the message begins; the token itself is never shown.
        fix: what to do.

    Raises:
        UserError: it is empty, or can't stand in a header of HTTP: only printable ASCII can.
    """
    token = token.strip()
    if not token:
        raise UserError(f"{where}: is empty. Fix: {fix}")
    if not (token.isascii() and token.isprintable()):
        raise UserError(
            f"{where}: holds a character that is not printable ASCII, or several lines; HTTP can't carry it. Fix: a "
            "token of letters and digits, such as openssl rand -hex 32 prints."
        )
    return token


def token_of_variable(name: str, fix: str) -> str | None:
    """Return the token in an environment variable, `None` where the variable is not set.

    Raises:
        UserError: it is set and can't be one.
    """
    token = os.environ.get(name)
    return None if token is None else checked_token(token, f"{name} in the environment", fix)


def token_of_file(file: str) -> str:
    """Return the token in a file.

    Raises:
        UserError: the file can't be read, or holds none.
    """
    try:
        token = read_small_text(file, _MOST_BYTES)
    except ValueError as error:
        raise UserError(f"token_file={file}: can't be read ({error}). Fix: a file with one line.") from error
    return checked_token(token, f"token_file={file}", "a file with one line.")
