"""A planned run: what the settings leave open filled in, and what the run takes; used here and under Slurm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rm_scale.config_parsing import ParsedConfig, parse_config
from rm_scale.errors import ConfigError, ModelError, UserError
from rm_scale.launch.machine import Machine
from rm_scale.logs import get_logger
from rm_scale.modeling.model_shape import shape_of_run
from rm_scale.planning import plan_text
from rm_scale.planning.advise import Choice, Offload, Request, recommend
from rm_scale.planning.changes import Change, changes_that_fit, shortened
from rm_scale.planning.deepspeed_config import read_deepspeed_config, zero_stage
from rm_scale.planning.estimate import Estimate, estimate
from rm_scale.planning.expert_settings import adapted_parameters
from rm_scale.planning.group_lengths import LengthMix, full_rows
from rm_scale.planning.layout_choice import choose_packing
from rm_scale.planning.parameters import count_parameters
from rm_scale.planning.plan import Plan, make_plan
from rm_scale.planning.run_estimate import scenario_of_run
from rm_scale.planning.shape import read_model_config
from rm_scale.texts import one_line
from rm_scale.tiers import MODEL_TIERS, model_tier

logger = get_logger(__name__)


@dataclass(frozen=True)
class PlannedRun:
    """A run with everything that the planner filled in.

    Attributes:
        settings: command line of `rm_scale/train.py`.
        asked: that command line without what the planner chose.
        parsed: the configuration that the settings come to.
        plan: what will run.
        lengths: of the data where they were measured, else full rows.
        predicted: memory and time that it takes; `None` where these can't be predicted for this kind of model.
    """

    settings: list[str]
    asked: list[str]
    parsed: ParsedConfig
    plan: Plan
    lengths: LengthMix
    predicted: Estimate | None

    def lines(self) -> str:
        """Return plan and prediction as text."""
        predicted = [] if self.predicted is None else plan_text.estimate_lines(self.predicted)
        return "\n".join([self.plan.summary(), *predicted])


def plan_run(tier: str | None, settings: Sequence[str], machine: Machine, check_output: bool) -> PlannedRun:
    """Fill in what the settings leave open, and work out what the run takes.

    Args:
        tier: whose model is taken unless the settings or their configuration file name one.
        settings: command line of `rm_scale/train.py`.
        machine: where it will run.
        check_output: probe that the output directory can be written.

    Raises:
        ConfigError: settings are wrong, or there are more devices than any cluster has.
    """
    _refuse_impossible_counts(machine)
    asked = [*_tier_settings(tier, settings), *settings]
    parsed = parse_config(asked)
    lengths = measure(parsed)
    chosen = chosen_settings(parsed, machine, lengths)
    for name, value in chosen.items():
        logger.info(f"{name} not given: {value}, by the plan")
    return _planned(asked, chosen, machine, lengths, check_output)


def _planned(
    asked: list[str], chosen: dict[str, str], machine: Machine, lengths: LengthMix, check_output: bool
) -> PlannedRun:
    settings = [*(word for name, value in chosen.items() for word in (f"--{name}", value)), *asked]
    parsed = parse_config(settings)
    device = "cpu" if machine.device.is_cpu else "cuda"
    plan = make_plan(parsed, machine.world_size, device, check_output, shape_of=shape_of_run, or_known=True)
    return PlannedRun(settings, asked, parsed, plan, lengths, _predict(parsed, plan, machine, lengths))


def _predict(parsed: ParsedConfig, plan: Plan, machine: Machine, lengths: LengthMix) -> Estimate | None:
    """Return what the run takes; `None`, with a warning, for layers whose activations no formula knows (Mamba)."""
    try:
        return estimate(scenario_for(parsed, plan, machine, lengths))
    except ModelError as error:
        cause = str(error).split(" Fix:")[0]
        logger.warning(f"memory and time are not predicted, nor is it checked that the run fits. {cause}")
        return None


_MOST_DEVICES, _MOST_NODES = 1024, 99_999
"""Devices on a node, and nodes (as many as the options of a Slurm job can say)."""


def _refuse_impossible_counts(machine: Machine) -> None:
    counts = (("gpus", machine.per_node, _MOST_DEVICES), ("nodes", machine.nodes, _MOST_NODES))
    problems = [
        f"{name}={one_line(str(count), 60)}: must be at most {most:,}. Fix: correct it."
        for name, count, most in counts
        if count > most
    ]
    if problems:
        raise ConfigError(problems)


def _tier_settings(tier: str | None, settings: Sequence[str]) -> list[str]:
    """Return the setting that names the tier's model, unless a flag or the configuration file names one."""
    if tier is None:
        return []
    chosen = model_tier(tier)
    named = "model_name_or_path" in parse_config(settings).given
    return [] if named else ["--model_name_or_path", chosen.model]


def refuse_another_size(tier: str | None, planned: PlannedRun) -> None:
    """Refuse a tier beside a model of another size: one of the two was not meant.

    Raises:
        ConfigError: the settings name a model that is not of the tier.
    """
    refuse_size(tier, planned.parsed.config.model_name_or_path, planned.plan.num_parameters)


