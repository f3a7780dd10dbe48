"""TRL's and transformers' own settings that are no settings here under that name, one line each.

A name that TRL's `RewardConfig`, `ModelConfig`, `ScriptArguments` or `DatasetMixtureConfig` has is one of four things:
a field of `RunConfig` of the same name and meaning, another name of one (`RENAMED`), accepted with the values that
say what a run does anyway, or refused with the reason and what to use instead (both in `FIXED`). A test compares the
names with the installed TRL, and docs/settings.md has these lines as a table (`python tools/settings_tables.py`).
"""

# ruff: noqa: E501  one line per name: a table to be read and searched

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "dataset_streaming": "streaming",
    "evaluation_strategy": "eval_strategy",
    "full_determinism": "deterministic",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "test_split_size": "eval_split_size",
    "torch_dtype": "dtype",
}
"""Names of TRL and transformers, now or in earlier versions, for a setting that has another name here."""


@dataclass(frozen=True)
class Fixed:
    """A setting of TRL that a run can't change.

    Attributes:
        accepted: values that say what a run does anyway, as written in YAML; "none" for not set. Empty: refused.
        reason: why no other value is taken.
        instead: what to do for it.
    """

    accepted: tuple[str, ...]
    reason: str
    instead: str = "leave it out"


_OFF, _ON, _NONE, _ANY = ("false",), ("true",), ("none",), ("true", "false")
_EXACT = "evaluation is exact and built in"
_NO_HUB = "nothing is pushed from a training run"
_UPLOAD = "leave it out and upload the finished folder yourself"
_LOADER = "batches are built ahead of the step by dataloader_num_workers processes, whose other settings are fixed"
_DDP = "a run's batches and gradients are its own, so that DDP's options are set by it"
_FSDP = "weights are sharded by DeepSpeed, not by FSDP"
_LENGTH_IS_NEEDED = (
    "memory is planned for the longest text, so there must be one. Fix: --max_length N; rm-scale data with the same "
    "settings counts what is longer, and --overlong_policy error stops for the first."
)
_CUTS = "a text that was cut would get another text's reward"
_ONE_LENGTH = "a prompt and its response share one limit"

