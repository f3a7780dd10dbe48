"""The layout of what `rm-scale eval` writes as `evaluation.json`; its pages, tables and gate read it.

All numbers are plain JSON numbers; what does not exist (a ratio without pairs, lengths that are not known) is null,
never NaN. "Pairs" are pairs whose labels prefer one response; a margin is r_better - r_worse of such a pair.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

DOCUMENT_VERSION = 1

Interval = list[float]
"""[low, high] of a 95 % interval."""


class Margins(TypedDict):
    """How the margins lie. Bin i of the histogram holds edges[i] <= margin < edges[i + 1], the last one its end too.

    `quantiles` has the keys p01, p05, p25, p50, p75, p95, p99.
    """

    edges: list[float]
    counts: list[int]
    quantiles: dict[str, float | None]
    mean: float | None
    std: float | None
    min: float | None
    max: float | None


class ReliabilityBin(TypedDict):
    """Pairs whose predicted probability, sigmoid(|margin|), lies in [low, high) (the last bin: up to 1 and with it).

    `predicted` is their mean prediction, `observed` the share in which the preferred response is the better one by
    label (an exact tie of rewards counts half, a soft label with its probability), `observed_ci95` Wilson's interval.
    All three are null where `count` is 0.
    """

    low: float
    high: float
    count: int
    predicted: float | None
    observed: float | None
    observed_ci95: Interval | None


class Calibration(TypedDict):
    """Do rewards mean what Bradley-Terry says they mean: P(a better than b) = sigmoid(r_a - r_b).

    Attributes:
        bins: reliability of the rewards as they are; `bins_after` of the rewards divided by the temperature.
        ece: expected calibration error, the mean over pairs of |predicted - observed| of their bin.
        ece_if_calibrated: what `ece` would be on average for a perfectly calibrated model on as many pairs.
        nll: mean negative log-likelihood of the labels, nats per pair; log 2 = 0.693 is a coin.
        temperature: rewards divided by it have the least `nll` on these pairs; null when there is no such number.
        temperature_note: why it is null, else "".
        ece_after, nll_after: with temperatures fitted on other prompts than those they are applied to.
        num_folds: of that cross-validation over prompts; `fold_temperatures` what each fitted.
    """

    bins: list[ReliabilityBin]
    bins_after: list[ReliabilityBin]
    ece: float | None
    ece_if_calibrated: float | None
    nll: float | None
    temperature: float | None
    temperature_note: str
    ece_after: float | None
    nll_after: float | None
    num_folds: int
    fold_temperatures: list[float | None]


class Share(TypedDict):
    """Accuracy over some of the pairs; `accuracy` and `accuracy_ci95` are null without pairs."""

    num_pairs: int
    accuracy: float | None
    accuracy_ci95: Interval | None
    mean_margin: float | None


class LengthBin(Share):
    """Pairs whose length difference, better - worse in tokens, is in [low, high], both ends included."""

    low: int
    high: int


class LengthBias(TypedDict):
    """Does the model go by length? Lengths are tokens of this model's tokenizer.

    Attributes:
        num_pairs: pairs whose lengths are known; 0 when none are, and then everything else is null or empty.
        better_longer, better_shorter, better_equal: accuracy where the better response is longer, shorter, as long.
        balanced_accuracy: mean of the first two accuracies; what length alone can't raise.
        longer_wins, shorter_wins: accuracy of choosing by length alone (equal lengths count as not correct).
        bins: accuracy by length difference.
        slope_per_token: of margin = intercept + slope * (length of better - length of worse), least squares;
            `slope_ci95` with errors clustered by prompt.
        intercept: the margin at equal length.
        slope_std_per_100_tokens: the slope for 100 tokens in standard deviations of the score.
        correlation: Pearson's, of margin and length difference.
    """

    num_pairs: int
    better_longer: Share
    better_shorter: Share
    better_equal: Share
    balanced_accuracy: float | None
    longer_wins: float | None
    shorter_wins: float | None
    bins: list[LengthBin]
    slope_per_token: float | None
    slope_ci95: Interval | None
    intercept: float | None
    slope_std_per_100_tokens: float | None
    correlation: float | None


class Ties(TypedDict):
    """Ties of labels and of rewards.

    Attributes:
        num_label_ties: pairs whose label prefers neither; they count for nothing else here but the loss.
        label_tie_mean_abs_margin: mean |difference of rewards| over them; `pair_mean_abs_margin` over all other pairs.
        label_tie_auc: probability that a label tie has the smaller |difference| than another pair; 0.5 is a coin.
        num_reward_ties: pairs with exactly equal rewards; not correct. `reward_tie_share` of all pairs.
    """

    num_label_ties: int
    label_tie_mean_abs_margin: float | None
    pair_mean_abs_margin: float | None
    label_tie_auc: float | None
    num_reward_ties: int
    reward_tie_share: float | None


class Ratios(TypedDict):
    """What training writes per subset, too; `accuracy_ci95` is Wilson's, for independent pairs."""

    accuracy: float | None
    accuracy_ci95: Interval
    num_pairs: int
    num_ties: int
    loss: float | None
    mean_margin: float | None


class Slice(Ratios):
    """Results over some groups: all of them, one subset, one source.

    Attributes:
        num_groups, num_prompts: groups, and different prompts among them.
        accuracy_ci95_prompts: Wilson's, for pairs that are alike within a prompt; the one to quote when prompts have
            several pairs. Null with fewer than two prompts.
    """

    num_groups: int
    num_prompts: int
    accuracy_ci95_prompts: Interval | None
    margins: Margins
    calibration: Calibration
    length_bias: LengthBias
    ties: Ties


