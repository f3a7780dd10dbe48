"""The rules that settings must keep, found without looking at any file or device.

`RULES` is a table of combinations that can't work. Each rule has a name, a condition and the text of its problem; to
add one, add a row here and its case to tests/unit/test_config_rules.py. What depends on files, the model or the number
of devices is checked when the run is planned (`rm_scale.planning`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

from rm_scale.config import FORCEABLE_RULES, RESUME_FACTS, RunConfig
from rm_scale.config_columns import reading_problems
from rm_scale.config_names import (
    ATTENTIONS,
    EVALUATION_METRICS,
    LOGGERS,
    OPTIMIZERS,
    OPTIMIZERS_WITH_ARGUMENTS,
    OPTIMIZERS_WITH_FORMS_OF_THEIR_OWN,
    SCHEDULES,
    SCHEDULES_BY_LOSS,
)
from rm_scale.config_schedules import optimizer_problems, schedule_problems
from rm_scale.config_sources import LISTS, source_problems
from rm_scale.texts import did_you_mean, nearest_name


@dataclass(frozen=True)
class Rule:
    """One combination of settings that can't work.

    Attributes:
        name: what the rule demands.
        broken: tells whether a configuration breaks it.
        problem: returns the problem as one text: the values seen, the rule and the fix.
    """

    name: str
    broken: Callable[[RunConfig], bool]
    problem: Callable[[RunConfig], str]


RULES = (
    # --- Weights and number types
    Rule(
        "four_bit_needs_adapters",
        lambda c: c.load_in_4bit and not c.use_peft,
        lambda c: (
            "load_in_4bit=True with use_peft=False: 4-bit weights can't be trained in full. Fix: set use_peft: "
            "true (QLoRA)."
        ),
    ),
    Rule(
        "merging_needs_an_adapter",
        lambda c: c.merge_adapter and not c.use_peft,
        lambda c: "merge_adapter=True with use_peft=False: there is no adapter to merge. Fix: leave merge_adapter out.",
    ),
    Rule(
        "expert_adapters_need_adapters",
        lambda c: bool(c.lora_target_parameters) and not c.use_peft,
        lambda c: (
            f"lora_target_parameters={c.lora_target_parameters} with use_peft=False: all experts are trained in full. "
            "Fix: leave it out, or set use_peft: true."
        ),
    ),
    Rule(
        "no_dora_on_experts",
        lambda c: bool(c.lora_target_parameters) and c.use_dora,
        lambda c: (
            f"use_dora=True with lora_target_parameters={c.lora_target_parameters}: adapters of experts can't have it. "
            "Fix: set use_dora: false, or leave lora_target_parameters out."
        ),
    ),
    Rule(
        "fp16_only_by_force",
        lambda c: c.fp16 and "fp16" not in c.force,
        lambda c: (
            "fp16=True: refused, since rewards overflow at 65,504 and loss scaling skips steps. "
            "Fix: use bf16: true, or add --force fp16."
        ),
    ),
    Rule(
        "one_compute_type",
        lambda c: c.fp16 and c.bf16,
        lambda c: "fp16=True with bf16=True: choose one. Fix: set bf16: false with fp16.",
    ),
    Rule(
        "fp16_weights_need_fp16",
        lambda c: c.dtype == "float16" and not c.fp16,
        lambda c: "dtype=float16 with fp16=False: weights in fp16 need fp16 training. Fix: use dtype: bfloat16.",
    ),
    Rule(
        "qlora_in_low_precision",
        lambda c: c.load_in_4bit and (_computes_in_fp32(c) or c.dtype == "float32") and "qlora_fp32" not in c.force,
        lambda c: (
            f"load_in_4bit=True in full precision (bf16={c.bf16}, dtype={c.dtype}): QLoRA computes in bfloat16; "
            "float32 saves no activation memory. Fix: set bf16: true and dtype: auto, or add --force qlora_fp32 (for "
            "tests)."
        ),
    ),
    Rule(
        "bf16_weights_need_bf16",
        lambda c: c.dtype == "bfloat16" and _computes_in_fp32(c),
        lambda c: (
            "dtype=bfloat16 with bf16=False: weights and compute type disagree. Fix: set bf16: true or dtype: float32."
        ),
    ),
    # --- Data
    Rule(
        "one_training_source",
        lambda c: bool(c.dataset_path) + bool(c.dataset_name) + bool(c.datasets) != 1,
        lambda c: (
            "dataset_path, dataset_name and datasets: exactly one must be given, got "
            f"{bool(c.dataset_path) + bool(c.dataset_name) + bool(c.datasets)}. "
            "Fix: give --dataset_path FILE for local files, --dataset_name NAME for the hub, or datasets for several "
            "sources."
        ),
    ),
    Rule(
        "one_evaluation_source",
        lambda c: len(_evaluation_sources(c)) > 1,
        lambda c: (
            f"{' and '.join(_evaluation_sources(c))}: only one can say what to evaluate on. Fix: keep one of them."
        ),
    ),
    Rule(
        "hub_split_needs_a_hub_dataset",
        lambda c: bool(c.dataset_test_split) and not c.dataset_name,
        lambda c: (
            f"dataset_test_split={c.dataset_test_split}: names a hub split, but dataset_name is not set. "
            "Fix: use eval_dataset_path or eval_split_size with local files."
        ),
    ),
    Rule(
        "revision_needs_a_hub_dataset",
        lambda c: c.dataset_revision is not None and not c.dataset_name,
        lambda c: (
            f"dataset_revision={c.dataset_revision}: is of a hub data set, but dataset_name is not set. Fix: leave it "
            "out; a source of datasets has a revision of its own."
        ),
    ),
    Rule(
        "held_out_share_or_whole_number",
        lambda c: c.eval_split_size is not None and c.eval_split_size >= 1 and c.eval_split_size % 1 != 0,
        lambda c: (
            f"eval_split_size={c.eval_split_size}: must be a share below 1 or a whole number of groups. Fix: "
            "e.g. 300 or 0.1."
        ),
    ),
    Rule(
        "streaming_needs_max_steps",
        lambda c: c.streaming and c.max_steps <= 0,
        lambda c: "streaming: the length of a stream is not known, so max_steps says when to stop. Fix: --max_steps N.",
    ),
    Rule(
        "streaming_reads_rows_as_they_come",
        lambda c: c.streaming and bool(_of_whole_data(c)),
        lambda c: (
            f"streaming with {' and '.join(_of_whole_data(c))}: needs all training rows before the first step. Fix: "
            "leave one of them out; evaluation data of its own is eval_dataset_path."
        ),
    ),
    Rule(
        "streaming_mixes_by_weights",
        lambda c: c.streaming and bool(_of_known_sizes(c)),
        lambda c: (
            f"streaming with {' and '.join(_of_known_sizes(c))}: needs the number of each source's groups, which a "
            "stream does not know. Fix: give each source of datasets a weight, which holds in each step."
        ),
    ),
    Rule(
        "streaming_encodes_in_this_process",
        lambda c: c.streaming and c.dataloader_num_workers > 0,
        lambda c: (
            f"streaming with dataloader_num_workers={c.dataloader_num_workers}: the next rows are encoded ahead by a "
            "thread of each rank. Fix: leave dataloader_num_workers out."
        ),
    ),
    # --- Evaluation
    Rule(
        "evaluation_needs_data",
        lambda c: c.eval_strategy != "no" and not _evaluation_sources(c),
        lambda c: (
            f"eval_strategy={c.eval_strategy}: there is nothing to evaluate on. "
            "Fix: give eval_dataset_path, eval_datasets, eval_split_size or dataset_test_split."
        ),
    ),
    Rule(
        "evaluation_by_steps_needs_eval_steps",
        lambda c: c.eval_strategy == "steps" and c.eval_steps is None,
        lambda c: "eval_strategy=steps: eval_steps is missing. Fix: add eval_steps: 100, say.",
    ),
    # --- Batch, layout and speed
    Rule(
        "batch_size_set_once",
        lambda c: c.gradient_accumulation_steps is not None and c.global_batch_size is not None,
        lambda c: (
            f"gradient_accumulation_steps={c.gradient_accumulation_steps} with "
            f"global_batch_size={c.global_batch_size}: the second sets the first. Fix: keep one of them."
        ),
    ),
    Rule(
        "no_compiled_four_bit_layers",
        lambda c: c.torch_compile and c.load_in_4bit,
        lambda c: (
            "torch_compile=True with load_in_4bit=True: 4-bit layers break the graph at every product. Fix: leave "
            "torch_compile out."
        ),
    ),
    Rule(
        "token_budget_needs_packed_rows",
        lambda c: c.packing == "none" and c.max_tokens_per_device is not None,
        lambda c: (
            f"max_tokens_per_device={c.max_tokens_per_device} with packing=none: padded rows are sized by "
            "per_device_train_batch_size. Fix: leave one of them out."
        ),
    ),
    Rule(
        "packed_attention_needs_packed_rows",
        lambda c: c.packing == "none" and c.packed_attention != "auto",
        lambda c: f"packed_attention={c.packed_attention} with packing=none: it is for packed rows. Fix: leave it out.",
    ),
    Rule(
        "packed_rows_use_packed_attention",
        lambda c: c.packing in {"padding_free", "prefix_shared"} and c.attn_implementation is not None,
        lambda c: (
            f"attn_implementation={c.attn_implementation} with packing={c.packing}: packed rows have attention "
            "of their own. Fix: use packed_attention, or packing: none."
        ),
    ),
    # --- Loss and steps
    Rule(
        "label_smoothing_needs_pairs",
        lambda c: c.loss_type == "plackett_luce" and c.label_smoothing_factor > 0,
        lambda c: (
            f"label_smoothing_factor={c.label_smoothing_factor} with loss_type=plackett_luce: smoothing is "
            "defined on pairs. Fix: use loss_type: bradley_terry or label_smoothing_factor: 0."
        ),
    ),
    Rule(
        "max_steps_off_or_positive",
        lambda c: c.max_steps == 0 or c.max_steps < -1,
        lambda c: (
            f"max_steps={c.max_steps}: must be -1 (train for num_train_epochs) or at least 1. Fix: leave it "
            "out, or e.g. 100."
        ),
    ),
    Rule(
        "best_model_needs_evaluations",
        lambda c: c.metric_for_best_model is not None and c.eval_strategy == "no",
        lambda c: (
            f"metric_for_best_model={c.metric_for_best_model} with eval_strategy=no: nothing is measured while "
            "training. Fix: set eval_strategy: steps and eval_steps."
        ),
    ),
    Rule(
        "best_model_by_a_metric_that_is_measured",
        lambda c: c.metric_for_best_model is not None and not _is_measured(c.metric_for_best_model),
        lambda c: (
            f"metric_for_best_model={c.metric_for_best_model}: no evaluation measures it. Fix: "
            + did_you_mean(
                _without_prefix(c.metric_for_best_model or ""),
                EVALUATION_METRICS,
                f"one of {', '.join(EVALUATION_METRICS)}; for a subset its name with _accuracy behind it, for one of "
                "several files also with _loss.",
            )
        ),
    ),
    Rule(
        "best_weights_need_a_metric",
        lambda c: c.load_best_model_at_end and c.metric_for_best_model is None,
        lambda c: (
            "load_best_model_at_end=True without metric_for_best_model: nothing says which is the best. Fix: "
            "metric_for_best_model: loss, which is TRL's default, or accuracy."
        ),
    ),
    Rule(
        "best_weights_are_saved",
        lambda c: c.load_best_model_at_end and c.eval_strategy != "no" and not _saves_every_evaluation(c),
        lambda c: (
            f"load_best_model_at_end=True with eval_strategy={c.eval_strategy}, eval_steps={c.eval_steps}, "
            f"save_strategy={c.save_strategy}, save_steps={c.save_steps}: not every evaluation's weights are saved. "
            "Fix: the same strategy for both and, with steps, save_steps equal to eval_steps or a divisor of it."
        ),
    ),
    Rule(
        "best_weights_in_full_precision",
        lambda c: (
            c.load_best_model_at_end
            and (c.save_only_model or any(part in c.optim for part in OPTIMIZERS_WITH_FORMS_OF_THEIR_OWN))
        ),
        lambda c: (
            f"load_best_model_at_end=True with save_only_model={c.save_only_model}, optim={c.optim}: the weights come "
            "back from checkpoints that hold them with the optimizer's state, one number for each weight. Fix: "
            "save_only_model: false and optim: adamw_torch, or leave load_best_model_at_end out and use the best "
            "checkpoint-N as the model."
        ),
    ),
    Rule(
        "greater_is_better_needs_a_metric",
        lambda c: c.greater_is_better is not None and c.metric_for_best_model is None,
        lambda c: (
            f"greater_is_better={c.greater_is_better} without metric_for_best_model: there is nothing to compare. Fix: "
            "leave it out, or set metric_for_best_model: accuracy."
        ),
    ),
    Rule(
        "greater_is_better_as_the_metric_says",
        lambda c: (
            c.greater_is_better is not None
            and c.metric_for_best_model is not None
            and c.greater_is_better == _is_loss(c.metric_for_best_model)
        ),
        lambda c: (
            f"greater_is_better={c.greater_is_better} with metric_for_best_model={c.metric_for_best_model}: the best "
            f"is its {'smallest' if c.greater_is_better else 'largest'} value. Fix: leave greater_is_better out."
        ),
    ),
    # --- Schedule and optimizer
    Rule(
        "schedule_by_loss_needs_evaluations",
        lambda c: c.lr_scheduler_type in SCHEDULES_BY_LOSS and c.eval_strategy == "no",
        lambda c: (
            f"lr_scheduler_type={c.lr_scheduler_type} with eval_strategy=no: it follows the loss of evaluations while "
            "training. Fix: set eval_strategy: steps and eval_steps, or use linear."
        ),
    ),
    Rule(
        "schedule_by_loss_follows_the_loss",
        lambda c: (
            c.lr_scheduler_type in SCHEDULES_BY_LOSS
            and c.metric_for_best_model is not None
            and not _is_loss(c.metric_for_best_model)
        ),
        lambda c: (
            f"lr_scheduler_type={c.lr_scheduler_type} with metric_for_best_model={c.metric_for_best_model}: it lowers "
            "the rate when that metric no longer falls, as only a loss should. Fix: metric_for_best_model: loss, or "
            "another schedule."
        ),
    ),
    Rule(
        "optimizer_without_arguments",
        lambda c: c.optim.startswith(OPTIMIZERS_WITH_ARGUMENTS) and c.optim in OPTIMIZERS,
        lambda c: (
            f"optim={c.optim}: needs the names of its modules (optim_target_modules), which are no setting here. "
            "Fix: use adamw_torch; adamw_8bit or use_peft to save memory."
        ),
    ),
)


def _computes_in_fp32(config: RunConfig) -> bool:
    return not config.bf16 and not config.fp16


def _saves_every_evaluation(config: RunConfig) -> bool:
    if config.save_strategy != config.eval_strategy:
        return False
    return config.eval_strategy == "epoch" or (config.eval_steps or 0) % config.save_steps == 0


def _without_prefix(metric: str) -> str:
    return metric.removeprefix("eval_")


def _is_measured(metric: str) -> bool:
    name = _without_prefix(metric)
    return name in EVALUATION_METRICS or any(name.endswith(end) and name != end for end in ("_accuracy", "_loss"))


def _is_loss(metric: str) -> bool:
    return metric.endswith("loss")  # as transformers tells it


def _evaluation_sources(config: RunConfig) -> list[str]:
    """Return which of the settings that say what to evaluate on are given."""
    names = ("eval_dataset_path", "eval_datasets", "eval_split_size", "dataset_test_split")
    return [name for name in names if getattr(config, name)]


def _of_whole_data(config: RunConfig) -> list[str]:
    """Return which of the settings are given that choose among all training rows."""
    return [name for name in ("eval_split_size", "max_train_samples") if getattr(config, name) is not None]


def _of_known_sizes(config: RunConfig) -> list[str]:
    """Return what a list of sources says of their sizes: a source without a weight is used once per epoch."""
    if not config.datasets:
        return []
    entries = [entry for entry in config.datasets if isinstance(entry, dict)]
    names = [name for name in ("epochs", "max_samples") if any(entry.get(name) is not None for entry in entries)]
    if len(entries) > 1 and not names and all(entry.get("weight") is None for entry in entries):
        names.append("sources without a weight")
    return [*names, *(["mixture_shares: per_epoch"] if config.mixture_shares == "per_epoch" else [])]


class _BrokenSettingRead(Exception):
    """A rule read a setting whose value could not be used."""


class _Readable:
    """A configuration whose broken settings can't be read.

    In a parsed configuration their defaults stand in for them, about which a rule must not complain.
    """

    def __init__(self, config: RunConfig, broken: frozenset[str]) -> None:
        self._config = config
        self._broken = broken

    def __getattr__(self, name: str) -> Any:
        if name in self._broken:
            raise _BrokenSettingRead(name)
        return getattr(self._config, name)


def conflicts(config: RunConfig, broken: Iterable[str] = ()) -> list[str]:
    """Return a text for each rule that the settings break, and for each unknown name in `force` or `allow_changed`.

    Args:
        config: the settings.
        broken: settings already reported; rules that read them are skipped.
    """
    broken = frozenset(broken)
    readable = cast(RunConfig, _Readable(config, broken))
    found = []
    for rule in RULES:
        try:
            if rule.broken(readable):
                found.append(rule.problem(readable))
        except _BrokenSettingRead:
            continue
    for setting, values in (("lr_scheduler_type", SCHEDULES), ("optim", OPTIMIZERS), ("report_to", LOGGERS)):
        if setting not in broken:
            found += _unknown_values(setting, getattr(config, setting), values)
    if not {"lr_scheduler_type", "lr_scheduler_kwargs"} & broken and config.lr_scheduler_type in SCHEDULES:
        found += schedule_problems(config.lr_scheduler_type, config.lr_scheduler_kwargs)
    if not {"optim", "optim_args"} & broken and config.optim in OPTIMIZERS:
        found += optimizer_problems(config.optim, config.optim_args)
    if "attn_implementation" not in broken and config.attn_implementation is not None:
        # "owner/name" is a kernel on the hub, which only the hub can judge.
        found += _unknown_values(
            "attn_implementation", [one for one in [config.attn_implementation] if "/" not in one], ATTENTIONS
        )
    if not {"dataset_preset", "dataset_columns", "dataset_format", "ignore_columns"} & broken:
        found += reading_problems(
            config.dataset_preset, config.dataset_columns, config.dataset_format, config.ignore_columns
        )
    for setting in LISTS:
        if setting not in broken:
            found += source_problems(setting, getattr(config, setting) or [])
    for setting, known in (("allow_changed", RESUME_FACTS), ("force", FORCEABLE_RULES)):
        if setting not in broken:
            unknown = [name for name in getattr(config, setting) if name not in known]
            found += [unknown_key_problem(name, known, f" (in {setting})") for name in unknown]
    return found


def _unknown_values(setting: str, value: str | list[str], known: Iterable[str]) -> list[str]:
    """Return a problem for each value that transformers does not know by this name."""
    return [
        f"{setting}={name}: transformers knows no such name. Fix: "
        + did_you_mean(name, known, f"one of {', '.join(known)}.", most=3)
        for name in ([value] if isinstance(value, str) else value)
        if name not in known
    ]


def unknown_key_problem(name: str, known: Iterable[str], where: str = "") -> str:
    """Return the problem of a name nobody knows, with the nearest known name.

    Args:
        name: what was written.
        known: the names to choose from.
        where: added after the name, e.g. " (in run.yaml)".
    """
    nearest = nearest_name(name, known)
    hint = f"did you mean {nearest}?" if nearest else "run with --help for the list of settings."
    return f"{name}{where}: no such setting. Fix: {hint}"
