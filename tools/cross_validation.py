"""Leave each source of published measurements out in turn: python tools/cross_validation.py [--source NAME] [--write]

The planner's constants that were set with these rows in sight (`CONSTANTS`) are set anew on all other sources' rows,
by a search along one constant after the other, and the rows left out are predicted with them. Prints the errors by
source and by kind of set-up, how far each constant moves, and what it costs when the other sources don't know it;
`--write` puts the tables into docs/planning_validation.md. Deterministic; needs no torch.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.published import CASES, MEMORY, SPEED, method_of, number  # noqa: E402
from rm_scale.planning.hardware import known_devices  # noqa: E402
from rm_scale.planning.published.predict import read_cases, tokens_per_second_of_row  # noqa: E402
from rm_scale.planning.published.reported_memory import peak_memory_of_row  # noqa: E402
from rm_scale.planning.published.scenario_of_row import NotModelled, Row, scenario_of_row  # noqa: E402
from rm_scale.planning.scenario import Scenario  # noqa: E402

PAGE = REPOSITORY / "docs" / "planning_validation.md"
BEGIN, END = "<!-- left-out:begin -->", "<!-- left-out:end -->"
FINENESS = 16
"""Steps of a constant's range that the search tries, by equal factors."""

PULL = 0.02
"""What being at the end of its range instead of at its prior costs a constant, in relative error of all rows: so
little that rows which know the constant decide, so much that it stays near its prior where few or none do."""


@dataclass(frozen=True)
class Constant:
    """A constant of the planner that was set with the published rows in sight.

    Attributes:
        name: what the tables call it.
        what: SPEED or MEMORY, which of the two it was set on.
        prior: what one would take without any of these rows.
        low, high: the range that makes sense physically.
        why: where prior and range are from.
        module, attribute: the module's constant that it is, where it is one.
        devices, field: the devices' figure that it is, otherwise; no devices: of all.
    """

    name: str
    what: str
    prior: float
    low: float
    high: float
    why: str
    module: str = ""
    attribute: str = ""
    devices: tuple[str, ...] = ()
    field: str = ""

    @property
    def value(self) -> float:
        """What the planner has."""
        if self.module:
            return float(_table(self)[_key(self)])
        device = self.devices[0] if self.devices else "a100-80g"
        return float(getattr(known_devices()[device], self.field))

    @property
    def tries(self) -> list[float]:
        """The values that the search tries: the prior, and the range by equal factors."""
        factor = (self.high / self.low) ** (1 / FINENESS)
        return [self.prior, *(self.low * factor**step for step in range(FINENESS + 1))]


_STEP, _LAUNCHES = "rm_scale.planning.step_time", "rm_scale.planning.launches"
_REPORTED = "rm_scale.planning.published.reported_memory"


CONSTANTS = (
    Constant(
        "step_efficiency, A100, 3090, 4090",
        SPEED,
        0.8,
        0.5,
        1.1,
        "of devices that are not calibrated",
        devices=("a100-40g", "a100-80g", "3090", "4090"),
        field="step_efficiency",
    ),
    Constant(
        "step_efficiency, H100",
        SPEED,
        0.8,
        0.5,
        1.1,
        "of devices that are not calibrated",
        devices=("h100-80g", "h100-96g"),
        field="step_efficiency",
    ),
    Constant(
        "elementwise_share",
        SPEED,
        0.85,
        0.6,
        1.0,
        "what copies reach",
        field="elementwise_share",
    ),
    Constant("launch_seconds", SPEED, 15e-6, 5e-6, 50e-6, "a processor here: 9e-06 to 2.2e-05", field="launch_seconds"),
    Constant(
        "ZERO3_HOOKS", SPEED, 28, 8, 80, "20 measured on a processor, 8 calls of CUDA streams", _LAUNCHES, "ZERO3_HOOKS"
    ),
    Constant("ZERO_HOOKS", SPEED, 8, 2, 40, "3 to 12 measured on a processor", _LAUNCHES, "ZERO_HOOKS"),
    Constant(
        "DEQUANTISE_BYTES, NF4", SPEED, 5, 2, 20, "read, written, read by the product", _STEP, "DEQUANTISE_BYTES.nf4"
    ),
    Constant(
        "DEQUANTISE_BYTES, GPTQ",
        SPEED,
        15,
        5,
        40,
        "counted in AutoGPTQ, one-byte elements twice",
        _STEP,
        "DEQUANTISE_BYTES.gptq",
    ),
    Constant("OVERLAP", SPEED, 0.5, 0.01, 1.0, "the middle of the band", _STEP, "OVERLAP"),
    Constant("ATTENTION_SHARE", SPEED, 0.75, 0.4, 1.0, "flash-attention 2's paper", _STEP, "ATTENTION_SHARE"),
    Constant(
        "ATTENTION_SHARES, flash1", SPEED, 0.4, 0.2, 0.8, "flash-attention 2's paper", _STEP, "ATTENTION_SHARES.flash1"
    ),
    Constant(
        "link of two 3090",
        SPEED,
        5e9,
        2e9,
        16e9,
        "of 8e9 of PCIe 3 x8, through the host's memory",
        devices=("3090",),
        field="link_bandwidth",
    ),
    Constant("context", MEMORY, 1.0e9, 0.4e9, 2.5e9, "kernels 0.5 to 0.9 GiB, workspaces", field="context_bytes"),
    Constant("RESERVED", MEMORY, 1.05, 1.005, 1.25, "rounded blocks, some pieces", _REPORTED, "RESERVED"),
    Constant("RESERVED_SHARDED", MEMORY, 1.05, 1.005, 1.25, "as RESERVED", _REPORTED, "RESERVED_SHARDED"),
)


