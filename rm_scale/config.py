"""The run as asked: every setting a user can give, from YAML and flags, checked strictly.

`RunConfig` holds user input only; whatever is computed from it lives in the `Plan`. Field names are those of
TRL's `ModelConfig`, `RewardConfig` and transformers' `TrainingArguments` wherever they have one.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rm_scale.errors import ConfigError

# Rules that exist to protect the user and can be overridden by name: --force fp16
FORCEABLE_RULES = {
    "fp16": "fp16 training (rewards overflow at 65,504 and dynamic loss scaling skips steps)",
    "qlora_fp32": "QLoRA computed in float32 (no memory is saved on activations; meant for tests of exactness)",
    "packing": "packed rows of an architecture that is not tested with them (rewards could be wrong without an error)",
    "rope": "lengths at which a model changes its rotary frequencies by the longest sequence of a batch",
    "overwrite": "writing into an output directory that already holds a run",
    "idle_restarts": "one more automatic restart after three that made no progress",
}


class RunConfig(BaseModel):
    """Everything a user can ask of a training run. Frozen; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)

    # --- Model ---------------------------------------------------------------------------------------------------
    model_name_or_path: str = Field(
        description="Causal language model or existing reward model: a folder in transformers' format or a hub name."
    )
    model_revision: str = Field("main", description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Off unless asked.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Weight type. auto: the compute type; float32 for full fine-tuning without DeepSpeed, which keeps "
        "no fp32 master copy.",
    )
    attn_implementation: str | None = Field(None, description="transformers' attention kernel; default its own choice.")
    chat_template_path: str | None = Field(None, description="Jinja file that replaces the tokenizer's chat template.")
    eos_token: str | None = Field(None, description="End-of-sequence token; default the tokenizer's.")
    pad_token: str | None = Field(None, description="Padding token; must differ from EOS. Default: found or added.")

    # --- Adapters and quantisation -------------------------------------------------------------------------------
    use_peft: bool = Field(False, description="Train LoRA adapters beside the scalar head, not the whole model.")
    lora_r: int = Field(16, ge=1, description="LoRA rank.")
    lora_alpha: int = Field(32, ge=1, description="LoRA alpha; updates are scaled by alpha / r.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the LoRA input.")
    lora_target_modules: list[str] | None = Field(None, description="Modules to adapt. Default: all linear layers.")
    lora_modules_to_save: list[str] | None = Field(
        None, description="Further modules trained in full; the head always is."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) (arXiv 2312.03732).")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA (arXiv 2402.09353).")
    load_in_4bit: bool = Field(False, description="QLoRA: hold the frozen backbone in 4 bits. Needs use_peft.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit number format.")
    use_bnb_nested_quant: bool = Field(False, description="Double quantisation: quantise the scales as well.")
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] | None = Field(
        None, description="Storage type of 4-bit weights. Default the compute type, as ZeRO-3 needs."
    )
    merge_adapter: bool = Field(False, description="At the end also write a merged model to OUTPUT_DIR/merged.")

    # --- Data ----------------------------------------------------------------------------------------------------
    dataset_path: list[str] | None = Field(
        None, description="Local preference files (JSON, JSONL[.gz], Parquet, CSV, Arrow)."
    )
    dataset_name: str | None = Field(None, description="Name of a hub dataset.")
    dataset_config: str | None = Field(None, description="Configuration of the hub dataset.")
    dataset_train_split: str = Field("train", description="Hub split to train on.")
    dataset_test_split: str | None = Field(None, description="Hub split to evaluate on.")
    eval_dataset_path: list[str] | None = Field(None, description="Local files to evaluate on.")
    eval_split_size: float | None = Field(
        None,
        gt=0,
        description="Hold out this many groups (>= 1) or this share (< 1) of the training data for evaluation.",
    )
    dataset_format: Literal[
        "auto", "explicit_prompt", "implicit_prompt", "conversational", "hh_text", "ranked", "soft_label"
    ] = Field("auto", description="How rows are read; auto prints what it found.")
    subset_column: str = Field("subset", description="Column that names a row's subset, for evaluation per subset.")
    max_length: int = Field(1024, ge=8, description="Longest prompt + response in tokens.")
    overlong_policy: Literal["drop", "truncate_prompt_left", "error"] = Field(
        "drop", description="What happens to a group with a sequence over max_length."
    )
    max_rejected_share: float = Field(0.05, ge=0, le=1, description="Stop when a larger share of rows is rejected.")
    max_train_samples: int | None = Field(None, ge=1, description="Use only the first N groups.")
    max_eval_samples: int | None = Field(None, ge=1, description="Evaluate only the first N groups.")
    dataset_num_proc: int | None = Field(None, ge=1, description="Processes for reading and tokenising.")
    dataset_cache_dir: str | None = Field(None, description="Where encoded data is cached. Default ~/.cache/rm_scale.")
    pad_to_multiple_of: int = Field(8, ge=1, description="Round padded lengths up, so that kernels meet fewer shapes.")
    packing: Literal["auto", "none", "padding_free", "prefix_shared"] = Field(
        "auto",
        description="Row layout. none: pad each response to the longest; padding_free: responses one after the other; "
        "prefix_shared: and each prompt once per group. auto: the fastest that is exact for the model.",
    )
    packed_attention: Literal["auto", "matmul", "sdpa", "varlen", "flex"] = Field(
        "auto", description="Attention of packed rows. auto: by device and type."
    )
    use_liger_kernel: bool = Field(
        False, description="Liger's fused kernels for norms, rotary embeddings and MLPs (GPU)."
    )
    torch_compile: bool = Field(
        False, description="Compile each decoder layer; attention over packed rows stays as it is."
    )
    max_tokens_per_device: int | None = Field(
        None, ge=16, description="Most tokens of a packed row. Default: 2 x per_device_train_batch_size x max_length."
    )

    # --- Loss ----------------------------------------------------------------------------------------------------
    loss_type: Literal["bradley_terry", "plackett_luce"] = Field(
        "bradley_terry", description="All comparisons of a group, or its whole ranking (K > 2)."
    )
    label_smoothing_factor: float = Field(0.0, ge=0, lt=0.5, description="Assumed share of flipped labels.")
    center_rewards_coefficient: float | None = Field(
        None, ge=0, description="Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 (arXiv 2312.09244)."
    )
    tie_policy: Literal["half", "ignore"] = Field(
        "half", description="Pairs of equal rank: pull the rewards together (target 0.5), or leave them out."
    )

    # --- Optimisation --------------------------------------------------------------------------------------------
    learning_rate: float | None = Field(None, gt=0, description="Peak learning rate. Default by size tier.")
    num_train_epochs: float | None = Field(None, gt=0, description="Passes over the data. Default by size tier.")
    max_steps: int = Field(-1, description="Optimizer steps; overrides num_train_epochs when positive.")
    per_device_train_batch_size: int | None = Field(
        None, ge=1, description="Groups per micro-batch and device. Default by size tier."
    )
    per_device_eval_batch_size: int | None = Field(None, ge=1, description="Groups per evaluation batch and device.")
    gradient_accumulation_steps: int | None = Field(None, ge=1, description="Micro-steps per optimizer step.")
    global_batch_size: int | None = Field(
        None, ge=1, description="Groups per optimizer step over all devices; sets gradient_accumulation_steps."
    )
    lr_scheduler_type: str = Field("linear", description="transformers' schedule name.")
    warmup_steps: int | None = Field(None, ge=0, description="Warm-up in optimizer steps.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Warm-up as a share of all steps.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay (biases and norms excepted).")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta 1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW beta 2.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping norm; 0 turns it off.")
    optim: str = Field("adamw_torch", description="transformers' optimizer name.")
    bf16: bool = Field(True, description="Compute in bfloat16. Off means float32 (for tests of exactness).")
    fp16: bool = Field(False, description="Compute in float16: refused unless --force fp16.")
    gradient_checkpointing: bool = Field(True, description="Recompute activations in the backward pass to save memory.")
    gradient_checkpointing_kwargs: dict[str, Any] | None = Field(None, description="Arguments for torch's checkpoint.")
    disable_dropout: bool = Field(True, description="Switch the model's own dropout off (LoRA's stays).")
    shuffle_train: bool = Field(True, description="New order of the groups in each epoch.")
    seed: int = Field(42, ge=0, description="Seed of head, adapters, dropout and, by default, the data order.")
    data_seed: int | None = Field(None, ge=0, description="Seed of the data order alone.")
    deepspeed: str | None = Field(
        None, description="DeepSpeed JSON file, or the name of a shipped one: zero1, zero2, zero3, zero3_offload, ..."
    )
    dataloader_num_workers: int = Field(0, ge=0, description="Worker processes that build batches.")
    ddp_timeout: int = Field(
        1800, ge=1, description="Seconds without progress after which a hung run ends and names the missing rank."
    )
    max_nonfinite_steps: int = Field(
        0,
        ge=0,
        description="Skip at most this many steps with a NaN or infinite loss or gradient; one more stops.",
    )

    # --- Logging, evaluation, saving -----------------------------------------------------------------------------
    output_dir: str = Field("outputs/run", description="Where everything of this run is written.")
    run_name: str | None = Field(None, description="Name shown by loggers. Default the output directory's name.")
    report_to: list[str] = Field(default_factory=list, description="tensorboard, wandb, mlflow, trackio, ...")
    logging_steps: int = Field(10, ge=1, description="Optimizer steps between log lines.")
    eval_strategy: Literal["no", "steps", "epoch"] = Field("no", description="When to evaluate while training.")
    eval_steps: int | None = Field(None, ge=1, description="Optimizer steps between evaluations.")
    eval_on_start: bool = Field(False, description="Evaluate before the first step too.")
    save_strategy: Literal["no", "steps", "epoch"] = Field("no", description="When to write checkpoint-N folders.")
    save_steps: int = Field(500, ge=1, description="Optimizer steps between checkpoints.")
    save_total_limit: int | None = Field(
        None, ge=1, description="Keep the newest checkpoints, this many, and the best. Default: all."
    )
    metric_for_best_model: str | None = Field(
        None, description="Metric of the evaluations while training whose best checkpoint is kept too: accuracy, loss."
    )
    save_only_model: bool = Field(
        False, description="Periodic checkpoints without optimizer state: smaller, can't be resumed."
    )
    max_failed_saves: int = Field(
        3, ge=1, description="A run goes on when a checkpoint can't be written, until this many in a row have failed."
    )
    resume_from_checkpoint: str | None = Field(
        None,
        description="A checkpoint-N folder; last: the newest whole one of output_dir; auto: the same, or a fresh start "
        "when there is none.",
    )
    allow_changed: list[str] = Field(
        default_factory=list, description="Facts in which a resumed run may differ from its checkpoint, by name."
    )
    stop_margin_seconds: float | None = Field(
        None,
        ge=0,
        description="Stop with a checkpoint when the job's time left is less. Default: from the save and step times "
        "measured, at least 60.",
    )
    disable_tqdm: bool = Field(False, description="No progress bar.")
    sample_scores: int = Field(4, ge=0, description="Groups of the evaluation set whose scores are printed at the end.")

    # --- Planning --------------------------------------------------------------------------------------------------
    hardware: str | None = Field(
        None, description="YAML file of `rm-scale bench hardware`: predictions are made with its first device."
    )

    # --- Running -------------------------------------------------------------------------------------------------
    force: list[str] = Field(
        default_factory=list, description="Rules to override by name: " + ", ".join(FORCEABLE_RULES)
    )
    dry_run: bool = Field(False, description="Print the resolved RunConfig and Plan and stop.")
    debug: bool = Field(False, description="Full tracebacks and log lines from every rank.")
    local_rank: int | None = Field(None, description="Set by launchers; the environment's LOCAL_RANK counts.")

    @property
    def method(self) -> Literal["full", "lora", "qlora"]:
        """How weights are trained."""
        if not self.use_peft:
            return "full"
        return "qlora" if self.load_in_4bit else "lora"


