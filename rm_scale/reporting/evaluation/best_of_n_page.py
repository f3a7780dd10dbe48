"""What `rm-scale rank --curves_page` draws: expected reward and gold score of best-of-n, as one page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rm_scale.inference.ranking.best_of_n import KL_NOTE, BestOfN, CurvePoint
from rm_scale.reporting.chart_parts import Axis
from rm_scale.reporting.charts import Series, lines
from rm_scale.reporting.page import Page, interval


def write_curves_page(result: BestOfN, path: Path, facts: Mapping[str, object]) -> Path:
    """Write the page, whole or not at all.

    Args:
        result: the curves.
        path: an HTML file.
        facts: where the completions and scores are from.
    """
    page = Page("What best-of-n is worth")
    if not result.points:
        page.paragraph("No prompt could be used.")
    else:
        page.paragraph(
            f"{result.num_prompts:,} prompts, {result.num_completions:,} completions; means over prompts, 95 % bands: "
            f"{result.interval}.",
            kind="measured",
        )
        page.figures([_over_n(result), _over_kl(result)])
        _table(page, result)
        page.paragraph(f"KL: {KL_NOTE}.", faint=True)
    if result.left_out:
        page.heading("Prompts that are not in the curves")
        page.table(["reason", "prompts"], list(result.left_out.items()))
    page.provenance(facts)
    return page.write(path)


def _over_n(result: BestOfN) -> tuple[str, str]:
    chart = lines(
        "Expected reward over n",
        [_series(result, "reward", [float(point.n) for point in result.points])],
        Axis("completions to choose from, n", log=result.max_n > 4),
        Axis("expected reward of the best"),
    )
    return chart, "The reward rises with n by construction, whatever the model is worth."


def _over_kl(result: BestOfN) -> tuple[str, str]:
    kl = [point.kl_bound_nats for point in result.points]
    if result.points[0].gold is None:
        chart = lines(
            "Expected reward over KL", [_series(result, "reward", kl)], Axis("KL bound, nats"), Axis("expected reward")
        )
        return chart, "Without a gold score, over-optimisation can't be seen."
    oracle = Series("chosen by the gold score", kl, [point.gold_oracle for point in result.points], dashed=True)
    series = [_series(result, "gold", kl, "chosen by the reward model"), oracle]
    chart = lines("Expected gold score over KL", series, Axis("KL bound, nats"), Axis("expected gold score"))
    peak = result.gold_peak
    assert peak is not None
    return (
        chart,
        f"The gold score is highest at n = {peak.n}; where it falls while the reward rises is over-optimisation.",
    )


def _series(result: BestOfN, what: str, x: list[float], name: str | None = None) -> Series:
    values = [getattr(point, what) for point in result.points]
    bands = [getattr(point, f"{what}_ci95") or (None, None) for point in result.points]
    return Series(name or what, x, values, low=[low for low, _ in bands], high=[high for _, high in bands])


def _table(page: Page, result: BestOfN) -> None:
    has_gold = result.points[0].gold is not None
    header = ["n", "KL bound, nats", "reward", "95 %"]
    header += ["gold", "95 %", "gold oracle"] if has_gold else []
    rows = [_row(point, has_gold) for point in result.points]
    if len(rows) <= 16:
        page.table(header, rows)
    else:
        page.details(f"All {len(rows)} points", header, rows)


def _row(point: CurvePoint, has_gold: bool) -> list[object]:
    row: list[object] = [point.n, point.kl_bound_nats, point.reward, interval(point.reward_ci95)]
    return [*row, point.gold, interval(point.gold_ci95), point.gold_oracle] if has_gold else row