def refuse_named_model_of_another_size(tier: str | None, settings: Sequence[str]) -> None:
    """Refuse a tier beside a model of another size before anything is planned, where the model's config can be read.

    Raises:
        ConfigError: the settings name a model that is not of the tier.
    """
    parsed = parse_config(settings)
    if tier is None or "model_name_or_path" not in parsed.given:
        return  # the tier's own model, or that of its script's configuration
    try:
        shape = shape_of_run(parsed.config, or_known=True)
    except UserError:
        return  # it may be readable where the run is started
    refuse_size(tier, parsed.config.model_name_or_path, count_parameters(shape))


def refuse_size(tier: str | None, model: str, num_parameters: int) -> None:
    """Refuse a model that is not of the tier.

    Raises:
        ConfigError: it is of another one; the text names it.
    """
    if tier is None or (size := nearest_tier(num_parameters)) == model_tier(tier).name:
        return
    raise ConfigError(
        [
            f"tier={tier!r}: model_name_or_path={model!r} has {num_parameters:,} parameters, a model of tier {size}. "
            f"Fix: --tier {size}, or name another model."
        ]
    )


def nearest_tier(num_parameters: int) -> str:
    """Return the tier that a model of this size belongs to."""
    sizes = {"1b": 2e9, "3b": 5e9, "7b": 9e9}
    return next((name for name, limit in sizes.items() if num_parameters <= limit), MODEL_TIERS[-1].name)


# --- The plan --------------------------------------------------------------------------------------------------------


def measure(parsed: ParsedConfig) -> LengthMix:
    """Return the lengths of the run's own data where it is on this machine, else full rows."""
    config = parsed.config
    if not config.dataset_path or parsed.problems:
        return full_rows(config.max_length)
    from rm_scale.data.measure_lengths import measure_lengths
    from rm_scale.data.reading import Reading

    measured = measure_lengths(config.dataset_path, config.model_name_or_path, Reading.of_config(config))
    kept = measured.cut(config.max_length)
    return kept if kept.groups else full_rows(config.max_length)


def request_for(parsed: ParsedConfig, machine: Machine, lengths: LengthMix) -> Request:
    """Return the planner's request for a run; what the settings leave open stays open."""
    config = parsed.config
    stage, offload = _asked_engine(parsed)
    model = read_model_config(config.model_name_or_path, config.model_revision, or_known=True)
    shape = shape_of_run(config, model)
    return Request(
        name=config.model_name_or_path,
        shape=shape,
        method=config.method,
        device=machine.device,
        num_devices=machine.world_size,
        num_nodes=machine.nodes,
        max_length=config.max_length,
        lengths=lengths,
        packing=choose_packing(config, model)[0],
        global_batch_size=config.global_batch_size or max(64, machine.world_size),
        zero_stage=stage,
        offload=offload,
        checkpointing=config.gradient_checkpointing if "gradient_checkpointing" in parsed.given else None,
        max_tokens=config.max_tokens_per_device,
        micro_batch=config.per_device_train_batch_size,
        lora_rank=config.lora_r,
        lora_targets=tuple(config.lora_target_modules) if config.lora_target_modules else None,
        lora_parameters=adapted_parameters(config.lora_target_parameters, shape) if config.use_peft else (),
        nested_quant=config.use_bnb_nested_quant,
    )


def _asked_engine(parsed: ParsedConfig) -> tuple[int | None, Offload | None]:
    """Return the ZeRO stage (0: without DeepSpeed) and what leaves the device, as asked for; `None`: left open.

    Raises:
        ConfigError: the DeepSpeed file can't be read.
    """
    if "deepspeed" not in parsed.given:
        return None, None
    if parsed.config.deepspeed is None:
        return 0, "none"
    values = read_deepspeed_config(parsed.config.deepspeed)
    zero = values.get("zero_optimization", {})
    optimizer, weights = ((zero.get(f"offload_{what}") or {}).get("device", "none") for what in ("optimizer", "param"))
    if "nvme" in {optimizer, weights}:
        return zero_stage(values), "nvme"
    if weights == "cpu":
        return zero_stage(values), "all"
    return zero_stage(values), "optimizer" if optimizer == "cpu" else "none"


def chosen_settings(parsed: ParsedConfig, machine: Machine, lengths: LengthMix) -> dict[str, str]:
    """Return settings for what the user left open: ZeRO, offload, checkpointing, rows, batch."""
    if parsed.problems:
        return {}  # all problems are reported together, by the plan
    try:
        request = request_for(parsed, machine, lengths)
        best = recommend(request)
    except UserError:
        return {}  # likewise; or nothing can be predicted, which is said later
    given, chosen = parsed.given, {}
    if "deepspeed" not in given and best.zero_stage:
        chosen["deepspeed"] = deepspeed_name(best)
    if "gradient_checkpointing" not in given:
        chosen["gradient_checkpointing"] = str(best.checkpointing).lower()
    if not given & {"global_batch_size", "gradient_accumulation_steps", "per_device_train_batch_size"}:
        chosen["global_batch_size"] = str(request.global_batch_size)
    if best.micro_batch is not None and "per_device_train_batch_size" not in given:
        chosen["per_device_train_batch_size"] = str(best.micro_batch)
    if best.micro_batch is None and "max_tokens_per_device" not in given:
        chosen["max_tokens_per_device"] = str(best.max_tokens)
    return chosen