# fmt: off
FIXED: dict[str, Fixed] = {
    # --- RewardConfig: optimisation
    "optim_target_modules": Fixed(_NONE, "it is for GaLore and APOLLO, with which no run here trains", "use adamw_8bit, or use_peft, to save memory"),
    "average_tokens_across_devices": Fixed(_ON, "a step's loss is the mean over its pairs on all devices"),
    "neftune_noise_alpha": Fixed(_NONE, "its noise is scaled by the length of a padded row, so that a reward would depend on what its text is batched with", "use weight_decay, label_smoothing_factor or lora_dropout against overfitting"),
    "train_sampling_strategy": Fixed(("random", "sequential"), "rows are packed by length inside a step"),
    "group_by_length": Fixed(_OFF, "TRL 1.16 raises on it for preference data, and rows are packed by length inside a step"),
    "length_column_name": Fixed(("length",), "lengths are counted by the tokenizer"),
    "auto_find_batch_size": Fixed(_OFF, "ZeRO-3 can't change its batch size in a run", "set per_device_train_batch_size, or start with rm-scale launch --auto_batch"),
    "padding_side": Fixed(("right",), "rows are padded on the right, where the last real token is found by its index"),
    "dataloader_drop_last": Fixed(_OFF, "every group is used in every epoch"),
    # --- RewardConfig: precision, memory and speed
    "bf16_full_eval": Fixed(_OFF, "evaluation computes in the type of the training", "use bf16"),
    "fp16_full_eval": Fixed(_OFF, "evaluation computes in the type of the training", "use bf16"),
    "tf32": Fixed(_NONE, "a run in float32 is for exactness", "use bf16: true for speed"),
    "activation_offloading": Fixed(_OFF, "plans count activations on the device", "use gradient_checkpointing, deepspeed: zero3_offload or a smaller max_tokens_per_device to save memory"),
    "torch_compile_backend": Fixed((*_NONE, "inductor"), "each decoder layer is compiled with torch's own compiler", "use torch_compile alone"),
    "torch_compile_mode": Fixed((*_NONE, "default"), "packed rows change their shape, and other modes try out or record each one", "use torch_compile alone"),
    "liger_kernel_config": Fixed(_NONE, "which of Liger's kernels fit a reward model is settled", "use use_liger_kernel alone"),
    "use_cache": Fixed(_OFF, "training scores each text once"),
    "torch_empty_cache_steps": Fixed(_NONE, "rows of one size leave no memory in pieces", "lower max_tokens_per_device where memory runs out"),
    "use_cpu": Fixed(_OFF, "a run uses the GPUs that it sees, and the CPU where it sees none", "hide the GPUs with the environment variable CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"),
    "no_cuda": Fixed(_OFF, "a run uses the GPUs that it sees, and the CPU where it sees none", "hide the GPUs with the environment variable CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"),
    # --- RewardConfig: logging
    "logging_strategy": Fixed(("steps",), "lines are logged by steps", "set logging_steps"),
    "logging_first_step": Fixed(_ON, "the first step is always logged"),
    "log_on_each_node": Fixed(_OFF, "one rank logs; with --debug all do", "use debug: true for lines of every rank"),
    "logging_nan_inf_filter": Fixed(_OFF, "a NaN must be seen, not replaced by an average of earlier losses", "set max_nonfinite_steps to skip such steps"),
    "include_num_input_tokens_seen": Fixed(_OFF, "tokens are counted in any case: run/metrics.jsonl has real and processed ones"),
    "log_level": Fixed(("passive",), "messages are rm_scale's own", "use debug: true for more"),
    "log_level_replica": Fixed(("warning",), "one rank logs", "use debug: true for lines of every rank"),
    "skip_memory_metrics": Fixed(_ANY, "peak memory is logged in any case"),
    "project": Fixed(("huggingface",), "it is read by one logger alone", "set that logger's environment variable, such as WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME"),
    "trackio_space_id": Fixed(_NONE, _NO_HUB, "leave it out: trackio logs to this machine"),
    "trackio_bucket_id": Fixed(_NONE, _NO_HUB, "leave it out: trackio logs to this machine"),
    "trackio_static_space_id": Fixed(("none", "false"), _NO_HUB, "leave it out: trackio logs to this machine"),
    "logging_dir": Fixed(_NONE, "transformers 5 has no such setting", "set the environment variable TENSORBOARD_LOGGING_DIR"),
    # --- RewardConfig: evaluation
    "eval_delay": Fixed(("0",), "evaluations come at every eval_steps from the start", "set a larger eval_steps"),
    "prediction_loss_only": Fixed(_OFF, _EXACT),
    "eval_do_concat_batches": Fixed(_ON, _EXACT),
    "eval_use_gather_object": Fixed(_OFF, _EXACT),
    "eval_accumulation_steps": Fixed(_NONE, "an evaluation keeps one number per response", "set per_device_eval_batch_size"),
    "include_for_metrics": Fixed(("empty",), _EXACT),
    "batch_eval_metrics": Fixed(_OFF, _EXACT),
    "compute_metrics": Fixed(_NONE, _EXACT),
    "label_names": Fixed(_NONE, "a preference has no label column", "rank responses as docs/data_formats.md says"),
    "do_train": Fixed(_ON, "a run trains", "evaluate a finished model with rm-scale eval"),
    "do_eval": Fixed(_ON, "a run evaluates at its end where it has data for that", "leave out eval_dataset_path, eval_split_size and dataset_test_split to evaluate nothing"),
    "do_predict": Fixed(_OFF, "a run only trains and evaluates", "score texts with rm-scale score"),
    # --- RewardConfig: saving and resuming
    "save_on_each_node": Fixed(_OFF, "output_dir is one folder that all nodes share"),
    "save_safetensors": Fixed(_ON, "weights are written as safetensors only"),
    "enable_jit_checkpoint": Fixed(_ANY, "a run that is told to end saves a checkpoint in any case, at a step that all ranks agree on"),
    "ignore_data_skip": Fixed(_OFF, "a resumed run goes on in the data where it was, without reading what it has seen"),
    "restore_callback_states_from_checkpoint": Fixed(_OFF, "what a resumed run needs is restored in any case"),
    "overwrite_output_dir": Fixed(_OFF, "a folder is replaced by name only", "add --force overwrite"),
    "push_to_hub": Fixed(_OFF, _NO_HUB, _UPLOAD),
    "hub_token": Fixed(_NONE, "tokens are read from the environment only", "set HF_TOKEN"),
    "hub_private_repo": Fixed(_NONE, _NO_HUB, _UPLOAD),
    "hub_model_id": Fixed(_NONE, _NO_HUB, _UPLOAD),
    "hub_strategy": Fixed(("every_save",), _NO_HUB, _UPLOAD),
    "hub_always_push": Fixed(_OFF, _NO_HUB, _UPLOAD),
    "hub_revision": Fixed(_NONE, _NO_HUB, _UPLOAD),
    # --- RewardConfig: devices and processes
    "accelerator_config": Fixed(_NONE, "batches are divided among ranks before accelerate sees them", "use deepspeed for how a run is distributed"),
    "parallelism_config": Fixed(_NONE, "each rank holds its own groups, and DeepSpeed shards the weights", "use deepspeed: zero3"),
    "dataloader_pin_memory": Fixed(_ON, _LOADER),
    "dataloader_persistent_workers": Fixed(_OFF, _LOADER),
    "dataloader_prefetch_factor": Fixed((*_NONE, "2"), _LOADER),
    "dataloader_multiprocessing_context": Fixed(_NONE, _LOADER),
    "dataloader_in_order": Fixed(_ON, _LOADER),
    "ddp_find_unused_parameters": Fixed(("none", "false"), "every weight takes part in every step"),
    "ddp_bucket_cap_mb": Fixed(_NONE, _DDP),
    "ddp_broadcast_buffers": Fixed(_NONE, _DDP),
    "ddp_static_graph": Fixed((*_NONE, "false"), _DDP),
    "ddp_backend": Fixed(_NONE, "it follows from the device: nccl on GPUs, gloo on CPUs"),
    "fsdp": Fixed((*_NONE, "empty"), _FSDP, "use deepspeed: zero3"),
    "fsdp_config": Fixed(_NONE, _FSDP, "use deepspeed: zero3"),
    # --- RewardConfig: data and model
    "remove_unused_columns": Fixed(_ANY, "only the columns of a preference are read in any case", "name a column in ignore_columns to leave it unread"),
    "model_init_kwargs": Fixed(_NONE, "how a model is loaded is settled by named settings", "use dtype, attn_implementation, model_revision and trust_remote_code"),
    # --- Earlier versions of TRL and transformers, and TRL's other trainers
    "adafactor": Fixed(_OFF, "an optimizer is chosen by its name", "set optim: adafactor"),
    "beta": Fixed(_NONE, "a reward model's loss has no reference model, from which beta of DPO bounds the distance"),
    "chat_template_kwargs": Fixed((*_NONE, "empty"), "a model is served with its template alone, so that arguments of the training alone would change its rewards", "write the values into a template file, and name it in chat_template_path"),
    "dataset_text_field": Fixed((*_NONE, "text"), "a preference has two texts, and their columns follow from its format", "set dataset_format, with columns as docs/data_formats.md names them"),
    "fp16_backend": Fixed(("auto",), "mixed precision is torch's own", "set bf16 or fp16"),
    "fp16_opt_level": Fixed(("O1",), "it is for Apex, with which no run here trains", "set bf16 or fp16"),
    "half_precision_backend": Fixed(("auto",), "mixed precision is torch's own", "set bf16 or fp16"),
    "include_tokens_per_second": Fixed(_ANY, "tokens per second are logged in any case"),
    "jit_mode_eval": Fixed(_OFF, "an evaluation runs the model that is trained", "use torch_compile for speed"),
    "max_completion_length": Fixed(_NONE, _ONE_LENGTH, "set max_length, and overlong_policy for what is longer"),
    "max_prompt_length": Fixed(_NONE, _ONE_LENGTH, "set max_length, and overlong_policy: truncate_prompt_left to shorten prompts"),
    "max_seq_length": Fixed(_NONE, _CUTS, "set max_length, and overlong_policy for what is longer"),
    "push_to_hub_model_id": Fixed(_NONE, _NO_HUB, _UPLOAD),
    "push_to_hub_organization": Fixed(_NONE, _NO_HUB, _UPLOAD),
    "push_to_hub_token": Fixed(_NONE, _NO_HUB, _UPLOAD),
    "use_ipex": Fixed(_OFF, "transformers 5 has no such setting", "use bf16 for speed"),
    "use_mps_device": Fixed(_OFF, "a run uses the CUDA GPUs that it sees, and the CPU where it sees none"),
    # --- ModelConfig
    "lora_task_type": Fixed(("SEQ_CLS",), "a reward model always uses SEQ_CLS, or its head is lost"),
    "load_in_8bit": Fixed(_OFF, "8-bit weights train wrongly under ZeRO-3 (bitsandbytes#1451)", "use load_in_4bit (QLoRA, NF4)"),
    # --- ScriptArguments and DatasetMixtureConfig
    "ignore_bias_buffers": Fixed(_OFF, "TRL's own script for reward models does not read it either"),
}