# Fields that carry no meaning for the result: a resumed run may differ in them, and they are not written as "asked".
LAUNCH_FIELDS = frozenset({"local_rank", "debug", "dry_run"})

# What a checkpoint remembers of its run, and a resumed run is held to (see rm_scale.training.run_facts). Some are
# computed: the model's and the data's fingerprints, values filled in by tier, the number of steps.
RESUME_FACTS = (
    "model",
    "data",
    "method",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "loss_type",
    "label_smoothing_factor",
    "center_rewards_coefficient",
    "tie_policy",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "compute_dtype",
    "disable_dropout",
    "shuffle_train",
    "seed",
    "data_seed",
    "global_batch_size",
    "total_steps",
)

# Settings that TRL or transformers know and we refuse on purpose, with the reason.
REFUSED_FIELDS = {
    "load_in_8bit": "8-bit weights train wrongly under ZeRO-3 (bitsandbytes#1451). Fix: use load_in_4bit (QLoRA, NF4)",
    "lora_task_type": "a reward model always uses SEQ_CLS, or its head is lost. Fix: leave it out",
    "group_by_length": "TRL 1.16 raises on it for preference data. Fix: leave it out",
    "push_to_hub": "nothing is pushed from a training run. Fix: leave it out and upload the finished folder yourself",
    "hub_token": "tokens are read from the environment only. Fix: set HF_TOKEN",
    "auto_find_batch_size": "ZeRO-3 can't change its batch size in a run. Fix: set per_device_train_batch_size",
    "padding_side": "rows are padded on the right, where the last real token is found by its index. Fix: leave it out",
    "compute_metrics": "evaluation is exact and built in. Fix: leave it out",
}


