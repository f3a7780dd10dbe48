"""Every rule about combinations of settings has a case here that breaks it, and no other rule."""

from __future__ import annotations

import typing
from collections import Counter
from typing import Any

import pytest

from rm_scale.config import RunConfig
from rm_scale.config_names import (
    ATTENTIONS,
    EVALUATION_METRICS,
    LOGGERS,
    OPTIMIZERS,
    SCHEDULES,
    SCHEDULES_BY_LOSS,
)
from rm_scale.config_parsing import config_from_dict
from rm_scale.config_rules import RULES, Rule, conflicts

BASE: dict[str, Any] = {"model_name_or_path": "m", "dataset_path": ["d.jsonl"]}
FP16: dict[str, Any] = {"fp16": True, "bf16": False, "force": ["fp16"]}
EVALUATED: dict[str, Any] = {"eval_split_size": 0.1}

# Per rule: settings that break it, one of these settings, and a part of the problem.
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "streaming_needs_max_steps": ({"streaming": True}, "max_steps", "says when to stop"),
    "streaming_reads_rows_as_they_come": (
        {"streaming": True, "max_steps": 9, "max_train_samples": 50},
        "max_train_samples",
        "needs all training rows before the first step",
    ),
    "streaming_mixes_by_weights": (
        {"streaming": True, "max_steps": 9, "dataset_path": None, "datasets": [{"path": "a"}, {"path": "b"}]},
        "datasets",
        "sources without a weight: needs the number of each source's groups",
    ),
    "streaming_encodes_in_this_process": (
        {"streaming": True, "max_steps": 9, "dataloader_num_workers": 2},
        "dataloader_num_workers",
        "encoded ahead by a thread",
    ),
    "revision_needs_a_hub_dataset": ({"dataset_revision": "v1"}, "dataset_name", "is of a hub data set, but"),
    "four_bit_needs_adapters": ({"load_in_4bit": True}, "use_peft", "can't be trained in full"),
    "merging_needs_an_adapter": ({"merge_adapter": True}, "use_peft", "there is no adapter to merge"),
    "expert_adapters_need_adapters": (
        {"lora_target_parameters": ["experts.down_proj"]},
        "use_peft",
        "all experts are trained in full",
    ),
    "no_dora_on_experts": (
        {"lora_target_parameters": ["experts.down_proj"], "use_peft": True, "use_dora": True},
        "use_dora",
        "adapters of experts can't have it",
    ),
    "fp16_only_by_force": ({"fp16": True, "bf16": False}, "fp16", "rewards overflow at 65,504"),
    "one_compute_type": ({**FP16, "bf16": True}, "bf16", "fp16=True with bf16=True: choose one"),
    "fp16_weights_need_fp16": ({"dtype": "float16"}, "dtype", "weights in fp16 need fp16 training"),
    "qlora_in_low_precision": (
        {"load_in_4bit": True, "use_peft": True, "bf16": False},
        "fp16",
        "in full precision (bf16=False, dtype=auto)",
    ),
    "bf16_weights_need_bf16": ({"dtype": "bfloat16", "bf16": False}, "fp16", "weights and compute type disagree"),
    "one_training_source": ({"dataset_name": "n"}, "dataset_path", "exactly one must be given, got 2"),
    "one_evaluation_source": (
        {"eval_split_size": 5, "eval_dataset_path": ["e.jsonl"]},
        "eval_split_size",
        "eval_dataset_path and eval_split_size: only one can say",
    ),
    "hub_split_needs_a_hub_dataset": ({"dataset_test_split": "test"}, "dataset_name", "names a hub split"),
    "held_out_share_or_whole_number": ({"eval_split_size": 2.5}, "eval_split_size", "a whole number of groups"),
    "evaluation_needs_data": ({"eval_strategy": "epoch"}, "eval_dataset_path", "there is nothing to evaluate on"),
    "evaluation_by_steps_needs_eval_steps": (
        {**EVALUATED, "eval_strategy": "steps"},
        "eval_steps",
        "eval_steps is missing",
    ),
    "batch_size_set_once": (
        {"global_batch_size": 8, "gradient_accumulation_steps": 2},
        "global_batch_size",
        "gradient_accumulation_steps=2 with global_batch_size=8",
    ),
    "no_compiled_four_bit_layers": (
        {"torch_compile": True, "load_in_4bit": True, "use_peft": True},
        "torch_compile",
        "break the graph",
    ),
    "token_budget_needs_packed_rows": (
        {"packing": "none", "max_tokens_per_device": 64},
        "packing",
        "max_tokens_per_device=64 with packing=none",
    ),
    "packed_attention_needs_packed_rows": (
        {"packing": "none", "packed_attention": "sdpa"},
        "packed_attention",
        "packed_attention=sdpa with packing=none",
    ),
    "packed_rows_use_packed_attention": (
        {"packing": "padding_free", "attn_implementation": "eager"},
        "packing",
        "attn_implementation=eager with packing=padding_free",
    ),
    "label_smoothing_needs_pairs": (
        {"loss_type": "plackett_luce", "label_smoothing_factor": 0.1},
        "loss_type",
        "smoothing is defined on pairs",
    ),
    "max_steps_off_or_positive": ({"max_steps": 0}, "max_steps", "max_steps=0: must be -1"),
    "best_model_needs_evaluations": (
        {**EVALUATED, "metric_for_best_model": "loss"},
        "eval_strategy",
        "metric_for_best_model=loss with eval_strategy=no",
    ),
    "best_model_by_a_metric_that_is_measured": (
        {**EVALUATED, "eval_strategy": "epoch", "metric_for_best_model": "eval_acuracy"},
        "metric_for_best_model",
        "metric_for_best_model=eval_acuracy: no evaluation measures it. Fix: did you mean accuracy?",
    ),
    "best_weights_need_a_metric": (
        {**EVALUATED, "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
        "metric_for_best_model",
        "Fix: metric_for_best_model: loss, which is TRL's default",
    ),
    "best_weights_are_saved": (
        {
            **EVALUATED,
            **{"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 2},
            **{"load_best_model_at_end": True, "metric_for_best_model": "loss"},
        },
        "save_steps",
        "not every evaluation's weights are saved",
    ),
    "best_weights_in_full_precision": (
        {
            **EVALUATED,
            **{"eval_strategy": "epoch", "save_strategy": "epoch", "optim": "adamw_8bit"},
            **{"load_best_model_at_end": True, "metric_for_best_model": "loss"},
        },
        "optim",
        "optim=adamw_8bit: the weights come back from checkpoints that hold them",
    ),
    "greater_is_better_needs_a_metric": (
        {"greater_is_better": True},
        "greater_is_better",
        "greater_is_better=True without metric_for_best_model",
    ),
    "greater_is_better_as_the_metric_says": (
        {**EVALUATED, "eval_strategy": "epoch", "metric_for_best_model": "eval_loss", "greater_is_better": True},
        "greater_is_better",
        "the best is its smallest value",
    ),
    "schedule_by_loss_needs_evaluations": (
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        "eval_strategy",
        "it follows the loss of evaluations",
    ),
    "schedule_by_loss_follows_the_loss": (
        {
            **EVALUATED,
            "eval_strategy": "epoch",
            "lr_scheduler_type": "greedy",
            "metric_for_best_model": "eval_accuracy",
        },
        "metric_for_best_model",
        "lowers the rate when that metric no longer falls",
    ),
    "optimizer_without_arguments": (
        {"optim": "galore_adamw"},
        "optim",
        "needs the names of its modules (optim_target_modules)",
    ),
}


def test_base_keeps_every_rule() -> None:
    assert config_from_dict(BASE).problems == ()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule(rule: Rule) -> None:
    """The case is reported by this rule alone, and not where a setting that the rule reads is broken itself."""
    settings, read, expected = CASES[rule.name]
    parsed = config_from_dict({**BASE, **settings})
    assert parsed.problems == (rule.problem(parsed.config),)
    assert expected in parsed.problems[0]
    assert ". Fix: " in parsed.problems[0]
    assert conflicts(parsed.config, {read}) == []


def test_names_and_cases_belong_together() -> None:
    assert Counter(rule.name for rule in RULES) == Counter(list(CASES))


def test_forced_rules_are_let_through() -> None:
    assert config_from_dict({**BASE, **FP16}).problems == ()
    qlora = {"load_in_4bit": True, "use_peft": True, "bf16": False, "force": ["qlora_fp32"]}
    assert config_from_dict({**BASE, **qlora}).problems == ()


def test_unknown_names_are_told_one_by_one() -> None:
    found = config_from_dict({**BASE, "force": ["fp61", "overwrite"], "allow_changed": ["sed", "zzz"]}).problems
    assert found == (
        "sed (in allow_changed): no such setting. Fix: did you mean seed?",
        "zzz (in allow_changed): no such setting. Fix: run with --help for the list of settings.",
        "fp61 (in force): no such setting. Fix: did you mean fp16?",
    )
    assert conflicts(RunConfig(**BASE, force=["fp61"]), {"force"}) == []


def test_all_broken_rules_are_reported_at_once() -> None:
    settings = {"load_in_4bit": True, "merge_adapter": True, "max_steps": 0, "dataset_name": "n"}
    assert len(config_from_dict({**BASE, **settings}).problems) == 4


def test_names_are_those_of_transformers() -> None:
    from transformers import SchedulerType
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.training_args import OptimizerNames

    assert set(SCHEDULES) == {one.value for one in SchedulerType}
    assert set(OPTIMIZERS) == {one.value for one in OptimizerNames}
    theirs = {name for name in ALL_ATTENTION_FUNCTIONS._global_mapping if not name.startswith("rm_scale_")}
    assert set(ATTENTIONS) == {*theirs, "eager"}
    assert set(SCHEDULES) > set(SCHEDULES_BY_LOSS)
    assert set(LOGGERS) == {*INTEGRATION_TO_CALLBACK, "all", "none"}


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"optim": "adamw"}, "optim=adamw: transformers knows no such name. Fix: did you mean"),
        ({"lr_scheduler_type": "cosin"}, "did you mean cosine"),
        ({"attn_implementation": "zzz"}, "attn_implementation=zzz: transformers knows no such name. Fix: one of eager"),
        ({"report_to": ["tensorbord"]}, "did you mean tensorboard?"),
        ({"learning_rate": float("inf")}, "learning_rate=inf: must be a finite number"),
        ({"adam_epsilon": float("nan")}, "adam_epsilon=nan: must be a finite number"),
        ({"seed": 2**32}, "seed=4294967296: must be less than 4294967296"),
        ({"data_seed": 2**32}, "data_seed=4294967296: must be less than 4294967296"),
        ({"eval_split_size": 1e-300}, "eval_split_size=1e-300: must be greater than or equal to 0.000001"),
        ({"lora_r": 1_000_000}, "lora_r=1000000: must be less than or equal to 65536"),
        ({"lora_alpha": int("9" * 400)}, "must be less than or equal to 1000000. Fix: LoRA alpha"),
        ({"pad_to_multiple_of": "1" + 20 * "0"}, "must be less than or equal to 65536"),
        ({"run_name": "a" * 1_000_000}, "must have at most 4,096 characters, and has 1,000,000. Fix: shorten it."),
        ({"report_to": ["tensorboard", "a" * 5000]}, "must have at most 4,096 characters"),
    ],
)
def test_values_that_training_could_not_use_are_refused_before_anything_is_read(
    settings: dict[str, Any], part: str
) -> None:
    (problem,) = config_from_dict({**BASE, **settings}).problems
    assert part in problem