DIFFERENT_DEFAULTS: dict[str, tuple[str, str]] = {
    "learning_rate": ("by model size", "TRL's is for adapters; in full fine-tuning of a large model it is ten times too high"),
    "num_train_epochs": ("`1`", "reward models overfit in a second pass"),
    "per_device_train_batch_size": ("by model size", "with packed rows it only bounds their tokens; a step is global_batch_size"),
    "per_device_eval_batch_size": ("that of training", "it has no influence on the result"),
    "warmup_steps": ("3 % of the steps (warmup_ratio)", "the new head's first gradients are large"),
    "save_strategy": ("`no`", "a finished run needs no checkpoint, and one that is stopped writes one; set `steps` for long runs"),
    "output_dir": ("`outputs/run`", "TRL writes to trainer_output"),
    "dataset_test_split": ("none", "evaluation data is named, not guessed"),
    "dtype": ("`auto`: the compute type; float32 where no engine keeps a master copy", "float32 weights in a bfloat16 run take twice the memory"),
    "pad_to_multiple_of": ("`8`", "kernels meet fewer shapes"),
    "optim": ("`adamw_torch`, run fused on CUDA", "the same steps up to rounding"),
    "logging_first_step": ("true", "a wrong start is seen at once"),
    "logging_nan_inf_filter": ("false", "a NaN must be seen"),
    "log_on_each_node": ("false", "one rank logs"),
    "do_train": ("true", "a run trains"),
    "do_eval": ("true where there is evaluation data", "a run ends with an evaluation of its model"),
    "lora_task_type": ("`SEQ_CLS`", "with TRL's CAUSAL_LM the head is lost"),
    "lora_target_modules": ("all linear layers", "PEFT's own choice leaves out the MLPs, and with them part of the quality"),
    "bnb_4bit_quant_storage": ("the compute type", "ZeRO-3 can't shard bytes beside bfloat16"),
    "pad_token": ("one that is not EOS, found or added", "with pad = EOS the reward is read one token early"),
}
"""Defaults that are not TRL's: what they are here, and why."""