Values = Mapping[str, float]


def _table(constant: Constant) -> dict[str, float]:
    """Return where a module's constant is: among its names, or for "NAME.key" in a dictionary there."""
    names: dict[str, Any] = vars(importlib.import_module(constant.module))
    table: dict[str, float] = names[constant.attribute.split(".")[0]] if "." in constant.attribute else names
    return table


def _key(constant: Constant) -> str:
    return constant.attribute.split(".")[-1]


@contextmanager
def constants_set(values: Values) -> Iterator[None]:
    """Give the planner's modules other constants for a while; devices' figures are given by `with_device`."""
    changed = [constant for constant in CONSTANTS if constant.module and constant.name in values]
    before = [_table(constant)[_key(constant)] for constant in changed]
    try:
        for constant in changed:
            _table(constant)[_key(constant)] = values[constant.name]
        yield
    finally:
        for constant, value in zip(changed, before, strict=True):
            _table(constant)[_key(constant)] = value


def with_device(scenario: Scenario, values: Values) -> Scenario:
    """Return the scenario on a device with other figures, where some of them are the device's."""
    own: dict[str, Any] = {
        constant.field: values[constant.name]
        for constant in CONSTANTS
        if constant.name in values
        and constant.field
        and (not constant.devices or scenario.device.name in constant.devices)
    }
    if not own:
        return scenario
    # A copy keeps the tensors that a scenario has counted once; they don't depend on the device.
    changed = copy(scenario)
    object.__setattr__(changed, "device", replace(scenario.device, **own))
    return changed


# --- Rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A figure that was measured and can be predicted.

    Attributes:
        row: the row it belongs to.
        scenario: its set-up.
        what: SPEED or MEMORY.
        measured: in the row's unit.
    """

    row: Row
    scenario: Scenario
    what: str
    measured: float

    @property
    def source(self) -> str:
        """Where the row is from."""
        return self.row["source"]

    def predict(self, values: Values) -> float:
        """Predict the figure; the modules' constants are those of the moment, see `constants_set`."""
        scenario = with_device(self.scenario, values)
        if self.what == MEMORY:
            return peak_memory_of_row(self.row, scenario)
        return tokens_per_second_of_row(self.row, scenario)


def cases_of(rows: Iterable[Row]) -> list[Case]:
    """Return all figures of these rows that were measured and can be predicted."""
    found = []
    for row in rows:
        for what, cell in ((MEMORY, row["peak_mem_gb"]), (SPEED, row["tok_s_gpu"])):
            measured = number(cell)
            if measured is None:
                continue
            try:
                case = Case(row, scenario_of_row(row), what, measured)
                case.predict({})
            except NotModelled:
                continue
            found.append(case)
    return found


def errors_of(cases: Sequence[Case], values: Values) -> list[float]:
    """Return the relative error of each case under these constants."""
    with constants_set(values):
        return [case.predict(values) / case.measured - 1 for case in cases]


# --- Setting the constants --------------------------------------------------------------------------------------------


Reach = Mapping[str, frozenset[int]]
"""By constant, the cases that it moves, by their place in the list of all."""


