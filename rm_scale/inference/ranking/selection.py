"""What is asked of a ranked group (`Selection`) and what it comes to (`Selected`): rows, or the reason for none.

Nothing is dropped silently: a prompt without a row is counted under one of `LEFT_OUT_REASONS`, a comparison without a
pair under one of `NO_PAIR_REASONS`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rm_scale.inference.ranking.candidates import CandidateGroup

OutputFormat = Literal["ranked", "top", "best", "pairs"]
PairRule = Literal["best_worst", "best_random", "adjacent", "all"]
Ties = Literal["first", "random", "skip"]

LEFT_OUT_REASONS = {
    "one_completion": "the prompt has one completion that could be scored: nothing to compare it with",
    "no_scored_completion": "none of the prompt's completions could be scored",
    "identical_completions": "all completions of the prompt are the same text",
    "equal_scores": "all completions of the prompt have the same score",
    "tied": "the choice falls between completions of equal score, and --ties skip leaves such prompts out",
    "below_min_score": "the best completion scores less than --min_score",
    "too_many_completions": "more than 1,000 completions: all their pairs would be half a million and more",
    "no_pair": "no comparison gave a pair; see the reasons for that",
}
NO_PAIR_REASONS = {
    "tie": "equal scores",
    "below_min_margin": "the scores differ by less than --min_margin",
    "empty_completion": "a completion has no text; preference formats refuse that",
    "nul_character": "a completion holds a NUL character; preference formats refuse that",
}


@dataclass(frozen=True)
class Selection:
    """What becomes of a ranked group.

    Attributes:
        output_format: `ranked` all completions, best first; `top` the first `top_k` of them; `best` one row with the
            best; `pairs` rows with a chosen and a rejected completion.
        top_k: for `top`.
        min_score: for `best`: prompts whose best completion scores less are left out.
        pairs: for `pairs`: `best_worst` one pair; `best_random` the best and a random one below it; `adjacent`
            neighbours in the ranking; `all` every two.
        min_margin: for `pairs`: least difference of scores.
        margin_column: for `pairs`: the column with the difference.
        ties: which completion is taken among several with the same score, where that matters: `first` in the input,
            one at `random`, or `skip` the prompt.
        seed: of random choices. They depend on it and on the prompt, not on where the prompt stands in the file.
    """

    output_format: OutputFormat = "ranked"
    top_k: int = 1
    min_score: float | None = None
    pairs: PairRule = "best_worst"
    min_margin: float = 0.0
    margin_column: str = "margin"
    ties: Ties = "first"
    seed: int = 0

    def random_for(self, group: CandidateGroup) -> random.Random:
        """Return random numbers for this prompt, the same wherever it stands in whichever file."""
        identity = json.dumps([self.seed, group.prompt, group.tools], sort_keys=True, default=str)
        return random.Random(hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest())


@dataclass(frozen=True)
class Selected:
    """The rows of one group, or why there are none.

    Attributes:
        rows: what is written.
        left_out: a reason of `LEFT_OUT_REASONS`, `None` when there are rows.
        no_pairs: comparisons that gave no pair, by reason.
    """

    rows: list[dict[str, Any]]
    left_out: str | None = None
    no_pairs: Mapping[str, int] = field(default_factory=dict)
