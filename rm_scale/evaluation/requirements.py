"""Requirements such as `accuracy>=0.8,ece<=0.1`: read strictly, looked up by name, judged."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rm_scale.errors import ConfigError
from rm_scale.evaluation.evaluation_document import Gate, Requirement
from rm_scale.texts import did_you_mean, one_line

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}
# A name may hold commas, dots and blanks, as subsets are called what they are; the number tells where it ends.
_REQUIREMENT = re.compile(r"\s*(?P<name>.+?)\s*(?P<sign>>=|<=|==|>|<)\s*(?P<bound>[^\s,]*)\s*(?:,|$)")
# Left out of the names: not results, or one number per bin.
_NOT_METRICS = {"bins", "bins_after", "edges", "counts", "fold_temperatures", "data"}
# What stands directly below these is called what the user calls it.
_HOLD_NAMES = ("subsets", "sources", "comparison", "benchmarks")
_SHORT_PARTS = ("calibration", "length_bias", "ties", "margins", "baselines")


@dataclass(frozen=True)
class Wanted:
    """A requirement as it was asked for: `metric operator bound`."""

    text: str
    metric: str
    operator: str
    bound: float


def read_requirements(texts: Sequence[str]) -> list[Wanted]:
    """Read requirements from `--require`, several in one text with commas between.

    Raises:
        ConfigError: says what of which can't be read.
    """
    wanted: list[Wanted] = []
    problems: list[str] = []
    for text in texts:
        place = 0
        while place < len(text):
            found = _REQUIREMENT.match(text, place)
            bound = _finite(found["bound"]) if found else None
            if found is None or bound is None:
                problems.append(
                    f"--require {one_line(text, 200)!r}: {one_line(text[place:], 200)!r} is not of the form "
                    "METRIC>=NUMBER (or <=, >, <, ==). Fix: for instance --require 'accuracy>=0.8,ece<=0.1', in "
                    "quotes: > means a file to the shell."
                )
                break
            said = f"{found['name']}{found['sign']}{found['bound']}"
            wanted.append(Wanted(said, found["name"], found["sign"], bound))
            place = found.end()
    if not wanted and not problems and texts:
        problems.append("--require '': is empty. Fix: for instance --require 'accuracy>=0.8', or leave it out.")
    if problems:
        raise ConfigError(problems, "the requirements can't be read")
    return wanted


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def metrics_of(results: Mapping[str, Any]) -> dict[str, float | None]:
    """Return all numbers of nested results under dotted names; an interval has `.low` and `.high`.

    A number of `calibration`, `length_bias`, `ties`, `margins` or `baselines` is also found without that word, at the
    place where the part stands: `ece`, `subsets.code.ece`.
    """
    names: dict[str, float | None] = {}
    short: dict[str, float | None] = {}
    _collect(results, "", "", names, short)
    return {**short, **names}


def _collect(
    value: Any, name: str, short_name: str, names: dict[str, float | None], short: dict[str, float | None]
) -> None:
    if isinstance(value, Mapping):
        holds_names = name in _HOLD_NAMES
        for key, part in value.items():
            if key in _NOT_METRICS and not holds_names:
                continue
            shorter = short_name if key in _SHORT_PARTS and not holds_names else _joined(short_name, key)
            _collect(part, _joined(name, key), shorter, names, short)
    elif "_ci95" in name.rpartition(".")[2] and (value is None or isinstance(value, list)):
        for place, end in enumerate(("low", "high")):
            names[_joined(name, end)] = short[_joined(short_name, end)] = None if value is None else value[place]
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        names[name] = value
        short.setdefault(short_name, value)


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def check_names(wanted: Iterable[Wanted], known: Iterable[str], open_parts: Sequence[str] = ()) -> None:
    """Refuse metrics nobody knows.

    Args:
        wanted: the requirements.
        known: names of all metrics.
        open_parts: names that begin with one of these can't be judged yet.

    Raises:
        ConfigError: names the nearest known ones.
    """
    names = list(known)
    problems = []
    for requirement in wanted:
        if requirement.metric in names or requirement.metric.startswith(tuple(open_parts)):
            continue
        hint = did_you_mean(requirement.metric, names, "see docs/evaluation.md for the names.", most=3, likeness=0.5)
        text, metric = one_line(requirement.text, 200), one_line(requirement.metric, 200)
        problems.append(f"--require {text!r}: there is no metric {metric!r} here. Fix: {hint}")
    if problems:
        raise ConfigError(problems, "the requirements can't be judged")


def judge(wanted: Sequence[Wanted], metrics: Mapping[str, float | None]) -> Gate:
    """Hold the metrics against the requirements. A number that does not exist fails.

    Args:
        wanted: their metrics are all in `metrics`.
        metrics: see `metrics_of`.
    """
    requirements = []
    for one in wanted:
        value = metrics[one.metric]
        passed = value is not None and bool(_OPERATORS[one.operator](value, one.bound))
        requirements.append(
            Requirement(
                text=one.text, metric=one.metric, operator=one.operator, bound=one.bound, value=value, passed=passed
            )
        )
    return Gate(requirements=requirements, passed=all(requirement["passed"] for requirement in requirements))


def gate_text(gate: Gate) -> str:
    """Return one line per requirement, and the verdict."""
    lines = []
    for requirement in gate["requirements"]:
        value = "does not exist here" if requirement["value"] is None else f"is {requirement['value']:.6g}"
        lines.append(f"{'passed' if requirement['passed'] else 'FAILED'}  {requirement['text']}: it {value}")
    failed = sum(not requirement["passed"] for requirement in gate["requirements"])
    total = len(gate["requirements"])
    verdict = f"gate: FAILED, {failed} of {total} requirements" if failed else f"gate: passed, {total} of {total} hold"
    lines.append(verdict)
    return "\n".join(lines)
