"""The arguments that learning-rate schedules and optimizers take beside the settings of their own, and their checks.

Names and meanings are transformers'; a test compares them with its functions. They stand here so that a wrong one is
found before any library is loaded: transformers finds some when training begins, and others never.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rm_scale.texts import did_you_mean


@dataclass(frozen=True)
class Numbers:
    """A number within limits.

    Attributes:
        least, most: the limits.
        is_whole: no fraction.
        above: `least` itself is too small.
    """

    least: float = 0.0
    most: float = 1e12
    is_whole: bool = False
    above: bool = False

    def takes(self, value: Any) -> bool:
        """Tell whether a value is such a number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        above = value > self.least if self.above else value >= self.least
        return above and value <= self.most and (not self.is_whole or value == int(value))

    def __str__(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        sign = "above" if self.above else "of at least"
        limit = f" and at most {self.most:g}" if self.most < 1e12 else ""
        return f"{kind} {sign} {self.least:g}{limit}"


@dataclass(frozen=True)
class Words:
    """One of a few values."""

    values: tuple[Any, ...]

    def takes(self, value: Any) -> bool:
        """Tell whether a value is one of them."""
        return any(value is one or (isinstance(one, str) and value == one) for one in self.values)

    def __str__(self) -> str:
        return "one of " + ", ".join(str(value).lower() for value in self.values)


Kinds = Mapping[str, Numbers | Words]

_SHARE, _POSITIVE, _ANY, _COUNT = Numbers(0, 1), Numbers(above=True), Numbers(), Numbers(is_whole=True)
_SOME, _SWITCH = Numbers(1, is_whole=True), Words((True, False))
_CURVES, _THRESHOLDS = Words(("linear", "cosine", "1-sqrt")), Words(("rel", "abs"))
_MIN_LR: Kinds = {"num_cycles": _POSITIVE, "min_lr": _ANY, "min_lr_rate": _SHARE}
_BY_LOSS: Kinds = {
    "factor": Numbers(0, 0.999999, above=True),
    "patience": _COUNT,
    "threshold": _ANY,
    "threshold_mode": _THRESHOLDS,
    "cooldown": _COUNT,
    "min_lr": _ANY,
    "eps": _ANY,
}
SCHEDULE_ARGUMENTS: Mapping[str, Kinds] = {
    "linear": {},
    "constant": {},
    "constant_with_warmup": {},
    "cosine": {"num_cycles": _POSITIVE},
    "cosine_with_restarts": {"num_cycles": _SOME},
    "polynomial": {"lr_end": _ANY, "power": _POSITIVE},
    "inverse_sqrt": {"timescale": _SOME},
    "cosine_with_min_lr": _MIN_LR,
    "cosine_warmup_with_min_lr": {**_MIN_LR, "warmup_lr_rate": _SHARE},
    "warmup_stable_decay": {
        "num_decay_steps": _SOME,
        "num_stable_steps": _COUNT,
        "warmup_type": _CURVES,
        "decay_type": _CURVES,
        "min_lr_ratio": _SHARE,
        "num_cycles": _POSITIVE,
    },
    "reduce_lr_on_plateau": _BY_LOSS,
    "greedy": {
        **_BY_LOSS,
        "warmup": _COUNT,
        "max_lr": _POSITIVE,
        "smooth": _SWITCH,
        "window_size": _SOME,
        "reset_start": _COUNT,
    },
}
"""What `lr_scheduler_kwargs` may hold, by schedule. Left out: `mode`, since the loss is to fall."""

_SCHEDULES_NEED = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Exactly one of these must be given."""

_LOWEST = {"polynomial": ("lr_end", 1e-7), "greedy": ("min_lr", 1e-3)}
"""The argument that holds the lowest rate, and transformers' default; elsewhere `min_lr`, by default none."""

_ADEMAMIX: Kinds = {
    "beta1": _SHARE,
    "beta2": _SHARE,
    "beta3": _SHARE,
    "alpha": _ANY,
    "eps": _ANY,
    "t_alpha": _COUNT,
    "t_beta3": _COUNT,
}
_SCHEDULE_FREE: Kinds = {"weight_lr_power": _ANY, "r": _ANY}
OPTIMIZER_ARGUMENTS: Mapping[str, Kinds] = {
    "sgd": {"momentum": _SHARE, "dampening": _SHARE, "nesterov": _SWITCH},
    "adagrad": {"lr_decay": _ANY, "eps": _ANY},
    "rmsprop": {"momentum": _SHARE, "alpha": _SHARE, "eps": _ANY, "centered": _SWITCH},
    "ademamix": _ADEMAMIX,
    "ademamix_8bit": _ADEMAMIX,
    "paged_ademamix_32bit": _ADEMAMIX,
    "paged_ademamix_8bit": _ADEMAMIX,
    "grokadamw": {
        "alpha_init": _SHARE,
        "lamb": _ANY,
        "gamma": _SHARE,
        "grokking_signal_decay_rate": _ANY,
        "gradient_clipping": _ANY,
    },
    "schedule_free_adamw": _SCHEDULE_FREE,
    "schedule_free_radam": _SCHEDULE_FREE,
    "schedule_free_sgd": _SCHEDULE_FREE,
    "stable_adamw": {"max_lr": _POSITIVE},
}
"""What `optim_args` may hold, by optimizer: what transformers reads of it, in the right type, and nothing overrides.

Left out for that: `weight_decay`, which each parameter group has from the setting of that name; the arguments that
bitsandbytes' RMSprop and torchao's block size would get as text; switches of which any text means yes.
"""


def schedule_problems(name: str, given: Mapping[str, Any] | None) -> list[str]:
    """Return what is wrong with `lr_scheduler_kwargs`, whatever the learning rate and the number of steps are.

    Args:
        name: transformers' name of the schedule, one that it knows.
        given: the arguments.
    """
    given, known = given or {}, SCHEDULE_ARGUMENTS[name]
    problems = _argument_problems("lr_scheduler_kwargs", f"lr_scheduler_type={name}", given, known)
    needed = _SCHEDULES_NEED.get(name, ())
    found = [one for one in needed if one in given]
    if needed and len(found) != 1:
        fix = {"min_lr": "{min_lr_rate: 0.1}", "num_decay_steps": "{num_decay_steps: 100}"}[needed[0]]
        had = f"both {' and '.join(found)}" if found else "none"
        problems.append(
            f"lr_scheduler_type={name}: needs {' or '.join(needed)} in lr_scheduler_kwargs, got {had}. Fix: "
            f"lr_scheduler_kwargs: {fix}, say, or another schedule such as cosine."
        )
    return problems


def rate_problems(
    name: str, given: Mapping[str, Any] | None, learning_rate: float, steps: int | None, warmup_steps: int
) -> list[str]:
    """Return what is wrong with a schedule's arguments at a learning rate and, once it is known, a number of steps.

    Args:
        name: transformers' name of the schedule, one that it knows.
        given: arguments in which `schedule_problems` finds nothing wrong.
        learning_rate: the highest.
        steps: optimizer steps of the run, `None` while that is not known.
        warmup_steps: of these.
    """
    given, problems = given or {}, []
    key, default = _LOWEST.get(name, ("min_lr", 0.0))
    lowest = float(given.get(key, default))
    if lowest >= learning_rate:
        unset = "" if key in given else ", transformers' default"
        problems.append(
            f"lr_scheduler_type={name}: {key}={lowest:g}{unset}, is not below learning_rate={learning_rate:g}, so that "
            f"the rate would rise to it. Fix: lr_scheduler_kwargs: {{{key}: {learning_rate / 100:g}}}, say."
        )
    if given.get("max_lr") is not None and given["max_lr"] < learning_rate:
        problems.append(
            f"lr_scheduler_type={name}: max_lr={given['max_lr']:g} is below learning_rate={learning_rate:g}. Fix: a "
            "larger max_lr, or a smaller learning_rate."
        )
    if name == "warmup_stable_decay" and steps is not None:
        problems += _phase_problems(given, steps, warmup_steps)
    return problems


def _phase_problems(given: Mapping[str, Any], steps: int, warmup_steps: int) -> list[str]:
    """Hold the phases of `warmup_stable_decay` against the run: too long a decay would begin with a jump."""
    decay, stable = int(given["num_decay_steps"]), given.get("num_stable_steps")
    if stable is None and warmup_steps + decay > steps:
        return [
            f"lr_scheduler_kwargs: num_decay_steps={decay} and {warmup_steps} warm-up steps are more than the run's "
            f"{steps}. Fix: num_decay_steps of {max(1, steps - warmup_steps)} or less."
        ]
    if stable is not None and warmup_steps + int(stable) + decay != steps:
        return [
            f"lr_scheduler_kwargs: {warmup_steps} warm-up steps, num_stable_steps={stable} and num_decay_steps={decay} "
            f"don't add up to the run's {steps}. Fix: leave num_stable_steps out, which is then what is left."
        ]
    return []


def read_optim_args(text: str) -> dict[str, Any]:
    """Return `optim_args` as values by name: numbers, true or false, else text.

    Raises:
        ValueError: it is not written as "name=value,name=value".
    """
    values: dict[str, Any] = {}
    for part in text.replace(" ", "").split(","):
        name, equals, value = part.partition("=")
        if not (name and equals and value) or "=" in value or name in values:
            raise ValueError(f"{part!r} in it is not one name=value")
        values[name] = _typed(value)
    return values


def _typed(value: str) -> Any:
    if value.lower() in {"true", "false"}:
        return value.lower() == "true"
    return number_in(value)


def number_in(value: str) -> Any:
    """Return the number that a text is, such as YAML's 1e-6; other text as it is."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def optimizer_problems(name: str, text: str | None) -> list[str]:
    """Return what is wrong with `optim_args`.

    Args:
        name: transformers' name of the optimizer, one that it knows.
        text: as it was written.
    """
    if text is None:
        return []
    try:
        given = read_optim_args(text)
    except ValueError as error:
        return [f"optim_args={text!r}: {error}. Fix: write momentum=0.9,nesterov=true, say."]
    known = OPTIMIZER_ARGUMENTS.get(name, {})
    problems = _argument_problems("optim_args", f"optim={name}", given, known)
    if given.get("nesterov") is True and not problems and (not given.get("momentum") or given.get("dampening")):
        problems.append(f"optim_args={text!r}: nesterov needs a momentum, and no dampening. Fix: add momentum=0.9.")
    return problems


def _argument_problems(setting: str, of: str, given: Mapping[str, Any], known: Kinds) -> list[str]:
    problems = []
    for name, value in given.items():
        if name not in known:
            none = "it takes none: leave it out, and use the settings of their own (docs/settings.md)."
            hint = did_you_mean(str(name), known, f"one of {', '.join(known)}.") if known else none
            problems.append(f"{setting}: {of} does not take {name}. Fix: {hint}")
        elif not known[name].takes(value):
            problems.append(f"{setting}: {name}={value!r} must be {known[name]}. Fix: correct the value.")
    return problems