def reach_of(cases: Sequence[Case], constants: Sequence[Constant]) -> Reach:
    """Find which cases each constant moves at an end of its range, with all others at their priors or at an end."""
    found: dict[str, set[int]] = {constant.name: set() for constant in constants}
    for others in ("prior", "low", "high"):
        values = {constant.name: float(getattr(constant, others)) for constant in constants}
        here = errors_of(cases, values)
        for constant in constants:
            for end in {constant.prior, constant.low, constant.high} - {values[constant.name]}:
                there = errors_of(cases, {**values, constant.name: end})
                found[constant.name] |= {
                    index for index, (a, b) in enumerate(zip(here, there, strict=True)) if abs(a - b) > 1e-9
                }
    return {name: frozenset(indices) for name, indices in found.items()}


class Search:
    """The search for the constants that suit some of the cases best.

    Its measure is the mean absolute logarithm of predicted over measured, which a few rows that are far off hardly
    move; each source weighs as the square root of its rows, since rows of one source resemble each other.
    """

    def __init__(
        self, cases: Sequence[Case], constants: Sequence[Constant], reach: Reach, chosen: Sequence[int]
    ) -> None:
        """Start at the constants' priors.

        Args:
            cases: all of them.
            constants: those to set.
            reach: see `reach_of`.
            chosen: places of the cases that may be looked at.
        """
        self.cases, self.constants = cases, constants
        self.values = {constant.name: constant.prior for constant in constants}
        num_rows: dict[str, int] = defaultdict(int)
        for index in chosen:
            num_rows[cases[index].source] += 1
        whole = sum(math.sqrt(count) for count in num_rows.values())
        self.weights = {index: 1 / math.sqrt(num_rows[cases[index].source]) / whole for index in chosen}
        self.moved = {constant.name: sorted(reach[constant.name] & set(chosen)) for constant in constants}

    def run(self, sweeps: int = 8) -> dict[str, float]:
        """Set one constant after the other until none moves any more; return them by name."""
        for _ in range(sweeps):
            before = dict(self.values)
            for constant in self.constants:
                costs = {value: self._cost(constant, value) for value in constant.tries}
                self.values[constant.name] = min(costs, key=lambda value: costs[value])
            if self.values == before:
                break
        return self.values

    def _cost(self, constant: Constant, value: float) -> float:
        """Return what the constant's value costs on the cases that it moves, and for being off its prior."""
        members = self.moved[constant.name]
        errors = errors_of([self.cases[index] for index in members], {**self.values, constant.name: value})
        losses = [self.weights[index] * abs(math.log1p(error)) for index, error in zip(members, errors, strict=True)]
        return sum(losses) + PULL * (math.log(value / constant.prior) / math.log(constant.high / constant.low)) ** 2


@dataclass(frozen=True)
class LeftOut:
    """A case, predicted with the constants that all other sources gave.

    Attributes:
        case: the figure.
        error: relative, with those constants.
        error_today: relative, with the planner's own.
    """

    case: Case
    error: float
    error_today: float


def set_without(cases: Sequence[Case], reach: Reach, source: str) -> dict[str, float]:
    """Set all constants on the cases of all sources but one; of none but "" on all."""
    values: dict[str, float] = {}
    for what in (SPEED, MEMORY):
        chosen = [index for index, case in enumerate(cases) if case.source != source and case.what == what]
        values |= Search(cases, [item for item in CONSTANTS if item.what == what], reach, chosen).run()
    return values


def left_out(cases: Sequence[Case], source: str, values: Values) -> list[LeftOut]:
    """Predict a source's cases with other constants, and with the planner's own."""
    mine = [case for case in cases if case.source == source]
    errors = zip(mine, errors_of(mine, values), errors_of(mine, {}), strict=True)
    return [LeftOut(*each) for each in errors]


def sources_of(cases: Iterable[Case]) -> list[str]:
    """Return the sources by name."""
    return sorted({case.source for case in cases})


# --- Tables -----------------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Case], str]] = {
    "source": lambda case: case.source,
    "method": lambda case: method_of(case.row),
    "ZeRO stage": lambda case: "none" if case.scenario.zero_stage is None else f"{case.scenario.zero_stage}",
    "framework": lambda case: _framework(case),
    "recomputation": lambda case: _recomputation(case),
    "device": lambda case: case.scenario.device.title,
    "tokens per micro-step": lambda case: _size(case.scenario.load.tokens),
    "model": lambda case: case.row["model"].split("-")[0],
}
"""What rows are grouped by. No row offloads parameters or optimizer state."""


