"""Data with nothing to compare: ties alone."""

from __future__ import annotations

from rm_scale.config import RunConfig
from rm_scale.data_review.finding import Example
from rm_scale.data_review.form_bias import review_form
from rm_scale.data_review.lengths import review_lengths
from rm_scale.data_review.noise import review_noise
from rm_scale.data_review.pair_hashes import PairHashes
from rm_scale.data_review.sample import SampledGroup
from rm_scale.data_review.sampled_pairs import SampledPairs
from rm_scale.data_review.word_model import review_words


def test_ties_alone() -> None:
    hashes = PairHashes()
    hashes.extend(PairHashes(), 0)
    found = review_noise(hashes.arrays(), lambda numbers: Example("rows", tuple(numbers), {}))
    groups = [SampledGroup("file", 0, "p", ("a", "b"), (), 3, (5, 6))]
    pairs = SampledPairs.of(groups)
    form, of_form = review_form(pairs)
    _, of_lengths = review_lengths(groups, RunConfig(model_name_or_path="none"), seed=0)
    assert {one.level for one in [*found, *of_form]} == {"nothing"} and of_lengths[0].count == 0
    assert form["length"]["longer_wins"] is None and form["starts"] == []
    assert review_words(pairs, seed=0)[0]["num_pairs"] == 0