@pytest.mark.parametrize("metric", [*EVALUATION_METRICS, "maths_accuracy", "eval_a_b_accuracy"])
def test_metrics_of_an_evaluation_can_choose_the_best_model(metric: str) -> None:
    settings = {**EVALUATED, "eval_strategy": "epoch", "metric_for_best_model": metric}
    assert config_from_dict({**BASE, **settings}).problems == ()


def test_metrics_are_those_of_an_evaluation() -> None:
    from rm_scale.training.exact_evaluation import logged_metrics
    from rm_scale.training.pair_counts import EvaluationResult

    assert set(logged_metrics(EvaluationResult(), "eval")) == {f"eval_{name}" for name in EVALUATION_METRICS}


def _takes_numbers(name: str) -> bool:
    kinds = RunConfig.model_fields[name].annotation
    return bool({int, float} & {kinds, *typing.get_args(kinds)})


@pytest.mark.parametrize("name", [name for name in RunConfig.model_fields if _takes_numbers(name)])
@pytest.mark.parametrize("value", [10**25, 1e300, "1" + 400 * "0"], ids=["10^25", "1e300", "10^400"])
def test_every_number_has_a_bound_far_above_any_use(name: str, value: Any) -> None:
    (problem,) = [text for text in config_from_dict({**BASE, name: value}).problems if text.startswith(f"{name}=")]
    assert "must be" in problem
    assert len(problem) < 500