class DataUse(TypedDict):
    """What became of the input rows: `rows_read` = `rows_used` + the counts of `rejected`.

    Each entry of `rejected` has `source`, `reason`, `meaning`, `count`, `first_rows` (indexes from 0). Scores that were
    read from columns have further keys.

    Attributes:
        read_as: which columns the scores and the labels are.
        group_sizes: number of groups by their number of scores.
        tied_rows: `count` and `first_rows` of the rows in which the scores of a compared pair are equal.
        num_pairs_lost: pairs of the rows that can't be used; `accuracy_if_lost` counts them as wrong.
    """

    sources: list[str]
    rows_read: int
    rows_used: int
    rejected: list[dict[str, Any]]
    read_as: NotRequired[str]
    group_sizes: NotRequired[dict[str, int]]
    tied_rows: NotRequired[dict[str, Any]]
    num_pairs_lost: NotRequired[int]
    accuracy_if_lost: NotRequired[float | None]


class ModelEvaluation(Slice):
    """One model on all groups.

    Attributes:
        name: short, different for each model of a document.
        path: the model's folder, or the file its scores were read from.
        dtype, device, max_length: how it was scored; null when scores were read.
        loss_type: what `loss` is: "bradley_terry" or "plackett_luce", and the run's options.
        score_mean, score_std, num_scored: over all responses.
        baselines: as training writes them (`longer_wins`, `shorter_wins`, `equal_length`).
        data: null when scores were read.
        scores_file: name of the file beside this document with every group's rewards.
        subsets, sources: the same numbers per subset and per input file.
    """

    name: str
    path: str
    dtype: str | None
    device: str | None
    max_length: int | None
    loss_type: str
    score_mean: float | None
    score_std: float | None
    num_scored: int
    baselines: dict[str, float | int | None]
    data: DataUse | None
    scores_file: str | None
    subsets: dict[str, Slice]
    sources: dict[str, Slice]


class Agreement(TypedDict):
    """Two models on the pairs that both have scored.

    Attributes:
        agreement: share of pairs with the same decision (right, wrong or a tie of rewards).
        kappa: Cohen's: agreement beyond what two models of these accuracies reach by chance (error consistency).
        both_correct, first_only, second_only, neither: numbers of pairs.
        spearman_scores, spearman_margins: rank correlation over all responses, and over the pairs' margins.
    """

    first: str
    second: str
    num_pairs: int
    agreement: float | None
    kappa: float | None
    both_correct: int
    first_only: int
    second_only: int
    neither: int
    spearman_scores: float | None
    spearman_margins: float | None


class Comparison(TypedDict):
    """Is the first model better than the second? On the pairs that both have scored.

    Attributes:
        num_pairs, num_prompts: compared; `num_groups_left_out` were scored by one of them only.
        accuracy_difference: first - second; `accuracy_difference_ci95` and `p_value` (two-sided) from
            `num_resamples` paired bootstrap resamples of prompts.
        mcnemar_p_value: exact McNemar test, two-sided, over the pairs that one model alone gets right; takes pairs as
            independent.
        verdict: "first", "second" or "undecided" at the 5 % level of the bootstrap.
    """

    first: str
    second: str
    num_pairs: int
    num_prompts: int
    num_groups_left_out: int
    accuracy_first: float | None
    accuracy_second: float | None
    accuracy_difference: float | None
    accuracy_difference_ci95: Interval | None
    p_value: float | None
    mcnemar_p_value: float | None
    num_resamples: int
    verdict: str


class Requirement(TypedDict):
    """One requirement: `value` is what was found, null when the number does not exist (that fails)."""

    text: str
    metric: str
    operator: str
    bound: float
    value: float | None
    passed: bool


class Gate(TypedDict):
    """The requirements on the first model, and whether all of them hold."""

    requirements: list[Requirement]
    passed: bool


class EvaluationDocument(TypedDict):
    """`evaluation.json`. The top-level numbers are those of the first model, for programs that read a run's record.

    Attributes:
        created: UTC time, ISO 8601.
        versions: of rm_scale, torch and transformers.
        models: all models, the first one is the one that is judged; empty when only benchmarks were run.
        agreement: all pairs of models; `comparisons`: the first model against each other one.
        benchmarks: per model name, per benchmark file name, what `Benchmark.score` returns, `num_items`, and
            `num_unscored`: items that could not be scored and count as lost.
        gate: null without requirements.
    """

    version: int
    created: str
    versions: dict[str, str]
    accuracy: NotRequired[float | None]
    accuracy_ci95: NotRequired[Interval]
    num_pairs: NotRequired[int]
    num_ties: NotRequired[int]
    loss: NotRequired[float | None]
    mean_margin: NotRequired[float | None]
    subsets: NotRequired[dict[str, dict[str, Any]]]
    score_mean: NotRequired[float | None]
    score_std: NotRequired[float | None]
    num_scored: NotRequired[int]
    baselines: NotRequired[dict[str, float | int | None]]
    models: list[ModelEvaluation]
    agreement: list[Agreement]
    comparisons: list[Comparison]
    benchmarks: dict[str, dict[str, dict[str, Any]]]
    gate: Gate | None
