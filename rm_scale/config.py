"""The settings of a run: every field a user can set, with type, limits, default and meaning.

`RunConfig` holds user input only; whatever is computed from it is in the `Plan`. Field names are those of TRL's
`ModelConfig`, `RewardConfig` and transformers' `TrainingArguments` wherever they have one. `rm_scale.config_parsing`
reads and checks settings, `rm_scale.config_rules` knows the combinations that can't work.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Checks that protect the user and can be switched off by name: --force fp16
FORCEABLE_RULES = {
    "fp16": "fp16 training (rewards overflow at 65,504 and dynamic loss scaling skips steps)",
    "qlora_fp32": "QLoRA computed in float32 (no memory is saved on activations; meant for tests of exactness)",
    "packing": "packed rows of an architecture that is not tested with them (rewards could be wrong without an error)",
    "rope": "lengths at which a model changes its rotary frequencies by the longest sequence of a batch",
    "overwrite": "writing into an output directory that already holds a run",
    "idle_restarts": "one more automatic restart after three that made no progress",
}


# Far above any use: a larger number is a slip, and would fail only when it meets an array, a process or a tensor.
MOST_STEPS = 1_000_000_000
MOST_GROUPS = 1_000_000_000
MOST_TOKENS = 1_000_000_000
MOST_PROCESSES = 1024
MOST_SECONDS = 366 * 24 * 3600
MANY = 1_000_000


class Group(StrEnum):
    """The groups of settings, in the order in which `--help` and docs/settings.md show them."""

    MODEL = "Model"
    DATA = "Data"
    BATCH = "Batch and layout"
    LOSS = "Loss"
    OPTIMISATION = "Optimisation"
    PRECISION = "Precision, memory and speed"
    LORA = "LoRA and quantisation"
    DISTRIBUTED = "DeepSpeed and distributed runs"
    EVALUATION = "Evaluation"
    SAVING = "Saving and resuming"
    LOGGING = "Logging"
    LAUNCH = "Launch and debugging"


def _setting(group: Group, default: Any, description: str, **limits: Any) -> Any:
    """Declare one field of `RunConfig`.

    Args:
        group: where `--help` and docs/settings.md show it.
        default: its value unless given; `...` for a required setting.
        description: what it means, for `--help` and docs/settings.md.
        limits: pydantic's limits, e.g. `ge=1`.
    """
    return Field(default, description=description, json_schema_extra={"group": group}, **limits)


class RunConfig(BaseModel):
    """Everything a user can ask of a training run. Frozen; unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )

    # --- Model ---------------------------------------------------------------------------------------------------
    model_name_or_path: str = _setting(
        Group.MODEL,
        ...,
        "Causal language model or existing reward model: a folder in transformers' format or a hub name.",
    )
    model_revision: str = _setting(Group.MODEL, "main", "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = _setting(
        Group.MODEL, False, "Run Python code that comes with the model. Off unless asked."
    )
    attn_implementation: str | None = _setting(
        Group.MODEL, None, "transformers' attention kernel; default its own choice."
    )
    chat_template_path: str | None = _setting(
        Group.MODEL,
        None,
        "Other chat template: a Jinja file, or a tokenizer's folder or hub name, for its own.",
    )
    eos_token: str | None = _setting(Group.MODEL, None, "End-of-sequence token; default the tokenizer's.")
    pad_token: str | None = _setting(Group.MODEL, None, "Padding token; must differ from EOS. Default: found or added.")

    # --- Data ----------------------------------------------------------------------------------------------------
    dataset_path: list[str] | None = _setting(
        Group.DATA, None, "Local preference files (JSON, JSONL[.gz], Parquet, CSV, Arrow)."
    )
    dataset_name: str | None = _setting(Group.DATA, None, "Name of a hub dataset.")
    dataset_config: str | None = _setting(Group.DATA, None, "Configuration of the hub dataset.")
    dataset_revision: str | None = _setting(
        Group.DATA, None, "Branch, tag or commit of the hub dataset; the commit that was read is recorded."
    )
    dataset_train_split: str = _setting(Group.DATA, "train", "Hub split to train on.")
    dataset_test_split: str | None = _setting(Group.DATA, None, "Hub split to evaluate on.")
    eval_dataset_path: list[str] | None = _setting(Group.DATA, None, "Local files to evaluate on.")
    datasets: list[dict[str, Any]] | None = _setting(
        Group.DATA,
        None,
        "Several sources, in place of dataset_path: a list of mappings with path or hub, and name, weight, epochs, "
        "filters and more (docs/mixtures.md).",
    )
    eval_datasets: list[dict[str, Any]] | None = _setting(
        Group.DATA, None, "Several sources to evaluate on, each with figures of its own (docs/mixtures.md)."
    )
    mixture_shares: Literal["per_step", "per_epoch"] = _setting(
        Group.DATA, "per_step", "Where the shares of the sources in datasets hold: in each step, or in each epoch."
    )
    eval_split_size: float | None = _setting(
        Group.DATA,
        None,
        "Hold out this many groups (>= 1) or this share (< 1) of the training data for evaluation.",
        ge=1e-6,
        le=MOST_GROUPS,
    )
    dataset_format: Literal[
        "auto", "explicit_prompt", "implicit_prompt", "conversational", "hh_text", "ranked", "soft_label"
    ] = _setting(Group.DATA, "auto", "How rows are read; auto prints what it found.")
    dataset_preset: str | None = _setting(
        Group.DATA,
        None,
        "Public set whose columns the files have, such as llmbar or helpsteer3 (docs/data_formats.md lists all). "
        "Default: known by its columns where they are unmistakable.",
    )
    dataset_columns: dict[str, Any] | None = _setting(
        Group.DATA,
        None,
        "Where prompt, responses and label stand in rows of other columns, as {prompt: input, chosen: a, rejected: b}.",
    )
    subset_column: str = _setting(Group.DATA, "subset", "Column that names a row's subset, for evaluation per subset.")
    ignore_columns: list[str] = _setting(
        Group.DATA, [], "Columns that are not read, such as a question that the responses are to be judged without."
    )
    max_length: int = _setting(Group.DATA, 1024, "Longest prompt + response in tokens.", ge=8, le=MOST_TOKENS)
    overlong_policy: Literal["drop", "truncate_prompt_left", "error"] = _setting(
        Group.DATA, "drop", "What happens to a group with a sequence over max_length."
    )
    max_rejected_share: float = _setting(Group.DATA, 0.05, "Stop when a larger share of rows is rejected.", ge=0, le=1)
    max_train_samples: int | None = _setting(Group.DATA, None, "Use only the first N groups.", ge=1, le=MOST_GROUPS)
    max_eval_samples: int | None = _setting(Group.DATA, None, "Evaluate only the first N groups.", ge=1, le=MOST_GROUPS)
    streaming: bool = _setting(
        Group.DATA,
        False,
        "Read and encode training rows while training comes to them, without a copy of them on disk. Needs max_steps.",
    )
    shuffle_buffer_size: int = _setting(
        Group.DATA, 10_000, "With streaming: rows that are read, encoded and shuffled together.", ge=1, le=MANY
    )
    shuffle_train: bool = _setting(Group.DATA, True, "New order of the groups in each epoch.")
    data_seed: int | None = _setting(Group.DATA, None, "Seed of the data order alone.", ge=0, lt=2**32)
    dataset_num_proc: int | None = _setting(
        Group.DATA,
        None,
        "Processes of each rank for reading and tokenising. Default: the machine's cores, shared by its ranks.",
        ge=1,
        le=MOST_PROCESSES,
    )
    dataset_cache_dir: str | None = _setting(
        Group.DATA, None, "Where encoded data is cached. Default ~/.cache/rm_scale."
    )

    # --- Batch and layout ----------------------------------------------------------------------------------------
    per_device_train_batch_size: int | None = _setting(
        Group.BATCH, None, "Groups per micro-batch and device. Default by size tier.", ge=1, le=MANY
    )
    per_device_eval_batch_size: int | None = _setting(
        Group.BATCH, None, "Groups per evaluation batch and device.", ge=1, le=MANY
    )
    gradient_accumulation_steps: int | None = _setting(
        Group.BATCH, None, "Micro-steps per optimizer step.", ge=1, le=MANY
    )
    global_batch_size: int | None = _setting(
        Group.BATCH,
        None,
        "Groups per optimizer step over all devices; sets gradient_accumulation_steps.",
        ge=1,
        le=MOST_GROUPS,
    )
    packing: Literal["auto", "none", "padding_free", "prefix_shared"] = _setting(
        Group.BATCH,
        "auto",
        "Row layout. none: pad each response to the longest; padding_free: responses one after the other; "
        "prefix_shared: and each prompt once per group. auto: the fastest that is exact for the model.",
    )
    packed_attention: Literal["auto", "matmul", "sdpa", "varlen", "flex"] = _setting(
        Group.BATCH, "auto", "Attention of packed rows. auto: by device and type."
    )
    max_tokens_per_device: int | None = _setting(
        Group.BATCH,
        None,
        "Most tokens of a packed row. Default: 2 x per_device_train_batch_size x max_length.",
        ge=16,
        le=MOST_TOKENS,
    )
    pad_to_multiple_of: int = _setting(
        Group.BATCH, 8, "Round padded lengths up, so that kernels meet fewer shapes.", ge=1, le=65_536
    )
    dataloader_num_workers: int = _setting(
        Group.BATCH, 0, "Worker processes that build batches.", ge=0, le=MOST_PROCESSES
    )

    # --- Loss ----------------------------------------------------------------------------------------------------
    loss_type: Literal["bradley_terry", "plackett_luce"] = _setting(
        Group.LOSS, "bradley_terry", "All comparisons of a group, or its whole ranking (K > 2)."
    )
    label_smoothing_factor: float = _setting(Group.LOSS, 0.0, "Assumed share of flipped labels.", ge=0, lt=0.5)
    center_rewards_coefficient: float | None = _setting(
        Group.LOSS,
        None,
        "Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 (arXiv 2312.09244).",
        ge=0,
        le=MANY,
    )
    router_aux_loss_coef: float | None = _setting(
        Group.LOSS,
        None,
        "Mixtures of experts: weight of the routers' load-balancing loss (arXiv 2101.03961), e.g. 0.001. Default: the "
        "model's own where its config.json says output_router_logits: true, else 0.",
        ge=0,
        le=MANY,
    )
    tie_policy: Literal["half", "ignore"] = _setting(
        Group.LOSS, "half", "Pairs of equal rank: pull the rewards together (target 0.5), or leave them out."
    )

    # --- Optimisation --------------------------------------------------------------------------------------------
    learning_rate: float | None = _setting(
        Group.OPTIMISATION, None, "Peak learning rate. Default by size tier.", gt=0, le=1000
    )
    num_train_epochs: float | None = _setting(
        Group.OPTIMISATION, None, "Passes over the data. Default by size tier.", gt=0, le=MANY
    )
    max_steps: int = _setting(
        Group.OPTIMISATION, -1, "Optimizer steps; overrides num_train_epochs when positive.", le=MOST_STEPS
    )
    lr_scheduler_type: str = _setting(Group.OPTIMISATION, "linear", "transformers' schedule name.")
    lr_scheduler_kwargs: dict[str, Any] | None = _setting(
        Group.OPTIMISATION, None, "Arguments of the schedule, as {min_lr_rate: 0.1} of cosine_with_min_lr."
    )
    warmup_steps: int | None = _setting(Group.OPTIMISATION, None, "Warm-up in optimizer steps.", ge=0, le=MOST_STEPS)
    warmup_ratio: float = _setting(Group.OPTIMISATION, 0.03, "Warm-up as a share of all steps.", ge=0, lt=1)
    optim: str = _setting(Group.OPTIMISATION, "adamw_torch", "transformers' optimizer name.")
    optim_args: str | None = _setting(
        Group.OPTIMISATION, None, "Arguments of optimizers other than AdamW, as momentum=0.9,nesterov=true of sgd."
    )
    weight_decay: float = _setting(
        Group.OPTIMISATION, 0.0, "AdamW weight decay (biases and norms excepted).", ge=0, le=1000
    )
    adam_beta1: float = _setting(Group.OPTIMISATION, 0.9, "AdamW beta 1.", ge=0, lt=1)
    adam_beta2: float = _setting(Group.OPTIMISATION, 0.999, "AdamW beta 2.", ge=0, lt=1)
    adam_epsilon: float = _setting(Group.OPTIMISATION, 1e-8, "AdamW epsilon.", gt=0, le=1)
    max_grad_norm: float = _setting(Group.OPTIMISATION, 1.0, "Gradient clipping norm; 0 turns it off.", ge=0, le=1e12)
    max_nonfinite_steps: int = _setting(
        Group.OPTIMISATION,
        0,
        "Skip at most this many steps with a NaN or infinite loss or gradient; one more stops.",
        ge=0,
        le=MOST_STEPS,
    )
    disable_dropout: bool = _setting(Group.OPTIMISATION, True, "Switch the model's own dropout off (LoRA's stays).")
    seed: int = _setting(
        Group.OPTIMISATION, 42, "Seed of head, adapters, dropout and, by default, the data order.", ge=0, lt=2**32
    )

    # --- Precision, memory and speed -----------------------------------------------------------------------------
    bf16: bool = _setting(Group.PRECISION, True, "Compute in bfloat16. Off means float32 (for tests of exactness).")
    fp16: bool = _setting(Group.PRECISION, False, "Compute in float16: refused unless --force fp16.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _setting(
        Group.PRECISION,
        "auto",
        "Weight type. auto: the compute type; float32 for full fine-tuning without DeepSpeed, which keeps "
        "no fp32 master copy.",
    )
    gradient_checkpointing: bool = _setting(
        Group.PRECISION, True, "Recompute activations in the backward pass to save memory."
    )
    gradient_checkpointing_kwargs: dict[str, Any] | None = _setting(
        Group.PRECISION, None, "Arguments for torch's checkpoint."
    )
    use_liger_kernel: bool = _setting(
        Group.PRECISION, False, "Liger's fused kernels for norms, rotary embeddings and MLPs (GPU)."
    )
    torch_compile: bool = _setting(
        Group.PRECISION, False, "Compile each decoder layer; attention over packed rows stays as it is."
    )
    deterministic: bool = _setting(
        Group.PRECISION,
        False,
        "Only kernels that give the same bits in every run: slower on GPUs; CPU runs are exact without it.",
    )

    # --- LoRA and quantisation -----------------------------------------------------------------------------------
    use_peft: bool = _setting(Group.LORA, False, "Train LoRA adapters beside the scalar head, not the whole model.")
    lora_r: int = _setting(Group.LORA, 16, "LoRA rank.", ge=1, le=65_536)
    lora_alpha: int = _setting(Group.LORA, 32, "LoRA alpha; updates are scaled by alpha / r.", ge=1, le=MANY)
    lora_dropout: float = _setting(Group.LORA, 0.05, "Dropout on the LoRA input.", ge=0, lt=1)
    lora_target_modules: list[str] | None = _setting(Group.LORA, None, "Modules to adapt. Default: all linear layers.")
    lora_target_parameters: list[str] | None = _setting(
        Group.LORA,
        None,
        "Tensors of experts to adapt beside them, as experts.gate_up_proj and experts.down_proj; without dropout.",
    )
    lora_modules_to_save: list[str] | None = _setting(
        Group.LORA, None, "Further modules trained in full; the head always is."
    )
    use_rslora: bool = _setting(Group.LORA, False, "Scale by alpha / sqrt(r) (arXiv 2312.03732).")
    use_dora: bool = _setting(Group.LORA, False, "Weight-decomposed LoRA (arXiv 2402.09353).")
    load_in_4bit: bool = _setting(Group.LORA, False, "QLoRA: hold the frozen backbone in 4 bits. Needs use_peft.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _setting(Group.LORA, "nf4", "4-bit number format.")
    use_bnb_nested_quant: bool = _setting(Group.LORA, False, "Double quantisation: quantise the scales as well.")
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] | None = _setting(
        Group.LORA, None, "Storage type of 4-bit weights. Default the compute type, as ZeRO-3 needs."
    )
    merge_adapter: bool = _setting(Group.LORA, False, "At the end also write a merged model to OUTPUT_DIR/merged.")

    # --- DeepSpeed and distributed runs --------------------------------------------------------------------------
    deepspeed: str | None = _setting(
        Group.DISTRIBUTED,
        None,
        "DeepSpeed JSON file, or the name of a shipped one: zero1, zero2, zero3, zero3_offload, ...",
    )
    gradient_reduction: Literal["auto", "each_step", "each_micro_step"] = _setting(
        Group.DISTRIBUTED,
        "auto",
        "ZeRO-2: reduce gradients once per step, which holds them whole in between, or in each micro-step. "
        "auto: once where they fit on a GPU.",
    )
    ddp_timeout: int = _setting(
        Group.DISTRIBUTED,
        1800,
        "Seconds without progress after which a hung run ends and names the missing rank.",
        ge=1,
        le=MOST_SECONDS,
    )

    # --- Evaluation ----------------------------------------------------------------------------------------------
    eval_strategy: Literal["no", "steps", "epoch"] = _setting(
        Group.EVALUATION, "no", "When to evaluate while training."
    )
    eval_steps: int | None = _setting(
        Group.EVALUATION, None, "Optimizer steps between evaluations.", ge=1, le=MOST_STEPS
    )
    eval_on_start: bool = _setting(Group.EVALUATION, False, "Evaluate before the first step too.")
    sample_scores: int = _setting(
        Group.EVALUATION, 4, "Groups of the evaluation set whose scores are printed at the end.", ge=0, le=MANY
    )

    # --- Saving and resuming -------------------------------------------------------------------------------------
    output_dir: str = _setting(Group.SAVING, "outputs/run", "Where everything of this run is written.")
    save_strategy: Literal["no", "steps", "epoch"] = _setting(Group.SAVING, "no", "When to write checkpoint-N folders.")
    save_steps: int = _setting(Group.SAVING, 500, "Optimizer steps between checkpoints.", ge=1, le=MOST_STEPS)
    save_total_limit: int | None = _setting(
        Group.SAVING, None, "Keep the newest checkpoints, this many, and the best. Default: all.", ge=1, le=MOST_STEPS
    )
    metric_for_best_model: str | None = _setting(
        Group.SAVING,
        None,
        "Metric of the evaluations while training whose best checkpoint is kept too: accuracy, loss.",
    )
    load_best_model_at_end: bool = _setting(
        Group.SAVING, False, "End with the weights of that best checkpoint. Every evaluation must be saved."
    )
    greater_is_better: bool | None = _setting(
        Group.SAVING, None, "Whether that metric's largest value is the best. Follows from it, and is only compared."
    )
    save_only_model: bool = _setting(
        Group.SAVING, False, "Periodic checkpoints without optimizer state: smaller, can't be resumed."
    )
    max_failed_saves: int = _setting(
        Group.SAVING,
        3,
        "A run goes on when a checkpoint can't be written, until this many in a row have failed.",
        ge=1,
        le=MOST_STEPS,
    )
    resume_from_checkpoint: str | None = _setting(
        Group.SAVING,
        None,
        "A checkpoint-N folder; last: the newest whole one of output_dir; auto: the same, or a fresh start "
        "when there is none.",
    )
    allow_changed: list[str] = _setting(
        Group.SAVING, [], "Facts in which a resumed run may differ from its checkpoint, by name."
    )
    stop_margin_seconds: float | None = _setting(
        Group.SAVING,
        None,
        "Stop with a checkpoint when the job's time left is less. Default: from the save and step times "
        "measured, at least 60, or a quarter of a shorter time limit.",
        ge=0,
        le=MOST_SECONDS,
    )

    # --- Logging -------------------------------------------------------------------------------------------------
    run_name: str | None = _setting(Group.LOGGING, None, "Name shown by loggers. Default the output directory's name.")
    report_to: list[str] = _setting(Group.LOGGING, [], "tensorboard, wandb, mlflow, trackio, ...")
    logging_steps: int = _setting(Group.LOGGING, 10, "Optimizer steps between log lines.", ge=1, le=MOST_STEPS)
    disable_tqdm: bool = _setting(Group.LOGGING, False, "No progress bar.")

    # --- Launch and debugging ------------------------------------------------------------------------------------
    hardware: str | None = _setting(
        Group.LAUNCH, None, "YAML file of `rm-scale bench hardware`: predictions are made with its first device."
    )
    force: list[str] = _setting(Group.LAUNCH, [], "Rules to override by name: " + ", ".join(FORCEABLE_RULES))
    dry_run: bool = _setting(Group.LAUNCH, False, "Print the plan and all settings, with --json as JSON, and stop.")
    debug: bool = _setting(Group.LAUNCH, False, "Full tracebacks and log lines from every rank.")
    local_rank: int | None = _setting(
        Group.LAUNCH, None, "Set by launchers; the environment's LOCAL_RANK counts.", ge=-1, le=MANY
    )

    @property
    def method(self) -> Literal["full", "lora", "qlora"]:
        """The way weights are trained."""
        if not self.use_peft:
            return "full"
        return "qlora" if self.load_in_4bit else "lora"


# Fields without influence on the result: a resumed run may differ in them, and a run's record leaves them out.
LAUNCH_FIELDS = frozenset({"local_rank", "debug", "dry_run"})

# What a checkpoint remembers of its run, and a resumed run is held to (see training/checkpoint/run_facts.py). Some
# are computed: the model's and the data's fingerprints, values filled in by tier, the number of steps.
RESUME_FACTS = (
    "model",
    "data",
    "mixture",
    "method",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "loss_type",
    "label_smoothing_factor",
    "center_rewards_coefficient",
    "router_aux_loss_coef",
    "tie_policy",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "optim_args",
    "compute_dtype",
    "disable_dropout",
    "shuffle_train",
    "seed",
    "data_seed",
    "global_batch_size",
    "total_steps",
)


def setting_groups() -> dict[Group, list[str]]:
    """Return the names of the settings in each group, in the order in which they are shown."""
    groups: dict[Group, list[str]] = {group: [] for group in Group}
    for name, info in RunConfig.model_fields.items():
        assert isinstance(info.json_schema_extra, dict)
        groups[Group(str(info.json_schema_extra["group"]))].append(name)
    return groups