SAME_MEANING = frozenset(["datasets", "gradient_accumulation_steps", "bf16", "report_to", "disable_tqdm", "debug", "local_rank", "model_name_or_path"])
"""Settings whose default is written otherwise than TRL's and means the same, or which have none."""
# fmt: on


def translate(values: dict[str, Any], switches: Collection[str], where: str = "") -> tuple[dict[str, Any], list[str]]:
    """Put our names and values in place of TRL's, and take out what a run does anyway.

    Args:
        values: settings by name, as they were written.
        switches: our settings that are true or false.
        where: added after a refused name, e.g. " (in run.yaml)".

    Returns:
        The settings that are left to be checked, and the problems of those that are refused.
    """
    kept: dict[str, Any] = {}
    problems = []
    spelled = {name: name for name in values if _in_our_words(name, values[name], switches)[0] == name}
    for name, value in values.items():
        ours, meant = _in_our_words(name, value, switches)
        refused = _refused_value(name, value, where)
        if refused is not None:
            problems.append(refused)
        elif spelled.setdefault(ours, name) != name:
            other = "" if spelled[ours] == ours else f", as is {spelled[ours]}"
            problems.append(
                f"{name}{where}: is another name of {ours}{other}, which is given too. Fix: keep one of them."
            )
        elif ours in _NONE_IS_DEFAULT and value is None:
            continue
        elif ours in FIXED:
            problems += [] if _as_written(meant) in FIXED[ours].accepted else [refusal(ours, where, name)]
        else:
            kept[ours] = meant
    return kept, problems


