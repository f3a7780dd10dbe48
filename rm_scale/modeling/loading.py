"""Backbone and head: load a causal LM or an existing reward model for training, or a saved one for scoring."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils import cached_file

from rm_scale.config import RunConfig
from rm_scale.distributed import giving_back_freed_memory
from rm_scale.errors import ModelError
from rm_scale.logs import get_logger
from rm_scale.modeling.adapters import add_adapters, keep_4bit_layout_on_cpu, quantization_config
from rm_scale.modeling.head import HEAD_NAMES, active_head, install_scalar_head
from rm_scale.modeling.packed import enable_packed_rows
from rm_scale.packing.attention import choose_backend
from rm_scale.planning.plan import Plan

logger = get_logger(__name__)


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
    head_was_found = checkpoint_has_head(config.model_name_or_path, config.model_revision, config.trust_remote_code)
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
        head_expected=head_was_found,
        **extra,
    )
    _match_vocabulary(model, tokenizer)
    describe_as_reward_model(model, tokenizer)
    head_name = install_scalar_head(model)
    if config.torch_compile:
        _compile_layers(model)
    if plan.packing != "none":
        _enable_packing(model, plan)
    if config.use_peft:
        model = add_adapters(model, config, keep_dtype=plan.zero_stage == 3)
    saved_head = _read_saved_head(config) if head_was_found else None
    if plan.deepspeed_config is None:
        _hold_trainable_in_fp32(model)
        if saved_head is not None:
            active_head(model).weight.data = saved_head.clone()
    source = "kept from the checkpoint" if head_was_found else "new, since the checkpoint has none"
    logger.info(f"reward head {head_name}: {source}")
    return LoadedModel(model, head_name, head_was_found, saved_head)


def _compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer in place; they are alike, so one compilation serves all of them."""
    for layer in getattr(model, model.base_model_prefix).layers:
        layer.compile(dynamic=True)


def _enable_packing(model: PreTrainedModel, plan: Plan) -> None:
    """Let the model take packed rows, with the backend asked for or the one that fits device and type."""
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    backend = choose_backend(plan.packed_attention, plan.device, plan.compute_dtype, softcap is not None)
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
    with without_zero_init():
        if (folder / "adapter_config.json").is_file():
            model = _load_adapter(folder, dtype, device, quantized, trust_remote_code)
        elif (folder / "config.json").is_file():
            model = _load_sequence_classifier(
                str(folder), dtype=dtype or "auto", head_expected=True, trust_remote_code=trust_remote_code
            )
            install_scalar_head(model)
            _restore_head(model, _file_with_head(folder))
        else:
            raise ModelError(
                f"{folder}: holds no config.json or adapter_config.json. Fix: give a run's output directory."
            )
    if not getattr(model, "is_loaded_in_4bit", False):
        model = model.to(device)
    return model.eval()


def _load_adapter(
    folder: Path, dtype: torch.dtype | None, device: str | torch.device, quantized: bool, trust_remote_code: bool
) -> PeftModel:
    from transformers import BitsAndBytesConfig

    contract = json.loads((folder / "scoring_contract.json").read_text(encoding="utf-8"))
    base = contract["base_model"]
    if base["trust_remote_code"] and not trust_remote_code:
        raise ModelError(
            f"{folder}: its base model {base['name']!r} needs Python code of its own, which is not run unasked. "
            "Fix: pass trust_remote_code=True if you trust it."
        )
    extra: dict[str, Any] = {}
    if quantized and base.get("quantization"):
        if torch.device(device).type == "cpu":
            keep_4bit_layout_on_cpu()
        extra["quantization_config"] = BitsAndBytesConfig(**base["quantization"])
        extra["device_map"] = {"": device}
    model = _load_sequence_classifier(
        base["name"],
        revision=base["revision"],
        trust_remote_code=trust_remote_code,
        dtype=dtype or getattr(torch, contract["dtype"]),
        head_expected=False,
        **extra,
    )
    if model.get_input_embeddings().num_embeddings < contract["vocab_size"]:
        model.resize_token_embeddings(contract["vocab_size"], mean_resizing=False)
    model.config.get_text_config().pad_token_id = contract["pad_token_id"]
    install_scalar_head(model)
    adapted = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
    _restore_head(adapted, folder / "adapter_model.safetensors")
    if dtype is not None and not extra:
        adapted = adapted.to(dtype)
        _restore_head(adapted, folder / "adapter_model.safetensors")
    return adapted


def _load_sequence_classifier(
    name: str, dtype: torch.dtype | str, head_expected: bool, **kwargs: Any
) -> PreTrainedModel:
    attention = kwargs.pop("attn_implementation", None)
    if attention is not None:
        kwargs["attn_implementation"] = attention
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"model_name_or_path={name!r}: can't be loaded as a reward model ({_short(error)}). "
            "Fix: use a decoder-only model in safetensors format that AutoModelForSequenceClassification knows."
        ) from error
    other_heads = [key for key in info["unexpected_keys"] if _looks_like_a_head(key)]
    if other_heads:
        raise ModelError(
            f"model_name_or_path={name!r}: holds a head that can't be used here ({sorted(other_heads)[0]}); "
            "it would be "
            "replaced by a random one. Fix: convert it to a transformers sequence classifier with one output, or give "
            "the causal language model it came from."
        )
    missing = [key for key in info["missing_keys"] if key.split(".")[0] not in HEAD_NAMES or head_expected]
    if missing:
        raise ModelError(
            f"model_name_or_path={name!r}: its files lack {len(missing)} weights, first "
            f"{sorted(missing)[0]}; they would "
            "be random. Fix: download the model again, or check that config.json belongs to these weights."
        )
    if "quantization_config" in kwargs:
        _let_go_of_the_files(model)
    return model


