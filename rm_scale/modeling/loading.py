"""Load a causal LM or an existing reward model for training, or a saved reward model for scoring."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rm_scale.batching.packed.backend_choice import choose_backend, has_sinks, head_size
from rm_scale.config import RunConfig
from rm_scale.distributed import giving_back_freed_memory
from rm_scale.errors import ModelError
from rm_scale.files import write_whole
from rm_scale.logs import get_logger, without_load_report
from rm_scale.modeling.adapter_base import adapter_base, require_width
from rm_scale.modeling.adapter_tensors import put_adapter_on
from rm_scale.modeling.adapters import add_adapters
from rm_scale.modeling.head import HEAD_NAMES, active_head, install_scalar_head
from rm_scale.modeling.head_layouts import projects_of
from rm_scale.modeling.language_model import forget_other_names, language_model_in, names_of_backbone
from rm_scale.modeling.out_of_memory import is_out_of_memory
from rm_scale.modeling.packed_model import enable_packed_rows
from rm_scale.modeling.quantization import (
    copy_from_mapped_files,
    keep_4bit_layout_on_cpu,
    quantization_config,
    report_4bit_size,
    saved_quantization_config,
)
from rm_scale.modeling.stored_head import StoredHead, find_stored_head, head_to_start_from, refuse_model_and_adapter
from rm_scale.modeling.unexpected_tensors import refuse_unexpected
from rm_scale.modeling.weight_files import checkpoint_tensors, file_of, open_weights
from rm_scale.modeling.zero_init import without_zero_init
from rm_scale.planning.classifiers import no_classifier
from rm_scale.planning.plan import Plan
from rm_scale.planning.shape import check_sizes, refuse_endless_files
from rm_scale.texts import one_line

logger = get_logger(__name__)

NO_CLASS = "Unrecognized configuration class"
"""How transformers says that its auto-class has none for a config."""
_RAW_SCORES = "torch.nn.modules.linear.Identity"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for the trainer.

    Attributes:
        model: the sequence-classification model, with adapters when asked.
        head_name: attribute name of the scalar head.
        head_was_found: the weights came with a head, which was kept; otherwise a new one was made.
        saved_head: that head in fp32, `(1, hidden_size)`, since loading rounds it to the backbone's type.
        record: what loading took, as the run's records name it.
    """

    model: PreTrainedModel | PeftModel
    head_name: str
    head_was_found: bool
    saved_head: torch.Tensor | None = None
    record: dict[str, Any] = field(default_factory=dict)