@dataclass(frozen=True)
class ParsedConfig:
    """What came out of the command line and the YAML file.

    Attributes:
        config: the settings; where a field was wrong, its default stands in so that further checks can still run.
        problems: everything found wrong so far, one sentence each.
        given: names of the fields the user set, by file or flag.
        broken: names of fields whose value could not be used.
    """

    config: RunConfig
    problems: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()
    source: str | None = field(default=None)

    def raise_problems(self) -> None:
        """Raise `ConfigError` with all problems, if there are any."""
        if self.problems:
            raise ConfigError(self.problems)


def parse_config(argv: Sequence[str]) -> ParsedConfig:
    """Read `--config FILE.yaml` and `--field value` flags; flags win over the file.

    Never raises for wrong settings: all problems are collected in the result, so that they can be shown at once.
    """
    flags, problems = _read_flags(argv)
    source = flags.pop("config", None)
    values: dict[str, Any] = {}
    if source is not None and not isinstance(source, str):
        problems.append(f"config={source}: must be one YAML file. Fix: --config FILE.yaml.")
    if isinstance(source, str):
        values, file_problems = _read_yaml(Path(source))
        problems += file_problems
    values.update(flags)
    return _validate(values, problems, source if isinstance(source, str) else None)


def config_from_dict(values: dict[str, Any]) -> ParsedConfig:
    """Check settings given from Python, with the same rules as the command line."""
    return _validate(dict(values), [], None)