def _let_go_of_the_files(model: PreTrainedModel) -> None:
    """Copy what was not quantised out of the mapped files.

    A few norms and embeddings that still point there keep all of the files mapped, and a process would seem to hold
    the unquantised model: 13 GB more for 7B. Parameters that ZeRO-3 shards are copies already.
    """
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter and parameter.device.type == "cpu" and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.clone()


def _looks_like_a_head(key: str) -> bool:
    """A reward or value head of another library; language-model heads are meant to be dropped."""
    first = key.split(".")[0]
    return first != "lm_head" and any(word in first for word in ("head", "score", "classifier", "reward", "summary"))


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:240] + ("..." if len(text) > 240 else "")


def checkpoint_has_head(name: str, revision: str = "main", trust_remote_code: bool = False) -> bool:
    """Does the checkpoint hold a scalar head?

    Raises:
        ModelError: its config says it is a sequence classifier, but it has not exactly one output or lacks the head.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model_name_or_path={name!r}: its config can't be used ({_short(error)}). Fix: use a model that this "
            "transformers knows; for a model with its own code, --trust_remote_code if you trust it."
        ) from error
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if not architecture.endswith("ForSequenceClassification"):
        return False
    if config.num_labels != 1:
        raise ModelError(
            f"model_name_or_path={name!r}: is a classifier with {config.num_labels} outputs, a reward model has 1. "
            "Fix: give a reward model or the causal language model it came from."
        )
    if not any(key.split(".")[0] in HEAD_NAMES for key in checkpoint_keys(name, revision)):
        raise ModelError(
            f"model_name_or_path={name!r}: config.json says {architecture}, but the weights hold no head "
            f"({' or '.join(HEAD_NAMES)}); it would be random. Fix: give the folder that holds the trained head."
        )
    return True


def checkpoint_keys(name: str, revision: str = "main") -> list[str]:
    """Names of all tensors in a safetensors checkpoint, sharded or not."""
    index = cached_file(
        name, "model.safetensors.index.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if index is not None:
        return list(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    single = cached_file(name, "model.safetensors", revision=revision, _raise_exceptions_for_missing_entries=False)
    if single is None:
        raise ModelError(
            f"model_name_or_path={name!r}: has no safetensors weights; other formats can run code when they are read. "
            "Fix: convert the model with save_pretrained(..., safe_serialization=True)."
        )
    with safe_open(single, framework="pt") as tensors:
        return list(tensors.keys())


def _match_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow the embedding when a padding token had to be added."""
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        # Mean-resizing reads whole embeddings, which ZeRO-3 has sharded; the pad row is never used anyway.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def describe_as_reward_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write into the config what others need to score with it: pad and EOS ids, one label, raw scores.

    `problem_type="regression"` makes `pipeline("text-classification")` and vLLM give the raw score, not its sigmoid.
    """
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.use_cache = False
    model.config.problem_type = "regression"
    model.config.num_labels = 1
    model.config.id2label = {0: "reward"}
    model.config.label2id = {"reward": 0}


def _hold_trainable_in_fp32(model: torch.nn.Module) -> None:
    """Without DeepSpeed there is no fp32 master copy, so whatever is trained must itself be fp32."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def _read_saved_head(config: RunConfig) -> torch.Tensor:
    """The head of an existing reward model as its file holds it, in fp32."""
    name, revision = config.model_name_or_path, config.model_revision
    file = "model.safetensors"
    index = cached_file(name, f"{file}.index.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        shards: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        file = next(shard for key, shard in shards.items() if key.split(".")[0] in HEAD_NAMES)
    with safe_open(cached_file(name, file, revision=revision), framework="pt") as tensors:
        key = next(key for key in list(tensors.keys()) if key.split(".")[0] in HEAD_NAMES)
        return tensors.get_tensor(key).float()


def _file_with_head(folder: Path) -> Path:
    """The safetensors file of a model folder, sharded or not, that holds the head."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return folder / "model.safetensors"
    shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return folder / next(file for name, file in shards.items() if name.split(".")[0] in HEAD_NAMES)


def _restore_head(model: torch.nn.Module, weights: Path) -> None:
    """Give the head back the fp32 value in the file, which loading may have rounded to the backbone's type."""
    head = active_head(model)
    with safe_open(str(weights), framework="pt") as tensors:
        names = [key for key in list(tensors.keys()) if key.removesuffix(".weight").split(".")[-1] in HEAD_NAMES]
        if len(names) == 1:
            head.weight.data = tensors.get_tensor(names[0]).float().to(head.weight.device)
            head.residual = torch.zeros_like(head.residual)


@contextlib.contextmanager
def without_zero_init() -> Iterator[None]:
    """Load whole weights on this rank alone even while a ZeRO-3 run is going on."""
    saved = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = saved
