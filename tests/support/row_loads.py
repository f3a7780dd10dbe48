"""Loads of micro-steps for tests of the planner."""

from __future__ import annotations

from rm_scale.planning.scenario import RowLoad


def uniform_rows(pairs: float, prompt: float, response: float, packing: str, padded_to: float | None = None) -> RowLoad:
    """Return the load of a micro-step of `pairs` pairs that are all alike.

    Args:
        pairs: how many.
        prompt, response: tokens of each prompt and response.
        packing: none, padding_free or prefix_shared.
        padded_to: length of a padded response with its prompt; default no padding.
    """
    length = prompt + response
    effective, effective_squared = 2 * pairs * length, 2 * pairs * length**2
    if packing == "prefix_shared":
        tokens = pairs * (prompt + 2 * response)
        squared = pairs * (prompt**2 + 2 * response * (2 * prompt + response))
    elif packing == "padding_free" or padded_to is None:
        tokens, squared = effective, effective_squared
    else:
        tokens, squared = 2 * pairs * padded_to, 2 * pairs * padded_to**2
    return RowLoad(tokens, squared, effective, effective_squared, pairs, 2 * pairs)