def deepspeed_name(choice: Choice) -> str:
    """Return the name of the shipped DeepSpeed file for a choice."""
    if choice.offload == "nvme":
        return "zero3_nvme"
    if choice.offload == "all":
        return "zero3_offload"
    if choice.offload == "optimizer":
        return f"zero{max(2, choice.zero_stage)}_offload_optimizer"
    return f"zero{choice.zero_stage}"


def scenario_for(parsed: ParsedConfig, plan: Plan, machine: Machine, lengths: LengthMix):  # type: ignore[no-untyped-def]
    """Return the scenario of the run as it will be started."""
    config = parsed.config
    return scenario_of_run(config, plan, shape_of_run(config, or_known=True), machine.device, machine.nodes, lengths)


def refuse_what_does_not_fit(planned: PlannedRun, machine: Machine, forced: bool) -> None:
    """Stop a run that does not fit.

    Raises:
        ConfigError: it was not forced; what would make it fit is in the text.
    """
    predicted = planned.predicted
    if predicted is None or predicted.fits:
        return
    need = max(predicted.peak_memory_bytes, predicted.load_peak_memory_bytes) / 1e9
    problem = f"the plan needs {need:.1f} GB per device, and there are {predicted.limit_bytes / 1e9:.1f}"
    if forced:
        logger.warning(f"{problem}: started all the same, as --force plan asks")
        return
    changes = "; ".join(_fixes(planned, machine))
    raise ConfigError([f"{problem}. Fix: {changes or 'a larger device'}; or --force plan to try it."])


_MOST_FIXES = 4


def _fixes(planned: PlannedRun, machine: Machine) -> list[str]:
    """Return options with which the run would fit, each planned with them as the run would be."""
    request = request_for(parse_config(planned.asked), machine, planned.lengths)
    found = []
    for change in changes_that_fit(request):
        settings, bigger = _as_settings(change), _with_more_devices(machine, change)
        if _fits_with(planned, settings, bigger, change):
            found.append(" ".join([*_machine_options(machine, bigger), *settings]))
        if len(found) == _MOST_FIXES:
            break
    return found


def _as_settings(change: Change) -> list[str]:
    """Return the settings that make a change; of more devices none, as these are options of the launcher."""
    chosen = {**change.changed, **change.chosen}
    words = []
    if "packing" in chosen:
        words += ["--packing", chosen["packing"]]
    if "max_length" in chosen:
        words += ["--max_length", str(chosen["max_length"])]
    if "method" in chosen:
        words += ["--use_peft", "true", *(["--load_in_4bit", "true"] if chosen["method"] == "qlora" else [])]
    if "zero_stage" in chosen or "offload" in chosen:
        words += ["--deepspeed", deepspeed_name(change.choice) if change.choice.zero_stage else "none"]
    if "checkpointing" in chosen:
        words += ["--gradient_checkpointing", str(chosen["checkpointing"]).lower()]
    if "max_tokens" in chosen:
        words += ["--max_tokens_per_device", str(chosen["max_tokens"])]
    if "micro_batch" in chosen:
        words += ["--per_device_train_batch_size", str(chosen["micro_batch"])]
    return words


def _with_more_devices(machine: Machine, change: Change) -> Machine:
    nodes = change.changed.get("num_nodes", machine.nodes)
    return replace(machine, per_node=change.changed.get("num_devices", machine.world_size) // nodes, nodes=nodes)


def _machine_options(machine: Machine, bigger: Machine) -> list[str]:
    """Return the launcher's options for more devices: those of each node, and nodes."""
    words = ["--gpus", str(bigger.per_node)] if bigger.per_node != machine.per_node else []
    if bigger.nodes == machine.nodes:
        return words
    by_whom = [] if machine.hostfile is not None else ["(of a --hostfile, or with --slurm)"]
    return [*words, "--nodes", str(bigger.nodes), *by_whom]


def _fits_with(planned: PlannedRun, settings: list[str], machine: Machine, change: Change) -> bool:
    """Tell whether the run would fit with these settings on this machine, planned anew from what was asked."""
    asked = [*planned.asked, *settings]
    length = change.changed.get("max_length")
    lengths = planned.lengths if length is None else shortened(planned.lengths, length)
    parsed = parse_config(asked)
    try:
        trial = _planned(asked, chosen_settings(parsed, machine, lengths), machine, lengths, check_output=False)
    except UserError:
        return False
    return trial.predicted is not None and trial.predicted.fits