@giving_back_freed_memory()
def load_for_training(config: RunConfig, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """Load the backbone, find or make its scalar head, and add adapters.

    The training arguments must exist (they tell transformers about ZeRO-3, so that weights are sharded while loading)
    and the seed must be set (a new head is random).

    Raises:
        ModelError: the weights can't be loaded, lack layers, or hold a head that is not scalar.
    """
    dtype: torch.dtype = getattr(torch, plan.dtype)
    if config.trust_remote_code:
        logger.warning(
            f"trust_remote_code is on: Python code that comes with {config.model_name_or_path} "
            f"(revision {config.model_revision}) may run here"
        )
    stored = head_to_start_from(config.model_name_or_path, config.model_revision, config.trust_remote_code)
    extra: dict[str, Any] = {}
    if config.load_in_4bit:
        if plan.device == "cpu":
            keep_4bit_layout_on_cpu()
        extra["quantization_config"] = quantization_config(config, getattr(torch, plan.compute_dtype))
    model = _load_sequence_classifier(
        config.model_name_or_path,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        dtype=dtype,
        stored=stored,
        **extra,
    )
    _match_vocabulary(model, tokenizer)
    describe_as_reward_model(model, tokenizer)
    head_name = install_scalar_head(model)
    # In its own precision: loading has rounded it, or has not known it by its name.
    saved_head = None if stored is None else stored.weight()
    if saved_head is not None:
        _put_head(model, saved_head, config.model_name_or_path)
    if config.torch_compile:
        _compile_layers(model)
    if plan.packing != "none":
        _enable_packing(model, plan)
    if config.load_in_4bit:
        report_4bit_size(model)
    if config.use_peft:
        model = add_adapters(model, config, keep_dtype=plan.zero_stage == 3)
    if plan.deepspeed_config is None:
        _hold_trainable_in_fp32(model)
        if saved_head is not None:
            active_head(model).weight.data = saved_head.clone()
    _report_head(head_name, stored)
    return LoadedModel(model, head_name, stored is not None, saved_head)


def _report_head(head_name: str, stored: StoredHead | None) -> None:
    """Say where the head comes from, and what of it is left behind."""
    if stored is None:
        logger.info(f"reward head {head_name}: new, since the checkpoint has none")
        return
    projects = projects_of(stored.key)
    whose = "" if projects is None or stored.is_transformers_own() else f", as {projects} name it"
    logger.info(f"reward head {head_name}: loaded from the checkpoint ({stored.describe()}{whose})")
    if stored.offset() != 0.0:
        logger.warning(
            f"reward head {head_name}: its constant ({stored.bias_key}={stored.offset():.6g}) is left out. It is the "
            "same for every text, so differences of rewards stay as they were; rewards themselves move by it"
        )


def _put_head(model: PreTrainedModel, weight: torch.Tensor, name: str) -> None:
    """Write a stored head into the model's, rounded to its type; under ZeRO-3 into its shards (a collective).

    Raises:
        ModelError: it was made for hidden states of another size.
    """
    head = active_head(model)
    if weight.shape != (1, head.in_features):
        raise ModelError(
            f"{name}: its reward head is {tuple(weight.shape)}, the model's hidden states are {head.in_features} wide. "
            "Fix: give a head that belongs to this model."
        )
    if not hasattr(head.weight, "ds_id"):
        head.weight.data.copy_(weight)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([head.weight], modifier_rank=0):
        head.weight.data.copy_(weight)


def _compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer in place; they are alike, so one compilation serves all of them."""
    for layer in getattr(model, model.base_model_prefix).layers:
        layer.compile(dynamic=True)


def _enable_packing(model: PreTrainedModel, plan: Plan) -> None:
    """Let the model take packed rows, with the backend asked for or the one that fits device and type."""
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    backend = choose_backend(
        plan.packed_attention,
        plan.device,
        plan.compute_dtype,
        softcap is not None,
        head_size(model.config),
        has_sinks(model),
    )
    enable_packed_rows(model, backend)
    logger.info(f"packed rows: {plan.packing}, attention {backend} ({plan.device}, {plan.compute_dtype})")


@giving_back_freed_memory()
def load_reward_model(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantized: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load what a run saved (a model, or an adapter with its base) for scoring, head in fp32.

    Args:
        folder: a run's output directory or checkpoint.
        dtype: type of the backbone; default what it was saved in.
        device: where to put it.
        quantized: load the backbone of a QLoRA adapter in 4 bits, as it was trained.
        trust_remote_code: run Python code that comes with the model. What the folder itself says is not enough.

    Raises:
        ModelError: the folder does not hold a reward model, or needs code that was not trusted.
    """
    folder = Path(folder)
    refuse_model_and_adapter(folder)
    with without_zero_init():
        if (folder / "adapter_config.json").is_file():
            model = _load_adapter(folder, dtype, device, quantized, trust_remote_code)
        elif (folder / "config.json").is_file():
            model = _load_full_model(folder, dtype, trust_remote_code)
        else:
            raise ModelError(
                f"{folder}: holds no config.json or adapter_config.json. Fix: give a run's output directory."
            )
    if not getattr(model, "is_loaded_in_4bit", False):
        model = model.to(device)
    _require_one_device(model, torch.device(device), folder)
    return model.eval()


def _require_one_device(model: torch.nn.Module, device: torch.device, folder: Path) -> None:
    """See that all of a model is where it was asked to be: 4-bit models don't move, so what is added to them must.

    Raises:
        ModelError: a parameter or buffer lies elsewhere.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    # "cuda" means the current one of several; processors have no numbers, though DeepSpeed calls theirs cpu:0.
    index = None if device.type == "cpu" else device.index
    elsewhere = [
        (name, tensor.device)
        for name, tensor in tensors
        if tensor.device.type != device.type or index not in {None, tensor.device.index}
    ]
    if elsewhere:
        name, place = elsewhere[0]
        raise ModelError(
            f"{folder}: asked for on {device}, but {len(elsewhere)} of its tensors are elsewhere, first {name} on "
            f"{place}. Fix: report this; until then score with --device cpu."
        )


def _load_full_model(folder: Path, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    stored = find_stored_head(str(folder))
    if stored is None:
        raise ModelError(
            f"{folder}: its weights hold no reward head; it would be random. "
            "Fix: give the folder that holds the trained head."
        )
    model = _load_sequence_classifier(
        str(folder), dtype=dtype or _saved_type(folder), stored=stored, trust_remote_code=trust_remote_code
    )
    install_scalar_head(model)
    _put_head(model, stored.weight(), str(folder))
    _set_exact_head(model, stored.weight())
    active_head(model).offset = stored.offset()
    return model


def _saved_type(folder: Path) -> torch.dtype | str:
    """Return the type of the backbone's weights where a run saved them: `config.json` names the one to load them in."""
    if not (folder / "scoring_contract.json").is_file():
        return "auto"
    sizes: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        with open_weights(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                tensor = tensors.get_slice(name)
                sizes[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return _TYPES.get(sizes.most_common(1)[0][0] if sizes else "", "auto")


_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _load_adapter(
    folder: Path, dtype: torch.dtype | None, device: str | torch.device, quantized: bool, trust_remote_code: bool
) -> PeftModel:
    base = adapter_base(folder)
    if base.needs_code and not trust_remote_code:
        raise ModelError(
            f"{folder}: its base model {base.name!r} needs Python code of its own, which is not run unasked. "
            "Fix: pass trust_remote_code=True if you trust it."
        )
    refuse_endless_files(base.name)
    extra: dict[str, Any] = {}
    if quantized and base.quantization:
        if torch.device(device).type == "cpu":
            keep_4bit_layout_on_cpu()
        extra["quantization_config"] = saved_quantization_config(base.quantization)
        extra["device_map"] = {"": device}
    model = _load_sequence_classifier(
        base.name,
        revision=base.revision,
        trust_remote_code=trust_remote_code,
        dtype=dtype or base.dtype or "auto",
        stored=find_stored_head(base.name, base.revision),  # the adapter's stands for it, if there is one
        **extra,
    )
    if model.get_input_embeddings().num_embeddings < base.vocab_size:
        model.resize_token_embeddings(base.vocab_size, mean_resizing=False)
    if base.pad_token_id is not None:
        model.config.get_text_config().pad_token_id = base.pad_token_id
    install_scalar_head(model)
    require_width(folder, base.head, active_head(model).in_features, base.name)
    adapted = put_adapter_on(model, folder)
    if dtype is not None and not extra:
        adapted = adapted.to(dtype)
    _set_exact_head(adapted, base.head)
    active_head(adapted).offset = base.offset
    return adapted


def _load_sequence_classifier(
    name: str, dtype: torch.dtype | str, stored: StoredHead | None, **kwargs: Any
) -> PreTrainedModel:
    """Load the backbone with a head that is new, or `stored` where transformers knows it by its name.

    Of a model that also sees or hears its language model alone is loaded.

    Raises:
        ModelError: it can't be loaded, its sizes are impossible, layers are missing, or it holds a head that is not
            `stored` or other tensors that may take part in its reward.
    """
    attention = kwargs.pop("attn_implementation", None)
    if attention is not None:
        kwargs["attn_implementation"] = attention
    revision = kwargs.get("revision", "main")
    _check_sizes(name, revision)
    try:
        inside = language_model_in(name, revision, kwargs.get("trust_remote_code", False))
        kwargs |= {"num_labels": 1} if inside is None else inside.load_settings
        renamed = {} if inside is not None else _renamed_backbone(name, revision, kwargs)
        if renamed:
            kwargs["key_mapping"] = renamed
        if stored is not None and stored.row is not None and stored.is_transformers_own():
            kwargs["ignore_mismatched_sizes"] = True  # of its several outputs one is put in later
        with without_load_report():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise  # no fault of the model's; who asked for it may know a place with more
        if NO_CLASS in str(error):
            raise ModelError(no_classifier(f"model_name_or_path={name!r}", _model_type(name, kwargs))) from error
        raise ModelError(
            f"model_name_or_path={name!r}: can't be loaded as a reward model ({one_line(error, 240)}). "
            "Fix: use a decoder-only model in safetensors format that AutoModelForSequenceClassification knows."
        ) from error
    except (KeyError, TypeError, AssertionError, ZeroDivisionError, StrictDataclassError) as error:
        raise ModelError(
            f"model_name_or_path={name!r}: transformers can't build it from its config.json "
            f"({type(error).__name__}: {one_line(error, 200)}). Fix: correct the value, or download the model again."
        ) from error
    unexpected = set(info["unexpected_keys"])
    if inside is not None or renamed:
        forget_other_names(model)
    if inside is not None:
        _tell_once(f"{name}: {inside.describe(checkpoint_tensors(name, revision))}")
        unexpected = {key for key in unexpected if not inside.leaves_out(key)}
    refuse_unexpected(name, revision, model, unexpected, set() if stored is None else stored.used_keys())
    mismatched = {key for key, *_ in info["mismatched_keys"]} - ({stored.key} if stored is not None else set())
    if mismatched:
        raise ModelError(
            f"model_name_or_path={name!r}: {sorted(mismatched)[0]} has other sizes than config.json says. Fix: "
            "download the model again, or check that config.json belongs to these weights."
        )
    missing = [key for key in info["missing_keys"] if key.split(".")[0] not in HEAD_NAMES]
    if missing:
        raise ModelError(
            f"model_name_or_path={name!r}: its files lack {len(missing)} weights, first "
            f"{sorted(missing)[0]}; they would "
            "be random. Fix: download the model again, or check that config.json belongs to these weights."
        )
    if "quantization_config" in kwargs:
        copy_from_mapped_files(model)
    return model


@functools.cache
def _tell_once(message: str) -> None:
    """Say something about a model that is loaded several times in a run."""
    logger.info(message)


def _renamed_backbone(name: str, revision: str, settings: dict[str, Any]) -> dict[str, str]:
    tensors = checkpoint_tensors(name, revision)
    return names_of_backbone(name, tensors, revision, settings.get("trust_remote_code", False))


def _model_type(name: str, settings: dict[str, Any]) -> str:
    known = {key: settings[key] for key in ("revision", "trust_remote_code") if key in settings}
    return str(AutoConfig.from_pretrained(name, **known).model_type)


def _check_sizes(name: str, revision: str) -> None:
    """Look at the sizes in a model's config.json before anything is built by them: an adapter's base has any name.

    Raises:
        ModelError: one is impossible.
    """
    try:
        path = file_of(name, "config.json", revision)
        config = None if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong with it
    if isinstance(config, dict):
        check_sizes(config, f"model_name_or_path={name!r}: config.json")


def _match_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow the embedding when a padding token had to be added."""
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        # Mean-resizing reads whole embeddings, which ZeRO-3 has sharded; the pad row is never used anyway.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def describe_as_reward_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write into the config what others need to score with it: pad and EOS ids, one label, raw scores.

    `problem_type="regression"` makes `pipeline("text-classification")` and vLLM give the raw score, not its sigmoid;
    `CrossEncoder` goes by the name of an activation.
    """
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.use_cache = False
    model.config.problem_type = "regression"
    model.config.num_labels = 1
    # sentence-transformers' CrossEncoder puts one label through a sigmoid; vLLM reads this too.
    model.config.sentence_transformers = {"activation_fn": _RAW_SCORES}
    model.config.sbert_ce_default_activation_function = _RAW_SCORES  # as CrossEncoder called it before 4.0
    model.config.id2label = {0: "reward"}
    model.config.label2id = {"reward": 0}


def name_exact_type(folder: Path) -> None:
    """Let a saved model's `config.json` name float32, whatever the backbone is stored in; an adapter has none.

    transformers loads all weights in the type that stands there. Half precision would round the head, which is stored
    in float32, and the score itself: by 0.03 for a score near 8.
    """
    path = folder / "config.json"
    if path.is_file():
        config = {**json.loads(path.read_text(encoding="utf-8")), "dtype": "float32"}
        write_whole(path, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _hold_trainable_in_fp32(model: torch.nn.Module) -> None:
    """Make trained weights fp32, as without DeepSpeed there is no fp32 master copy."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def _set_exact_head(model: torch.nn.Module, weight: torch.Tensor) -> None:
    """Give the head its fp32 value, which loading may have rounded to the backbone's type."""
    head = active_head(model)
    head.weight.data = weight.to(head.weight.device)
    head.residual = torch.zeros_like(head.weight, dtype=torch.float32)