def _framework(case: Case) -> str:
    sharding = case.row["sharding"]
    return "FSDP" if "FSDP" in sharding else "DeepSpeed" if case.scenario.zero_stage is not None else "neither"


def _recomputation(case: Case) -> str:
    found = re.match(r"none|selective|full", case.row["act_ckpt"])
    extra = ", checkpoints on the host" if "offload" in case.row["act_ckpt"] else ""
    return (found.group() if found else "unclear") + extra


def _size(tokens: float) -> str:
    bounds = ((1000, "below 1,000"), (4000, "1,000 to 4,000"), (16000, "4,000 to 16,000"))
    return next((name for bound, name in bounds if tokens < bound), "16,000 and more")


def summary(errors: Sequence[float]) -> str:
    """Return rows, mean absolute and worst error as a table's cell."""
    if not errors:
        return "-"
    worst = max(errors, key=abs)
    return f"{len(errors)}, {mean(map(abs, errors)):.1%}, {worst:+.1%}".replace("%", " %")


def error_table(items: Sequence[LeftOut], kind: str) -> str:
    """Return the errors of left-out rows by a property, beside those with the planner's own constants."""
    groups: dict[str, list[LeftOut]] = defaultdict(list)
    for item in items:
        groups[KINDS[kind](item.case)].append(item)
    lines = [
        f"| {kind} | memory, left out | memory, today | tokens/s, left out | tokens/s, today |",
        "|---|---|---|---|---|",
    ]
    for name, members in [*sorted(groups.items()), ("all", list(items))]:
        cells = []
        for what in (MEMORY, SPEED):
            chosen = [item for item in members if item.case.what == what]
            cells += [summary([item.error for item in chosen]), summary([item.error_today for item in chosen])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def constant_table(cases: Sequence[Case], reach: Reach, everything: Values, without: Mapping[str, Values]) -> str:
    """Return a table of the constants: what they are, what all rows say, how far leaving a source out moves them."""
    lines = [
        "| constant | in the planner | prior, and why | set on all rows | set without a source: lowest, highest "
        "| moved most without | known to |",
        "|---|---|---|---|---|---|---|",
    ]
    for constant in sorted(CONSTANTS, key=lambda item: -_moved(item, everything, without)[0]):
        found = [values[constant.name] for values in without.values()]
        by = _moved(constant, everything, without)[1]
        known = sorted({cases[index].source.split("/")[1] for index in reach[constant.name]})
        lines.append(
            f"| {constant.name} | {constant.value:.3g} | {constant.prior:.3g}: {constant.why} "
            f"| {everything[constant.name]:.3g} | {min(found):.3g}, {max(found):.3g} | {by} | {', '.join(known)} |"
        )
    return "\n".join(lines)


def _moved(constant: Constant, everything: Values, without: Mapping[str, Values]) -> tuple[float, str]:
    """Return how far leaving a source out moves a constant at most, as a logarithm, and which source that is."""
    moves = {
        source: abs(math.log(values[constant.name] / everything[constant.name])) for source, values in without.items()
    }
    source = max(moves, key=lambda name: moves[name])
    return moves[source], source.split("/")[1] if moves[source] > 0.02 else "-"


def page_part(cases: Sequence[Case]) -> str:
    """Return what the page says: all tables."""
    reach = reach_of(cases, CONSTANTS)
    without = {source: set_without(cases, reach, source) for source in sources_of(cases)}
    items = [item for source, values in without.items() for item in left_out(cases, source, values)]
    parts = [
        "Each cell: rows, mean absolute error, worst error; left out: predicted with the constants that all other "
        "sources give; today: with the planner's own.",
        *(error_table(items, kind) for kind in KINDS),
        "Constants that were set with these rows in sight, those first that a source moves most. Known to: the sources "
        "with rows that depend on it.",
        constant_table(cases, reach, set_without(cases, reach, ""), without),
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=str(CASES), help="file of rows")
    parser.add_argument("--source", help="leave out this source alone, and print each of its rows")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/planning_validation.md")
    options = parser.parse_args()
    cases = cases_of(read_cases(options.cases))
    if options.source:
        values = set_without(cases, reach_of(cases, CONSTANTS), options.source)
        for item in left_out(cases, options.source, values):
            print(f"{item.case.row['id']} {item.case.what:<9} {item.error:+7.1%}, today {item.error_today:+7.1%}")
        return
    part = page_part(cases)
    print(part)
    if options.write:
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{part}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