def _refused_value(name: str, value: Any, where: str) -> str | None:
    """Return why a value is refused that TRL takes of a setting that is here too; `None` for all others."""
    written = _as_written(value)
    if name == "max_length" and written == "none":
        return f"max_length=none{where}: {_LENGTH_IS_NEEDED}"
    if name in _STEPS and _is_share(written):
        return (
            f"{name}={value}{where}: a share of all steps is not taken, as their number changes with the data. Fix: "
            f"{name}: N, a whole number of steps; --dry_run prints how many there are."
        )
    if name == "save_strategy" and written == "best":
        return (
            f"save_strategy=best{where}: the best checkpoint is kept beside the newest ones. Fix: save_strategy: steps, "
            "with metric_for_best_model: accuracy, eval_strategy: steps and save_total_limit: 1."
        )
    options = value if isinstance(value, list) else str(value).split()
    if name == "debug" and options and all(_as_written(one) in _DEBUG_OPTIONS for one in options):
        return (
            f"debug={' '.join(map(str, options))}{where}: it is transformers' search for overflows or on TPUs, and a run "
            "here names a loss or gradient that is not finite in any case. Fix: leave it out, or debug: true for full "
            "tracebacks and log lines from every rank."
        )
    if name == "deepspeed" and (isinstance(value, dict) or str(value).lstrip().startswith("{")):
        return (
            f"deepspeed={{...}}{where}: a configuration is read from a file, which is kept with the run. Fix: write the "
            "mapping to FILE.json and set deepspeed: FILE.json, or name a shipped one such as zero2."
        )
    return None


_NONE_IS_DEFAULT = {"bf16", "dtype", "output_dir", "report_to"}
"""Settings of which none says in TRL to take the default; here it is ours, as if they were left out."""
_STEPS = {"logging_steps", "save_steps", "eval_steps"}
_DEBUG_OPTIONS = {"underflow_overflow", "tpu_metrics_debug"}


def _in_our_words(name: str, value: Any, switches: Collection[str]) -> tuple[str, Any]:
    """Return our name and value for one of TRL's; the same where it is ours already, or none of ours."""
    written = _as_written(value)
    positive = name.removeprefix("no_")
    if name != positive and name not in FIXED and written == "true":  # how TRL's command line switches something off
        ours = RENAMED.get(positive, positive)
        is_fixed_switch = ours in FIXED and bool({"true", "false"} & set(FIXED[ours].accepted))
        return (ours, False) if ours in switches or is_fixed_switch else (name, value)
    if name == "warmup_steps" and _is_share(written):
        return "warmup_ratio", value
    if name == "train_sampling_strategy" and written in {"random", "sequential"}:
        return "shuffle_train", written == "random"
    if name == "pad_to_multiple_of" and written in {"none", "auto"}:
        return name, 1
    if name == "debug" and written in {"none", "empty"}:
        return name, False
    if RENAMED.get(name, name) in {"eval_strategy", "save_strategy"} and value is False:
        return RENAMED.get(name, name), "no"  # as YAML reads the word no
    if name == "resume_from_checkpoint" and isinstance(value, bool):
        return name, "last" if value else None  # as Trainer.train() takes it
    return RENAMED.get(name, name), value


def _is_share(written: str) -> bool:
    try:
        return 0 < float(written) < 1
    except ValueError:
        return False


def refusal(name: str, where: str = "", written: str | None = None) -> str:
    """Return why a setting of TRL is refused, what is accepted of it, and what to use instead.

    Args:
        name: of the setting in `FIXED`.
        where: added after the name.
        written: how the user wrote the name, where otherwise: no_NAME.
    """
    fixed = FIXED[name]
    only = f" ({name}: {' or '.join(fixed.accepted)} is accepted)" if fixed.accepted else ""
    return f"{written or name}{where}: {fixed.reason}{only}. Fix: {fixed.instead}."


def _as_written(value: Any) -> str:
    """Return a value as `Fixed.accepted` has it, whether it comes from YAML or, as text, from a flag."""
    if value is None:
        return "none"
    if value in ([], {}, ""):
        return "empty"
    text = str(value)
    if isinstance(value, float) and value.is_integer():
        text = str(int(value))
    return _WORDS.get(text.lower(), text.lower())


_WORDS = {"null": "none", "yes": "true", "no": "false", "on": "true", "off": "false", "seq_cls": "SEQ_CLS", "o1": "O1"}
"""Other ways to write a value, from flags."""