def unknown_key_problem(name: str, known: Iterable[str], where: str = "") -> str:
    """The sentence for a key nobody knows, naming the nearest valid one."""
    if name in REFUSED_FIELDS:
        return f"{name}{where}: {REFUSED_FIELDS[name]}."
    nearest = _nearest(name, known)
    hint = f"did you mean {nearest}?" if nearest else "run with --help for the list of settings."
    return f"{name}{where}: no such setting. Fix: {hint}"


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`; one that starts with the same word (lora_, dataset_) is preferred."""
    first = name.split("_")[0]

    def likeness(candidate: str) -> float:
        same_family = 0.25 if candidate.split("_")[0] == first else 0.0
        return difflib.SequenceMatcher(None, name, candidate).ratio() + same_family

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.7 else None


def _read_flags(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Turn `--a 1 --b=2 --c x y --flag` into a dictionary of strings and lists of strings.

    Of a flag given twice the last counts, as everywhere: launch scripts append the user's words to their own.
    """
    flags: dict[str, Any] = {}
    problems: list[str] = []
    current: str | None = None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            current = name.replace("-", "_")
            flags[current] = [value] if equals else []
        elif current is None:
            problems.append(f"{word}: expected a --flag before it. Fix: write settings as --name value.")
        else:
            flags[current].append(word)
    return {name: _flag_value(name, words) for name, words in flags.items()}, problems


def _flag_value(name: str, words: list[str]) -> Any:
    if not words:
        return True  # a bare --flag
    if name in RunConfig.model_fields and _is_list_field(name):
        return [part for word in words for part in word.split(",") if part]
    return words[0] if len(words) == 1 else words


def _is_list_field(name: str) -> bool:
    annotation = RunConfig.model_fields[name].annotation
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return any(typing.get_origin(option) is list for option in options)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        return {}, [f"config={path}: can't be read ({error.strerror}). Fix: give the path of a YAML file."]
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        return {}, [f"config={path}: not valid YAML ({' '.join(str(error).split())}). Fix: correct the file."]
    if values is None:
        return {}, []
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        return {}, [f"config={path}: must be a mapping of setting names to values. Fix: write 'name: value' lines."]
    return values, []


class _UniqueKeyLoader(yaml.SafeLoader):
    """`yaml.safe_load` that refuses a key written twice, where the last one would silently win."""


def _construct_unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]} is written twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_unique_mapping)


def _validate(values: dict[str, Any], problems: list[str], source: str | None) -> ParsedConfig:
    known = RunConfig.model_fields
    problems = list(problems)
    where = f" (in {source})" if source else ""
    for name in [name for name in values if name not in known]:
        problems.append(unknown_key_problem(name, known, where))
        del values[name]
    values = {name: _normalise(name, value) for name, value in values.items()}
    broken: set[str] = set()
    try:
        config = RunConfig(**values)
    except ValidationError as error:
        for item in error.errors():
            name = str(item["loc"][0])
            if name not in broken:
                problems.append(_field_problem(name, item, values))
            broken.add(name)
        good = {name: value for name, value in values.items() if name not in broken}
        good.setdefault("model_name_or_path", "")
        config = RunConfig(**good)
    problems += conflicts(config, broken)
    return ParsedConfig(config, tuple(problems), frozenset(values), frozenset(broken), source)


def _normalise(name: str, value: Any) -> Any:
    """Accept `none` from a flag, and one string where a list is meant."""
    annotation = RunConfig.model_fields[name].annotation
    optional = _is_union(annotation) and type(None) in typing.get_args(annotation)
    if optional and isinstance(value, str) and value.lower() in {"none", "null"}:
        return None
    if _is_list_field(name):
        if isinstance(value, list) and [str(part).lower() for part in value] in (["none"], ["null"]):
            return None if optional else []
        if isinstance(value, str):
            return [] if value.lower() == "none" else [value]
    return value


def _field_problem(name: str, item: Any, values: dict[str, Any]) -> str:
    if item["type"] == "missing":
        return f"{name}: is required. Fix: add '{name}: ...' to the YAML file or --{name} ... to the command."
    rule = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{name}={values.get(name)!r}: must be {rule}. Fix: {RunConfig.model_fields[name].description}"


def conflicts(config: RunConfig, broken: Iterable[str] = ()) -> list[str]:
    """Combinations of settings that can't work together, found without looking at any file or device.

    Args:
        broken: fields already reported; rules that read them are skipped.
    """
    skip = set(broken)
    found: list[str] = []

    def rule(fields: str, bad: bool, text: str) -> None:
        if bad and not skip & set(fields.split()):
            found.append(text)

    c = config
    rule(
        "load_in_4bit use_peft",
        c.load_in_4bit and not c.use_peft,
        "load_in_4bit=True with use_peft=False: 4-bit weights can't be trained in full. Fix: set use_peft: "
        "true (QLoRA).",
    )
    rule(
        "merge_adapter use_peft",
        c.merge_adapter and not c.use_peft,
        "merge_adapter=True with use_peft=False: there is no adapter to merge. Fix: leave merge_adapter out.",
    )
    rule(
        "fp16 force",
        c.fp16 and "fp16" not in c.force,
        "fp16=True: refused, since rewards overflow at 65,504 and loss scaling skips steps. "
        "Fix: use bf16: true, or add --force fp16.",
    )
    rule("fp16 bf16", c.fp16 and c.bf16, "fp16=True with bf16=True: choose one. Fix: set bf16: false with fp16.")
    rule(
        "dtype fp16",
        c.dtype == "float16" and not c.fp16,
        "dtype=float16 with fp16=False: weights in fp16 need fp16 training. Fix: use dtype: bfloat16.",
    )
    computes_fp32 = not c.bf16 and not c.fp16
    rule(
        "load_in_4bit bf16 dtype force",
        c.load_in_4bit and (computes_fp32 or c.dtype == "float32") and "qlora_fp32" not in c.force,
        f"load_in_4bit=True in full precision (bf16={c.bf16}, dtype={c.dtype}): QLoRA computes in bfloat16; float32 "
        "saves no activation memory. Fix: set bf16: true and dtype: auto, or add --force qlora_fp32 (for tests).",
    )
    rule(
        "dtype bf16",
        c.dtype == "bfloat16" and not c.bf16 and not c.fp16,
        "dtype=bfloat16 with bf16=False: weights and compute type disagree. Fix: set bf16: true or dtype: float32.",
    )
    sources = [name for name in ("dataset_path", "dataset_name") if getattr(c, name)]
    rule(
        "dataset_path dataset_name",
        len(sources) != 1,
        f"dataset_path and dataset_name: exactly one must be given, got {len(sources)}. "
        "Fix: give --dataset_path FILE for local files or --dataset_name NAME for the hub.",
    )
    evals = [n for n in ("eval_dataset_path", "eval_split_size", "dataset_test_split") if getattr(c, n)]
    rule(
        "eval_dataset_path eval_split_size dataset_test_split",
        len(evals) > 1,
        f"{' and '.join(evals)}: only one can say what to evaluate on. Fix: keep one of them.",
    )
    rule(
        "dataset_test_split dataset_name",
        bool(c.dataset_test_split) and not c.dataset_name,
        f"dataset_test_split={c.dataset_test_split}: names a hub split, but dataset_name is not set. "
        "Fix: use eval_dataset_path or eval_split_size with local files.",
    )
    rule(
        "eval_split_size",
        c.eval_split_size is not None and c.eval_split_size >= 1 and c.eval_split_size != int(c.eval_split_size),
        f"eval_split_size={c.eval_split_size}: must be a share below 1 or a whole number of groups. Fix: "
        "e.g. 300 or 0.1.",
    )
    rule(
        "eval_strategy eval_dataset_path eval_split_size dataset_test_split",
        c.eval_strategy != "no" and not evals,
        f"eval_strategy={c.eval_strategy}: there is nothing to evaluate on. "
        "Fix: give eval_dataset_path, eval_split_size or dataset_test_split.",
    )
    rule(
        "eval_strategy eval_steps",
        c.eval_strategy == "steps" and c.eval_steps is None,
        "eval_strategy=steps: eval_steps is missing. Fix: add eval_steps: 100, say.",
    )
    rule(
        "gradient_accumulation_steps global_batch_size",
        c.gradient_accumulation_steps is not None and c.global_batch_size is not None,
        f"gradient_accumulation_steps={c.gradient_accumulation_steps} with global_batch_size={c.global_batch_size}: "
        "the second sets the first. Fix: keep one of them.",
    )
    rule(
        "torch_compile load_in_4bit",
        c.torch_compile and c.load_in_4bit,
        "torch_compile=True with load_in_4bit=True: 4-bit layers break the graph at every product. Fix: leave "
        "torch_compile out.",
    )
    rule(
        "packing max_tokens_per_device",
        c.packing == "none" and c.max_tokens_per_device is not None,
        f"max_tokens_per_device={c.max_tokens_per_device} with packing=none: padded rows are sized by "
        "per_device_train_batch_size. Fix: leave one of them out.",
    )
    rule(
        "packing packed_attention",
        c.packing == "none" and c.packed_attention != "auto",
        f"packed_attention={c.packed_attention} with packing=none: it is for packed rows. Fix: leave it out.",
    )
    rule(
        "packing attn_implementation",
        c.packing in {"padding_free", "prefix_shared"} and c.attn_implementation is not None,
        f"attn_implementation={c.attn_implementation} with packing={c.packing}: packed rows have attention of their "
        "own. Fix: use packed_attention, or packing: none.",
    )
    rule(
        "loss_type label_smoothing_factor",
        c.loss_type == "plackett_luce" and c.label_smoothing_factor > 0,
        f"label_smoothing_factor={c.label_smoothing_factor} with loss_type=plackett_luce: smoothing is defined on "
        "pairs. Fix: use loss_type: bradley_terry or label_smoothing_factor: 0.",
    )
    rule(
        "max_steps",
        c.max_steps == 0 or c.max_steps < -1,
        f"max_steps={c.max_steps}: must be -1 (train for num_train_epochs) or at least 1. Fix: leave it "
        "out, or e.g. 100.",
    )
    rule(
        "metric_for_best_model eval_strategy",
        c.metric_for_best_model is not None and c.eval_strategy == "no",
        f"metric_for_best_model={c.metric_for_best_model} with eval_strategy=no: nothing is measured while training. "
        "Fix: set eval_strategy: steps and eval_steps.",
    )
    for name in c.allow_changed:
        rule("allow_changed", name not in RESUME_FACTS, unknown_key_problem(name, RESUME_FACTS, " (in allow_changed)"))
    for name in c.force:
        rule("force", name not in FORCEABLE_RULES, unknown_key_problem(name, FORCEABLE_RULES, " (in force)"))
    return found


def help_text() -> str:
    """All settings with type, default and meaning, as `--help` shows them."""
    lines = ["usage: deepspeed rm_scale/train.py --config FILE.yaml [--setting value ...]", "", "settings:"]
    for name, info in RunConfig.model_fields.items():
        default = "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)!r}"
        lines.append(f"  --{name:<32} {info.description} [{default}]")
    return "\n".join(lines)
